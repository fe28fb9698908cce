"""lm_head_of knows all that a transformers model does to its logits, or refuses."""

import ast
import importlib.util
import re
import sys
import textwrap
from pathlib import Path

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
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 12}, "Mamba": {}, "BioGpt": {},
    "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8},
    "HyperCLOVAX": {"logits_scaling": 0.125},
}  # fmt: skip


def model_of(name: str, **changes):
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**SIZES, **MODELS.get(name, {}), **changes))
    return model.double().eval()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_models_own(name):
    model = model_of(name)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    ids = torch.randint(3, 61, (2, 7))
    head = opsd_kernels.lm_head_of(model)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        logprobs, order, log_z = opsd_kernels.top_k_logprobs(hidden, head.weight, 61, **head.options())
        expected = model(ids).logits.double()
    got = torch.full_like(expected, torch.nan).scatter(-1, order, logprobs + log_z[..., None])
    assert torch.allclose(got, expected, atol=1e-5)
    assert head.weight is model.get_output_embeddings().weight


def test_the_cap_and_the_scale_are_read():
    assert opsd_kernels.lm_head_of(model_of("Gemma2")).softcap == 3.0
    assert opsd_kernels.lm_head_of(model_of("Cohere")).logit_scale == 0.25
    assert opsd_kernels.lm_head_of(model_of("Granite")).logit_scale == 0.25
    assert opsd_kernels.lm_head_of(model_of("FalconH1")).logit_scale == 0.5
    assert opsd_kernels.lm_head_of(model_of("HyperCLOVAX")).logit_scale == 0.125


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


def test_a_compiled_model_is_the_one_within():
    model = model_of("Cohere")
    read = opsd_kernels.lm_head_of(torch.compile(model))
    assert read.weight is model.lm_head.weight
    assert read.logit_scale == 0.25
    model.lm_head = torch.compile(model.lm_head)
    assert opsd_kernels.lm_head_of(model).weight is read.weight


def test_hooks_on_the_head_are_refused():
    model = model_of("Llama")

    def doubled(*seen):
        return seen[-1] * 2

    for register in (model.lm_head.register_forward_hook, model.lm_head.register_forward_pre_hook):
        handle = register(doubled)
        with pytest.raises(ValueError, match=r"output embedding must be .* without forward hooks, got .*doubled"):
            opsd_kernels.lm_head_of(model)
        handle.remove()
        opsd_kernels.lm_head_of(model)
    model.lm_head.forward = doubled
    with pytest.raises(ValueError, match=r"output embedding must be .* a forward of its own, .*doubled"):
        opsd_kernels.lm_head_of(model)


def test_a_forward_of_the_models_own_is_the_one_that_is_tried():
    model = model_of("Llama")
    opsd_kernels.lm_head_of(model)  # of its class, and kept
    model.forward = lambda ids: model.lm_head(model.model(ids).last_hidden_state) / 2
    with pytest.raises(ValueError, match=r"not understood .*LlamaForCausalLM.* are 0\.5 times these"):
        opsd_kernels.lm_head_of(model)
    model.forward = eval("lambda ids: model.lm_head(model.model(ids).last_hidden_state)", {"model": model})
    assert opsd_kernels.lm_head_of(model).logit_scale == 1  # without a source
    model.forward = eval("lambda ids: ids")
    with pytest.warns(UserWarning, match="could not be tried on tokens"):
        opsd_kernels.lm_head_of(model)


