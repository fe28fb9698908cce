"""What benchmarks of many cells keep: a JSON file, written after every cell, within a budget of time.

A file holds `machines` (a cell names its own by number: not all need come from one), `cells`, each with its `key`, and
`left_out`: each key that was to be measured and was not, with the reason.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Unavailable
from benchmarks.measure import machine


class Record:
    """A part's results. What `path` already holds of other cells stays, and so does what was measured of a cell that
    is left out this time."""

    def __init__(self, path: Path, device: torch.device, seconds: float = math.inf):
        self.path, self.device = path, device
        self.deadline = time.monotonic() + seconds
        self.data: dict[str, Any] = {"machines": [], "cells": [], "left_out": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
        self.machine = _number(self.data["machines"], machine(device))
        self.failed = 0
        self._longest: dict[str, float] = {}

    def measure(self, key: str, run: Callable[[], dict[str, Any]], *, like: str = "") -> None:
        """Keeps what `run` returns as the cell `key`, or why there is nothing.

        It is not begun where the time that is left is less than what the longest cell `like` it took. `run` may return
        an entry "left_out", what it did not come to; such keys are named after this one.
        """
        began = time.monotonic()
        if began + self._longest.get(like, 0.0) > self.deadline:
            self.leave_out(key, "the time is used up")
            return
        print(key, flush=True)
        reason: str | None = None
        found: dict[str, Any] = {}
        try:
            found = run()
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Unavailable as error:
            reason = str(error)
        except Exception as error:  # the other cells are worth having
            self.failed += 1
            reason = f"failed: {type(error).__name__}: {str(error)[:500]}"
        release(self.device)  # outside of the handlers: an exception holds its frames, and they what was computed
        seconds = time.monotonic() - began
        self._longest[like] = max(self._longest.get(like, 0.0), seconds)
        if reason is not None:
            self.leave_out(key, reason)
            return
        if found.get("agree") is False:  # kept all the same, to be looked at
            self.failed += 1
            print(f"{key}: the results do not agree", flush=True)
        self._forget(key)
        for name, why in found.pop("left_out", {}).items():
            self.leave_out(f"{key} {name}", why)
        self.data["cells"] = [cell for cell in self.data["cells"] if cell["key"] != key]
        self.data["cells"].append({"key": key, "machine": self.machine, "took": round(seconds, 1), **found})
        self.write()

    def leave_out(self, key: str, reason: str) -> None:
        """Says and keeps that `key` was not measured."""
        print(f"{key}: left out: {reason}", flush=True)
        self.data["left_out"] = [one for one in self.data["left_out"] if one["key"] != key]
        self.data["left_out"].append({"key": key, "reason": reason})
        self.write()

    def _forget(self, key: str) -> None:
        kept = [one for one in self.data["left_out"] if one["key"] != key and not one["key"].startswith(f"{key} ")]
        self.data["left_out"] = kept

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")  # a killed process leaves the old or the new, no half
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def _number(machines: list[dict[str, Any]], here: dict[str, Any]) -> int:
    if here not in machines:
        machines.append(here)
    return machines.index(here)


def merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The cells of both, those of `new` in place of older ones."""
    machines = list(into["machines"])
    cells = [{**cell, "machine": _number(machines, new["machines"][cell["machine"]])} for cell in new["cells"]]
    measured = {cell["key"] for cell in cells}
    cells = [cell for cell in into["cells"] if cell["key"] not in measured] + cells
    # Of a cell that was measured again only the new file knows what it lacks.
    left_out = {
        one["key"]: one
        for one in into["left_out"]
        if not any(one["key"] == key or one["key"].startswith(f"{key} ") for key in measured)
    }
    left_out |= {one["key"]: one for one in new["left_out"]}
    return {"machines": machines, "cells": cells, "left_out": list(left_out.values())}


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of the device there is nothing left to give back
            torch.cuda.empty_cache()
