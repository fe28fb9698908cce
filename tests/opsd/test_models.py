import json
from types import SimpleNamespace

import pytest
import torch
from _models import VOCAB, lora, model, run_of, tokenizer, write_model, write_rows
from transformers import AutoTokenizer

from opsd import models
from opsd.cli import main
from opsd.config import load_config
from opsd.errors import ConfigError
from opsd.scoring import rollout_hidden
from opsd.vocabulary import pad_id

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
        models.load_model(config.model, config.lora, CPU)


def test_adapters_are_loaded_to_be_evaluated_and_to_teach(adapter, monkeypatch):
    config = load_config(None, [("model.path", adapter), ("data.eval", "e")], training=False)
    expected = logits(models.load_trained(config.model, config.model.path, CPU))
    assert not torch.equal(expected, logits(model()))
    assert torch.equal(logits(models.load_trained(config.model, str(adapter), CPU, "teacher.path")), expected)
    monkeypatch.setattr(models, "ADAPTER", "absent.json")  # as of a hub id
    assert torch.equal(logits(models.load_trained(config.model, config.model.path, CPU)), expected)


def test_an_adapter_whose_base_is_gone_cannot_be_evaluated(adapter):
    described = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    config = load_config(None, [("model.path", adapter), ("data.eval", "e")], training=False)
    with pytest.raises(ConfigError, match=r"does not name its base model"):
        models.load_trained(config.model, config.model.path, CPU)


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
        models.load_trained(config.model, config.model.path, CPU)


@pytest.mark.parametrize("path", ["absent/of/all", "./absent", "../absent", "/absent", "~/absent", "absent/", "a b"])
@pytest.mark.parametrize("option", ["model.path", "teacher.path"])
def test_what_can_be_no_hub_id_is_not_asked_for(tmp_path, monkeypatch, path, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match=rf"^{option}: there is no directory {path}; accepted: a directory, or a hub"):
        models.load_tokenizer(path, option)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"model.path 'file' is a file; accepted: a directory"):
        models.load_tokenizer("file")


@pytest.mark.parametrize("path", ["nomodel", "org/no-model_1.5"])
def test_the_hub_is_asked_for_what_may_be_on_it_once_that_is_said(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl")
    said = f"there is no directory {path}: the hub is asked for it (model.path)\n"
    asked = []

    def from_pretrained(name, **_):
        asked.append(name)
        assert said in capsys.readouterr().out
        raise OSError("no such model")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    for command in (f"train --model.path={path} --data.train=t.jsonl", f"eval --model={path} --data=t.jsonl"):
        assert main(command.split()) == 2
        told = f"opsd: model.path: there is no directory {path}, and from the hub no tokenizer can be loaded: no such"
        assert capsys.readouterr().err.startswith(told)
    assert asked == [path] * 2


def test_the_model_of_a_run_that_has_none_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    for path in ("runs/x/model", "runs/x/best"):
        with pytest.raises(ConfigError, match=f"there is no directory {path}: .*; opsd train --resume runs/x goes on"):
            models.load_tokenizer(path)
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"there is no directory x/model: .*; opsd train --resume x goes on"):
        models.load_tokenizer("x/model")
    (run / "summary.json").touch()
    with pytest.raises(ConfigError, match=r"there is no directory x/model: its run kept none; its directory is x"):
        models.load_tokenizer("x/model")


@pytest.mark.parametrize(
    ("own", "ends", "expected"),
    [(0, [5], 0), (7, [], 7), (None, [5, 6], 5), (None, [], 0), (VOCAB, [5], 5), (-1, [], 0)],
)
def test_what_pads_a_batch(own, ends, expected):
    assert pad_id(model(), SimpleNamespace(pad_token_id=own), ends) == expected
