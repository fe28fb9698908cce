"""What a run writes down: times, one line per step, samples, and a display to watch."""

from __future__ import annotations

import json
import math
import os
import sys
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

from opsd.checkpoint import replace_file
from opsd.config import ConfigError


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
    """One more line in `path`: all of it or, on an error, nothing. Numbers that JSON cannot hold become null.

    Raises:
        OSError: the line cannot be written, as on a full disk; `path` is as long as before.
    """
    line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        length = os.fstat(file).st_size
        try:
            # One write, so that killing the process rarely halves a line; a short one means that space ran out, and
            # the next attempt says how.
            while line:
                line = line[os.write(file, line) :]
        except BaseException:
            os.ftruncate(file, length)
            raise
    finally:
        os.close(file)


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON cannot hold, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewind_json(path: Path, step: int) -> None:
    """Forget the records of `path`, as written by `append_json`, that are of later steps than `step`.

    A run that goes on from the checkpoint of `step` calls this first. The last line may be half-written, since the
    process may have been killed at any moment; it is dropped then. `path` is replaced at once and need not exist.

    Raises:
        ConfigError: another line is not a record with a step, so that the file is not what a run leaves.
        OSError: the file cannot be read or replaced; it is as it was.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    lines, kept = data.split(b"\n"), []
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        try:
            of = json.loads(line.decode())["step"]
            if not isinstance(of, int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ConfigError(f"{path}:{number}: not a record with a step: {line[:80]!r}") from None
        if of <= step:
            kept.append(line + b"\n")
    rewound = b"".join(kept)
    if rewound != data:
        replace_file(path, rewound)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a CUDA device the most that was allocated since the last call, or since the start; elsewhere the most
    that the process has had resident since its start, which only grows, or 0 where the system does not tell."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
        if self.live:  # rich before 14.3 ends even a disabled bar with an empty line
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()

    def note(self, text: str, *, style: str | None = None) -> None:
        """A line of its own, above the bar; `style`, as rich spells it, shows in a terminal only."""
        if self.live:
            self.console.print(text, markup=False, style=style)
        elif not self.quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A note that stands out."""
        self.note(f"warning: {text}", style="yellow")

    def advance(self, phase: str, step: int, total: int, text: str, *, every: int | None = None) -> None:
        """`phase` has come to `step` of `total`; `text` says how it stands."""
        if self.live:
            if phase not in self.tasks:
                self.tasks[phase] = self.progress.add_task(phase, total=total, text="")
            self.progress.update(self.tasks[phase], completed=step, text=text)
        elif step % (every or self.every) == 0 or step in (1, total):
            self.note(f"{phase} {step}/{total}  {text}")
