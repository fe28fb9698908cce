"""What a GPU's time is made of: the machine's two ceilings, the row pass by itself, each product against the number of
rows in a chunk, and what Nsight Compute counts in the row kernels.

`python -m benchmarks.probe` runs each row pass twice and measures nothing: it is what the profiler looks into.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import GAP, LABELS, PROJECT, SPREAD, Unavailable
from benchmarks.measure import seconds_of
from benchmarks.runner import Report, run_command
from opsd_kernels import backends
from opsd_kernels.gemm import Products
from opsd_kernels.objective import Objective

SAMPLES, SAMPLE_SECONDS = 10, 0.03
OBJECTIVES = {"JSD": 0.5, "forward KL": 0.0, "reverse KL": 1.0}
# How often a row pass reads each pair of logits (8 bytes), at least: some of the JSD's rows are read once more. It is
# what the kernels are written to do; what memory saw is in the profiler's figures.
READS = {"triton": dict.fromkeys(OBJECTIVES, 2), "cluster": dict.fromkeys(OBJECTIVES, 1)}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "InstructionStats", "LaunchStats")
METRICS = {
    "Duration", "SM Frequency", "DRAM Throughput", "Memory Throughput", "Issue Slots Busy", "Executed Ipc Active",
    "Executed Instructions", "Registers Per Thread", "Block Size", "Grid Size",
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Logits (n, V) of both models as a chunk has them, and dz in a buffer of its own."""

    student: Tensor
    teacher: Tensor
    dz: Tensor

    @classmethod
    def of(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device, confident: bool) -> Chunk:
        """`confident`: the likeliest token has a probability from 0.5 to 0.999, even in log-odds."""
        draw = torch.Generator(device).manual_seed(0)
        teacher = (1.0 if confident else SPREAD) * torch.randn(rows, vocab, generator=draw, device=device)
        student = teacher + GAP * torch.randn(rows, vocab, generator=draw, device=device)
        if confident:
            odds = torch.linspace(0.0, math.log(999.0), rows, device=device)
            each = torch.arange(rows, device=device)
            at = each * 97 % vocab
            teacher[each, at] = -math.inf
            teacher[each, at] = teacher.logsumexp(-1) + odds
            student[each, at] = teacher[each, at]
        return cls(student, teacher, torch.empty(rows, vocab, dtype=dtype, device=device))

    def run(self, backend: str, beta: float) -> Callable[[], None]:
        """The row pass as the mean loss of a frozen head needs it: losses and dz."""
        table = self.student.new_empty(1, len(self.student))
        module, objective = backends.module(backend), Objective.checked(beta=beta)
        return lambda: backends.divergence_rows(
            module, self.student, self.teacher, objective, targets=None, table=table, dz=self.dz, row_scale=None
        )


def fit(device: torch.device) -> list[str]:
    """The project's row passes that can run here, without their self-checks."""
    return [name for name in PROJECT if not backends.unfit(name, device, torch.float32, check=False)]


