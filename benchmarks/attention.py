"""One layer's attention over packed rows, backend beside backend, and what the Triton kernel's tiles should be: the
steps `attention` and `tuning` of `benchmarks.parts`.

A round is a new draw of lengths, those of `benchmarks.packing`, of as many prompts as give about the wanted number of
rows. Timed are the student's forward and backward pass and the teacher's forward pass, all on the same tensors;
contenders take turns, and their results must agree. What a layout costs once for all layers (tables, gathers, a block
mask) is timed apart, as `prepare`. FLOPs are those of the pairs of query and key that the layout lets meet, 4 · D for
each head forward and 2.5 times that backward, whatever a contender computes beyond.

"padded" is SDPA as two padded batches have it: each context, prefix and all, as a row of a batch. FlexAttention is
compiled. On a CPU it has no backward pass: there it takes part in the teacher's forward pass alone, and its results
for the student are compared without a gradient.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cells import Unavailable
from benchmarks.packing import SCALE, Case, draw
from benchmarks.runner import Item, Report, release
from opsd_kernels.packing import attention, pack_dual_context, triton_attention
from opsd_kernels.packing.layout import Layout
from opsd_kernels.packing.triton_attention import Tiling, Tilings

CONTENDERS = {"cuda": ("varlen", "triton", "flex", "padded"), "cpu": ("sdpa", "eager", "flex", "padded")}
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
ROUNDS, REPEATS = 3, {"cuda": 5}  # calls in a row for one time: a single one may be over before the next is launched
LONGEST = 1024  # of the rollouts, before scaling
ROWS = {"cuda": (8192, 32768, 2048, 4096, 16384), "cpu": (256,)}  # the most telling first


@dataclass(frozen=True)
class Heads:
    """A layer's attention."""

    query: int
    key: int
    size: int


HEADS = {
    "cuda": {"32:8": Heads(32, 8, 128), "16:8": Heads(16, 8, 128)},
    "cpu": {"4:2": Heads(4, 2, 16)},
}

Attend = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
"""query (1, heads, T, D), key, value (1, key heads, T, D) → (1, heads, T, D)."""


def layouts(generations: int, rows: int, seed: int, device: torch.device) -> tuple[Layout, Layout]:
    """A student's and a teacher's, each of about so many rows, at least one prompt."""
    scale = 1 if device.type == "cuda" else SCALE
    written = generations * 0.55 * LONGEST

    def drawn(prompt: int) -> Any:
        prompts = max(1, round(rows * scale / (prompt + written)))
        data = draw(Case(generations, LONGEST), 1000, seed, scale=scale, prompts=prompts)
        return pack_dual_context(data.students, data.teachers, data.rollouts).to(device)

    return drawn(300).student.layout, drawn(2300).teacher.layout


