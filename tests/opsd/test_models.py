import json
from types import SimpleNamespace

import pytest
import torch
from _models import lora, model, run_of, tokenizer, write_model, write_rows

from opsd import models
from opsd.cli import main
from opsd.config import ConfigError, load_config
from opsd.scoring import rollout_hidden

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


def test_prompt_learning_is_refused_wherever_the_wrapper_is_left(tmp_path):
    """The model below the wrapper is the bare one, so it must be neither trained, nor evaluated, nor a teacher."""
    from peft import PrefixTuningConfig, get_peft_model

    write_model(tmp_path / "base")
    tuned = get_peft_model(model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    reason = "adapter 'default' is PREFIX_TUNING, whose virtual tokens no layer holds"
    for use in (
        lambda: rollout_hidden(tuned, [[3, 4]], [[5]]),
        lambda: run_of(tuned),
        lambda: run_of(tuned, teacher__kind="ema"),
        lambda: models.body(tuned),
    ):
        with pytest.raises(ConfigError, match=reason):
            use()
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    config = load_config(None, [("model.path", tmp_path / "tuned"), ("data.eval", "e")], training=False)
    with pytest.raises(ConfigError, match=f"model.path '.*tuned': {reason}"):
        models.load_trained(config, CPU)


@pytest.mark.parametrize(("own", "ends", "expected"), [(0, [5], 0), (7, [], 7), (None, [5, 6], 5), (None, [], 0)])
def test_what_pads_a_batch(own, ends, expected):
    assert models.pad_id(SimpleNamespace(pad_token_id=own), ends) == expected
