"""Runs that are killed, corrupted and starved of disk, against the same run left alone: equal bit for bit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from _models import tokenizer, write_model, write_rows
from safetensors.torch import load_file

from opsd.checkpoint import list_checkpoints

# A server that has imported everything forks each run: it then takes a second, and can be killed at any moment of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["opsd.trainer", "opsd.cli", "peft", "transformers.models.llama.modeling_llama"])

STEPS, EVERY, KILLS = 24, 2, 4
TEACHERS = ("base", "live", "ema", "model")
TIMED = ("seconds", "tokens_per_second", "peak_memory_bytes")


def work(
    argv: list[str], log: str, slow_write: float = 0, file_limit: int | None = None, directory: Path | None = None
) -> None:
    """One process of a run; what it prints goes to `log`."""
    import opsd.checkpoint
    import opsd.files
    from opsd.cli import main

    torch.set_num_threads(1)
    os.chdir(directory or "/")
    with open(log, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        if slow_write:
            flush = opsd.files.flush
            opsd.checkpoint.flush = opsd.files.flush = lambda handle: (flush(handle), time.sleep(slow_write))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.exit(main(argv))


class Runs:
    """A set-up in `directory` and the processes that work on it."""

    def __init__(self, directory: Path, teacher: str, adapted: bool):
        self.directory, self.log = directory, directory / "log"
        write_model(directory / "base")
        options = {
            "model.path": directory / "base",
            "data.train": write_rows(directory / "train.jsonl"),
            "data.eval": write_rows(directory / "eval.jsonl", 2),
            "teacher.kind": teacher,
            "teacher.ema_decay": 0.7,
            "teacher.ema_every": 2,
            "lora.enabled": adapted,
            "lora.dropout": 0.1,
            "optim.steps": STEPS,
            "optim.batch_size": 3,
            "optim.micro_batch_size": 4,
            "optim.lr": 2e-2,
            "optim.schedule": "linear",
            "optim.warmup_steps": 1,
            "rollout.per_prompt": 2,
            "rollout.max_new_tokens": 6,
            "eval.every": 9,
            "eval.keep_best": True,
            "run.device": "cpu",
            "run.checkpoint_every": EVERY,
            "run.sample_every": 7,
        }
        if teacher == "model":
            from _models import model

            model(seed=5).save_pretrained(directory / "other")
            tokenizer().save_pretrained(directory / "other")
            options["teacher.path"] = directory / "other"
        self.options = [f"--{name}={value}" for name, value in options.items()]

    def start(self, run: Path, *extra: str, **how):
        again = (run / "run.json").exists()
        words = ["--resume", str(run)] if again else [*self.options, f"--run.dir={run}"]
        process = FORKS.Process(target=work, args=(["train", *words, *extra], str(self.log)), kwargs=how)
        process.start()
        return process

    def finish(self, run: Path, *extra: str, code: int = 0, **how) -> str:
        process = self.start(run, *extra, **how)
        process.join(120)
        said = self.log.read_text()
        assert process.exitcode == code, said[-3000:]
        return said

    def stop_after(self, run: Path, step: int, **how) -> None:
        """Kills a process of `run` once it has logged `step`."""
        process = self.start(run, **how)
        while process.is_alive() and steps_logged(run) < step:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


def newest(run: Path) -> list[int]:
    """The steps of its checkpoints, the latest first."""
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


def steps_logged(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves and that does not tell the time."""
    found: dict[str, object] = {}
    for directory in ("model", "best"):
        (weights,) = (run / directory).glob("*.safetensors")
        found |= {f"{directory}/{name}": tensor for name, tensor in load_file(weights).items()}
    for name in ("metrics", "evaluations", "samples"):
        lines = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]
    summary = json.loads((run / "summary.json").read_text())
    found |= {name: summary[name] for name in ("steps", "tokens", "evaluations", "best")}
    return found


def assert_same(actual: dict[str, object], expected: dict[str, object]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, torch.Tensor) else actual[name] == value
        assert same, name


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path, "ema", True)


@pytest.fixture
def expected(runs):
    runs.finish(runs.directory / "whole")
    return outcome(runs.directory / "whole")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.thinned(2)
