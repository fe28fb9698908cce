"""One layer's attention over packed rows, backend beside backend and FlexAttention: `python -m benchmarks.attention`.

A round is a new draw of lengths, those of `benchmarks.packing`: on a GPU in full, on a CPU divided by its `SCALE`.
Timed are the student's forward and backward pass and the teacher's forward pass, each of a layer's heads, all on the
same tensors; contenders take turns, and their results must agree. What a layout costs once for all layers (tables,
gathers, a block mask) is timed apart, as `prepare`. Results go to results/attention.json.

FlexAttention is compiled on a GPU. On a CPU it has no backward pass and its time would be that of the uncompiled form,
so there only its result is compared.

`--sweep` instead times the Triton kernels with other tilings, one kernel's at a time. A contender that cannot run where
this runs is named with its error, and the others go on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine
from benchmarks.packing import SCALE, Case, draw
from opsd_kernels.packing import attention, pack_dual_context, triton_attention
from opsd_kernels.packing.layout import Layout

DATA = Path(__file__).parent / "results" / "attention.json"
CASES = [Case(1, 1024), Case(8, 1024)]
CONTENDERS = {"cuda": ("varlen", "triton", "flex"), "cpu": ("sdpa", "eager", "flex")}
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
REPEATS = {"cuda": 5, "cpu": 1}  # calls per clocking: on a GPU the host's part hides behind the call before
# Queries x keys per tile, warps, stages. Some of these spill: outside of the loops that costs nothing.
SWEEP = {
    "forward": ("128x128w8s2", "128x64w8s2", "64x64w4s2", "64x64w4s3", "128x64w4s3", "64x128w4s2"),
    "query_gradient": ("64x64w4s2", "128x64w8s3", "128x128w8s2", "64x128w8s2", "128x32w4s2"),
    "key_gradient": ("64x128w8s2", "64x64w4s2", "64x64w8s2", "128x128w8s1", "64x128w8s1", "32x64w4s2"),
}


@dataclass(frozen=True)
class Heads:
    """A layer's attention."""

    query: int
    key: int
    size: int


HEADS = {
    "cuda": {"Qwen3-1.7B": Heads(16, 8, 128), "Qwen3-4B": Heads(32, 8, 128)},
    "cpu": {"toy": Heads(4, 2, 64)},
}

Attend = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
"""query (1, heads, T, D), key, value (1, key heads, T, D) → (1, heads, T, D)."""


def backend(name: str) -> Attend:
    function = getattr(attention, f"_{name}")
    return lambda q, k, v, layout: function(q, k, v, layout, q.shape[-1] ** -0.5, None, None)


