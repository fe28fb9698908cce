import json
import os
import pydoc
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _models import SIZES, lora, model, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DogeConfig, DogeForCausalLM

from opsd.batching import choose_scoring
from opsd.cli import main, parse_overrides
from opsd.config import load_config
from opsd.errors import ConfigError, NonFiniteError
from opsd.evaluation import Evaluation, wilson
from opsd.optim import learning_rate, make_optimizer
from opsd.options import OptimConfig
from opsd.run import StepResult
from opsd.scoring import supervised_loss
from opsd.step import opsd_step
from opsd.trainer import train


@pytest.fixture
def setup(tmp_path):
    """A model directory, data, and the options that train on them quickly."""
    options = {
        "model.path": write_model(tmp_path / "base"),
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "data.eval": write_rows(tmp_path / "eval.jsonl", 3),
        "optim.steps": 2,
        "optim.batch_size": 3,
        "optim.micro_batch_size": 2,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 8,
        "run.device": "cpu",
        "run.dir": tmp_path / "out",
    }
    return {name: str(value) for name, value in options.items()}


def words(options):
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("adapted", [False, True])
def test_train_saves_a_model_that_loads_and_has_changed(setup, tmp_path, adapted, capsys):
    setup["lora.enabled"] = str(adapted)
    assert main(words(setup)) == 0
    out = tmp_path / "out"
    shown = capsys.readouterr().out
    assert "first student prompt" in shown
    assert "first teacher prompt" in shown
    assert "trained" in shown
    steps = lines(out / "metrics.jsonl")
    assert [record["step"] for record in steps] == [1, 2]
    expected = "loss divergence student_entropy teacher_entropy entry_clipped token_clipped rollout_length truncated "
    expected += "grad_norm lr tokens_per_second seconds_rollout seconds_teacher seconds_student "
    expected += "seconds_loss seconds_backward seconds_optimizer"
    assert set(expected.split()) <= steps[0].keys()
    assert steps[0]["divergence"] > 0
    assert steps[0]["loss"] == pytest.approx(steps[0]["divergence"], rel=1e-4)
    assert {"rollout", "problem", "truncated"} <= lines(out / "samples.jsonl")[0].keys()
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["evaluations"]) == {"base", "teacher", "trained"}
    assert summary["train_rows"] == 8
    assert load_config(out / "config.yaml").optim.lr == 1e-3

    ids = torch.tensor([[5, 6, 7]])
    before = AutoModelForCausalLM.from_pretrained(setup["model.path"])(ids).logits
    after = AutoModelForCausalLM.from_pretrained(out / "model")(ids).logits
    assert not torch.allclose(before, after, atol=1e-4)
    assert (out / "model" / "adapter_config.json").exists() == adapted
    assert AutoTokenizer.from_pretrained(out / "model").decode([4]) == "1"


def test_the_same_seed_gives_the_same_run(setup, tmp_path):
    for name, options in (("a", {}), ("b", {}), ("c", {"run.seed": "1"})):
        train(load_config(None, {**setup, "run.dir": str(tmp_path / name), **options}.items()), quiet=True)
    losses = [[record["loss"] for record in lines(tmp_path / name / "metrics.jsonl")] for name in "abc"]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_weights_change(setup, monkeypatch, where, capsys):
    models = []

    def step(run, batch, number):
        result = opsd_step(run, batch, number)
        models[:] = [run.model, {n: p.detach().clone() for n, p in run.model.named_parameters()}]
        if number == 2 and where == "loss":
            result.loss = result.loss * float("nan")
        elif number == 2:
            next(run.model.parameters()).grad[0, 0] = float("inf")
        return result

    with pytest.raises(NonFiniteError, match=r"step 2"):
        train(load_config(None, setup.items()), step=step, quiet=True)
    student, before = models
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())

    monkeypatch.setattr("opsd.trainer.train", lambda config: train(config, step=step, quiet=True))
    assert main(words({**setup, "run.dir": setup["run.dir"] + "2"})) == 1
    assert "step 2" in capsys.readouterr().err


