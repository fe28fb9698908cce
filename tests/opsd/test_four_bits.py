"""A base of 4 bits under adapters, by bitsandbytes itself."""

import json

import pytest
import torch
from _models import model, tokenizer, write_rows

from opsd.cli import main
from opsd.errors import ConfigError
from opsd.models import load_model
from opsd.options import LoraConfig, ModelConfig
from opsd.quantized import in_4_bits

pytest.importorskip("bitsandbytes")

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # blocks of 64 weights


@pytest.fixture
def options(tmp_path):
    model("qwen3", **WIDE).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return {
        "model.path": tmp_path / "base",
        "model.load_in_4bit": "true",
        "lora.enabled": "true",
        "lora.r": 4,
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "optim.steps": 2,
        "optim.batch_size": 3,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 8,
        "run.device": "cpu",
        "run.checkpoint_every": 1,
    }


def train(options, directory, **changes):
    words = {**options, **{name.replace("__", "."): value for name, value in changes.items()}, "run.dir": directory}
    return main(["train", *(f"--{name}={value}" for name, value in words.items())])


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_linear_layers_but_the_head_have_4_bits(options):
    config = ModelConfig(path=str(options["model.path"]), load_in_4bit=True)
    four, whole = (
        load_model(one, LoraConfig(enabled=True, r=4), torch.device("cpu"))
        for one in (config, ModelConfig(path=config.path))
    )
    plain = dict(whole.named_parameters())
    seen = 0
    for name, parameter in four.named_parameters():
        if "base_layer" in name:
            assert parameter.numel() <= plain[name].numel() / 2
            seen += 1
        else:
            assert parameter.shape == plain[name].shape, name
    assert seen == 2 * 7
    ids = torch.tensor([[5, 6, 7, 8]])
    found, wanted = four(input_ids=ids).logits, whole(input_ids=ids).logits
    assert 1e-3 < (found - wanted).norm() / wanted.norm() < 0.3


def test_gradients_are_those_of_the_weights_that_the_4_bits_stand_for(options):
    from bitsandbytes.functional import dequantize_4bit

    where, device = str(options["model.path"]), torch.device("cpu")
    four, plain = (
        load_model(ModelConfig(path=where, load_in_4bit=own), LoraConfig(enabled=True, r=4), device)
        for own in (True, False)
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        four.eval()(input_ids=ids)  # as rollouts are written before the first gradient
        layers = dict(four.named_modules())
        for name, module in plain.named_modules():
            if name.endswith("base_layer"):
                weight = layers[name].weight
                module.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8)
                four.get_parameter(name).copy_(parameter)
    for one in (four, plain):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            found, wanted = four.get_parameter(name).grad, parameter.grad
            assert (found - wanted).norm() < 0.02 * wanted.norm(), name


def test_a_run_is_packed_resumes_and_its_adapter_can_be_evaluated(options, tmp_path, capsys):
    assert train(options, tmp_path / "packed") == 0
    assert "scoring: packed rows" in capsys.readouterr().out
    assert train(options, tmp_path / "padded", model__packing="off") == 0
    said = capsys.readouterr().out
    assert "one at a time" not in said
    for one, other in zip(metrics(tmp_path / "packed"), metrics(tmp_path / "padded"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    assert train(options, tmp_path / "whole", optim__steps=3) == 0
    assert main(["train", f"--resume={tmp_path / 'packed'}", "--optim.steps=3"]) == 0
    assert metrics(tmp_path / "packed")[2]["loss"] == metrics(tmp_path / "whole")[2]["loss"]
    given = [f"--model.path={tmp_path / 'packed' / 'model'}", f"--data={options['data.train']}"]
    given += ["--rollout.max-new-tokens=4", "--run.device=cpu"]
    assert main(["eval", "--model.load-in-4bit=true", *given]) == 0


def test_what_does_not_go_with_it_is_named(options, tmp_path, capsys):
    assert train(options, tmp_path / "out", lora__enabled="false") == 2
    assert "model.load_in_4bit is true; accepted: with lora.enabled" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"'x.gguf' a GGUF file; accepted: a directory or a hub id"):
        in_4_bits(ModelConfig(load_in_4bit=True), "x.gguf", torch.device("cpu"))


def test_a_missing_package_is_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opsd.quantized.find_spec", lambda name: None)
    assert train(options, tmp_path / "out") == 2
    assert "needs bitsandbytes: pip install 'opsd[quant]'" in capsys.readouterr().err
