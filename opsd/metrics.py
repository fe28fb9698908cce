"""What a run writes down: times, one line per step, samples, and a display to watch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`. On a GPU the device's time, by events, without waiting for it."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans.append((phase, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sums by phase; on a GPU this waits for the last event."""
        if self.on_gpu and self.spans:
            self.spans[-1][2].synchronize()
        totals: dict[str, float] = {}
        for phase, start, end in self.spans:
            span = start.elapsed_time(end) / 1000 if self.on_gpu else end - start
            totals[phase] = totals.get(phase, 0.0) + span
        return totals


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """One more line in `path`. Numbers that JSON cannot hold become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")


def host_values(tensors: Mapping[str, torch.Tensor | float]) -> dict[str, float]:
    """0-d tensors and numbers as numbers, with a single transfer from the device."""
    on_device = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    stacked = torch.stack([value.detach().double() for value in on_device.values()]).tolist() if on_device else []
    return {name: float(value) for name, value in {**tensors, **dict(zip(on_device, stacked, strict=True))}.items()}


class Display:
    """Progress: a bar in a terminal, else a plain line every so many steps. `quiet` shows nothing."""

    def __init__(self, *, every: int = 1, quiet: bool = False):
        self.console, self.every, self.quiet = Console(highlight=False), every, quiet
        self.live = self.console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.live:
            self.console.print(text, markup=False)
        elif not self.quiet:
            print(text, flush=True)

    def advance(self, phase: str, step: int, total: int, text: str, *, every: int | None = None) -> None:
        """`phase` has come to `step` of `total`; `text` says how it stands."""
        if self.live:
            if phase not in self.tasks:
                self.tasks[phase] = self.progress.add_task(phase, total=total, text="")
            self.progress.update(self.tasks[phase], completed=step, text=text)
        elif step % (every or self.every) == 0 or step in (1, total):
            self.note(f"{phase} {step}/{total}  {text}")