@contextlib.contextmanager
def tiled(name: str) -> Iterator[None]:
    """The Triton kernels with one other tiling, as in "triton:forward=128x64w8s2"."""
    kernel, _, text = name.removeprefix("triton:").partition("=")
    queries, keys, warps, stages = map(int, re.split("[xws]", text))
    tilings = triton_attention.tilings

    def other(*args: Any, **options: Any) -> triton_attention.Tilings:
        return tilings(*args, **options)._replace(**{kernel: triton_attention.Tiling(queries, keys, warps, stages)})

    triton_attention.tilings = other
    try:
        yield
    finally:
        triton_attention.tilings = tilings


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _flex_attention(q.is_cuda)(q, k, v, block_mask=_block_mask(layout), enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # Every draw is a new mask. Past the limit the uncompiled form would run, with all scores in memory.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(layout: Layout) -> Any:
    """The layout's mask as FlexAttention takes it, made once per layout."""
    from torch.nn.attention.flex_attention import create_block_mask

    if "flex" not in layout._cache:
        device = layout.ids.device
        lengths = torch.tensor([s.stop - s.start for s in layout.segments], device=device)

        def by_row(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device).repeat_interleave(lengths)

        first = by_row([s.start for s in layout.segments])
        most = max(len(s.prefix) for s in layout.segments)
        ranges = [
            tuple(by_row([s.prefix[i][end] if i < len(s.prefix) else 0 for s in layout.segments]) for end in (0, 1))
            for i in range(most)
        ]

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (key >= first[query])
            for start, stop in ranges:
                seen = seen | ((key >= start[query]) & (key < stop[query]))
            return seen

        layout._cache["flex"] = create_block_mask(visible, None, None, layout.rows, layout.rows, device=device)
    return layout._cache["flex"]


def contender(name: str) -> Attend:
    return flex if name == "flex" else backend(name.partition(":")[0])


def tensors(layout: Layout, heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the output's gradient, laid out as the models' projections leave them."""
    device = layout.ids.device
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(1, layout.rows, n, heads.size) for n in (heads.query, heads.key, heads.key, heads.query)]
    return [torch.randn(*s, generator=draw, device=device).to(dtype).transpose(1, 2) for s in shapes]


def clocked(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> tuple[float, Any]:
    """Seconds per call, and what the last one returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / repeats, result


@dataclass(frozen=True)
class Sample:
    """One contender on one draw."""

    seconds: dict[str, float]
    results: dict[str, Tensor]


def measure(attend: Attend, student: Layout, teacher: Layout, heads: Heads, dtype: torch.dtype, grad: bool) -> Sample:
    """Both contexts; each pass runs once before it is timed. The layouts must be new: they keep what was prepared."""
    seconds, results = {}, {}
    for name, layout, backward in (("student", student, grad), ("teacher", teacher, False)):
        *inputs, upstream = tensors(layout, heads, dtype)
        device = layout.ids.device
        repeats = REPEATS[device.type]
        inputs = [t.requires_grad_(backward) for t in inputs]
        with torch.set_grad_enabled(backward):
            first, _ = clocked(lambda i=inputs, x=layout: attend(*i, x), device)
            seconds[f"{name} forward"], out = clocked(lambda i=inputs, x=layout: attend(*i, x), device, repeats)
        seconds[f"{name} prepare"] = max(0.0, first - seconds[f"{name} forward"])
        results[name] = out.detach()
        if backward:
            torch.autograd.grad(out, inputs, upstream, retain_graph=True)
            seconds[f"{name} backward"], found = clocked(
                lambda o=out, i=inputs, u=upstream: torch.autograd.grad(o, i, u, retain_graph=True), device, repeats
            )
            results |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return Sample(seconds, results)


def compare(case: Case, heads: Heads, rounds: int, names: list[str], device: torch.device) -> dict[str, Any]:
    dtype, scale = (torch.bfloat16, 1) if device.type == "cuda" else (torch.float32, SCALE)
    records: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    rows, order, worst = [], list(names), 0.0
    failed: dict[str, str] = {}
    for number in range(-1, rounds):  # the first one compiles and is not counted
        data = draw(case, 1000, 1 + number, scale=scale)
        seen: dict[str, dict[str, Tensor]] = {}
        for name in list(order):
            batch = pack_dual_context(data.students, data.teachers, data.rollouts).to(device)
            student, teacher = batch.student.layout, batch.teacher.layout
            grad = name != "flex" or device.type == "cuda"
            try:
                with tiled(name) if ":" in name else contextlib.nullcontext():
                    sample = measure(contender(name), student, teacher, heads, dtype, grad)
            except Exception as error:  # an older torch, no room for a tile: the others are worth having
                failed[name] = repr(error)[:300]
                order.remove(name)
                records.pop(name)
                print(f"  {name} cannot run: {failed[name]}", flush=True)
                continue
            seen[name] = sample.results
            if number >= 0 and grad:
                for part, seconds in sample.seconds.items():
                    records[name].setdefault(part, []).append(seconds)
        reference, *others = (name for name in names if name in seen)
        for name in others:
            for part, got in seen[name].items():
                want = seen[reference][part]
                worst = max(worst, float((got - want).double().norm() / want.double().norm()))
        if worst > TOLERANCE[dtype]:
            raise RuntimeError(f"{case.key}: the contenders differ by {worst:.1e}")
        if number >= 0:
            rows.append([student.rows, teacher.rows])
        order = [*order[1:], order[0]]
    return {
        "case": asdict(case), "heads": asdict(heads), "rows": rows, "largest_difference": worst, "failed": failed,
        "seconds": records,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=CONTENDERS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", action="append", help="contenders; default: all")
    parser.add_argument("--sweep", action="store_true", help="the Triton kernels' tilings, on a GPU")
    parser.add_argument("--data", type=Path, help="default: results/attention.json, or attention-tilings.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    names = options.only or list(CONTENDERS[options.device])
    if options.sweep:
        names = ["triton", *(f"triton:{kernel}={tiling}" for kernel, found in SWEEP.items() for tiling in found)]
    options.data = options.data or (DATA.with_name("attention-tilings.json") if options.sweep else DATA)
    results: dict[str, Any] = {"machine": machine(device), "found": []}
    for model, heads in HEADS[options.device].items():
        for case in CASES:
            found = compare(case, heads, options.rounds, names, device)
            results["found"].append({"model": model, **found})
            for name, parts in found["seconds"].items():
                cells = [f"{part} {1e3 * median(values):.2f} ms" for part, values in parts.items()]
                print(f"{model} {case.key} {name}: {', '.join(cells) or 'agrees'}", flush=True)
            options.data.parent.mkdir(exist_ok=True)
            options.data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