def test_accelerates_hooks_leave_the_head_readable():
    accelerate = pytest.importorskip("accelerate")
    hooks = accelerate.hooks

    class Doubled(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    model = accelerate.dispatch_model(model_of("Granite"), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model.lm_head)
    assert opsd_kernels.lm_head_of(model).logit_scale == 0.25
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu"), append=True)
    assert opsd_kernels.lm_head_of(model).weight is model.lm_head.weight
    hooks.add_hook_to_module(model.lm_head, Doubled(), append=True)
    with pytest.raises(ValueError, match=r"the hook .*Doubled"):
        opsd_kernels.lm_head_of(model)
    hooks.remove_hook_from_module(model.lm_head)
    assert opsd_kernels.lm_head_of(model).weight is model.lm_head.weight
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu"))
    model.lm_head.forward = lambda x: x
    with pytest.raises(ValueError, match="a forward of its own"):
        opsd_kernels.lm_head_of(model)


def test_accelerates_mixed_precision_leaves_the_head_readable():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    model = model_of("Granite")
    try:
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    wrapped = model.forward
    assert opsd_kernels.lm_head_of(model).logit_scale == 0.25
    assert model.forward == wrapped
    model._original_forward = lambda ids: model.lm_head(model.model(ids).last_hidden_state) / 8
    with pytest.raises(ValueError, match="not understood"):
        opsd_kernels.lm_head_of(model)


# The config says scale 2 and cap 3, and has fields that no one knows: use_scale 0 and final_logit_softcap 4.
ODD = {
    "a mean is taken off": "logits = self.lm_head(hidden)\nlogits = logits - logits.mean(-1, keepdim=True) * 0.5",
    "hidden states are scaled in the call": "logits = self.lm_head(hidden / 5)",
    "hidden states are scaled before": "hidden = hidden * 5\nlogits = self.lm_head(hidden)",
    "scaled behind a conversion": "logits = self.lm_head(hidden).to(hidden.dtype) * float(self.config.use_scale)",
    "hidden states are scaled behind a slice": "logits = self.lm_head(hidden[:, :] * hidden[0])",
    "scaled by what may learn": "logits = self.lm_head(hidden) * self.config.logit_scale",
    "hidden states are scaled as they are sliced": (
        "hidden_states = outputs.last_hidden_state\n"
        "hidden_states = hidden_states[:, 0:] * hidden[0]\nlogits = self.lm_head(hidden_states)"
    ),
    "another layer": "logits = self.model.embed_tokens(hidden)",
    "in place": "logits = self.lm_head(hidden)\nlogits /= 5",
    "in place by a method": "logits = self.lm_head(hidden)\nlogits.div_(5)",
    "where it is returned": "logits = self.lm_head(hidden)\nreturn logits / 5",
    "a little": "logits = self.lm_head(hidden) * 1.001",
    "under another name": "logits = self.lm_head(hidden)\nscaled = logits * 5\nreturn scaled",
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
    "a cut": "logits = self.lm_head(hidden).clamp(-20, 20)",
    "no head": "logits = hidden",
}


PLAIN = {
    "nothing": "logits = self.lm_head(hidden)",
    "conversions": "logits = self.lm_head(hidden.to(self.lm_head.weight.dtype)).float().contiguous()",
    "a scale, then a cap": (
        "logits = self.lm_head(hidden[:, 0:]).to(torch.float32) * self.config.logits_scaling\n"
        "logits = logits / self.config.final_logit_softcapping\nlogits = torch.tanh(logits)\n"
        "logits = logits * self.config.final_logit_softcapping"
    ),
    "the same scale and cap, written otherwise": (
        "cap, apply = self.config.final_logit_softcapping, torch.nn.functional.linear\n"
        "return cap * apply(hidden * (self.config.logits_scaling / cap), self.lm_head.weight).tanh_()"
    ),
    "a scale by division": "scaled = self.lm_head(hidden)\nscaled /= self.config.logits_scaling\nreturn scaled",
    "only under a flag": (
        "logits = self.lm_head(hidden)\nif self.config.use_scale:\n    logits = logits * self.config.logits_scaling"
    ),
}
READ = {"a scale, then a cap": (2.0, 3.0), "the same scale and cap, written otherwise": (2.0, 3.0),
        "a scale by division": (0.5, None)}  # fmt: skip


def written(body: str, tmp_path):
    """A model whose forward does what `body` says."""
    body = textwrap.indent("outputs = self.model(input_ids)\nhidden = outputs.last_hidden_state\n" + body, " " * 8)
    source = tmp_path / "odd.py"  # in a file, for its source to be found
    source.write_text(
        "import torch\nimport transformers\n\nclass Odd(transformers.LlamaForCausalLM):\n"
        f"    def forward(self, input_ids, **kwargs):\n{body}\n        return logits\n"
    )
    spec = importlib.util.spec_from_file_location(f"odd_{abs(hash(body))}", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    config = transformers.LlamaConfig(**SIZES)
    config.logit_scale = torch.nn.Parameter(torch.tensor(0.3))
    config.logits_scaling, config.final_logit_softcapping, config.use_scale, config.final_logit_softcap = (
        2.0,
        3.0,
        0,
        4.0,
    )
    torch.manual_seed(0)
    return module.Odd(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ODD)
def test_unknown_post_processing_is_refused(name, dtype, tmp_path):
    if name == "a little" and dtype == torch.bfloat16:
        pytest.skip("is within its rounding")
    with pytest.raises(ValueError, match="not understood"):
        opsd_kernels.lm_head_of(written(ODD[name], tmp_path).to(dtype))


def test_a_refusal_has_the_numbers(tmp_path):
    model = written(ODD["where it is returned"], tmp_path)
    with pytest.raises(
        ValueError, match=r"scale 0\.5 and softcap 3\.0 as its config says, logit \d+ of token"
    ) as error:
        opsd_kernels.lm_head_of(model)
    found = re.search(r"logit (\d+) of token (\d+)\D* is (\S+) and the model's own (\S+);", str(error.value))
    assert found
    assert abs(float(found[3]) - float(found[4])) > 0.1
    model = written("return self.lm_head(hidden) * 0.7", tmp_path)
    model.config.final_logit_softcapping = model.config.logits_scaling = None
    with pytest.raises(ValueError, match=r"the model's logits are 0\.7 times these"):
        opsd_kernels.lm_head_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_understood_is_not(name, dtype, tmp_path):
    model = written(PLAIN[name], tmp_path).to(dtype)
    head = opsd_kernels.lm_head_of(model)
    assert (head.logit_scale, head.softcap) == READ.get(name, (1.0, None))
    model.config.use_scale = 1
    assert opsd_kernels.lm_head_of(model).logit_scale == (2.0 if "flag" in name else head.logit_scale)


def test_a_cap_shows_where_the_models_own_logits_are_small():
    """With logits of 1e-3 a cap of 30 changes nothing that float32 could tell."""
    model = model_of("Gemma2").float()
    model.config.final_logit_softcapping = 30.0
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1e-4)
    assert opsd_kernels.lm_head_of(model).softcap == 30.0
    model.forward = lambda ids: model.lm_head(model.model(ids).last_hidden_state)
    assert opsd_kernels.lm_head_of(model).softcap is None


def test_a_scale_that_may_learn_is_refused_whatever_its_value():
    model = model_of("Cohere")
    del model.logit_scale
    model.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="logit_scale is a tensor"):
        opsd_kernels.lm_head_of(model)