def rows(report: Report, tokens: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of each row pass on one chunk's logits, and the bytes a second that its reads and writes make."""
    found: dict[str, dict[str, Any]] = {}
    for confident in (False, True):
        chunk = Chunk.of(tokens, vocab, dtype, report.device, confident)
        for backend in report.wanted(fit(report.device)):
            for objective, beta in OBJECTIVES.items():
                name = f"{backend}, {objective}{', confident rows' * confident}"
                times = report.attempt(name, lambda c=chunk, b=backend, x=beta: sampled(c.run(b, x), report.device))
                if times is None:
                    found[name] = dict(report.out[name])
                    continue
                found[name] = {"seconds": times, "median": median(times)}
                reads = READS.get(backend, {}).get(objective)
                if reads is not None:
                    moved = tokens * vocab * (8 * reads + dtype.itemsize)
                    found[name] |= {"bytes": moved, "bytes_per_second": moved / median(times)}
                print(f"  {name}: {1e3 * median(times):.3f} ms{_rate(found[name])}", flush=True)
    return {"tokens": tokens, "vocab": vocab, "dtype": str(dtype)[6:], "contenders": found}


def _rate(record: dict[str, Any]) -> str:
    return f", {record['bytes_per_second'] / 1e12:.2f} TB/s" if "bytes_per_second" in record else ""


def sampled(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of one call, in several samples of several calls in a row."""
    run()
    one = seconds_of(run, device)
    calls = max(1, min(100, int(SAMPLE_SECONDS / max(one, 1e-6))))

    def several() -> None:
        for _ in range(calls):
            run()

    samples = SAMPLES if device.type == "cuda" else 2
    return [seconds_of(several, device) / calls for _ in range(samples)]


def products(report: Report, hidden: int, vocab: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> dict[str, Any]:
    """FLOP/s of the three products of a chunk of n rows, for each n: what a larger chunk would gain."""
    device = report.device
    draw = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=draw, device=device).to(dtype)
    made = Products("torch", device, dtype, 1 << 30)
    dw = torch.empty(vocab, hidden, device=device)
    found: dict[str, dict[str, Any]] = {}

    def rates(n: int) -> dict[str, float]:
        x = torch.randn(2 * n, hidden, generator=draw, device=device).to(dtype)
        logits = torch.empty(2 * n, vocab, device=device)
        dz = torch.randn(n, vocab, generator=draw, device=device).to(dtype)
        dx = torch.empty(n, hidden, device=device)
        one = 2 * n * hidden * vocab
        runs: dict[str, tuple[int, Callable[[], None]]] = {
            "project": (2 * one, lambda: made.project(logits, x, weight, None)),
            "dX": (one, lambda: made.back_project(dx, dz, weight)),
            "dW": (one, lambda: made.accumulate_weight_gradient(dw, dz, x[:n], first=False)),
        }
        return {name: flops / median(sampled(run, device)) for name, (flops, run) in runs.items()}

    for n in sizes:
        name = f"n {n}"
        got = report.attempt(name, lambda n=n: rates(n))
        found[name] = {"n": n, **(dict(report.out[name]) if got is None else {"flops": got})}
        if got:
            print(f"  {name}: " + ", ".join(f"{p} {r / 1e12:.0f}" for p, r in got.items()) + " TFLOP/s", flush=True)
    return {"hidden": hidden, "vocab": vocab, "dtype": str(dtype)[6:], "contenders": found}


def ceilings(report: Report, side: int, copied: int, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large square product with a float32 result, and bytes/s (read and written) of a large copy."""
    device = report.device
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device)
    wide: dict[str, Any] = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / median(sampled(lambda: torch.mm(a, b, out=out, **wide), device))
    moved = 2 * copied / median(sampled(lambda: target.copy_(source), device))
    print(f"  {flops / 1e12:.1f} TFLOP/s, {moved / 1e12:.2f} TB/s", flush=True)
    return {"flops": flops, "bytes_per_second": moved}


def profiled(report: Report, tokens: int, vocab: int) -> dict[str, Any]:
    """Nsight Compute's figures of each row kernel, with the clocks as they are."""
    program = shutil.which("ncu")
    if program is None:
        raise Unavailable("ncu is not installed")
    if report.device.type != "cuda":
        raise Unavailable("there is no CUDA device")
    command = [program, "--clock-control", "none", "--csv", "--page", "details", "--target-processes", "all"]
    command += ["--kernel-name", "regex:lean_kernel|divergence"]
    command += [text for section in SECTIONS for text in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.probe", str(tokens), str(vocab)]
    status, lines = run_command(command, min(600.0, report.deadline - time.monotonic()))
    kernels = parsed(lines)
    if not kernels:
        raise RuntimeError(f"ncu ended with status {status} and counted nothing: {' | '.join(lines[-5:])[:400]}")
    if "triton" in fit(report.device) and not any("lean_kernel" in kernel["kernel"] for kernel in kernels):
        raise RuntimeError(f"ncu saw no lean_kernel, but {', '.join(sorted({k['kernel'] for k in kernels}))}")
    for kernel in kernels:
        figures = ", ".join(f"{name} {value}" for name, value in kernel["metrics"].items())
        print(f"  {kernel['kernel']}: {figures}", flush=True)
    return {"tokens": tokens, "vocab": vocab, "status": status, "kernels": kernels}


def parsed(lines: list[str]) -> list[dict[str, Any]]:
    """The launches in ncu's CSV, which may begin after other output: {"kernel", "metrics": {"name, unit": "value"}}."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in METRICS:
            one = found.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}})
            unit = f", {row['Metric Unit']}" if row["Metric Unit"] else ""
            one["metrics"][row["Metric Name"] + unit] = row["Metric Value"]
    return list(found.values())


# Tables, in Markdown.


def rows_table(cells: list[dict[str, Any]]) -> str:
    lines = ["| row pass | rows | ms | TB/s |", "|---|---|---|---|"]
    for cell in cells:
        for name, one in cell["contenders"].items():
            if "median" in one:
                backend, _, rest = name.partition(", ")
                rate = f"{one['bytes_per_second'] / 1e12:.2f}" if "bytes_per_second" in one else "–"
                label = LABELS.get(backend, backend)
                lines.append(f"| {label}: {rest} | {cell['tokens']:,} × {cell['vocab']:,} | "
                             f"{1e3 * one['median']:.3f} | {rate} |")  # fmt: skip
    return "\n".join(lines)


def products_table(cells: list[dict[str, Any]]) -> str:
    """TFLOP/s by number of rows."""
    lines = ["| hidden × vocabulary | rows | project | dX | dW |", "|---|---|---|---|---|"]
    for cell in cells:
        for one in cell["contenders"].values():
            if "flops" in one:
                rates = " | ".join(f"{rate / 1e12:.0f}" for rate in one["flops"].values())
                lines.append(f"| {cell['hidden']} × {cell['vocab']:,} | {one['n']} | {rates} |")
    return "\n".join(lines)


def _main(tokens: int, vocab: int) -> None:
    device = torch.device("cuda")
    chunk = Chunk.of(tokens, vocab, torch.bfloat16, device, confident=False)
    for backend in fit(device):
        for beta in OBJECTIVES.values() if backend != "torch" else ():
            for _ in range(2):
                chunk.run(backend, beta)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:3]))
