"""The directory of a run: who may write to it, and what lies where.

config.yaml  run.json  metrics.jsonl  evaluations.jsonl  samples.jsonl  checkpoints/  best/  model/  summary.json
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from opsd import checkpoint, distributed
from opsd.errors import CheckpointError, ConfigError, WriteError, config_error
from opsd.files import UNFINISHED, append_json, remove_unfinished, replace_directory, replace_file, rewind_json
from opsd.models import progress_bars, save_model
from opsd.run import Run

LOCK = ".lock"

NOTHING_OF_VALUE = {LOCK, "config.yaml", "run.json", "evaluations.jsonl"}
"""All that a run leaves that was killed, or failed, before its first step was done: a new one writes it as well."""


class RunDir:
    """Where a run writes; an observer of its steps and evaluations. `saved_step` is that of the newest checkpoint.

    What cannot be written, on a full disk say, is a `WriteError`, which says what is safe.
    """

    def __init__(self, path: Path, run_id: str):
        self.path, self.run_id, self.saved_step = path, run_id, 0

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        with self._writing():
            append_json(self.path / "metrics.jsonl", record)
            for sample in samples:
                append_json(self.path / "samples.jsonl", sample)

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        with self._writing():
            append_json(self.path / "evaluations.jsonl", record)

    def save_model(self, run: Run, name: str) -> None:
        """The model, or its adapter, and the tokenizer, for `from_pretrained`."""
        state = distributed.to_first(run.model.state_dict()) if run.sharded else None
        with self._writing(), progress_bars(False):  # they would break into the display's
            ends = run.engine.end_ids
            replace_directory(self.path / name, lambda fresh: save_model(run.model, run.tokenizer, ends, fresh, state))

    def save_checkpoint(self, step: int, state: dict[str, Any], *, keep: int) -> None:
        """`state` as the checkpoint of `step`; of those before it `keep` stay, itself included."""
        whole = distributed.to_first(state)
        with self._writing():
            checkpoint.save_checkpoint(self.checkpoints, step, whole, run_id=self.run_id, keep=keep)
        self.saved_step = step

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """What a finished run leaves last of all."""
        with self._writing():
            write_json(self.path / "summary.json", summary)

    def rewind(self, step: int) -> None:
        """Takes back what was logged after `step`, of which there is a checkpoint, or after the start with -1."""
        self.saved_step = max(0, step)
        (self.path / "summary.json").unlink(missing_ok=True)
        for name in ("metrics", "evaluations", "samples"):
            rewind_json(self.path / f"{name}.jsonl", step)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def what_is_safe(self) -> str:
        """The end of a message about a run that stops before its end."""
        if not self.saved_step and (self.path / "model").exists():
            return f"the trained model is in {self.path / 'model'}"
        if not self.saved_step:
            return f"no checkpoint was written yet, opsd train --resume {self.path} starts anew"
        return f"opsd train --resume {self.path} goes on after step {self.saved_step}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, CheckpointError) as error:
            raise WriteError(f"{error}; {self.what_is_safe()}") from error


class ReadOnly(RunDir):
    """That of a process which leaves the writing to another one."""

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        pass

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        pass

    def save_model(self, run: Run, name: str) -> None:
        if run.sharded:
            distributed.to_first(run.model.state_dict())

    def save_checkpoint(self, step: int, state: dict[str, Any], *, keep: int) -> None:
        distributed.to_first(state)
        self.saved_step = step

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> None:
        self.saved_step = max(0, step)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """For people to read, too."""
    replace_file(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """While open, no other process may work on the run in `directory`; a process that dies gives it free.

    Raises:
        ConfigError: another process works on it.
    """
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{directory}: another process works on this run") from None
    try:
        yield
    finally:
        lock.release()


def check_new(name: str | None) -> Path | None:
    """`run.dir` of a run that begins.

    Raises:
        ConfigError: it is in use, or holds anything but what an attempt left that never finished a step.
    """
    if name is None:
        return None
    directory = Path(name)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run.dir {name!r} is a file; accepted: a directory, new or empty")
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if any(each not in NOTHING_OF_VALUE and not each.startswith(UNFINISHED) for each in there):
        if "run.json" not in there:
            raise ConfigError(f"run.dir {name!r} is not empty; accepted: a new directory or an empty one")
        raise ConfigError(
            f"run.dir {name!r} already holds a run, which is never overwritten; name a new directory, or go "
            f"on with it: opsd train --resume {directory}"
        )
    return directory


def check_writable(directory: Path | None) -> None:
    """Makes `directory`, or runs/ for a run without one, and a file in it, and takes both away again.

    Raises:
        ConfigError: that is not possible.
    """
    place = directory or Path("runs")
    with config_error(f"run.dir {str(place)!r} cannot be written", OSError):
        missing = [path for path in (place, *place.parents) if not path.exists()]
        try:
            place.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=place).close()
        finally:
            for path in missing:
                with suppress(OSError):  # it was not made, or another run has come into it
                    path.rmdir()


def make_directory(directory: Path | None, model: str) -> Path:
    """`directory`, or the first of runs/<model>-<number> that is not there yet."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    name = re.sub(r"[^\w.-]+", "-", model) or "model"
    for number in itertools.count(1):
        with suppress(FileExistsError):
            made = Path("runs") / f"{name}-{number}"
            made.mkdir(parents=True)
            break
    return made


def read_description(directory: Path) -> dict[str, Any]:
    """`run.json` of the run in `directory`.

    Raises:
        ConfigError: there is none.
    """
    try:
        described = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        described["id"], datetime.fromisoformat(described["created"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} is no run that can be resumed: its run.json cannot be read: {error}") from error
    return described


def check_resumable(directory: Path) -> None:
    """Without a checkpoint a resumed run starts anew, which must not cost what the run left at its end."""
    remove_unfinished(directory)
    left = [name for name in ("model", "summary.json") if (directory / name).exists()]
    if left and not checkpoint.list_checkpoints(directory / "checkpoints"):
        raise ConfigError(
            f"{directory} holds {' and '.join(left)} of a finished run, but no checkpoint to go on from, so that it "
            "would start anew; begin another run in a new run.dir, or move what it left elsewhere"
        )
