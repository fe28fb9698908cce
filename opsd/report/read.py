"""What run directories hold, as plain data, from their files alone: neither a model nor the training loop is needed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opsd.errors import ConfigError

Record = dict[str, Any]


@dataclass
class RunData:
    """What a run directory holds, as far as it could be read; `notes` says what could not."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)  # empty: the run is not finished
    started: dict[str, Any] = field(default_factory=dict)  # of run.json: when and with which packages it began
    metrics: list[Record] = field(default_factory=list)  # one for each step, in order; at least one
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def options(self) -> dict[str, Any]:
        """section.option: value."""
        sections = {name: values for name, values in self.config.items() if isinstance(values, dict)}
        return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}

    def values(self, metric: str) -> list[float]:
        """Those of `metric` that are finite numbers, in the order of the steps."""
        return [value for record in self.metrics if (value := finite(record.get(metric))) is not None]

    def total(self, metric: str) -> float:
        return sum(self.values(metric))

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"]

    @property
    def seconds(self) -> float:
        """Of the whole run; of its steps alone while it is not finished."""
        return finite(self.summary.get("seconds")) or self.total("seconds")

    def evaluation(self, name: str) -> Record | None:
        """The latest of that name."""
        return next((e for e in reversed(self.evaluations) if e.get("name") == name), None)

    @property
    def trained(self) -> Record | None:
        """The evaluation after training, or the latest of the model in training."""
        during = [e for e in self.evaluations if e.get("name") not in ("base", "teacher")]
        return self.evaluation("trained") or max(during, key=lambda e: e["step"], default=None)

    @property
    def warnings(self) -> dict[str, list[int]]:
        """The steps of each warning."""
        found: dict[str, list[int]] = {}
        for record in self.metrics:
            given = record.get("warnings")
            for text in given if isinstance(given, list) else []:
                found.setdefault(str(text), []).append(record["step"])
        return found


def read_run(directory: str | Path, name: str | None = None) -> RunData:
    """What is in a run directory. Files that are missing, and lines that are half written, end up in `notes`.

    Raises:
        ConfigError: it is no run directory, or no step has been recorded in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"{directory}: {'not a directory' if path.exists() else 'there is no such run directory'}")
    if not (path / "metrics.jsonl").exists():
        missing = "no metrics.jsonl: no step was recorded" if (path / "config.yaml").exists() else "not a run directory"
        raise ConfigError(f"{directory}: {missing}")
    run = RunData(path, name or path.resolve().name)
    # Of a step that was run twice, before and after an interruption, the later record counts.
    metrics = {r["step"]: r for r in _read_lines(run, "metrics.jsonl", step=lambda step: type(step) is int)}
    if not metrics:
        raise ConfigError(f"{directory}: metrics.jsonl holds no step that can be read")
    run.metrics = [metrics[step] for step in sorted(metrics)]
    evaluations = _read_lines(run, "evaluations.jsonl", step=_known, accuracy=_known)
    run.evaluations = list({(e["step"], str(e.get("name"))): e for e in evaluations}.values())
    run.samples = _read_lines(run, "samples.jsonl", rollout=lambda value: isinstance(value, str))
    run.config = _read_mapping(run, "config.yaml", yaml.safe_load)
    run.summary = _read_mapping(run, "summary.json", json.loads)
    run.started = _read_mapping(run, "run.json", json.loads)
    return run


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell the runs apart: as few of the last folders as do."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(p) for p in parts]
    for depth in range(max(map(len, parts)), 0, -1):
        shorter = ["/".join(p[-depth:]) for p in parts]
        if len(set(shorter)) < len(set(parts)):
            break
        names = shorter
    return names


def finite(value: Any) -> float | None:
    """`value` if it is a number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _known(value: Any) -> bool:
    return finite(value) is not None


def _read_lines(run: RunData, name: str, **needed: Callable[[Any], bool]) -> list[Record]:
    """The records of a file of JSON lines in which each key of `needed` has a value as its function wants it."""
    text = _read_text(run, name)
    lines = [] if text is None else text.split("\n")
    records, bad, lacking = [], [], 0
    for number, line in enumerate(lines, 1):
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if not isinstance(record, dict):
            bad += [number] if line.strip() else []
        elif all(wanted(record.get(key)) for key, wanted in needed.items()):
            records.append(record)
        else:
            lacking += 1
    if bad and bad[-1] == len(lines):  # no newline after it
        run.notes.append(f"the last line of {name} is half written and left out")
        bad.pop()
    if bad:
        run.notes.append(f"{name}: {len(bad)} lines are no records and are left out, the first is line {bad[0]}")
    if lacking:
        run.notes.append(f"{name}: {lacking} records without {' or '.join(needed)} are left out")
    return records


def _read_mapping(run: RunData, name: str, load: Callable[[str], Any]) -> dict[str, Any]:
    text, loaded = _read_text(run, name), None
    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
        loaded = {} if text is None else load(text)
    if not isinstance(loaded, dict):
        run.notes.append(f"{name} cannot be read")
    return loaded if isinstance(loaded, dict) else {}


def _read_text(run: RunData, name: str) -> str | None:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        run.notes.append(f"{name} is missing" + (": the run is not finished" if name == "summary.json" else ""))
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
    return None
