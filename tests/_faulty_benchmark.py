"""Measurements that fail in every way, for the tests of what runs them: `python -m _faulty_benchmark`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benchmarks import runner
from benchmarks.cells import Unavailable
from benchmarks.runner import Item, Report, main


def several(report: Report) -> dict[str, Any]:
    """Some contenders that do nothing wrong, and one that hangs, one that dies, one that raises, one that also leaves
    the device in a state in which it does not answer."""

    def hangs() -> int:
        time.sleep(1000)
        return 0

    def dies() -> int:
        os._exit(7)

    def raises() -> int:
        raise KeyError("nothing there")

    def spoils() -> int:
        runner.answers = lambda _: False
        raise RuntimeError("an illegal memory access was encountered")

    runs = {"first": lambda: 1, "hangs": hangs, "dies": dies, "raises": raises, "spoils": spoils, "last": lambda: 2}
    found = {name: report.attempt(name, run) for name, run in runs.items()}
    return {"contenders": {name: report.out.get(name, {"value": found[name]}) for name in runs}}


def absent(_: Report) -> dict[str, Any]:
    raise Unavailable("there is none")


def broken(_: Report) -> dict[str, Any]:
    raise ValueError("a fault of its own")


def sleeps(_: Report) -> dict[str, Any]:
    time.sleep(1000)
    return {}


def items(_: torch.device) -> list[Item]:
    return [
        Item("a/good", 1, lambda _: {"value": time.time()}),
        Item("a/several", 1, several, patience=2, limit=300),
        Item("a/sleeps", 1, sleeps, limit=4),
        Item("b/broken", 1, broken, limit=300),
        Item("b/absent", 1, absent, limit=300),
        Item("b/last", 1, lambda _: {"value": time.time()}, limit=300),
    ]


if __name__ == "__main__":
    sys.exit(main("_faulty_benchmark", "", items, lambda _: {}))