def test_killed_at_random_moments(tmp_path, teacher, adapted):
    runs = Runs(tmp_path, teacher, adapted)
    runs.finish(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    # the run has to be one in which something happens
    moving = [record["divergence"] > 1e-3 and record["grad_norm"] > 1e-3 for record in expected["metrics"]]
    assert sum(moving) > STEPS // 3
    first = load_file(next((tmp_path / "base").glob("*.safetensors")))
    assert adapted or any(not torch.equal(expected[f"model/{n}"], v) for n, v in first.items())

    draw = random.Random(f"{teacher}{adapted}")
    step = json.loads((tmp_path / "whole" / "summary.json").read_text())["seconds"] / STEPS
    killed, run = 1, tmp_path / "killed"
    runs.stop_after(run, EVERY + 1)
    for _ in range(KILLS):
        begun, target = steps_logged(run), steps_logged(run) + draw.randrange(2)
        process = runs.start(run)
        while process.is_alive() and steps_logged(run) < target:
            time.sleep(0.001)
        # from before it has loaded the model to the middle of a later step
        process.join(draw.uniform(0, (2 if target > begun else 8) * step))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    said = runs.finish(run)
    assert killed > 1
    assert_same(outcome(run), expected)
    assert "passed over" not in said  # a kill leaves no bad checkpoint behind, only an unfinished one


def test_killed_while_writing(runs, expected):
    run = runs.directory / "killed"
    checkpoints = run / "checkpoints"
    seen = 0
    for _ in range(3):
        process = runs.start(run, slow_write=0.15)
        while process.is_alive() and not list(checkpoints.glob(".unfinished-*/state.pt")):
            time.sleep(0.002)
        process.kill()
        process.join()
        seen += bool(list(checkpoints.glob(".unfinished-*/state.pt")))
    assert seen == 3
    assert not [path for path in checkpoints.iterdir() if path.name.startswith("step-")]
    runs.finish(run)
    assert_same(outcome(run), expected)
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


def shorten(path: Path) -> None:
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def other_run(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "run": "somebody-else"}))


