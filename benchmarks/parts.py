"""What there is to measure on one GPU beside the loss itself, part by part, each within a budget of time.

    python -m benchmarks.parts --part checks attention --out DIR

Parts: `checks` (the tests that need a device, the alignment of causal masks, compute-sanitizer where it is installed),
`attention` and `tuning` (benchmarks.attention), `step` and `longest` (benchmarks.step), `rollouts`
(benchmarks.rollouts), `learning` (benchmarks.curves). The loss is measured by `python -m benchmarks.gpu`.

Each part writes PART-gpu.json after every cell. What no longer fits into `--seconds` is listed there as left out, so
that a later command, told what to do by `--model`, `--training` and `--only`, adds it to the same file; `--merge` puts
files from elsewhere into those of benchmarks/results, and `--table` makes the tables from these. `--dry-run` does all
of it on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, curves, rollouts, step
from benchmarks.cells import Unavailable
from benchmarks.gpu import ROOT, run_tests
from benchmarks.record import Record, merge
from benchmarks.report import replace_section

RESULTS = Path(__file__).parent / "results"
SECONDS = 540.0  # of each part: ten minutes, less the time to start and to end what is under way
TESTS = {
    "cuda": [["tests/gpu"], ["tests/packing/test_dual_hidden_states.py"]],
    "cpu": [["tests/gpu/test_triton_attention_gpu.py"]],
}
TOOLS = ("memcheck", "racecheck")
SMALL = """
import torch
from benchmarks.attention import HEADS, backend, layouts, measure
student, teacher = layouts(4, 64, 0, torch.device("cuda"))
measure(backend("triton"), student, teacher, HEADS["cpu"]["4:2"], torch.bfloat16, True)
"""


def checks(record: Record) -> None:
    device = record.device
    record.measure("alignment", lambda: alignment(device))
    for arguments in TESTS[device.type]:

        def tests(arguments: list[str] = arguments) -> dict[str, Any]:
            (found,) = run_tests(record.deadline, [arguments])
            return {**found, "agree": found["status"] == "0"}

        record.measure(" ".join(arguments), tests)
    for tool in TOOLS:
        record.measure(f"compute-sanitizer {tool}", lambda t=tool: sanitized(t, record.deadline))


def alignment(device: torch.device) -> dict[str, Any]:
    """That a causal `varlen_attn` of fewer queries than keys lets the last query see the last key."""
    from opsd_kernels.packing.attention import _check_alignment

    if device.type != "cuda":
        raise Unavailable("varlen_attn needs a GPU")
    _check_alignment("varlen", device, torch.bfloat16)
    return {"varlen_attn": "the last query sees the last key"}


def sanitized(tool: str, deadline: float) -> dict[str, Any]:
    """The Triton attention, both ways, on a few rows."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Unavailable("compute-sanitizer is not installed")
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device")
    # Without torch's cache each tensor is an allocation of its own, whose bounds are known.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": _path()}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL]
    limit = max(1.0, min(180.0, deadline - time.monotonic()))
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"stopped after {limit:.0f} s") from None
    tail = (ran.stdout + ran.stderr).strip().splitlines()[-20:]
    print("\n".join(tail[-2:]), flush=True)
    return {"status": ran.returncode, "tail": tail, "agree": ran.returncode == 0}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


PARTS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "checks": (checks, ()),
    "attention": (attention.run, ("rounds", "only")),
    "tuning": (attention.tune, ("only",)),
    "step": (step.run, ("models", "trainings", "rounds", "only")),
    "longest": (step.longest, ("models", "trainings", "memory", "only")),
    "rollouts": (rollouts.run, ("models", "only")),
    "learning": (curves.run, ("only",)),
}
"""Each part and the options that it takes."""


def tables(directory: Path) -> dict[str, str]:
    """The README's sections, by name, of the parts that there are results of."""
    stored = {}
    for part in PARTS:
        path = directory / f"{part}-gpu.json"
        if path.exists():
            stored[part] = json.loads(path.read_text(encoding="utf-8"))
    made = {}
    if "attention" in stored:
        made["attention-gpu"] = f"{attention.table(stored['attention'])}\n\n{where(stored['attention'])}"
    if "step" in stored:
        found = stored["step"]
        both = [step.table(found, stored.get("longest")), step.phases_table(found), where(found)]
        made["step-gpu"] = "\n\n".join(both)
    if "rollouts" in stored:
        made["rollouts-gpu"] = f"{rollouts.table(stored['rollouts'])}\n\n{where(stored['rollouts'])}"
    return made


def where(stored: dict[str, Any]) -> str:
    """The machines that a table's figures are from, and what is missing."""
    used = sorted({cell["machine"] for cell in stored["cells"]})
    lines = []
    for one in (stored["machines"][i] for i in used):
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        device = f"{one['gpu']}, driver {one['driver']}, CUDA {one['cuda']}" if "gpu" in one else one["processor"]
        lines.append(f"{device}, {one['date']}; {versions}.")
    missing = [f"{one['key']} ({one['reason']})" for one in stored["left_out"]]
    return "\n".join(lines + ([f"Left out: {'; '.join(missing)}."] if missing else []))


def fold(path: Path, directory: Path) -> None:
    """Adds the cells of `path` to the file of the same name in `directory`."""
    new, target = json.loads(path.read_text(encoding="utf-8")), directory / path.name
    stored = {"machines": [], "cells": [], "left_out": []}
    if target.exists():
        stored = json.loads(target.read_text(encoding="utf-8"))
    target.write_text(json.dumps(merge(stored, new), indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the budget of each part")
    parser.add_argument("--model", nargs="+", help="of step, longest and rollouts, such as 4B")
    parser.add_argument("--training", nargs="+", choices=step.TRAININGS, help="of step and longest")
    parser.add_argument("--only", nargs="+", help="contenders, ways, kernels or courses by name")
    parser.add_argument("--rounds", type=int, help="of attention and step")
    parser.add_argument("--memory", nargs="+", type=float, help="of longest: GiB, 0: all there is")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy sizes")
    parser.add_argument("--merge", nargs="+", type=Path, help="run nothing: add these files' cells to those of --out")
    parser.add_argument("--table", action="store_true", help="run nothing: make the README's tables from --out")
    options = parser.parse_args(arguments)
    if options.merge:
        for path in options.merge:
            fold(path, options.out)
        return 0
    if options.table:
        for name, text in tables(options.out).items():
            print(f"{text}\n")
            replace_section(name, text)
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run does without")
    device = torch.device("cpu" if options.dry_run else "cuda")
    given = {
        "models": options.model, "trainings": options.training, "only": options.only, "rounds": options.rounds,
        "memory": options.memory,
    }  # fmt: skip
    failed = 0
    for part in options.part:
        path = options.out / f"{part}-gpu{'-dry-run' * options.dry_run}.json"
        record = Record(path, device, options.seconds)
        run, takes = PARTS[part]
        print(f"== {part}", flush=True)
        run(record, **{name: given[name] for name in takes})
        failed += record.failed
        print(f"{path}: {len(record.data['cells'])} cells, {len(record.data['left_out'])} left out", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
