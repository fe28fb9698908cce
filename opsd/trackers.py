"""The same numbers as in `metrics.jsonl`, sent to TensorBoard, Weights & Biases or trackio.

The files of the run directory are the record of a run; a tracker is a view of it. So a tracker that cannot start stops
the run before its first step, and one that fails later is let go with a warning.
"""

from __future__ import annotations

import html
import importlib
import json
import secrets
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opsd.errors import ConfigError
from opsd.files import replace_file
from opsd.options import TRACKERS

PROJECT = "opsd"
"""What W&B and trackio file runs under."""


class Tracker(Protocol):
    """A place that numbers are sent to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name; a slash groups names."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step, shown verbatim."""

    def close(self, *, failed: bool = False) -> None:
        """Send what is pending and end the run, which `failed` if it did not come to its end."""


def check_trackers(names: Sequence[str] | None) -> None:
    """Import the packages behind `names`, for a run to call before anything that takes time.

    Raises:
        ConfigError: an unknown name, or a package that cannot be imported.
    """
    for name in names or ():
        if name not in TRACKERS:
            raise ConfigError(f"run.trackers has {name!r}; accepted: {', '.join(TRACKERS)}")
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except Exception as error:  # a package too old or too new for another fails in any way
            raise ConfigError(
                f"run.trackers has {name!r}, but the package {name} cannot be imported: pip install 'opsd[{name}]' "
                f"({type(error).__name__}: {error})"
            ) from error


def make_trackers(
    names: Sequence[str] | None,
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    resume_step: int | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Trackers:
    """The trackers called `names`, as one.

    A run that is resumed continues in each tracker as the same run: `trackers.json` in `run_dir` keeps what identifies
    it. TensorBoard forgets what was logged after `resume_step`; the others keep it beside what the resumed run logs.

    Args:
        names: of `opsd.options.TRACKERS`; None or none of them: everything logged is ignored.
        run_dir: exists; TensorBoard and W&B write below it, trackio where it always does (`TRACKIO_DIR`).
        config: nested options of the run, for display.
        resume_step: the last step that counts, or None for a new run.
        warn: called once for each tracker that fails later on.

    Raises:
        ConfigError: a tracker cannot start.
    """
    check_trackers(names)
    trackers = Trackers({}, warn)
    for name in dict.fromkeys(names or ()):
        try:
            trackers.made[name] = _KINDS[name](run_dir, _identity(run_dir), config, resume_step)
        except Exception as error:
            trackers.close(failed=True)
            if isinstance(error, ConfigError):
                raise
            hint = "; without a network or an account WANDB_MODE=offline helps" if name == "wandb" else ""
            raise ConfigError(f"run.trackers: {name} cannot start: {type(error).__name__}: {error}{hint}") from error
    return trackers


class Trackers:
    """Several trackers as one, also as a context. An error of one is given to `warn`, after which it is left alone;
    none is ever raised."""

    def __init__(self, made: dict[str, Tracker], warn: Callable[[str], None]):
        self.made, self._warn = made, warn

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among `values`; whatever else is among them stays."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if numbers:
            self._each(f"at step {step}", lambda tracker: tracker.log(step, numbers))

    def text(self, step: int, name: str, text: str) -> None:
        """Send a text, such as a rollout."""
        self._each(f"at step {step}", lambda tracker: tracker.text(step, name, text))

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        self.log(record["step"], train_values(record))
        for sample in samples:
            self.text(sample["step"], "samples/rollout", sample["rollout"])

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        passes = {str(passed["k"]): passed["value"] for passed in record["pass_at"]}
        of = record["name"] if record["name"] in ("base", "teacher") else "eval"
        self.log(record["step"], eval_values({**record, "pass_at": passes}, of=of))

    def close(self, *, failed: bool = False) -> None:
        """End the run in every tracker; closing again does nothing."""
        self._each("at the end", lambda tracker: tracker.close(failed=failed))
        self.made.clear()

    def _each(self, when: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.made.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.made[name]
                why = f"({type(error).__name__}: {error}); the run goes on and metrics.jsonl has everything"
                self._warn(f"the tracker {name} failed {when} and gets nothing more {why}")


def train_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `metrics.jsonl` under the names of trackers: train/loss, time/rollout, time/tokens_per_second."""
    times = {"seconds": "time/step", "tokens_per_second": "time/tokens_per_second"}
    times |= {name: f"time/{name.removeprefix('seconds_')}" for name in record if name.startswith("seconds_")}
    return {times.get(name, f"train/{name}"): value for name, value in record.items() if name != "step"}


def eval_values(evaluation: Mapping[str, Any], *, of: str = "eval") -> dict[str, Any]:
    """An evaluation under the names of trackers: eval/accuracy, and eval/pass/4 for what is nested."""
    values: dict[str, Any] = {}
    for name, value in evaluation.items():
        if isinstance(value, Mapping):
            values |= eval_values(value, of=f"{of}/{name}")
        elif name != "step":
            values[f"{of}/{name}"] = value
    return values


def _identity(run_dir: Path) -> dict[str, str]:
    """What W&B and trackio know the run by, the same whenever it is resumed."""
    path = run_dir / "trackers.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {"id": kept["id"], "name": kept["name"]}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not what names a run to its trackers ({error}); remove it to start anew") from error
    identity = {"id": secrets.token_hex(4), "name": run_dir.resolve().name}
    replace_file(path, json.dumps(identity) + "\n")
    return identity


class _TensorBoard:
    def __init__(self, run_dir, identity, config, resume_step):
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop the events from purge_step on that earlier files hold.
        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if resume_step is None:
            self.text(0, "config", json.dumps(config, indent=2, default=str))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # The writer's thread waits for minutes; a killed run would lose steps that its checkpoint has.
        self.writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, textwrap.indent(text, "    ", lambda _: True), step)
        self.writer.flush()

    def close(self, *, failed: bool = False) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run_dir, identity, config, resume_step):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=PROJECT,
            id=identity["id"],
            name=identity["name"],
            dir=str(run_dir),
            config=json.loads(json.dumps(config, default=str)),
            resume="allow" if resume_step is not None else None,
            settings=wandb.Settings(console="off"),  # capturing the output would garble the progress bar
        )
        # W&B's own step only ever grows, so that it would refuse the steps which a resumed run repeats.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self, *, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, run_dir, identity, config, resume_step):
        import trackio

        self.trackio = trackio
        # Its names are those of all runs of a project, wherever their directories are.
        self.run = trackio.init(
            project=PROJECT,
            name=f"{identity['name']}-{identity['id']}",
            config=json.loads(json.dumps(config, default=str)),
            resume="never" if resume_step is None else "allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: self.trackio.Markdown(textwrap.indent(text, "    ", lambda _: True))}, step=step)

    def close(self, *, failed: bool = False) -> None:
        self.trackio.finish()


_KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
