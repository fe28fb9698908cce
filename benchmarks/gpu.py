"""The loss on one GPU: what it is made of, and beside its floor and its peers.

    python -m benchmarks.gpu --out DIR              # as much as fits in ten minutes; again for the rest
    python -m benchmarks.gpu --out DIR --only loss  # some steps only
    python -m benchmarks.gpu --out DIR --table      # the documents' tables

Steps, in this order: `compile` (all Triton kernels, on all cores), `tests` (those that need a GPU), `loss` (the cells
against every contender, the two that matter most first), `rows`, `profile`, `ceilings` and `products` (see
benchmarks.probe), `compiled` (peers that torch.compile has to work for), `sweep` (one axis at a time). Everything runs
in a process of its own, results are added to DIR/gpu.json, and what is there already is not measured again.
`--dry-run` does all of it on the CPU at toy sizes. Attention, rollouts and the whole step: benchmarks.parts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import precompile, probe
from benchmarks.cells import FLOOR, FLOORS, LABELS, PROJECT, Cell, Unavailable, contenders
from benchmarks.loss import label, over, peak
from benchmarks.measure import measure
from benchmarks.record import of_step, where
from benchmarks.runner import ROOT, Item, Report, main, run_command

ROUNDS = {"cuda": 9, "cpu": 2}
MORE_BETAS = (0.1, 0.9)
WORKERS = 8  # of the tests: each has a context on the device, of half a gigabyte
FIRST_TESTS, LAST_TESTS = "tests/gpu/test_triton_gpu.py", "tests/gpu/test_triton_attention_gpu.py"
PEERS = "tests/kernels/test_peers.py"
ONLY = {PEERS: ["-k", "liger and not chunked"]}  # the others need no GPU


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: tuple[int, int]
    vocab: int
    dtype: str
    more_tokens: tuple[int, ...]
    more_vocab: tuple[int, ...]
    workspaces: tuple[int, ...]  # MiB
    chunk: int  # rows of the row pass by itself
    chunks: tuple[int, ...]  # rows of the products
    square: int  # side of the square matrices
    copied: int  # bytes


FULL = Sizes(
    8192, (4096, 2048), 151936, "bfloat16", (512, 1024, 2048, 4096, 32768), (32003, 50257, 262144),
    (256, 512, 768, 3072), 1024, (128, 256, 512, 1024, 2048, 4096), 8192, 4 << 30,
)  # fmt: skip
TOY = Sizes(64, (96, 64), 1009, "float32", (8, 128), (503,), (8,), 8, (8, 16), 128, 1 << 20)


def items(device: torch.device) -> list[Item]:
    """The most telling first. Seconds are estimates, after what an H200 with 16 cores took."""
    return list(_items(device, FULL if device.type == "cuda" else TOY))


def _items(device: torch.device, sizes: Sizes) -> Iterator[Item]:
    large, small = sizes.hidden
    dtype = getattr(torch, sizes.dtype)
    every = contenders(compiled=False)
    own = "triton" if device.type == "cuda" else "torch"
    few = [FLOOR, own, "trl", "liger"]

    def cell(hidden: int, **options: Any) -> Cell:
        return Cell(**{"tokens": sizes.tokens, "hidden": hidden, "vocab": sizes.vocab, "dtype": sizes.dtype, **options})

    def of(step: str, seconds: float, cell: Cell, names: list[str], suffix: str = "", **options: Any) -> Item:
        def run(report: Report) -> dict[str, Any]:
            return measured(report, cell, names)

        return Item(f"{step}/{cell.key}{suffix}", seconds, run, **options)

    def tests(path: str, seconds: float) -> Item:
        return Item(f"tests/{Path(path).name}", seconds, lambda report: tested(report, path))

    yield Item("compile/kernels", 40, precompile.run, holds=lambda _: device.type == "cpu" or precompile.cached())
    files = {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")}
    for path in (FIRST_TESTS, *sorted(files - {FIRST_TESTS, LAST_TESTS})):
        yield tests(path, 60)
    yield of("loss", 45, cell(large), every)
    yield of("loss", 40, cell(small), every)
    yield Item("rows/chunk", 15, lambda report: probe.rows(report, sizes.chunk, sizes.vocab, dtype))
    yield Item("profile/rows", 40, lambda report: probe.profiled(report, sizes.chunk, sizes.vocab))
    yield Item("ceilings/square", 5, lambda report: probe.ceilings(report, sizes.square, sizes.copied, dtype))
    for hidden in (large, small):
        yield Item(f"products/{hidden}", 10, lambda r, h=hidden: probe.products(r, h, sizes.vocab, dtype, sizes.chunks))
    yield tests(PEERS, 40)
    yield of("loss", 40, cell(small, confident=True), every)
    for options in ({"beta": 0.0}, {"trainable": True}, {"beta": 1.0}, {"beta": 0.0, "trainable": True}):
        yield of("loss", 45, cell(large, **options), every)
        yield of("loss", 40, cell(small, **options), every)
    yield of("loss", 40, cell(small, beta=0.0, confident=True), every)
    yield tests(LAST_TESTS, 60)
    yield of("compiled", 150, cell(small), [FLOOR, own, "liger-chunked", "dense-compiled"], patience=200)
    for tokens in sizes.more_tokens:
        yield of("sweep", 30 if tokens <= sizes.tokens else 90, cell(small, tokens=tokens), few)
    for vocab in sizes.more_vocab:
        yield of("sweep", 40, cell(small, vocab=vocab), few)
    for beta in MORE_BETAS:
        yield of("sweep", 40, cell(small, beta=beta), few)
    workspaces = [f"{own}@{size}MiB" for size in sizes.workspaces]
    for trainable in (False, True):
        yield of("sweep", 40, cell(small, trainable=trainable), [FLOOR, own, *workspaces], " workspaces")


def measured(report: Report, cell: Cell, names: list[str]) -> dict[str, Any]:
    found = measure(cell, report.wanted(names), report, rounds=report.rounds or ROUNDS[report.device.type])
    floor = found["contenders"][FLOOR].get("median")
    products = (4 if cell.trainable else 3) * 2 * cell.tokens * cell.hidden * cell.vocab
    return {**found, "floor_flops": products / floor if floor else None}


def tested(report: Report, path: str) -> dict[str, Any]:
    """Runs a file of tests. Its workers find what `compile` left in Triton's cache; how much was new to it is told."""
    if path == PEERS and report.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    command += [path, *ONLY.get(path, [])]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(WORKERS, len(os.sched_getaffinity(0))))]
    before, begun = precompile.entries(), time.monotonic()
    status, lines = run_command(command, report.deadline - time.monotonic() - 2.0)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = round(time.monotonic() - begun, 1)
    ran = report.device.type == "cpu" or "passed" in (lines or [""])[-1]  # with a GPU, all skipped is a fault
    ended = f"stopped after {seconds:.0f} s" if status is None else f"status {status}"
    shown = -1 if status == 0 else -40
    print("\n".join(f"  {line}" for line in [ended, *failed[:20], *lines[-1:]]), flush=True)
    return {"status": status, "seconds": seconds, "agree": status == 0 and ran, "failed": failed, "tail": lines[shown:],
            "compiled_anew": precompile.entries() - before}  # fmt: skip


