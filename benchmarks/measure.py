"""The measuring harness of the loss benchmarks: forward and backward, in one process, contenders taking turns.

Times are compared round by round, so that a machine that slows down slows everyone. Each contender first makes an
un-timed call whose results are compared with float64, and whose allocations are recorded.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import (
    COMPILED,
    FLOOR,
    FLOORS,
    Call,
    Cell,
    Inputs,
    Unavailable,
    build,
    chunks,
    is_project,
    make_inputs,
    split,
)
from opsd_kernels import reference, workspace
from opsd_kernels.objective import Objective

COPIES = {"cuda": 3}  # sets of hidden states to rotate through, so that no call finds the last one's in the cache
REFERENCE_BYTES = {"cuda": 1 << 29}  # of one (rows, V) float64 tensor of the reference
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


def timed(call: Call, inputs: Inputs) -> float:
    """Seconds of one step."""
    inputs.clear()
    if inputs.student.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step(call, inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    step(call, inputs)
    return time.perf_counter() - begun


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
    key = (cell.tokens, cell.hidden, cell.vocab, cell.dtype, cell.beta, str(inputs.student.device))
    if key not in _references:
        _references[key] = Reference(cell, inputs)
    return _references[key]


def measure(
    cell: Cell,
    names: Sequence[str],
    device: torch.device,
    *,
    rounds: int,
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the contenders on one cell; the floor always takes part.

    Returns {"cell", "chunks", "rounds", "load", "contenders": {name: record}}. A record has "seconds" by round,
    "median", "spread" (least, most), "over_floor" (median of the rounds' ratios) with its spread, "peak_bytes",
    "bound_bytes" for the project's own, and the errors; or "skipped", the reason. `deadline` is on time.monotonic's
    clock: no round is begun after it, but for the first.
    """
    torch.compiler.reset()  # what earlier cells compiled only takes memory
    sets = make_inputs(cell, device, COPIES.get(device.type, 1))
    names = [FLOOR, *(name for name in names if name != FLOOR)]
    exact = reference_for(cell, sets[0])
    calls: dict[str, Call] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        if name != FLOOR and time.monotonic() > deadline:
            records[name] = {"skipped": "the time is used up"}
            continue
        try:
            calls[name], records[name] = _prepared(name, cell, sets, exact)
        except Unavailable as reason:
            records[name] = {"skipped": str(reason)}
            say(f"  {name}: skipped: {reason}")
        _release(sets, all_of_it=True)
    if FLOOR not in calls:
        raise RuntimeError(f"{cell.key}: no floor to compare with: {records[FLOOR]['skipped']}")

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    if device.type == "cuda":  # fills the allocator's cache again, which was emptied after each contender
        for name in order:
            timed(calls[name], sets[0])
    for round_number in range(rounds):
        if round_number and time.monotonic() > deadline:
            break
        for name in order:
            inputs = sets[round_number % len(sets)]
            if is_project(name) and device.type == "cpu":  # its last call left it memory, as from step to step
                inputs.clear()
                step(calls[name], inputs)
            seconds[name].append(timed(calls[name], inputs))
        _release(sets)
        order = [*order[1:], order[0]]  # no one always follows the same one
    for name, times in seconds.items():
        ratios = [mine / floor for mine, floor in zip(times, seconds[FLOOR], strict=True)]
        records[name] |= {
            "seconds": times, "median": median(times), "spread": [min(times), max(times)],
            "over_floor": median(ratios), "over_floor_spread": [min(ratios), max(ratios)],
        }  # fmt: skip
        say(f"  {name}: {_summary(records[name])}")
    return {
        "cell": cell.__dict__,
        "chunks": chunks(cell, sets[0]),
        "rounds": len(seconds[FLOOR]),
        "load": os.getloadavg()[0],
        "contenders": records,
    }


def _prepared(name: str, cell: Cell, sets: list[Inputs], exact: Reference) -> tuple[Call, dict[str, Any]]:
    """The contender, warmed up on every set of inputs, and what one un-timed call showed."""
    inputs = sets[0]
    try:
        call = build(name, cell, inputs)
        # compilation and kernel launches allocate for once; on a CPU nothing else does, and a call takes seconds
        if name in COMPILED or inputs.student.is_cuda:
            for given in sets:
                given.clear()
                step(call, given)
        loss, peak_bytes = recorded(call, inputs)
    except Unavailable:
        raise
    except torch.OutOfMemoryError:
        raise Unavailable("out of memory") from None
    except Exception as error:
        if is_project(name) or name in FLOORS:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        raise Unavailable(reason) from None
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
    gc.collect()
    if all_of_it:
        workspace.release()
        if sets[0].student.is_cuda:
            torch.cuda.empty_cache()


def _summary(record: dict[str, Any]) -> str:
    text = f"{record['median']:.4g} s, {record['over_floor']:.3f} of the floor"
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


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader of the results must know of where they come from."""
    versions = {}
    for package in ("torch", "triton", "trl", "liger-kernel", "transformers", "peft", "flash-attn", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda, "driver": _driver(),
        }  # fmt: skip
    return {"date": date.today().isoformat(), **found, "python": platform.python_version(), "versions": versions}


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return platform.processor() or platform.machine()
