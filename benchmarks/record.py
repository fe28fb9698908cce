"""What was measured on GPUs: one JSON file for all of it, and what tables say of where their figures are from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME, DRY_NAME = "gpu.json", "gpu-dry-run.json"


class Results:
    """The file. `machines` (a cell names its own by number: not all need come from one), `cells` by name, `failed` and
    `left_out` with reasons, and `faults`: by measurement, the contenders that ended its process, which a repetition
    leaves out."""

    def __init__(self, path: Path, dry_run: bool = False):
        self.path = path
        self.data: dict[str, Any] = {"dry_run": dry_run, "machines": [], "cells": {}, "failed": {}, "left_out": {},
                                     "faults": {}}  # fmt: skip
        if path.exists():
            self.merge(json.loads(path.read_text(encoding="utf-8")))

    def merge(self, other: dict[str, Any]) -> None:
        """Takes over what `other` holds, in place of older entries of the same names.

        Raises:
            ValueError: one of the two is from a dry run and the other is not.
        """
        if other["dry_run"] != self.data["dry_run"]:
            raise ValueError(f"{self.path} and what is merged into it must both be from a dry run, or neither")
        for name, cell in other["cells"].items():
            self.keep(name, {**cell, "machine": other["machines"][cell["machine"]]}, write=False)
        for kind in ("failed", "left_out"):
            for name, reason in other[kind].items():
                if name not in self.data["cells"]:
                    self._put(kind, name, reason)
        for name, faults in other["faults"].items():
            self.data["faults"].setdefault(name, {}).update(faults)

    def keep(self, name: str, found: dict[str, Any], *, write: bool = True) -> None:
        """`found` has the machine itself under "machine"."""
        machines = self.data["machines"]
        if found["machine"] not in machines:
            machines.append(found["machine"])
        self.forget(name)
        self.data["cells"][name] = {**found, "machine": machines.index(found["machine"])}
        if write:
            self.write()

    def note(self, kind: str, name: str, reason: str) -> None:
        """That `name` "failed" or was "left_out"; what was measured of it before stays."""
        print(f"{name}: {kind.replace('_', ' ')}: {reason}", flush=True)
        self._put(kind, name, reason)
        self.write()

    def _put(self, kind: str, name: str, reason: str) -> None:
        for other in ("failed", "left_out"):
            self.data[other].pop(name, None)
        self.data[kind][name] = reason

    def fault(self, name: str, contender: str, reason: str) -> None:
        self.data["faults"].setdefault(name, {})[contender] = reason
        self.write()

    def faults(self, name: str) -> dict[str, str]:
        return self.data["faults"].get(name, {})

    def forget(self, name: str) -> None:
        for kind in ("cells", "failed", "left_out", "faults"):
            self.data[kind].pop(name, None)

    def write(self) -> None:
        write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """A killed process leaves the old file or the new one, no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def of_step(data: dict[str, Any], step: str) -> list[dict[str, Any]]:
    """The cells of a step that were measured."""
    found = (cell for name, cell in data["cells"].items() if name.startswith(f"{step}/"))
    return [cell for cell in found if "unavailable" not in cell]


def where(data: dict[str, Any], steps: Sequence[str]) -> str:
    """The machines that a table's figures are from, and what is missing; below every table of GPU results."""
    used = sorted({cell["machine"] for step in steps for cell in of_step(data, step)})
    lines = ["Dry run on a CPU at toy sizes: these are no measurements."] if data["dry_run"] else []
    for one in (data["machines"][i] for i in used):
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        device = f"{one['gpu']}, driver {one['driver']}, CUDA {one['cuda']}" if "gpu" in one else one["processor"]
        lines.append(f"{device}, {one['date']}; Python {one['python']}, {versions}.")
    missing = [
        f"{name} ({reason})" for kind in ("failed", "left_out") for name, reason in data[kind].items()
        if name.partition("/")[0] in steps
    ]  # fmt: skip
    return "\n".join(lines + ([f"Not measured: {'; '.join(missing)}."] if missing else []))