# The tables.


def tables(data: dict[str, Any]) -> dict[str, str]:
    made = {}
    cells = [cell for step in ("loss", "compiled", "sweep") for cell in of_step(data, step)]
    if cells:
        parts = [times_table(cells), "", *load(cells), where(data, ["loss", "compiled", "sweep"]), "",
                 "<details><summary>Peak memory and phases</summary>", "", "Peak MiB (bound):", "", peaks_table(cells),
                 "", phases_table(cells), "", "</details>"]  # fmt: skip
        made["loss-gpu"] = "\n".join(parts)
    rows, products, most = (of_step(data, step) for step in ("rows", "products", "ceilings"))
    if rows or products:
        parts = [probe.rows_table(rows), "", probe.products_table(products), ""]
        if most:
            best = most[0]
            parts += [f"A large square product runs at {best['flops'] / 1e12:.0f} TFLOP/s, a large copy at "
                      f"{best['bytes_per_second'] / 1e12:.2f} TB/s."]  # fmt: skip
        made["rows-gpu"] = "\n".join([*parts, where(data, ["rows", "products", "ceilings"])])
    return made


def load(cells: list[dict[str, Any]]) -> list[str]:
    """What the clocks were while the cells were measured."""
    states = [cell["gpu"]["loaded"] for cell in cells if cell.get("gpu", {}).get("loaded")]
    if not states:
        return []
    clocks, power = ([float(state[name]) for state in states] for name in ("clocks.sm", "power.draw"))
    return [f"Under load: SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz, {min(power):.0f} to {max(power):.0f} W."]


def _start(cell: dict[str, Any]) -> str:
    shape = cell["cell"]
    rows = ", confident rows" * shape["confident"]
    return (
        f"| {shape['tokens']:,} × {shape['hidden']} × {shape['vocab']:,}{rows} "
        f"| {'trainable' if shape['trainable'] else 'frozen'} | {shape['beta']:g} |"
    )


def _names(cells: list[dict[str, Any]]) -> list[str]:
    ran = {name for cell in cells for name, record in cell["contenders"].items() if "median" in record}
    order = [*LABELS, *sorted(name for name in ran if "@" in name)]
    return [name for name in order if name in ran and name not in FLOORS]


HEAD = "| tokens × hidden × vocabulary | head | β |"


def times_table(cells: list[dict[str, Any]]) -> str:
    """Milliseconds of the floor, and how many times as long the contenders take."""
    names = _names(cells)
    lines = [f"{HEAD} {LABELS[FLOOR]} | " + " | ".join(map(label, names)) + " |",
             "|---|---|---|---|" + "---|" * len(names)]  # fmt: skip
    for cell in cells:
        records = cell["contenders"]
        floor = f"{1e3 * records[FLOOR]['median']:.1f} ms" if "median" in records[FLOOR] else "–"
        lines.append(f"{_start(cell)} {floor} | " + " | ".join(over(records.get(n, {})) for n in names) + " |")
    return "\n".join(lines)


def peaks_table(cells: list[dict[str, Any]]) -> str:
    names = _names(cells)
    lines = [
        f"{HEAD} " + " | ".join(map(label, names)) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for cell in cells:
        lines.append(f"{_start(cell)} " + " | ".join(peak(cell["contenders"].get(n, {})) for n in names) + " |")
    return "\n".join(lines)


PHASES = ("project", "rows", "dX", "dW", "whole")


def phases_table(cells: list[dict[str, Any]]) -> str:
    """Milliseconds of a step by phase, of the project's own and the floor."""
    lines = [f"{HEAD} ms of | " + " | ".join(PHASES) + " |", "|---|---|---|---|" + "---|" * len(PHASES)]
    for cell in cells:
        for name in (FLOOR, *PROJECT):
            parts = cell["contenders"].get(name, {}).get("phases")
            if parts:
                values = [f"{1e3 * parts[phase]:.2f}" if phase in parts else "–" for phase in PHASES]
                lines.append(f"{_start(cell)} {label(name)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("benchmarks.gpu", __doc__, items, tables))
