"""A GGUF file as model.path: the model that is loaded, what is refused, training and resuming from it."""

import importlib.util
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import opsd
from opsd import gguf_file
from opsd.errors import ConfigError
from opsd.models import load_model, load_tokenizer, load_trained
from opsd.options import LoraConfig, ModelConfig

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
TOKENS = ["<pad>", "<end>", *bytes_to_unicode().values(), "ab"]
HEADS, KEY_HEADS = 4, 2


def original():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def paired(weight, heads):
    """Rows of a query or key product in GGUF's order, where those that rotate together are neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, kind="F32"):
    """`model` as a GGUF file, its matrices in the type `kind`."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, HEADS if "q_proj" in name else KEY_HEADS)
        type_ = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(weight, type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path):
    return load_model(ModelConfig(path=str(path)), LoraConfig(), torch.device("cpu")).eval()


@needs_gguf
def test_float32_gives_the_logits_of_the_original(tmp_path):
    model, ids = original(), torch.arange(2, 40)[None]
    model.save_pretrained(tmp_path / "safetensors")
    with torch.no_grad():
        expected = loaded(tmp_path / "safetensors")(ids).logits
        found = loaded(write(tmp_path / "model.gguf", model))(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_gguf
def test_packed_weights_are_unpacked_to_the_type_of_the_model(tmp_path):
    model = original()
    found = dict(loaded(write(tmp_path / "model.gguf", model, "Q8_0")).named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert found[name].dtype == torch.float32
        assert found[name].requires_grad
        # Of 32 weights in a row the largest is 127 steps, and a step itself has the precision of float16.
        step = weight.abs().max() / 127
        assert (found[name] - weight).abs().max() <= step * (0.5 + 127 / 2048) + 1e-7
    changed = [name for name in found if not torch.equal(found[name], dict(model.named_parameters())[name])]
    assert any("q_proj" in name for name in changed)  # they were packed at all


@needs_gguf
def test_the_tokenizer_is_that_of_the_file(tmp_path):
    tokenizer = load_tokenizer(str(write(tmp_path / "model.gguf", original())))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("2 + 3", add_special_tokens=False).input_ids == [TOKENS.index(c) for c in "2Ġ+Ġ3"]
    assert tokenizer.eos_token_id == 1


def refusal(path):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert f"model.path: there is no file {tmp_path}/no.gguf" in refusal(tmp_path / "no.gguf")


def test_without_the_package_its_name_is_said(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refusal(tmp_path / "model.gguf")


@needs_gguf
def test_a_file_of_another_kind_and_a_damaged_one_are_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("hello")
    assert "begins with b'hell'" in refusal(tmp_path / "text.gguf")
    whole = write(tmp_path / "whole.gguf", original()).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 100])
    assert "model.path" in refusal(tmp_path / "half.gguf")


@needs_gguf
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_resumes_and_saves_an_ordinary_model(tmp_path, lora):
    path, data = write(tmp_path / "model.gguf", original()), tmp_path / "train.jsonl"
    rows = [{"problem": f"{n} + 1", "solution": str(n + 1)} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def options(name, steps):
        return {
            "model.path": str(path), "data.train": str(data), "lora.enabled": lora, "rollout.max_new_tokens": 4,
            "optim.steps": steps, "optim.batch_size": 2, "run.checkpoint_every": 1, "run.device": "cpu",
            "run.dir": str(tmp_path / name),
        }  # fmt: skip

    def train(name, steps):
        return opsd.train(opsd.load_config(None, options(name, steps).items()), quiet=True)

    whole = train("whole", 3)
    train("parts", 2)
    parts = opsd.resume(tmp_path / "parts", [("optim.steps", 3)], quiet=True)
    weights = [next(r.model_dir.glob("*model.safetensors")).read_bytes() for r in (whole, parts)]
    assert weights[0] == weights[1]
    again = load_trained(ModelConfig(), str(whole.model_dir), torch.device("cpu")).eval()
    if lora:  # on the base that the adapter names
        ids = torch.arange(2, 40)[None]
        assert not torch.equal(again(ids).logits, loaded(path)(ids).logits)
        with again.disable_adapter():
            assert torch.equal(again(ids).logits, loaded(path)(ids).logits)
    else:
        assert not any(torch.equal(a, b) for a, b in zip(again.parameters(), loaded(path).parameters(), strict=True))
        assert "quantization_config" not in json.loads((whole.model_dir / "config.json").read_text())