def test_padding_that_the_model_cuts_off_is_noticed(tmp_path):
    assert opsd_kernels.lm_head_of(written("return self.lm_head(hidden)[..., :50]", tmp_path)).valid_vocab == 50


def test_the_trial_leaves_the_model_and_the_random_numbers_as_they_were():
    model = model_of("Gemma2", attention_dropout=0.1).train()
    model.model.layers[0].eval()

    def drawing(*_):
        torch.rand(3)

    model.model.register_forward_hook(drawing)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert opsd_kernels.lm_head_of(model).softcap == 3.0
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert len(model.model._forward_hooks) == 1
    assert all(p.grad is None for p in model.parameters())


def test_it_is_tried_once_for_the_same_settings():
    model, calls = model_of("Cohere"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    heads = [opsd_kernels.lm_head_of(model) for _ in range(3)]
    assert len(calls) == 1
    assert heads[0] == heads[1] == heads[2]
    model.logit_scale = model.config.logit_scale = 0.5
    assert opsd_kernels.lm_head_of(model).logit_scale == 0.5
    assert len(calls) == 2


def test_what_cannot_be_tried_is_said():
    model = model_of("Gemma2").to("meta")
    with pytest.warns(UserWarning, match=r"head of Gemma2ForCausalLM .* could not be tried .* is on device meta"):
        assert opsd_kernels.lm_head_of(model).softcap == 3.0


def test_a_layer_between_body_and_head_is_refused():
    config = transformers.RemBertConfig(**SIZES, input_embedding_size=8, output_embedding_size=24, is_decoder=True)
    with pytest.raises(ValueError, match="last hidden states have 16 features, its head takes 24"):
        opsd_kernels.lm_head_of(transformers.RemBertForCausalLM(config))


def test_no_language_model_is_refused():
    with pytest.raises(TypeError, match="output embedding"):
        opsd_kernels.lm_head_of(torch.nn.Linear(3, 3))


def test_nothing_reads_source_or_byte_code():
    """A refactoring of a model that changes nothing it computes must change nothing here."""
    readers = {"getsource", "getsourcelines", "getsourcefile", "__code__", "co_code", "get_instructions", "Bytecode"}
    files = list(Path(opsd_kernels.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "attr", None), getattr(node, "id", None)} & readers
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {node.value} & readers
            imported = {n.name for n in getattr(node, "names", ()) if isinstance(n, ast.alias)} & {"ast", "dis"}
            assert not names | imported, f"{path.name}:{node.lineno}"
