"""How long each phase of a step took, and how much memory it needed."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


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
        totals: dict[str, float] = defaultdict(float)
        for phase, start, end in self.spans:
            totals[phase] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        return dict(totals)


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
