import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import opsd.trackers
from opsd.errors import ConfigError
from opsd.options import TRACKERS
from opsd.trackers import check_trackers, eval_values, make_trackers, train_values

RECORD = {
    "step": 3,
    "loss": 0.25,
    "student_entropy": 1.5,
    "seconds": 4.0,
    "seconds_rollout": 3.0,
    "tokens": 640,
    "tokens_per_second": 160.0,
    "peak_memory_bytes": 2**30,
}
CONFIG = {"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "run": {"dir": None, "trackers": ("tensorboard",)}}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    return tmp_path / "runs" / "tiny-1"


def make(names, run_dir, resume_step=None, warn=pytest.fail):
    return make_trackers(names, run_dir=run_dir, config=CONFIG, resume_step=resume_step, warn=warn)


def killed(run_dir, names, steps):
    """A process that logs `steps` and dies without a word to its trackers."""
    code = f"""
import os
from pathlib import Path
from opsd.trackers import make_trackers
trackers = make_trackers({names!r}, run_dir=Path({str(run_dir)!r}), config={CONFIG!r})
for step in {steps!r}:
    trackers.log(step, {{"train/loss": -float(step)}})
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 9, done.stderr


def scalars(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    texts = {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, texts


def test_names_are_grouped():
    assert train_values(RECORD) == {
        "train/loss": 0.25,
        "train/student_entropy": 1.5,
        "time/step": 4.0,
        "time/rollout": 3.0,
        "train/tokens": 640,
        "time/tokens_per_second": 160.0,
        "train/peak_memory_bytes": 2**30,
    }
    found = eval_values({"step": 5, "accuracy": 0.5, "name": "base", "pass_at": {"1": 0.5, "4": 0.75}})
    assert found == {"eval/accuracy": 0.5, "eval/name": "base", "eval/pass_at/1": 0.5, "eval/pass_at/4": 0.75}
    assert eval_values({"accuracy": 0.5}, of="eval_teacher") == {"eval_teacher/accuracy": 0.5}


def test_tensorboard_reads_back_what_was_logged(run_dir):
    pytest.importorskip("tensorboard")
    with make(["tensorboard"], run_dir) as trackers:
        trackers.log(0, eval_values({"accuracy": 0.5, "name": "base", "low": None, "problems": 8, "kept": True}))
        trackers.log(3, train_values(RECORD))
        trackers.log(4, {"train/loss": math.nan})
        trackers.text(3, "samples/rollout", "# 1 + 1\n\n<b>= 2")
    found, texts = scalars(run_dir)
    assert found["eval/accuracy"] == [(0, 0.5)]
    assert found["eval/problems"] == [(0, 8.0)]
    assert set(found) == {"eval/accuracy", "eval/problems", *train_values(RECORD)}
    assert found["time/rollout"] == [(3, 3.0)]
    assert found["train/loss"][0] == (3, 0.25)
    assert math.isnan(found["train/loss"][1][1])
    assert texts["samples/rollout/text_summary"] == [(3, "    # 1 + 1\n    \n    <b>= 2")]
    shown = texts["config/text_summary"][0][1].replace("\n    ", "\n").strip()
    assert json.loads(shown) == json.loads(json.dumps(CONFIG))


def test_tensorboard_continues_a_killed_run_at_its_checkpoint(run_dir):
    pytest.importorskip("tensorboard")
    killed(run_dir, ["tensorboard"], [0, 1, 2, 3, 4])
    assert scalars(run_dir)[0]["train/loss"] == [(n, -n) for n in range(5)]  # nothing waited to be flushed
    (file,) = (run_dir / "tensorboard").iterdir()  # named by the second, and none passes here until the run is resumed
    file.rename(file.with_name("events.out.tfevents.1600000000.host.1.0"))
    with make(["tensorboard"], run_dir, resume_step=2) as trackers:
        trackers.log(3, {"train/loss": 30.0})
    found, texts = scalars(run_dir)
    assert found["train/loss"] == [(0, 0.0), (1, -1.0), (2, -2.0), (3, 30.0)]
    assert len(texts["config/text_summary"]) == 1


def test_wandb_offline_continues_as_the_same_run(run_dir, tmp_path):
    pytest.importorskip("wandb")
    # In processes of their own: W&B may still write after the end of a run, but not after that of the process.
    code = f"""
import sys
from pathlib import Path
from opsd.trackers import make_trackers
step = int(sys.argv[2])
with make_trackers(
    ["wandb"], run_dir=Path(sys.argv[1]), config={CONFIG!r}, resume_step=step - 1 if step > 1 else None
) as trackers:
    trackers.log(step, {{f"train/marked_{{step}}": 1.0}})
    trackers.text(step, "samples/rollout", f"<b>1 + 1 = {{step}}")
"""
    seen = set()
    for step in (1, 2):
        environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(run_dir), str(step)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        identity = json.loads((run_dir / "trackers.json").read_text())
        (file,) = set(run_dir.glob("wandb/offline-run-*/run-*.wandb")) - seen
        assert file.name == f"run-{identity['id']}.wandb"
        data = file.read_bytes()
        assert [b"train/marked_%d" % n in data for n in (1, 2)] == [step == 1, step == 2]
        assert b"tiny-1" in data
        (page,) = file.parent.glob("files/media/html/**/*.html")
        assert f"&lt;b&gt;1 + 1 = {step}" in page.read_text()
        # Directories are named by the second too.
        file.parent.rename(file.parent.with_name(f"offline-run-2020010{step}_000000-{identity['id']}"))
        seen = set(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(seen) == 2
    assert len({path.name for path in seen}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_trackio_continues_as_the_same_run(run_dir, tmp_path):
    pytest.importorskip("trackio")
    # In a process of its own: trackio reads where it writes to when it is imported.
    code = f"""
import json, sys
from pathlib import Path
from opsd.trackers import make_trackers
for directory in ("tiny-1", "other/tiny-1"):
    run_dir = Path(sys.argv[1]) / directory
    run_dir.mkdir(parents=True, exist_ok=True)
    for resume_step, steps in [(None, (1, 2)), (2, (3,))]:
        with make_trackers(["trackio"], run_dir=run_dir, config={CONFIG!r}, resume_step=resume_step) as trackers:
            for step in steps:
                trackers.log(step, {{"train/loss": step / 2}})
        trackers.log(9, {{"train/loss": 9}})
    with make_trackers(["trackio"], run_dir=run_dir, config={CONFIG!r}, resume_step=3) as trackers:
        trackers.text(3, "samples/rollout", "1 + 1")
from trackio.sqlite_storage import SQLiteStorage
names = SQLiteStorage.get_runs("opsd")
print(json.dumps([[name, SQLiteStorage.get_logs("opsd", name)] for name in names]))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir.parent)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    runs = dict(json.loads([line for line in done.stdout.splitlines() if line.startswith("[[")][-1]))
    assert len(runs) == 2  # not merged, though the directories have one name
    for name, logs in runs.items():
        assert name.startswith("tiny-1-")
        assert [(x["step"], x["train/loss"]) for x in logs if "train/loss" in x] == [(1, 0.5), (2, 1.0), (3, 1.5)]
        assert any("samples/rollout" in x for x in logs)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_the_run_starts(monkeypatch, run_dir, name):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    for start in (check_trackers, lambda names: make(names, run_dir)):
        with pytest.raises(ConfigError, match=rf"run\.trackers .*package {name} .*pip install 'opsd\[{name}\]'"):
            start((name,))
    assert not any(run_dir.iterdir())


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"run\.trackers has 'mlflow'; accepted: tensorboard, wandb, trackio"):
        check_trackers(["mlflow"])