def test_another_step_can_be_trained_by_the_same_loop(setup):
    def supervised(run, batch, number):
        completions = [[*run.tokenizer(e.row.solution)["input_ids"], run.tokenizer.eos_token_id] for e in batch]
        tokens = sum(map(len, completions))
        loss = supervised_loss(run.model, [e.student for e in batch], completions, tokens)
        loss.backward()
        return StepResult(loss.detach(), tokens)

    config = load_config(None, {**setup, "optim.steps": "30", "optim.lr": "0.01", "run.save": "false"}.items())
    result = train(config, step=supervised, quiet=True)
    losses = [record["loss"] for record in lines(result.run_dir / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    assert result.model_dir is None


def test_weight_decay_spares_norms_and_biases(setup):
    options = load_config(None, {**setup, "optim.weight_decay": "0.1"}.items()).optim
    groups = make_optimizer(model(), options).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 2, 3, 3, 3, 3]), ("linear", [1, 2, 3, 2.25, 1.5, 0.75]), ("cosine", [1, 2, 3, 2.56, 1.5, 0.44])],
)
def test_learning_rate_warms_up_from_the_first_step_and_is_never_zero(schedule, expected):
    options = OptimConfig(lr=3.0, steps=6, warmup_steps=2, schedule=schedule)
    assert [learning_rate(options, n) for n in range(1, 7)] == pytest.approx(expected, abs=0.01)


def test_an_interrupt_within_a_step_writes_no_checkpoint_of_it(setup, tmp_path, monkeypatch, capsys):
    def step(run, batch, number):
        if number == 2:
            raise KeyboardInterrupt  # what the second Ctrl-C raises
        return opsd_step(run, batch, number)

    setup["run.checkpoint_every"] = "1"
    monkeypatch.setattr("opsd.trainer.train", partial(train, step=step))
    assert main(words(setup)) == 130
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step-00000001"]
    assert "stopped by the user" in capsys.readouterr().err


