"""The measuring harness of the loss benchmarks: forward and backward, in one process, contenders taking turns.

Times are compared round by round, so that a machine that slows down slows everyone. Each contender first makes an
un-timed call whose results are compared with float64, and whose allocations are recorded.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cells import (
    COMPILED,
    FLOOR,
    FLOORS,
    Call,
    Cell,
    Inputs,
    build,
    chunks,
    is_project,
    make_inputs,
    split,
)
from benchmarks.machine import gpu_state
from benchmarks.runner import Report, release, synchronize
from opsd.clock import Clock
from opsd_kernels import backends, reference, workspace
from opsd_kernels.gemm import Products
from opsd_kernels.objective import Objective

COPIES = {"cuda": 3}  # sets of hidden states to rotate through, so that no call finds the last one's in the cache
REFERENCE_BYTES = {"cuda": 1 << 29}  # of one (rows, V) float64 tensor of the reference
# A sample on a GPU is some steps in a row, up to this many, or as many as take so long: the host's start is then over
# while the device still works, as within a training step. Nothing flushes the cache: each step streams a head and
# logits many times as large.
STEPS, SAMPLE_SECONDS = 5, 0.3
PHASE_ROUNDS = {"cuda": 3, "cpu": 1}
SAMPLE = 64  # rows of dX, and of dW, that are compared


class Reference:
    """The loss, and rows of its gradients, in float64 from the same operands; a few tokens' logits at a time."""

    def __init__(self, cell: Cell, inputs: Inputs):
        student, teacher, weight = (t.detach() for t in (inputs.student, inputs.teacher, inputs.weight))
        objective = Objective.checked(beta=cell.beta)
        rows = max(1, REFERENCE_BYTES.get(student.device.type, 1 << 26) // (8 * cell.vocab))
        self.rows = _sample(cell.tokens, student.device)
        self.columns = _sample(cell.vocab, student.device)
        total = 0.0
        self.dx = torch.zeros(len(self.rows), cell.hidden, dtype=torch.float64, device=student.device)
        self.dw = torch.zeros(len(self.columns), cell.hidden, dtype=torch.float64, device=student.device)
        for start in range(0, cell.tokens, rows):
            part = slice(start, min(start + rows, cell.tokens))
            logits = _logits(student[part], weight).requires_grad_()
            losses = reference.divergence(logits, _logits(teacher[part], weight), objective)
            (dz,) = torch.autograd.grad(losses.sum() / cell.tokens, logits)
            total += float(losses.detach().sum())
            wanted = (self.rows >= part.start) & (self.rows < part.stop)
            if wanted.any():
                self.dx[wanted] = _back(dz[self.rows[wanted] - start], weight)
            self.dw += dz[:, self.columns].t() @ student[part].double()
        self.loss = total / cell.tokens

    def errors(self, loss: Tensor, inputs: Inputs) -> dict[str, float]:
        """Relative errors: of the loss, and of the gradients as the RMS over rows of ‖out − ref‖ / ‖ref‖."""
        assert inputs.student.grad is not None
        found = {
            "loss_error": abs(float(loss.detach()) - self.loss) / abs(self.loss),
            "dx_error": row_rms(inputs.student.grad[self.rows], self.dx),
        }
        if inputs.weight.grad is not None:
            # over all sampled rows at once: rows of unlikely tokens are nearly zero
            dw = inputs.weight.grad[self.columns].double()
            found["dw_error"] = float((dw - self.dw).norm() / self.dw.norm())
        return found


def _sample(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(SAMPLE, count), dtype=torch.float64, device=device).round().long().unique()


def _blocks(weight: Tensor) -> Iterable[tuple[slice, Tensor]]:
    """The head in float64, a block of rows at a time."""
    step = max(1, (1 << 25) // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        yield part, weight[part].double()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float64, device=hidden.device)
    for part, block in _blocks(weight):
        out[:, part] = hidden.double() @ block.t()
    return out


def _back(dz: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros(dz.shape[0], weight.shape[1], dtype=torch.float64, device=dz.device)
    for part, block in _blocks(weight):
        out += dz[:, part] @ block
    return out


def row_rms(got: Tensor, expected: Tensor) -> float:
    """RMS over rows of ‖got − expected‖ / ‖expected‖."""
    return float(((got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).square().mean().sqrt())


def step(call: Call, inputs: Inputs) -> Tensor | None:
    """What is timed: forward and backward."""
    loss = call(inputs)
    if loss is not None:
        loss.backward()
    return loss


def timed(call: Call, inputs: Inputs, steps: int = 1) -> float:
    """Seconds of one step, the mean of `steps` in a row."""

    def run() -> None:
        for _ in range(steps):
            inputs.clear()
            step(call, inputs)

    return seconds_of(run, inputs.student.device) / steps


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `run` takes: on a GPU the device's, by events, from an idle device on."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def phases(call: Call, inputs: Inputs) -> dict[str, float]:
    """Seconds of one step by phase, for what computes with the project's products and row pass: "project", "rows",
    "dX", "dW", and "whole", to which the rest belongs too."""
    clock = Clock(inputs.student.device)
    names = {"project": "project", "back_project": "dX", "accumulate_weight_gradient": "dW"}

    def clocked(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with clock(phase):
                return function(*args, **options)

        return run

    inputs.clear()
    replaced = {name: clocked(phase, getattr(Products, name)) for name, phase in names.items()}
    rows = clocked("rows", backends.divergence_rows)
    with mock.patch.multiple(Products, **replaced), mock.patch.object(backends, "divergence_rows", rows):
        synchronize(inputs.student.device)
        with clock("whole"):
            step(call, inputs)
    return clock.seconds()


def recorded(call: Call, inputs: Inputs) -> tuple[Tensor | None, int]:
    """One step, and the most bytes it had allocated at once above the inputs and the gradients that it returns.

    A returned gradient is only taken off where it exists: from the backward pass.
    """
    inputs.clear()
    workspace.release()  # what an earlier call left for this one counts too
    if inputs.student.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = call(inputs)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        if loss is not None:
            loss.backward()
        backward = torch.cuda.max_memory_allocated() - before
    else:
        loss, sizes = allocations(lambda: call(inputs))
        forward = peak(sizes)
        _, later = allocations(lambda: None if loss is None else loss.backward())
        backward = peak(later, alive=sum(sizes))
    return loss, max(forward, backward - inputs.gradient_bytes())


def allocations(run: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The sizes in bytes of every CPU allocation (positive) and release (negative) of torch's, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    assert profile.profiler is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return result, [e.nbytes() for e in events if e.name() == "[memory]"]


def peak(sizes: Sequence[int], alive: int = 0) -> int:
    most = alive
    for size in sizes:
        alive += size
        most = max(most, alive)
    return most


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that `run` had allocated at once, above what there was before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _, sizes = allocations(run)
    return peak(sizes)


_references: dict[tuple[object, ...], Reference] = {}


def reference_for(cell: Cell, inputs: Inputs) -> Reference:
    """The cell's reference; the same with a frozen and with a trainable head."""
    key = (dataclasses.replace(cell, trainable=False), str(inputs.student.device))
    if key not in _references:
        _references[key] = Reference(cell, inputs)
    return _references[key]


def measure(
    cell: Cell, names: Sequence[str], report: Report, *, rounds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures the contenders on one cell; the floor always takes part.

    Returns {"cell", "chunks", "rounds", "load", "gpu", "contenders": {name: record}}. A record has "seconds" by round,
    "median", "spread" (least, most), "over_floor" (median of the rounds' ratios) with its spread, "peak_bytes",
    "bound_bytes" for the project's own, "phases" for what has them, on a GPU "steps" of a sample, and the errors; or
    "skipped" or "failed", the reason. No round is begun after the report's deadline, but for the first.
    """
    device = report.device
    torch.compiler.reset()  # what earlier cells compiled only takes memory
    sets = make_inputs(cell, device, COPIES.get(device.type, 1))
    exact = reference_for(cell, sets[0])
    calls: dict[str, Call] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in [FLOOR, *(name for name in names if name != FLOOR)]:
        if name != FLOOR and report.late:
            records[name] = {"skipped": "the time is used up"}
            continue
        prepared = report.attempt(name, lambda n=name: _prepared(n, cell, sets, exact))
        if prepared is None:
            records[name] = dict(report.out[name])
        else:
            calls[name], records[name] = prepared
        _release(sets, all_of_it=True)

    steps = dict.fromkeys(calls, 1)
    if device.type == "cuda":  # fills the allocator's cache again, which was emptied after each contender
        for name in list(calls):
            one = report.attempt(name, lambda n=name: timed(calls[n], sets[0]))
            if one is None:
                records[name] |= report.out[name]
                del calls[name]
            else:
                steps[name] = max(1, min(STEPS, int(SAMPLE_SECONDS / one)))
    gpu = {"before": gpu_state()} if device.type == "cuda" else {}
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    order, number = list(calls), 0
    for number in range(rounds):
        if number and report.late:
            break
        for name in order:
            inputs = sets[number % len(sets)]
            if is_project(name) and device.type == "cpu":  # its last call left it memory, as from step to step
                inputs.clear()
                step(calls[name], inputs)
            one = report.attempt(name, lambda n=name, i=inputs: timed(calls[n], i, steps[n]))
            if one is not None:
                seconds[name][number] = one
        _release(sets)
        order = [*order[1:], *order[:1]]  # no one always follows the same one
    if gpu and seconds.get(FLOOR):
        for _ in range(min(40, math.ceil(1.0 / median(seconds[FLOOR].values())))):
            step(calls[FLOOR], sets[0])
        gpu |= {"loaded": gpu_state()}  # while those run, about a second
        synchronize(device)
        gpu |= {"after": gpu_state()}
    floor = seconds.get(FLOOR, {})
    for name, times in seconds.items():
        records[name] |= report.out.get(name, {})
        if "failed" in records[name] or not times:
            continue
        values = list(times.values())
        records[name] |= {"seconds": values, "median": median(values), "spread": [min(values), max(values)]}
        ratios = [mine / floor[n] for n, mine in times.items() if n in floor]
        if ratios:
            records[name] |= {"over_floor": median(ratios), "over_floor_spread": [min(ratios), max(ratios)]}
        if device.type == "cuda":
            records[name]["steps"] = steps[name]
        if is_project(name) or name in FLOORS:
            parts = report.attempt(
                name, lambda n=name: [phases(calls[n], sets[0]) for _ in range(PHASE_ROUNDS[device.type])]
            )
            if parts:
                records[name]["phases"] = {phase: median(one[phase] for one in parts) for phase in parts[0]}
        say(f"  {name}: {_summary(records[name])}")
    return {
        "cell": cell.__dict__,
        "chunks": chunks(cell, sets[0]),
        "rounds": len(floor),
        "load": os.getloadavg()[0],
        "gpu": gpu,
        "contenders": records,
    }


def _prepared(name: str, cell: Cell, sets: list[Inputs], exact: Reference) -> tuple[Call, dict[str, Any]]:
    """The contender, warmed up on every set of inputs, and what one un-timed call showed."""
    inputs = sets[0]
    call = build(name, cell, inputs)
    # compilation and kernel launches allocate for once; on a CPU nothing else does, and a call takes seconds
    if name in COMPILED or inputs.student.is_cuda:
        for given in sets:
            given.clear()
            step(call, given)
    loss, peak_bytes = recorded(call, inputs)
    if loss is None:
        return call, {}
    record: dict[str, Any] = {"peak_bytes": peak_bytes}
    if is_project(name):
        backend, workspace = split(name)
        record["bound_bytes"] = cell.memory_bound(inputs.student.device, workspace)
        record["chunks"] = chunks(cell, inputs, workspace, backend)
    return call, record | exact.errors(loss, inputs)


def _release(sets: list[Inputs], *, all_of_it: bool = False) -> None:
    """Drops the gradients and what cycles hold, and with `all_of_it` gives cached memory back."""
    for inputs in sets:
        inputs.clear()
    if all_of_it:
        workspace.release()
        release(sets[0].student.device)
    else:
        gc.collect()


def _summary(record: dict[str, Any]) -> str:
    text = f"{record['median']:.4g} s"
    if "over_floor" in record:
        text += f", {record['over_floor']:.3f} of the floor"
    if "peak_bytes" in record:
        text += f", {record['peak_bytes'] / 2**20:.0f} MiB"
        text += f", errors {record['loss_error']:.1e} {record['dx_error']:.1e}"
    return text


def ratio(records: dict[str, dict[str, Any]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes as `fast`: round by round where they ran together, else over their floors."""
    a, b = records[slow], records[fast]
    if a.get("run") == b.get("run"):
        return median(x / y for x, y in zip(a["seconds"], b["seconds"], strict=True))
    return a["over_floor"] / b["over_floor"]