@pytest.mark.parametrize("names", [None, ()])
def test_without_trackers_nothing_is_written(run_dir, names):
    check_trackers(names)
    with make(names, run_dir) as trackers:
        trackers.log(1, {"train/loss": 1.0})
        trackers.text(1, "a", "b")
    assert not any(run_dir.iterdir())


class Recorder:
    """A tracker that fails where it is told to."""

    def __init__(self, fail_at=None):
        self.fail_at, self.logged, self.closed = fail_at, [], []

    def _at(self, where):
        if where == self.fail_at:
            raise ConnectionError("no network")

    def log(self, step, values):
        self._at(step)
        self.logged.append((step, values))

    def text(self, step, name, text):
        self._at(name)

    def close(self, *, failed=False):
        self.closed.append(failed)
        self._at("close")


@pytest.fixture
def recorders(monkeypatch):
    """The two trackers that `make(["wandb", "trackio"], ...)` makes; the first one can be told to fail."""
    made = {"wandb": Recorder(), "trackio": Recorder()}
    monkeypatch.setattr(opsd.trackers, "check_trackers", lambda names: None)
    for name, recorder in made.items():
        monkeypatch.setitem(opsd.trackers._KINDS, name, lambda *_, recorder=recorder: recorder)
    return made


@pytest.mark.parametrize("fail_at", [2, "sample", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(recorders, run_dir, fail_at):
    recorders["wandb"].fail_at = fail_at
    told = []
    trackers = make(["wandb", "trackio"], run_dir, warn=told.append)
    for step in (1, 2, 3):
        trackers.log(step, {"train/loss": step, "name": "x", "none": None})
        trackers.text(step, "sample", "text")
    trackers.close()
    trackers.close()
    assert recorders["trackio"].logged == [(step, {"train/loss": step}) for step in (1, 2, 3)]
    assert recorders["trackio"].closed == [False]
    assert len(recorders["wandb"].logged) == {2: 1, "sample": 1, "close": 3}[fail_at]
    (text,) = told
    assert "wandb" in text
    assert "ConnectionError: no network" in text


def test_an_interrupt_is_no_failure_of_a_tracker(recorders, run_dir):
    def interrupt(step, values):
        raise KeyboardInterrupt

    recorders["wandb"].log = interrupt
    trackers = make(["wandb"], run_dir)
    with pytest.raises(KeyboardInterrupt):
        trackers.log(1, {"train/loss": 1.0})


def test_a_run_that_fails_is_marked_so(recorders, run_dir):
    with pytest.raises(ZeroDivisionError), make(["wandb", "trackio"], run_dir):
        raise ZeroDivisionError
    assert [recorder.closed for recorder in recorders.values()] == [[True], [True]]


def test_a_failing_tracker_warns_by_default(recorders, run_dir):
    recorders["wandb"].fail_at = 1
    trackers = make_trackers(["wandb"], run_dir=run_dir, config={})
    with pytest.warns(UserWarning, match="wandb failed at step 1"):
        trackers.log(1, {"a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log(1, {"a": 1.0})


def test_a_tracker_that_cannot_start_stops_the_run_and_ends_the_others(recorders, run_dir, monkeypatch):
    def broken(*_):
        raise ConnectionError("no network")

    monkeypatch.setitem(opsd.trackers._KINDS, "wandb", broken)
    with pytest.raises(ConfigError, match=r"wandb cannot start: ConnectionError: no network.*WANDB_MODE=offline"):
        make(["trackio", "wandb"], run_dir)
    assert recorders["trackio"].closed == [True]


def test_each_tracker_is_made_once(recorders, run_dir, monkeypatch):
    made = []
    monkeypatch.setitem(opsd.trackers._KINDS, "wandb", lambda *given: made.append(given) or Recorder())
    make(["wandb", "wandb"], run_dir)
    make(["wandb"], run_dir, resume_step=7)
    assert len(made) == 2
    (first, second) = ((directory, identity, step) for directory, identity, _, step in made)
    assert first == (run_dir, second[1], None)
    assert second[2] == 7


def test_an_unreadable_identity_is_named(recorders, run_dir):
    Path(run_dir / "trackers.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"trackers.json: .*remove it"):
        make(["wandb"], run_dir, resume_step=3)
