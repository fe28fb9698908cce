"""What the command is given and cannot use, and where it cannot show what it says: one line, or no word, never a
traceback, and nothing of a run is lost."""

import io
import itertools
import json
import os
import re
import string
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
import torch
from _models import tokenizer, write_model, write_rows

from opsd import train
from opsd.cli import main
from opsd.config import load_config
from opsd.errors import ConfigError


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Options of a run of one step, by the words of a command line."""
    directory = tmp_path_factory.mktemp("setup")
    options = {
        "model.path": write_model(directory / "model"),
        "data.train": write_rows(directory / "train.jsonl", 2, teacher_prompt="é"),
        "optim.steps": 1,
        "optim.batch_size": 2,
        "rollout.max_new_tokens": 4,
        "run.device": "cpu",
    }
    return {name: str(value) for name, value in options.items()}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full():
    return open("/dev/full", "w", encoding="utf-8")


def ascii_only():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = pytest.mark.parametrize("stream", [nobody_reads, full, ascii_only])
"""Where text cannot be shown."""


@STREAMS
def test_a_run_ends_well_where_its_words_cannot_be_shown(stream, setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert main(["train", *words({**setup, "run.dir": tmp_path / "é"})]) == 0
    assert (tmp_path / "é" / "summary.json").is_file()
    if stream is ascii_only:
        sys.stdout.seek(0)
        assert "\\xe9" in sys.stdout.read()


@STREAMS
def test_so_does_a_run_from_python(stream, setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert train({**nested(setup), "run": {"dir": str(tmp_path / "é"), "device": "cpu"}}).summary["steps"] == 1


def nested(options):
    sections: dict[str, dict[str, str]] = {}
    for name, value in options.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    return sections


@STREAMS
@pytest.mark.parametrize(("argv", "code"), [
    (["train", "--print-config"], 0),
    (["train", "--print-config", "--optim.steps", "é"], 2),
    (["report", "é"], 2),
])  # fmt: skip
def test_no_command_changes_its_exit_code(stream, argv, code, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert main(argv) == code


def test_what_finds_no_room_is_shown_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", full())
    assert main(["train", "--print-config"]) == 0
    assert "keep_checkpoints: 2" in capsys.readouterr().err


def test_python_ends_with_the_commands_own_exit_code():
    # Its last flush fails after the command has returned, which no test within the process sees.
    for stream in (nobody_reads(), full()):
        with stream:
            done = subprocess.run(
                [sys.executable, "-m", "opsd", "train", "--print-config"], stdout=stream, stderr=subprocess.PIPE
            )
        assert done.returncode == 0
        assert b"Exception" not in done.stderr


def test_without_standard_streams(setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["train", *words({**setup, "run.dir": tmp_path / "out"})]) == 0


CODE = {
    "configuration_odd.py": "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n",
    "modeling_odd.py": "from .configuration_odd import OddConfig\n\n"
    "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n",
}


def with_code(directory):
    """A model of whose kind transformers knows nothing, with the code that makes it."""
    write_model(directory)
    for name, text in CODE.items():
        (directory / name).write_text(f"from transformers import LlamaConfig, LlamaForCausalLM\n{text}")
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Where transformers puts code that comes with a model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("option", ["model.path", "teacher.path"])
def test_code_that_comes_with_a_model_is_run_where_it_is_asked_for(option, setup, tmp_path, capsys, own_modules):
    odd, out = with_code(tmp_path / "odd"), tmp_path / "out"
    teacher = {"teacher.kind": "model"} if option == "teacher.path" else {}
    argv = ["train", *words({**setup, **teacher, option: odd, "run.dir": out})]
    capsys.readouterr()  # of writing the model
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "it comes with code of its own, which model.trust_remote_code true would run" in said
    assert said.startswith(f"opsd: {option} '{odd}': no ")
    assert said.count("\n") == 1
    assert main([*argv, "--model.trust-remote-code"]) == 0
    evaluation = ["eval", f"--model={out / 'model'}", f"--data={setup['data.train']}"]
    if option == "model.path":  # the trained model comes with it, too, and its run does not vouch for it
        assert main(evaluation) == 2
        assert main([*evaluation, "--model.trust-remote-code"]) == 0


@pytest.mark.parametrize(("name", "value", "takes"), [
    ("run.seed", 2**64, "int >= 0 and <= 18446744073709551615"),
    ("run.threads", 100000, r"int >= 1 and <= 1024\|none"),
    ("lora.r", 10**30, r"int >= 1, below 2\*\*63"),
    ("eval.max_problems", 10**30, r"int >= 1\|none, below 2\*\*63"),
    ("rollout.temperature", 1e-40, r"float >= 1e-06 and <= 1e\+06"),
    ("objective.temperature", 1e40, r"float >= 1e-06 and <= 1e\+06"),
    ("eval.temperature", 1e-40, r"0, or 1e-06 to 1e\+06"),
    ("run.dir", "x" * 300, "a path that the system can take; this one is too long"),
    ("model.path", "x" * 300, "a path that the system can take; this one is too long"),
    ("data.eval", "x" * 300, "a path that the system can take; this one is too long"),
    ("data.train", "a\0b", "a path without null characters"),
])  # fmt: skip
def test_values_beyond_what_can_be_held_are_named_at_once(name, value, takes):
    with pytest.raises(ConfigError, match=f"^{name} is {re.escape(repr(value))}; accepted: {takes}$"):
        load_config(None, [(name, value)], complete=False)


def test_the_largest_values_still_are():
    values = [("run.seed", str(2**64 - 1)), ("rollout.temperature", "1e-6"), ("eval.temperature", "0")]
    config = load_config(None, values, complete=False)
    assert torch.Generator().manual_seed(config.run.seed).initial_seed() == 2**64 - 1


@pytest.mark.parametrize(("text", "said"), [
    (f"optim: {{steps: {'9' * 5000}}}", r"^optim.steps is '9+ \.\.\. \(5002 characters\); accepted: int >= 1$"),
    (f"optim: {{lr: {'9' * 5000}}}", r"^optim.lr is '9+ \.\.\. \(5002 characters\); accepted: float > 0\|none$"),
    ("optim: {steps: 2026-99-99}", r"^optim.steps is '2026-99-99'; accepted: int >= 1$"),
    ("optim: {steps: 0x_}", r"^optim.steps is '0x_'; accepted: int >= 1$"),
    ("[" * 5000, "cannot be read as YAML"),
])  # fmt: skip
def test_yaml_that_python_cannot_hold_is_named(text, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert len(str(caught.value)) < 700


def test_a_number_too_long_to_be_written_is_refused():
    for name in ("optim.steps", "optim.lr", "rollout.temperature"):
        with pytest.raises(ConfigError, match=f"^{name} is an int of more digits than can be shown; accepted: "):
            load_config(None, [(name, 10**5000)])


@pytest.mark.parametrize(("name", "said"), [
    ("x" * 300, "cannot be written: File name too long"),
    ("x" * 245 + ".json", "cannot be written: File name too long"),  # the answers' name is longer
    ("/proc/eval.json", "cannot be written: "),
    (".", "is a directory; name a new file"),
    ("there", "is a directory; name a new file"),
])  # fmt: skip
def test_where_an_evaluation_goes_is_tried_before_any_answer(name, said, setup, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("opsd.cli.evaluate_model", lambda *_: pytest.fail("answers were generated"))
    assert main(["eval", f"--model={setup['model.path']}", f"--data={setup['data.train']}", f"--output={name}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("opsd: --output ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_keeps_the_date_of_its_prompts(setup, tmp_path, capsys):
    words_of_it, out = tokenizer(chat=True), tmp_path / "out"
    words_of_it.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + words_of_it.chat_template
    model = write_model(tmp_path / "model")
    words_of_it.save_pretrained(model)
    assert main(["train", *words({**setup, "model.path": model, "run.dir": out, "run.checkpoint_every": 1})]) == 0
    assert f"\n{datetime.now():%Y-%m-%d}[user]" in capsys.readouterr().out

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=400)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", Later)
        assert main(["train", "--resume", str(out), "--optim.steps", "2"]) == 0, capsys.readouterr().err
        assert f"\n{datetime.now():%Y-%m-%d}[user]" in capsys.readouterr().out
        began, read = json.loads((out / "run.json").read_text())["created"], []
        patch.setattr("opsd.evaluate_model.check_prompts", lambda *given: read.extend(given[2]))
        for model_of_it, date in ((out / "model", began[:10]), (model, f"{Later.now():%Y-%m-%d}")):
            patch.setattr("opsd.prompts.datetime", Later)
            data = f"--data={setup['data.train']}"
            given = ["eval", f"--model={model_of_it}", data, "--rollout.max-new-tokens=2", "--run.device=cpu"]
            assert main(given) == 0, capsys.readouterr().err
            assert words_of_it.decode(read[-1].student).startswith(f"{date}[user]")


@pytest.mark.parametrize("own", [False, True])
def test_a_cap_that_ones_own_loss_ignores_is_said(own, setup, capsys, tmp_path):
    def loss(run, student, teacher, rollouts, denominator):
        return student.square().sum() / denominator, {}

    config = {**nested(setup), "run": {"dir": str(tmp_path / "out"), "device": "cpu"}}
    config["rollout"] = {"max_new_tokens": 4, "importance_cap": 2}
    train(config, loss=loss if own else None)
    said = "rollout.importance_cap is 2, which weights no token, since the loss function (loss) is your own"
    assert (said in capsys.readouterr().out) == own


LEVELS = "[&a [x, x], " + ", ".join(f"&{b} [*{a}, *{a}]" for a, b in itertools.pairwise(string.ascii_lowercase)) + "]"
"""YAML of 2^26 entries, written out."""


@pytest.mark.parametrize(("text", "said"), [
    ("--- {}\n--- {}\n", "cannot be read as YAML: expected a single document in the stream"),
    (f"optim: {LEVELS}\n", "cannot be read as YAML: its aliases stand for over 100000 entries"),
    (f"prompts: {{student_chat_args: {{a: {LEVELS}}}}}\n", "its aliases stand for over 100000 entries"),
    ("optim: &a {steps: *a}\n", "cannot be read as YAML: an alias stands within what it stands for"),
    ("optim: {steps: &a [x, x], lr: *a}\n", r"^optim.steps is \['x', 'x'\]; accepted: int >= 1$"),
    (f"optim: [{'x,' * 9000}]\n", r"section optim should hold options, got \['x', .*\(45000 characters\)$"),
])  # fmt: skip
def test_what_is_said_of_yaml_is_one_line(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words_of_it", [["--data.train=/dev/zero"], ["--config=/dev/zero"], ["--data.eval=/dev/zero"]])
def test_a_device_is_not_read_without_end(words_of_it, setup, capsys):
    assert main(["train", *words(setup), *words_of_it]) == 2
    error = capsys.readouterr().err
    assert "/dev/zero: cannot be read" in error
    assert "it is a device, not a file" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["/proc/out", "/dev/null/out"])
def test_where_a_run_goes_is_tried_before_anything_is_loaded(name, setup, monkeypatch, capsys):
    monkeypatch.setattr("opsd.trainer.set_up", lambda *_: pytest.fail("the run was set up"))
    assert main(["train", *words(setup), f"--run.dir={name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"opsd: run.dir '{name}' ")
    assert error.count("\n") == 1


def test_the_trial_leaves_nothing(setup, tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError("not as asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opsd.trainer.set_up", refuse)
    for place in ({}, {"run.dir": "a/b/c"}):
        assert main(["train", *words({**setup, **place})]) == 2
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [
    ("model.path", "m"), ("data.train", "d"), ("run.dir", "r"), ("eval.scorer", "s.py:f")
])  # fmt: skip
def test_a_path_that_may_not_be_looked_at_is_named(name, value, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("opsd.limits.os.stat", refuse)
    with pytest.raises(ConfigError, match=f"^{name} is '{value}'; accepted: a path that can be reached; here: Perm"):
        load_config(None, [(name, value)], complete=False)


def test_a_scorers_file_with_too_long_a_name_is_named():
    with pytest.raises(ConfigError, match=r"^eval.scorer is 'x+\.py:f'; accepted: a path that the system can take"):
        load_config(None, [("eval.scorer", f"{'x' * 300}.py:f")], complete=False)


def test_an_evaluation_that_finds_no_room_for_its_answers_says_so(setup, tmp_path, monkeypatch, capsys):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opsd.files.flush", full)
    out = tmp_path / "out" / "eval.json"
    argv = [f"--model={setup['model.path']}", f"--data={setup['data.train']}", "--rollout.max-new-tokens=2"]
    assert main(["eval", *argv, f"--output={out}"]) == 1
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert (
        shown.err
        == f"opsd: --output {out.with_name('eval.answers.jsonl')} cannot be written: No space left on device\n"
    )
    assert not list(out.parent.iterdir())
