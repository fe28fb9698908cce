"""Everything for one GPU within ten minutes: `python -m benchmarks.gpu --out DIR`.

Runs the GPU tests, measures the machine's two ceilings (a large bfloat16 product, a large copy), then the core cells
against every contender, then sweeps along one axis at a time against the quick ones. What no longer fits in the time
box is skipped and listed. `--dry-run` does all of it on the CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cells import FLOOR, Cell, Inputs, contenders
from benchmarks.measure import machine, measure, timed

ROOT = Path(__file__).parent.parent
SECONDS = 570.0  # of the ten minutes, less the time to start and to write
TEST_SECONDS = 180.0
ROUNDS = 10
# All that use a GPU where there is one. The attention's last: it compiles some sixty kernels, a few seconds each, and
# what is measured here is the loss.
TESTS = [["tests/gpu/test_triton_gpu.py"], ["tests/kernels/test_peers.py"], ["tests/gpu/test_triton_attention_gpu.py"]]


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: tuple[int, int]
    vocab: int
    dtype: str
    more_tokens: tuple[int, ...]
    more_vocab: tuple[int, ...]
    workspaces: tuple[int, ...]  # MiB
    product: int  # side of the square matrices
    copy: int  # bytes


FULL = Sizes(
    8192, (2048, 4096), 151936, "bfloat16", (512, 1024, 2048, 4096, 32768), (32003, 50257, 262144),
    (256, 512, 768, 3072), 8192, 4 << 30,
)  # fmt: skip
TOY = Sizes(64, (16, 32), 1009, "float32", (8, 128), (503,), (8,), 128, 1 << 20)
MORE_BETAS = (0.1, 0.9)


@dataclass(frozen=True)
class Item:
    """One cell to measure, and in which part of the report it belongs."""

    part: str
    cell: Cell
    names: list[str]


def plan(sizes: Sizes) -> Iterator[Item]:
    """Most important first. Compiling takes tens of seconds per shape: only two cells have those contenders."""
    small, large = sizes.hidden

    def cell(hidden: int, **options: Any) -> Cell:
        return Cell(sizes.tokens, hidden, sizes.vocab, sizes.dtype, **options)

    quick = contenders(compiled=False)
    yield Item("core", cell(small), contenders())
    yield Item("core", cell(small, beta=0.0), quick)
    yield Item("core", cell(small, trainable=True), contenders())
    yield Item("core", cell(large), quick)
    yield Item("core", cell(large, beta=0.0), quick)
    yield Item("core", cell(large, trainable=True), quick)
    yield Item("core", cell(small, beta=1.0), quick)
    yield Item("core", cell(large, beta=1.0), quick)
    yield Item("core", cell(small, beta=0.0, trainable=True), quick)
    yield Item("core", cell(large, beta=0.0, trainable=True), quick)

    few = [FLOOR, "auto", "trl", "liger"]
    for tokens in sizes.more_tokens:
        yield Item("tokens", dataclasses.replace(cell(small), tokens=tokens), few)
    for vocab in sizes.more_vocab:
        yield Item("vocabulary", dataclasses.replace(cell(small), vocab=vocab), few)
    for beta in MORE_BETAS:
        yield Item("beta", cell(small, beta=beta), few)
    workspaces = [f"auto@{size}MiB" for size in sizes.workspaces]
    yield Item("workspace", cell(small), [FLOOR, "auto", *workspaces])
    yield Item("workspace", cell(small, trainable=True), [FLOOR, "auto", *workspaces])


def run_tests(deadline: float, sets: Sequence[list[str]] = TESTS) -> list[dict[str, Any]]:
    """Each set of GPU tests in its own process, so that no test's environment reaches the measurements."""
    done = []
    for arguments in sets:
        started = time.monotonic()
        limit = max(1.0, deadline - started)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            status, output = str(ran.returncode), ran.stdout
        except subprocess.TimeoutExpired as late:
            status = f"stopped after {limit:.0f} s"
            output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        lines = output.strip().splitlines()
        print(f"tests {' '.join(arguments)}: {status}: {lines[-1] if lines else ''}", flush=True)
        done.append({"arguments": arguments, "status": status, "seconds": time.monotonic() - started,
                     "tail": lines[-40:]})  # fmt: skip
    return done


def ceilings(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """FLOP/s of a large square product with a float32 result, and bytes/s (read and written) of a large copy."""
    side, dtype = sizes.product, getattr(torch, sizes.dtype)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device)
    wide: dict[str, Any] = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
    source = torch.empty(sizes.copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    none = Inputs(a, b, b)  # for its device

    def seconds(run: Any) -> float:
        for _ in range(3):
            run(none)
        return median(timed(run, none) for _ in range(20))

    def product(_: Inputs) -> None:
        torch.mm(a, b, out=out, **wide)

    def copy(_: Inputs) -> None:
        target.copy_(source)

    found = {"flops": 2 * side**3 / seconds(product), "bytes_per_second": 2 * sizes.copy / seconds(copy)}
    print(f"ceilings: {found['flops'] / 1e12:.1f} TFLOP/s, {found['bytes_per_second'] / 1e12:.2f} TB/s", flush=True)
    return found


def floor_flops(cell: Cell, seconds: float) -> float:
    return (4 if cell.trainable else 3) * 2 * cell.tokens * cell.hidden * cell.vocab / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or Path(__file__).parent / "results"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time box, tests included")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at toy sizes")
    options = parser.parse_args()
    began = time.monotonic()
    deadline = began + options.seconds
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run does without")
    device, sizes = (torch.device("cpu"), TOY) if options.dry_run else (torch.device("cuda"), FULL)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("loss-gpu-dry-run.json" if options.dry_run else "loss-gpu.json")

    report: dict[str, Any] = {"machine": machine(device), "cells": [], "failed": [], "skipped": []}

    def write() -> None:  # after every step: what there is must survive a killed process
        report["seconds"] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report["tests"] = None if options.skip_tests else run_tests(min(deadline, began + TEST_SECONDS))
    report["ceilings"] = ceilings(sizes, device)
    write()
    longest: dict[bool, float] = {}  # by whether compiled contenders take part
    for item in plan(sizes):
        started = time.monotonic()
        slow = "dense-compiled" in item.names
        if started + longest.get(slow, 0.0) > deadline:
            report["skipped"].append({"part": item.part, "cell": item.cell.key})
            print(f"{item.part} {item.cell.key}: skipped, the time is used up", flush=True)
            continue
        print(f"{item.part} {item.cell.key}", flush=True)
        try:
            found = measure(item.cell, item.names, device, rounds=options.rounds, deadline=deadline)
            median_floor = found["contenders"][FLOOR]["median"]
            report["cells"].append(
                {"part": item.part, "floor_flops": floor_flops(item.cell, median_floor), **found}
            )  # fmt: skip
        except Exception as error:  # the other cells are worth having
            report["failed"].append({"part": item.part, "cell": item.cell.key, "error": repr(error)[:500]})
            print(f"  failed: {error!r}", flush=True)
        longest[slow] = max(longest.get(slow, 0.0), time.monotonic() - started)
        write()
    write()
    print(f"{path}: {len(report['cells'])} cells, {len(report['failed'])} failed, {len(report['skipped'])} skipped")
    tests_failed = any(t["status"] != "0" for t in report["tests"] or [])
    return int(bool(report["failed"]) or tests_failed)


if __name__ == "__main__":
    sys.exit(main())