def pairs(layout: Layout) -> int:
    """How many pairs of query and key meet."""
    return sum(n * s.position + n * (n + 1) // 2 for s in layout.segments for n in [s.stop - s.start])


def flops(layout: Layout, heads: Heads, part: str) -> float:
    return 4.0 * pairs(layout) * heads.query * heads.size * (2.5 if part.endswith("backward") else 1.0)


def backend(name: str) -> Attend:
    function = getattr(attention, f"_{name}")
    return lambda q, k, v, layout: function(q, k, v, layout, q.shape[-1] ** -0.5, None, None)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _flex_attention()(q, k, v, block_mask=_block_mask(layout), enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # each form of mask is one
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


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

        layout._cache["flex"] = create_block_mask(
            visible, None, None, layout.rows, layout.rows, device=device, _compile=device.type == "cuda"
        )
    return layout._cache["flex"]


def padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The stock fused kernel on a padded batch. To put rows there and to take them back is more than a padded path has
    to do."""
    batch, source = _batch(layout)
    q, k, v = (t[0][:, batch].transpose(0, 1) for t in (q, k, v))  # (contexts, heads, width, D)
    with fused_sdpa(q.device):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(0, 1).flatten(1, 2)[:, source][None]


@contextmanager
def fused_sdpa(device: torch.device) -> Iterator[None]:
    """On a GPU: SDPA is FlashAttention, the kernel that `varlen_attn` calls too, and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext():
        yield


def _batch(layout: Layout) -> tuple[Tensor, Tensor]:
    """(contexts, width) rows of the layout, padded by row 0, and for each row of the layout its place in there."""
    if "batch" not in layout._cache:
        prefixes = {held for s in layout.segments for held in s.prefix}
        contexts = [
            list(chain.from_iterable(range(*r) for r in (*s.prefix, (s.start, s.stop))))
            for s in layout.segments
            if (s.start, s.stop) not in prefixes  # a shared prompt is in the contexts of its rollouts
        ]
        width = max(map(len, contexts))
        source = [0] * layout.rows
        for i, rows in enumerate(contexts):
            for place, row in enumerate(rows, i * width):
                source[row] = place
        batch = [rows + [0] * (width - len(rows)) for rows in contexts]
        layout._cache["batch"] = tuple(torch.tensor(x, device=layout.ids.device) for x in (batch, source))
    return layout._cache["batch"]


def contender(name: str) -> Attend:
    return {"flex": flex, "padded": padded}.get(name) or backend(name)


def tensors(layout: Layout, heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the output's gradient, laid out as the models' projections leave them."""
    device = layout.ids.device
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(1, layout.rows, n, heads.size) for n in (heads.query, heads.key, heads.key, heads.query)]
    return [torch.randn(*s, generator=draw, device=device).to(dtype).transpose(1, 2) for s in shapes]


def clocked(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> tuple[float, Any]:
    """Seconds of one call, and what it returns."""
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
        repeats = REPEATS.get(device.type, 1)
        inputs = [t.requires_grad_(backward) for t in inputs]
        with torch.set_grad_enabled(backward):
            call = functools.partial(attend, *inputs, layout)
            first, _ = clocked(call, device)
            seconds[f"{name} forward"], out = clocked(call, device, repeats)
        seconds[f"{name} prepare"] = max(0.0, first - seconds[f"{name} forward"])
        results[name] = out.detach()
        if backward:
            back = functools.partial(torch.autograd.grad, out, inputs, upstream, retain_graph=True)
            back()
            seconds[f"{name} backward"], found = clocked(back, device, repeats)
            results |= dict(zip(("dq", "dk", "dv"), found, strict=True))
    return Sample(seconds, results)


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative difference of what both have."""
    both = got.keys() & want.keys()
    return max(float((got[n] - want[n]).float().norm() / want[n].float().norm()) for n in both)


def compare(
    generations: int, rows: int, heads: Heads, report: Report, names: Sequence[str], rounds: int
) -> dict[str, Any]:
    device = report.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    order, worst = list(names), 0.0
    records: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    sizes = []
    for number in range(-1, rounds):  # the first one compiles and is not counted
        if number > 0 and report.late:
            break
        want: dict[str, Tensor] = {}
        for name in order:
            student, teacher = layouts(generations, rows, 1 + number, device)
            grad = name != "flex" or device.type == "cuda"
            sample = report.attempt(
                name, lambda n=name, s=student, t=teacher, g=grad: measure(contender(n), s, t, heads, dtype, g)
            )
            release(device)
            if sample is None:
                continue
            want = want or sample.results
            worst = max(worst, difference(sample.results, want))
            if number >= 0:
                for part, seconds in sample.seconds.items():
                    if part.startswith("student") and not grad:
                        continue
                    layout = student if part.startswith("student") else teacher
                    records[name].setdefault(part, []).append(seconds)
                    if not part.endswith("prepare"):
                        rate = flops(layout, heads, part) / seconds
                        records[name].setdefault(f"{part} FLOP/s", []).append(rate)
        if number >= 0:
            sizes.append([student.rows, teacher.rows])
        order = [*order[1:], *order[:1]]
    return {
        "generations": generations, "heads": asdict(heads), "rows": sizes,
        "contenders": {name: {**records[name], **report.out.get(name, {})} for name in names},
        "largest_difference": worst, "agree": worst <= TOLERANCE[dtype],
    }  # fmt: skip


def items(device: torch.device) -> Iterator[Item]:
    for model, heads in HEADS[device.type].items():
        for rows in ROWS[device.type]:
            for generations in (1, 8):

                def run(report: Report, g: int = generations, t: int = rows, h: Heads = heads) -> dict[str, Any]:
                    return compare(g, t, h, report, report.wanted(CONTENDERS[device.type]), report.rounds or ROUNDS)

                yield Item(f"attention/{model} G{generations} T{rows}", 45 if rows < 32768 else 90, run)


# Which tiles the Triton kernel is fastest with.

# Those that should be: two programs on a multiprocessor, or the largest tile there is room for.
FIRST = {
    "forward": [Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(128, 128, 8, 2), Tiling(128, 128, 8, 3)],
    "key_gradient": [Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3)],
}
TILES = ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32), (32, 128))
TUNED = {"cuda": ((8, 8192), (1, 16384)), "cpu": ((8, 128),)}  # generations, rows