DAMAGE = {
    "bytes": shorten,
    "corrupted": flip,
    "another run": other_run,
    "no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "cannot be read": lambda path: (path / "manifest.json").write_text('{"format": 1, "ru'),
    "state.pt": lambda path: (path / "state.pt").unlink(),
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(runs, expected):
    run = runs.directory / "damaged"
    runs.stop_after(run, 2 * EVERY + 1)
    last, before = newest(run)
    for reason, damage in DAMAGE.items():
        copy = runs.directory / "copy"
        shutil.copytree(run, copy)
        damage(copy / "checkpoints" / f"step-{last:08d}")
        said = runs.finish(copy)
        assert f"step-{last:08d}" in said
        assert reason in said
        assert f"going on after step {before}\n" in said
        assert_same(outcome(copy), expected)
        shutil.rmtree(copy)
    for path in (run / "checkpoints").iterdir():
        flip(path)
    said = runs.finish(run, code=1)
    assert "no checkpoint can be used" in said
    assert all(f"step-{step:08d}" in said for step in (last, before))


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_one(runs, expected):
    run = runs.directory / "full"
    runs.stop_after(run, EVERY + 1)
    kept = newest(run)
    size = (run / "checkpoints" / f"step-{kept[0]:08d}" / "state.pt").stat().st_size
    said = runs.finish(run, code=1, file_limit=size // 2)
    assert f"step-{kept[0] + EVERY:08d}: cannot be written" in said
    assert f"last good one is step-{kept[0]:08d}" in said
    assert f"--resume {run} goes on after step {kept[0]}\n" in said
    assert newest(run) == kept
    assert not list((run / "checkpoints").glob(".*"))
    runs.finish(run)
    assert_same(outcome(run), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(runs, expected, number):
    run = runs.directory / "stopped"
    process = runs.start(run)
    while process.is_alive() and steps_logged(run) < 1:
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    done = steps_logged(run)
    assert 1 <= done < STEPS
    assert (run / "checkpoints" / f"step-{done:08d}").is_dir()
    assert f"goes on after step {done}" in runs.log.read_text()
    runs.finish(run)
    assert_same(outcome(run), expected)


def test_a_finished_run_can_be_made_longer_and_nothing_else(runs):
    runs.options.append("--optim.schedule=constant")
    runs.finish(runs.directory / "long", f"--optim.steps={STEPS + 2}")
    runs.finish(runs.directory / "short")
    said = runs.finish(runs.directory / "short", "--optim.lr=1", code=2)
    assert "optim.lr is 1.0" in said
    assert "0.02" in said
    runs.finish(runs.directory / "short", f"--optim.steps={STEPS + 2}")
    long, short = (outcome(runs.directory / name) for name in ("long", "short"))
    assert short["metrics"] == long["metrics"]
    for name, value in long.items():
        if name.startswith("model/"):
            assert torch.equal(short[name], value)


def test_a_run_that_stopped_early_is_finished_and_can_go_on(runs):
    """Its last evaluation is between two checkpoints, and at a rate this low no evaluation is better than the first."""
    runs.options += ["--run.checkpoint_every=5", "--eval.every=3", "--optim.lr=1e-9"]
    whole, run = runs.directory / "whole", runs.directory / "early"
    runs.finish(whole)
    said = runs.finish(run, "--eval.patience=2")
    assert "stopped early" in said
    stopped = outcome(run)
    assert stopped["steps"] == 9
    assert newest(run) == [9, 5]
    said = runs.finish(run)
    assert "the run is finished: it stopped early after step 9, by eval.patience 2;" in said
    assert "starts anew" not in said
    assert_same(outcome(run), stopped)
    assert json.loads((run / "summary.json").read_text())["stopped_early"]
    said = runs.finish(run, "--eval.patience=none")
    assert "going on after step 9\n" in said
    assert_same(outcome(run), outcome(whole))
    assert not json.loads((run / "summary.json").read_text())["stopped_early"]
    said = runs.finish(run)
    assert f"the run is finished: step {STEPS} was the last;" in said
    assert_same(outcome(run), outcome(whole))


def test_resumed_with_less_patience_than_has_passed_it_ends_there(runs):
    runs.options += ["--eval.every=3", "--optim.lr=1e-9"]
    run = runs.directory / "run"
    runs.stop_after(run, 11)
    at = newest(run)[0]
    assert "accuracy, trained" in runs.finish(run, "--eval.patience=1")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == at
    assert "trained" in summary["evaluations"]


@pytest.mark.parametrize(("gone", "left"), [([], "model and summary.json"), (["model"], "summary.json")])
def test_a_finished_run_without_a_checkpoint_does_not_start_anew(runs, gone, left):
    run = runs.directory / "run"
    runs.finish(run, "--run.checkpoint_every=0", "--optim.steps=2")
    for name in gone:
        shutil.rmtree(run / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = runs.finish(run, "--optim.steps=3", code=2)
    assert f"{run} holds {left} of a finished run, but no checkpoint" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_elsewhere_does_not_push_out_good_ones(runs):
    run = runs.directory / "run"
    runs.stop_after(run, EVERY + 1)
    good = newest(run)[0]
    later = run / "checkpoints" / "step-00000099"
    shutil.copytree(run / "checkpoints" / f"step-{good:08d}", later)
    other_run(later)
    said = runs.finish(run, "--run.keep_checkpoints=1", f"--optim.steps={good + EVERY}")
    assert "warning: passed over a checkpoint" in said
    assert "warning: warning" not in said
    assert newest(run) == [99, good + EVERY]
    assert f"going on after step {good + EVERY}" in runs.finish(run, f"--optim.steps={good + EVERY + 1}")


def test_a_full_disk_under_the_trained_model(runs):
    run = runs.directory / "full"
    runs.options.append("--run.checkpoint_every=0")
    size = next((runs.directory / "base").glob("*.safetensors")).stat().st_size
    said = runs.finish(run, "--lora.enabled=false", "--optim.steps=1", code=1, file_limit=size // 2)
    assert "starts anew" in said
    assert "Traceback" not in said
    assert not list(run.glob(".unfinished*"))
    assert not (run / "model").exists()
    assert not (run / "best").exists()


def test_two_processes_do_not_share_a_run(runs):
    run = runs.directory / "run"
    first = runs.start(run)
    while first.is_alive() and steps_logged(run) < 1:
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    second = FORKS.Process(target=work, args=(["train", "--resume", str(run)], str(runs.directory / "second")))
    second.start()
    second.join()
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 2)
    assert "another process" in (runs.directory / "second").read_text()


def test_from_another_working_directory_and_after_a_move(runs, expected, monkeypatch):
    here = {f"--{name}": str(runs.directory) for name in ("model.path", "data.train", "data.eval")}
    absolute = list(runs.options)
    runs.options = [o.replace(f"{runs.directory}/", "") if o.split("=")[0] in here else o for o in runs.options]
    assert runs.options != absolute
    run = runs.directory / "run"
    runs.stop_after(run, EVERY + 1, directory=runs.directory)
    moved = runs.directory / "elsewhere"
    shutil.move(run, moved)
    shutil.move(runs.directory / "base", runs.directory / "base-2")
    said = runs.finish(moved, code=2)
    assert "model.path" in said
    runs.finish(moved, f"--model.path={runs.directory / 'base-2'}")
    assert_same(outcome(moved), expected)


def test_evaluations_may_change_and_the_rows_they_had_may_not(runs):
    run = runs.directory / "run"
    runs.stop_after(run, 12)
    said = runs.finish(run, "--eval.max_problems=1")
    assert "begins anew" in said
    assert "begins anew" not in runs.finish(run, f"--optim.steps={STEPS + 1}")
    write_rows(runs.directory / "eval.jsonl", 3, solution="another")
    assert "what data.eval names has changed" in runs.finish(run, f"--optim.steps={STEPS + 2}", code=2)


def test_another_model_or_other_data_is_named(runs):
    run = runs.directory / "run"
    runs.stop_after(run, 2)
    write_rows(runs.directory / "train.jsonl", 7)
    assert "what data.train names has changed" in runs.finish(run, code=2)
    write_rows(runs.directory / "train.jsonl")
    from _models import model

    model(seed=9).save_pretrained(runs.directory / "base")
    assert "what model.path names has changed" in runs.finish(run, code=2)


def test_another_teacher_is_named(tmp_path):
    runs = Runs(tmp_path, "model", False)
    runs.stop_after(tmp_path / "run", 2)
    from _models import model

    model(seed=6).save_pretrained(tmp_path / "other")
    assert "what teacher.path names has changed" in runs.finish(tmp_path / "run", code=2)


def test_what_is_no_run_is_named(tmp_path, capsys):
    from opsd.cli import main

    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