def test_a_run_never_overwrites_another(setup, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(words(setup)) == 2
    assert "run.dir" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["precious"]


def fails(run, batch, number):
    raise RuntimeError("mine")


def test_a_directory_of_a_run_that_took_no_step_is_used_again(setup, tmp_path, capsys):
    config, out = load_config(None, setup.items()), tmp_path / "out"
    with pytest.raises(RuntimeError, match="mine"):
        train(config, step=fails, quiet=True)
    assert {"run.json", "evaluations.jsonl"} < set(os.listdir(out))
    first = json.loads((out / "run.json").read_text())["id"]
    train(config, quiet=True)
    assert json.loads((out / "run.json").read_text())["id"] != first
    assert [record["name"] for record in lines(out / "evaluations.jsonl")] == ["base", "teacher", "trained"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run.*name a new directory.*opsd train --resume .*out$"):
        train(config, quiet=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt", "best"])
def test_a_directory_that_may_hold_something_of_value_is_not_used_again(setup, tmp_path, name):
    config = load_config(None, setup.items())
    with pytest.raises(RuntimeError, match="mine"):
        train(config, step=fails, quiet=True)
    (tmp_path / "out" / name).touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, quiet=True)


def test_the_directory_of_a_run_at_work_is_not_used_again(setup, tmp_path, monkeypatch):
    """Neither while it is before its first step, nor when it ends while another is about to begin."""
    import opsd.trainer

    config = load_config(None, setup.items())

    def step(run, batch, number):
        if number == 1:
            with pytest.raises(ConfigError, match="another process works on this run"):
                train(config, quiet=True)
        return opsd_step(run, batch, number)

    real = opsd.trainer.set_up

    def late(*given):
        monkeypatch.setattr(opsd.trainer, "set_up", real)
        train(config, step=step, quiet=True)
        return real(*given)

    monkeypatch.setattr(opsd.trainer, "set_up", late)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, step=fails, quiet=True)
    assert len(lines(tmp_path / "out" / "metrics.jsonl")) == 2


GOOD = Evaluation(0.5, 0.4, 0.6, 3, 1, 3.0, 0.0)


@pytest.mark.parametrize(("returned", "error", "said"), [
    (0.5, TypeError, r"evaluate\) returned float; accepted: an opsd.Evaluation"),
    (None, TypeError, r"evaluate\) returned NoneType"),
    (replace(GOOD, accuracy=torch.tensor(0.5)), TypeError, r"Evaluation.accuracy is tensor\(0.5000\); accepted"),
    (replace(GOOD, low=float("nan")), TypeError, r"Evaluation.low is nan; accepted: a finite float"),
    (replace(GOOD, problems=3.0), TypeError, r"Evaluation.problems is 3.0; accepted: an int"),
    (replace(GOOD, pass_at=[{"k": 1}]), TypeError, r"Evaluation.pass_at is .*; accepted: a tuple"),
])  # fmt: skip
def test_what_is_no_evaluation_is_named(setup, returned, error, said):
    with pytest.raises(error, match=said):
        train(load_config(None, setup.items()), evaluate=lambda *_: returned, quiet=True)


@pytest.mark.parametrize(("changes", "said"), [
    (None, r"step\) returned Tensor; accepted: an opsd.run.StepResult"),
    ({"loss": 0.5}, r"a loss that is 0.5; accepted: a 0-d tensor"),
    ({"loss": torch.ones(3)}, r"a loss that is \(3,\); accepted: a 0-d tensor"),
    ({"tokens": torch.tensor(3)}, r"tokens tensor\(3\); accepted: an int"),
    ({"metrics": [("mine", 1)]}, r"metrics of type list; accepted: a dict"),
    ({"metrics": {"mine": torch.ones(2)}}, r"metric 'mine' of shape \(2,\); accepted: a number or a 0-d tensor"),
    ({"metrics": {"mine": "much"}}, r"metric 'mine' 'much'; accepted: a number"),
    ({"metrics": {"loss": 1.0}}, r"a metric called 'loss'; accepted: text other than step, loss, grad_norm"),
    ({"rollouts": [[3, 4]]}, r"rollouts \[\[3, 4\]\]; accepted: a list of opsd.Rollout"),
])  # fmt: skip
def test_what_is_no_result_of_a_step_is_named(setup, changes, said):
    del setup["data.eval"]
    states = []

    def step(run, batch, number):
        result = opsd_step(run, batch, number)
        states[:] = [run.model, {n: p.detach().clone() for n, p in run.model.named_parameters()}]
        return result.loss if changes is None else replace(result, **changes)

    with pytest.raises((TypeError, ValueError), match=said):
        train(load_config(None, setup.items()), step=step, quiet=True)
    student, before = states
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


def test_the_parts_that_may_be_replaced_are_documented():
    from opsd.plugins import Callback, Divergence, Evaluate, MakeTeacher, Sampler
    from opsd.run import Step
    from opsd.scorers import Scorer

    for part, word in (
        (Sampler, "vocabulary"),
        (Divergence, "denominator"),
        (Step, "gradient"),
        (Evaluate, "student"),
        (MakeTeacher, "student"),
        (Scorer, "Undecided"),
        (Callback, "metrics.jsonl"),
    ):
        shown = pydoc.render_doc(part, renderer=pydoc.plaintext)
        assert f"class {part.__name__}" in shown
        assert "__call__" in shown
        assert word in shown


def test_default_run_directories_are_numbered(setup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    del setup["run.dir"]
    setup |= {"run.save": "false", "optim.steps": "1"}
    del setup["data.eval"]
    found = [train(load_config(None, setup.items()), quiet=True).run_dir.as_posix() for _ in range(2)]
    assert found == ["runs/base-1", "runs/base-2"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optim.stpes": "3"}, ["optim.stpes", "optim.steps"]),
        ({"objective.beta": "2"}, ["objective.beta", "'2'"]),
        ({"model.path": "/nowhere/at-all"}, ["model.path", "/nowhere/at-all"]),
        ({"data.train": "/nowhere.jsonl"}, ["/nowhere.jsonl"]),
        ({"data.max_prompt_tokens": "5"}, ["train.jsonl:1", "data.max_prompt_tokens"]),
        ({"rollout.max_new_tokens": "5000"}, ["rollout.max_new_tokens", "2048"]),
        ({"lora.enabled": "true", "lora.target_modules": "q_proj,lm_head"}, ["model.path", "adapters on the head"]),
        ({"lora.enabled": "true", "lora.target_modules": "absent"}, ["lora.target_modules", "absent"]),
    ],
)
def test_errors_come_without_a_traceback(setup, changes, parts, capsys):
    assert main(words({**setup, **changes})) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert "Traceback" not in error


def test_bad_row_stops_before_the_run_directory_exists(setup, tmp_path, capsys):
    with open(setup["data.train"], "a") as file:
        file.write("{oops\n")
    assert main(words(setup)) == 2
    assert "train.jsonl:9: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words({**setup, "data.skip-bad-rows": "true", "run.save": "false"})) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["train_rows_skipped"] == 1


def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "opsd", "train", "--optim.lr", "fast"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("opsd: optim.lr is 'fast'")


@pytest.mark.parametrize(("absent", "words"), [("rich", ["--help"]), ("yaml", ["train"]), ("numpy", ["--help"])])
@pytest.mark.thinned(3)
def test_without_the_packages_for_training_the_command_says_what_to_install(absent, words):
    code = f"import sys, runpy; sys.modules[{absent!r}] = None; runpy.run_module('opsd', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    said = f"opsd: needs {absent}, which is not installed: pip install 'opsd[train]'\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(said)  # torch has a word on numpy
    assert "Traceback" not in done.stderr
    code = f"import sys; sys.modules[{absent!r}] = None; import opsd_kernels, opsd; opsd.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"the training loop needs {absent}, which is not installed: pip install 'opsd[train]'" in done.stderr


def test_the_help_begins_with_examples_that_are_understood(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out.splitlines()
    examples = [line.split("   ")[0].split()[2:] for line in shown[:10] if line.startswith("  opsd train")]
    assert len(examples) == 3
    assert "--resume" in examples[2]
    for example in examples[:2]:
        load_config(None, parse_overrides(example))


@pytest.mark.parametrize("extra", [{}, {"lora.enabled": "true", "model.gradient_checkpointing": "true"}])
@pytest.mark.thinned(2)
def test_quiet_prints_nothing(setup, extra):
    """Of what transformers and peft would print, neither, and their bars are as before afterwards."""
    code = (
        "import sys, json, opsd\n"
        "from transformers.utils import logging\n"
        "options = json.loads(sys.argv[1])\n"
        "opsd.train(opsd.load_config(None, options.items()), quiet=True)\n"
        "opsd.resume(options['run.dir'], [('optim.steps', 3)], quiet=True)\n"
        "assert logging.is_progress_bar_enabled()\n"
    )
    options = {**setup, **extra, "run.checkpoint_every": "1"}
    command = [sys.executable, "-c", code, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (Path(setup["run.dir"]) / "model").is_dir()


def test_intervals():
    low, high = wilson(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0
    assert 0.2 < wilson(0.0, 10)[1] < 0.3


@pytest.mark.parametrize(("kind", "packing", "code", "said"), [
    ("llama", "auto", 0, "scoring: packed rows, student and teacher in two passes ("),
    ("llama", "on", 0, "scoring: packed rows, student and teacher in two passes ("),
    ("llama", "off", 0, "scoring: padded, as asked"),
    ("gpt2", "auto", 0, "in training; accepted: 0, to be set in the model's config.json\n"),
    ("gpt2", "on", 2, "model.packing is on, but"),
    ("nemotron", "auto", 0, "scoring: padded, since model NemotronForCausalLM cannot run on packed rows: its "),
    ("nemotron", "on", 2, "model.packing is on, but model NemotronForCausalLM cannot run on packed rows"),
])  # fmt: skip
def test_packing_is_said_and_refused_by_name(setup, tmp_path, capsys, kind, packing, code, said):
    setup |= {"model.path": str(write_model(tmp_path / "other", kind)), "model.packing": packing, "optim.steps": "1"}
    assert main(words(setup)) == code
    assert said in "".join(capsys.readouterr())


def test_the_header_says_what_kind_of_training_it_is(setup, capsys):
    del setup["data.eval"], setup["optim.lr"]
    setup |= {"optim.steps": "1", "lora.r": "3", "optim.batch_size": "2", "run.sample_every": "0"}
    with open(setup["data.train"], "a") as file:
        file.write("{}\n")
    setup["data.skip_bad_rows"] = "true"
    assert main([*words(setup), "--preset=paper", "--rollout.max-new-tokens=4"]) == 0
    said = capsys.readouterr().out
    assert "\npreset paper; LoRA r 3 alpha 128; lr 5e-06\n" in said
    assert "\ntrain rows 8; train rows skipped 1\n" in said
    assert "\n1 step, " in said
    setup |= {"run.dir": setup["run.dir"] + "2", "optim.lr": "1e-3", "model.gradient_checkpointing": "true"}
    assert main(words({**setup, "lora.r": "64", "optim.steps": "2", "teacher.kind": "live"})) == 0
    said = capsys.readouterr().out
    assert "\nfull training; lr 0.001\n" in said
    assert "preset" not in said
    assert "student and teacher in one pass (" in said
    assert "\n2 steps, " in said


def test_callbacks_see_each_step_and_cannot_change_how_training_goes_on(setup, tmp_path):
    def weights():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()

    train(load_config(None, setup.items()), quiet=True)
    expected = weights()
    shutil.rmtree(tmp_path / "out")
    seen = []

    def callback(run, record):
        assert not run.model.training
        assert not torch.is_grad_enabled()
        seen.append((record.pop("step"), next(run.model.parameters()).clone()))
        run.model.train()

    train(load_config(None, setup.items()), callbacks=[callback], quiet=True)
    assert [step for step, _ in seen] == [1, 2]
    assert [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    found = weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    last = next(iter(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").parameters()))
    assert torch.equal(seen[-1][1], last)
    assert not torch.equal(seen[0][1], last)


def test_what_a_callback_raises_stops_the_run_after_that_step(setup, tmp_path):
    def callback(run, record):
        raise ArithmeticError(f"enough at step {record['step']}")

    with pytest.raises(ArithmeticError, match="enough at step 1"):
        train(load_config(None, setup.items()), callbacks=[callback], quiet=True)
    assert [line["step"] for line in lines(tmp_path / "out" / "metrics.jsonl")] == [1]
    with pytest.raises(TypeError, match=r"callbacks has 'mine'; accepted: functions of \(run, record\)"):
        train(load_config(None, {**setup, "run.dir": str(tmp_path / "new")}.items()), callbacks=["mine"], quiet=True)
    assert not (tmp_path / "new").exists()


class Hub:
    """What a run asks of huggingface_hub's HfApi, kept; nothing goes over the network."""

    calls: list = []  # noqa: RUF012
    failing = ""

    def _called(self, name, values):
        if name == self.failing:
            raise OSError("no such\nluck")
        self.calls.append((name, values))

    def create_repo(self, name, **options):
        self._called("create", (name, options))

    def upload_folder(self, *, repo_id, folder_path, **options):
        self._called("upload", (repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_the_trained_model_goes_to_the_hub(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opsd.push.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    setup["run.push_to_hub"] = "org/name"
    monkeypatch.setattr(Hub, "failing", "create")
    assert main(words(setup)) == 2
    assert "run.push_to_hub 'org/name': the repository cannot be made: no such luck" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Hub, "failing", "upload")
    assert main(words(setup)) == 0
    shown = "".join(capsys.readouterr())
    assert "run.push_to_hub: no such luck; by hand: hf upload org/name" in " ".join(shown.split())
    monkeypatch.setattr(Hub, "failing", "")
    assert main(["train", "--resume", setup["run.dir"]]) == 0  # finished: nothing is left but to upload it
    files = sorted(path.name for path in (tmp_path / "out" / "model").iterdir())
    asked = ("create", ("org/name", {"private": True, "exist_ok": True}))
    assert Hub.calls == [asked, asked, ("upload", ("org/name", files))]
    unsaved = {**setup, "run.dir": str(tmp_path / "new"), "run.save": "false"}
    assert main(words(unsaved)) == 2
    assert "run.push_to_hub is 'org/name', but run.save is False" in capsys.readouterr().err
    assert main(words({**setup, "run.push_to_hub": "../x"})) == 2
    assert "run.push_to_hub is '../x'; accepted: org/name of a repository" in capsys.readouterr().err


def test_what_shows_only_in_a_pass_shows_before_the_first_step():
    """Doge brings a mask of its own to its attention, of which its config and its code's names say nothing."""
    config = load_config(None, [("model.path", "m"), ("data.train", "t")])
    doge = DogeForCausalLM(DogeConfig(**SIZES)).eval()
    teacher = SimpleNamespace(source="live")
    how, *others = choose_scoring(config.model, doge, teacher)
    assert not any(others)
    refused = "model DogeForCausalLM cannot run on packed rows"
    assert how == f"scoring: padded, since {refused}: DogeAttention brings an attention mask, packed rows take none"
    dropping = lora(model())
    for module in dropping.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    before = torch.get_rng_state()
    assert choose_scoring(config.model, dropping, teacher).packed
    assert torch.equal(torch.get_rng_state(), before)


def test_packed_and_padded_runs_learn_the_same(setup, tmp_path):
    records = {}
    for packing in ("on", "off"):
        options = {**setup, "model.packing": packing, "run.dir": str(tmp_path / packing)}
        assert main(words(options)) == 0
        records[packing] = lines(tmp_path / packing / "metrics.jsonl")
    for packed, padded in zip(records["on"], records["off"], strict=True):
        for name in ("loss", "grad_norm", "student_entropy", "teacher_entropy"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-3, abs=1e-6)


def test_a_users_error_is_not_taken_for_one_of_the_disk(setup):
    def rollouts(run, batch, number):
        raise ConnectionError("the engine is down")

    with pytest.raises(ConnectionError, match="the engine is down"):
        train(load_config(None, setup.items()), rollouts=rollouts, quiet=True)


def test_an_evaluation_of_ones_own_cannot_change_how_training_goes_on(setup):
    modes = []

    def step(run, batch, number):
        modes.append(run.model.training)
        return opsd_step(run, batch, number)

    def evaluate(run, student, examples, context):
        student.eval()
        assert not torch.is_grad_enabled()
        return Evaluation(0.5, 0.4, 0.6, len(examples), 1, 3.0, 0.0)

    config = load_config(None, {**setup, "eval.every": "1", "optim.steps": "3"}.items())
    train(config, step=step, evaluate=evaluate, quiet=True)
    assert modes == [True] * 3


def test_a_scorer_that_fails_later_stops_the_run_and_says_what_is_safe(setup, tmp_path, capsys):
    code = "calls = 0\ndef score(text, row):\n    global calls\n    calls += 1\n    assert calls < 8\n    return 0.0\n"
    (tmp_path / "mine.py").write_text(code)
    setup |= {"eval.scorer": f"{tmp_path / 'mine.py'}:score", "eval.every": "1", "run.checkpoint_every": "1"}
    assert main(words(setup)) == 1
    said = capsys.readouterr().err
    assert "mine.py" in said
    assert "starts anew" in said or "goes on after step" in said


def test_what_the_kernels_refuse_shows_before_the_first_step(setup, tmp_path, capsys):
    for option, value in (("objective.backend", "triton"), ("objective.top_k", "5000")):
        assert main(words({**setup, option: value})) == 2
        assert option.rpartition(".")[2] in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_mistakes_that_are_none_are_warned_of(setup, capsys):
    (tmp := write_rows(Path(setup["data.eval"]), 3)).write_text(
        tmp.read_text() + json.dumps({"problem": "1+1?", "answer": "2"}) + "\n"
    )
    setup["optim.warmup_steps"] = "10"
    assert main(words(setup)) == 0
    said = capsys.readouterr().out
    assert "warning: optim.warmup_steps" in said
    assert "warning: the teacher is not evaluated: 1 rows" in said
