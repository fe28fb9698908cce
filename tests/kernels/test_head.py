"""lm_head_of reads all that a transformers model does to its logits, or refuses."""

import importlib.util
import sys
import textwrap

import pytest
import torch

transformers = pytest.importorskip("transformers")

import opsd_kernels  # noqa: E402

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": {}, "Qwen3": {"tie_word_embeddings": True}, "Mistral": {}, "Phi3": {},
    "Gemma2": {"final_logit_softcapping": 3.0}, "Gemma3": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0},
}  # fmt: skip


def model_of(name: str, **changes):
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**SIZES, **MODELS.get(name, {}), **changes))
    return model.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_the_models_own(name):
    model = model_of(name)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    ids = torch.randint(3, 61, (2, 7))
    head = opsd_kernels.lm_head_of(model)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        got = opsd_kernels.token_logprobs(hidden, head.weight, ids, **head.options())
        expected = model(ids).logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(got, expected, atol=1e-6)
    assert head.weight is model.get_output_embeddings().weight


def test_the_cap_and_the_scale_are_read():
    assert opsd_kernels.lm_head_of(model_of("Gemma2")).softcap == 3.0
    assert opsd_kernels.lm_head_of(model_of("Cohere")).logit_scale == 0.25
    assert opsd_kernels.lm_head_of(model_of("Granite")).logit_scale == 0.25


def test_a_cap_of_none_is_none():
    model = model_of("Gemma2")
    model.config.final_logit_softcapping = None
    assert opsd_kernels.lm_head_of(model).softcap is None


def test_a_padded_head_is_noticed():
    model = model_of("Llama")
    model.resize_token_embeddings(64)
    model.config.vocab_size = 61
    assert opsd_kernels.lm_head_of(model).valid_vocab == 61


def test_adapters_leave_the_head_readable_but_not_on_it():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model_of("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert opsd_kernels.lm_head_of(adapted).weight.shape == (61, 16)
    on_head = peft.get_peft_model(model_of("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="plain torch"):
        opsd_kernels.lm_head_of(on_head)


ODD = {
    "a mean is taken off": "logits = self.lm_head(hidden)\nlogits = logits - logits.mean(-1, keepdim=True) * 0.5",
    "hidden states are scaled in the call": "logits = self.lm_head(hidden / 2)",
    "hidden states are scaled before": "hidden = hidden * 2\nlogits = self.lm_head(hidden)",
    "in place": "logits = self.lm_head(hidden)\nlogits /= 2",
    "in place by a method": "logits = self.lm_head(hidden)\nlogits.div_(2)",
    "where it is returned": "logits = self.lm_head(hidden)\nreturn logits / self.config.logits_scaling",
    "under another name": "logits = self.lm_head(hidden)\nscaled = logits * self.config.logits_scaling\nreturn scaled",
    "only under a flag": (
        "logits = self.lm_head(hidden)\nif self.config.use_scale:\n    logits = logits * self.config.logits_scaling"
    ),
    "cap before scale": (
        "logits = self.lm_head(hidden)\n"
        "logits = logits / self.config.final_logit_softcapping\nlogits = torch.tanh(logits)\n"
        "logits = logits * self.config.final_logit_softcapping\nlogits = logits * self.config.logits_scaling"
    ),
    "another name of the cap": (
        "logits = self.lm_head(hidden)\n"
        "logits = logits / self.config.final_logit_softcap\nlogits = torch.tanh(logits)\n"
        "logits = logits * self.config.final_logit_softcap"
    ),
    "half a cap": "logits = self.lm_head(hidden)\nlogits = torch.tanh(logits)",
    "no head": "logits = hidden",
}


@pytest.mark.parametrize("name", ODD)
def test_unknown_post_processing_is_refused(name, tmp_path):
    body = textwrap.indent("hidden = self.model(input_ids).last_hidden_state\n" + ODD[name], " " * 8)
    source = tmp_path / "odd.py"  # in a file, for its source to be found
    source.write_text(
        "import torch\nimport transformers\n\nclass Odd(transformers.LlamaForCausalLM):\n"
        f"    def forward(self, input_ids, **kwargs):\n{body}\n        return logits\n"
    )
    spec = importlib.util.spec_from_file_location(f"odd_{abs(hash(name))}", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    config = transformers.LlamaConfig(**SIZES)
    config.logits_scaling, config.final_logit_softcapping, config.use_scale, config.final_logit_softcap = (
        2.0,
        3.0,
        0,
        3.0,
    )
    with pytest.raises(ValueError, match="not understood"):
        opsd_kernels.lm_head_of(module.Odd(config))


def test_no_language_model_is_refused():
    with pytest.raises(TypeError, match="output embedding"):
        opsd_kernels.lm_head_of(torch.nn.Linear(3, 3))
