import json
from types import SimpleNamespace

import pytest
import torch
from _models import lora, model, tokenizer, write_model, write_rows

from opsd import models
from opsd.cli import main
from opsd.config import ConfigError, load_config

CPU = torch.device("cpu")


@pytest.fixture
def adapter(tmp_path):
    """The directory of an adapter that changes its base."""
    base = write_model(tmp_path / "base")
    adapted = lora(model())
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(loaded):
    with torch.no_grad():
        return loaded.eval()(torch.tensor([[3, 4, 5, 6]])).logits


@pytest.mark.parametrize("enabled", [False, True])
def test_an_adapter_is_not_trained_from(adapter, tmp_path, monkeypatch, capsys, enabled):
    words = ["train", f"--model.path={adapter}", f"--data.train={write_rows(tmp_path / 't.jsonl')}", "--optim.steps=1"]
    words += [f"--lora.enabled={enabled}", f"--run.dir={tmp_path / 'out'}", "--run.device=cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"model.path '{adapter}' is an adapter" in error
    assert "train from the base model" in error
    assert not (tmp_path / "out").exists()
    # Of an adapter on a hub there is nothing to see before it is loaded.
    monkeypatch.setattr(models, "ADAPTER", "absent.json")
    config = load_config(None, [("model.path", adapter), ("data.train", "t"), ("lora.enabled", enabled)])
    with pytest.raises(ConfigError, match=r"model.path '.*adapter' is an adapter"):
        models.load_model(config, CPU)


def test_adapters_are_loaded_to_be_evaluated_and_to_teach(adapter, monkeypatch):
    config = load_config(None, [("model.path", adapter), ("data.eval", "e")], training=False)
    expected = logits(models.load_trained(config, CPU))
    assert not torch.equal(expected, logits(model()))
    assert torch.equal(logits(models.load_weights(config, str(adapter), "teacher.path")), expected)
    monkeypatch.setattr(models, "ADAPTER", "absent.json")  # as of a hub id
    assert torch.equal(logits(models.load_trained(config, CPU)), expected)


def test_an_adapter_whose_base_is_gone_cannot_be_evaluated(adapter):
    described = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    config = load_config(None, [("model.path", adapter), ("data.eval", "e")], training=False)
    with pytest.raises(ConfigError, match=r"does not name its base model"):
        models.load_trained(config, CPU)


@pytest.mark.parametrize(("own", "ends", "expected"), [(0, [5], 0), (7, [], 7), (None, [5, 6], 5), (None, [], 0)])
def test_what_pads_a_batch(own, ends, expected):
    assert models.pad_id(SimpleNamespace(pad_token_id=own), ends) == expected