def tuning(device: torch.device) -> Iterator[Item]:
    """Each kernel's tiles by themselves, the other kernels as they come; the likeliest ones first."""
    heads = next(iter(HEADS[device.type].values()))

    def item(generations: int, rows: int, kernel: str, what: str, tilings: list[Tiling]) -> Item:
        def run(report: Report) -> dict[str, Any]:
            return tuned(generations, rows, heads, report, kernel, tilings)

        return Item(f"tuning/G{generations} T{rows} {kernel} {what}", 30 + 12 * len(tilings), run)

    for generations, rows in TUNED[device.type]:
        for kernel, tilings in FIRST.items():
            chosen = tilings if device.type == "cuda" else [Tiling(16, 16, 1, 1)]
            yield item(generations, rows, kernel, "first", chosen)
    if device.type != "cuda":
        return
    for generations, rows in TUNED[device.type]:
        for kernel in Tilings._fields:
            for queries, keys in TILES:
                several = [Tiling(queries, keys, warps, stages) for warps in (4, 8) for stages in (2, 3)]
                rest = [tiling for tiling in several if tiling not in FIRST.get(kernel, [])]
                yield item(generations, rows, kernel, f"{queries}x{keys}", rest)


def tuned(
    generations: int, rows: int, heads: Heads, report: Report, kernel: str, candidates: list[Tiling]
) -> dict[str, Any]:
    """The candidates beside what the kernel runs with as it comes."""
    device = report.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fine, why = triton_attention.serves(device, dtype, heads.size)
    if not fine:
        raise Unavailable(why)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    usual = triton_attention.tilings(heads.size, dtype, capability)
    part = "student forward" if kernel == "forward" else "student backward"
    found: dict[str, dict[str, Any]] = {}
    want: dict[str, Tensor] = {}
    worst = 0.0
    for tiling in [getattr(usual, kernel), *(t for t in candidates if t != getattr(usual, kernel))]:
        name = f"{tiling.queries}x{tiling.keys} warps {tiling.warps} stages {tiling.stages}"
        chosen = usual._replace(**{kernel: tiling})
        student, _ = layouts(generations, rows, 0, device)

        def sampled(student: Layout = student, chosen: Tilings = chosen) -> list[Sample]:
            with mock.patch.object(triton_attention, "tilings", return_value=chosen):
                return [measure(backend("triton"), student, student, heads, dtype, True) for _ in range(3)]

        samples = report.attempt(name, sampled)  # more shared memory than there is, say
        if samples is None:
            found[name] = {"tiling": asdict(tiling), **report.out[name]}
            continue
        want = want or samples[0].results
        worst = max(worst, difference(samples[0].results, want))
        seconds = [sample.seconds[part] for sample in samples]
        rate = flops(student, heads, part) / median(seconds)
        found[name] = {"tiling": asdict(tiling), "seconds": seconds, "flops": rate}
        print(f"  {kernel} {name}: {1e3 * median(seconds):.3f} ms, {rate / 1e12:.0f} TFLOP/s", flush=True)
    return {
        "kernel": kernel, "usual": asdict(getattr(usual, kernel)), "rows": student.rows, "contenders": found,
        "largest_difference": worst, "agree": worst <= TOLERANCE[dtype],
    }  # fmt: skip


def table(cells: list[dict[str, Any]]) -> str:
    """TFLOP/s by contender and pass, in Markdown; a median over the rounds."""
    parts = ("student forward", "student backward", "teacher forward")
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    lines = [
        "| heads | rollouts per prompt | rows | | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for cell in cells:
        heads, generations = cell["heads"], cell["generations"]
        for part in parts:
            rows = median(sizes[part == "teacher forward"] for sizes in cell["rows"])
            found = [cell["contenders"].get(name, {}).get(f"{part} FLOP/s") for name in names]
            rates = [f"{median(rates) / 1e12:.0f}" if rates else "–" for rates in found]
            start = f"| {heads['query']}:{heads['key']} × {heads['size']} | {generations} | {rows:,.0f} | {part} | "
            lines.append(start + " | ".join(rates) + " |")
    return "\n".join(lines)
