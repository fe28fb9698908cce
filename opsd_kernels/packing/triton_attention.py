"""Attention over packed rows in Triton, forward and backward, for NVIDIA GPUs from compute capability 8.0 on.

The algorithm is FlashAttention-2's (Dao, 2023, arXiv:2307.08691): online softmax, scores recomputed in backward from
the saved log-sum-exp. What differs is who meets whom. A tile is some rows of one segment, and the host lists the runs
of rows that it meets: for queries the prefix and what came before in their own segment, for keys whoever sees them,
which for a shared prompt is all its rollouts. So shared keys are neither gathered nor copied.

    kernel               a program             loops over
    forward              a tile of queries     runs of keys
    query gradient       a tile of queries     runs of keys; also leaves delta = rowsum(dO ∘ O) for the next one
    key gradient         a tile of keys        the query heads of its group, runs of queries

Every output element is written once, by one program: no atomics, nothing to clear, the same bits in every run. Lengths,
windows and counts are runtime values, so that no batch compiles anything anew.

A graph exists for the rows of a call that has gradients on; teacher rows run in calls without, and save nothing.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rows.triton_backend import available
from ..triton_jit import constant, jit, tl
from .layout import Layout, Range, Segment

LARGEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}


# Tile ranges, on the host. A query sees a key if 0 <= distance, and distance < window where there is one; distance is
# in logical positions, and within one run `query row − key row + shift`.


class Run(NamedTuple):
    """Rows [start, stop) that a tile meets in steps of whole tiles; those before `masked` are visible throughout."""

    start: int
    masked: int
    stop: int
    shift: int


class Work(NamedTuple):
    """Rows [start, stop) of one segment and what they meet."""

    start: int
    stop: int
    runs: tuple[Run, ...]


class _Link(NamedTuple):
    """Rows on the other side, before any tile is cut."""

    start: int
    stop: int
    shift: int


def query_tiles(layout: Layout, queries: int, keys: int, window: int | None) -> list[Work]:
    """Tiles of at most `queries` queries with the keys that they meet, `keys` at a time."""
    found = []
    for segment in layout.segments:
        links = list(_keys_of(segment))
        for start in range(segment.start, segment.stop, queries):
            stop = min(start + queries, segment.stop)
            runs: list[Run] = []
            for link in links:
                first, last = start + link.shift, stop - 1 + link.shift  # the keys at distance 0
                if window is None:
                    needed, seen = (link.start, last + 1), (link.start, first + 1)
                else:
                    needed, seen = (first - window + 1, last + 1), (last - window + 1, first + 1)
                runs += _cut(link, needed, seen, keys)
            found.append(Work(start, stop, tuple(runs)))
    return found


def key_tiles(layout: Layout, queries: int, keys: int, window: int | None) -> list[Work]:
    """Tiles of at most `keys` keys with the queries that see them, `queries` at a time."""
    found = []
    for segment, seers in zip(layout.segments, _seers(layout), strict=True):
        # A tile lies within or outside each range that others see, so that all its keys have the same queries.
        cuts = {segment.start, segment.stop, *(edge for seen, _ in seers for edge in seen)}
        for low, high in pairwise(sorted(cuts)):
            links = [link for seen, link in seers if seen[0] <= low and high <= seen[1]]
            if window is None:
                links = _joined(links)
            for start in range(low, high, keys):
                stop = min(start + keys, high)
                runs: list[Run] = []
                for link in links:
                    first, last = start - link.shift, stop - 1 - link.shift  # the queries at distance 0
                    if window is None:
                        needed, seen = (first, link.stop), (last, link.stop)
                    else:
                        needed, seen = (first, last + window), (last, first + window)
                    runs += _cut(link, needed, seen, queries)
                found.append(Work(start, stop, tuple(runs)))
    return found


def _cut(link: _Link, needed: Range, seen: Range, step: int) -> Iterator[Run]:
    """The rows of `link` within `needed`; no mask in the whole steps that lie within `seen`."""
    start, stop = max(link.start, needed[0]), min(link.stop, needed[1])
    if start >= stop:
        return
    low = start + -(-max(0, seen[0] - start) // step) * step
    high = low + max(0, min(seen[1], stop) - low) // step * step
    if low == high:
        yield Run(start, start, stop, link.shift)
        return
    if start < low:
        yield Run(start, start, low, link.shift)
    yield Run(low, high, stop, link.shift)


def _keys_of(segment: Segment) -> Iterator[_Link]:
    """The keys of all queries of a segment, in logical order."""
    position = 0
    for start, stop in (*segment.prefix, (segment.start, segment.stop)):
        yield _Link(start, stop, (segment.position - segment.start) - (position - start))
        position += stop - start


def _seers(layout: Layout) -> list[list[tuple[Range, _Link]]]:
    """For each segment who sees which of its rows: the reverse of `_keys_of`, in the order of the queries' rows."""
    starts = [s.start for s in layout.segments]
    found: list[list[tuple[Range, _Link]]] = [[] for _ in starts]
    for segment in layout.segments:
        for start, stop, shift in _keys_of(segment):
            holder = bisect_right(starts, start) - 1
            while start < stop:
                end = min(stop, layout.segments[holder].stop)
                found[holder].append(((start, end), _Link(segment.start, segment.stop, shift)))
                start, holder = end, holder + 1
    return found


def _joined(links: Iterable[_Link]) -> list[_Link]:
    """Neighbours as one: the rollouts of a prompt, which all see all of it, follow it and each other. Without a window
    only the sign of a distance matters, and under the first one's shift the later rows are further away still."""
    found: list[_Link] = []
    for link in links:
        if found and found[-1].stop == link.start:
            found[-1] = _Link(found[-1].start, link.stop, found[-1].shift)
        else:
            found.append(link)
    return found


@dataclass(frozen=True)
class Table:
    """A list of `Work` on the device."""

    tiles: Tensor  #: (tiles, 4) int32: start, stop, number of the first run, of the one after the last
    runs: Tensor  #: (runs, 4) int32: as in `Run`

    @classmethod
    def of(cls, work: list[Work], device: torch.device) -> Table:
        # The longest first: a long tile that starts last would keep the device waiting.
        work = sorted(work, key=lambda w: -sum(run.stop - run.start for run in w.runs))
        tiles: list[tuple[int, ...]] = []
        runs: list[Run] = []
        for one in work:
            tiles.append((one.start, one.stop, len(runs), len(runs) + len(one.runs)))
            runs += one.runs
        both = torch.tensor([*tiles, *runs], dtype=torch.int32).view(-1, 4)
        if device.type == "cuda":  # from pageable memory the host would wait for all that is queued before the copy
            both = both.pin_memory()
        on_device = both.to(device, non_blocking=True)
        return cls(on_device[: len(tiles)], on_device[len(tiles) :])


def _table(
    tiles_of: Callable[..., list[Work]], layout: Layout, tiling: Tiling, window: int | None, device: torch.device
) -> Table:
    """Made once per layout, for all layers; for each stream anew, since on another the copy may not have ended, and the
    memory could be given away while kernels there still read it."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (tiles_of.__name__, tiling.queries, tiling.keys, window, device, stream)
    if key not in layout._cache:
        layout._cache[key] = Table.of(tiles_of(layout, tiling.queries, tiling.keys, window), device)
    return layout._cache[key]


# Small functions of one tile, on the device.

NEG_INF = constant(-math.inf)
LOWEST = constant(-3.4028234663852886e38)  # a running maximum's start: finite, so that −inf − LOWEST is no NaN


@jit()
def _load_rows(
    pointer, first, stop, stride,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(ROWS, WIDTH) from row `first` on; 0 from row `stop` on if MASKED, and always from column D on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if MASKED:
        inside = (first + row < stop)[:, None]
        if D < WIDTH:
            inside = inside & (column < D)[None, :]
        rows = tl.load(at, mask=inside, other=0.0)
    elif D < WIDTH:
        rows = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        rows = tl.load(at)
    return rows


@jit()
def _store_rows(pointer, first, stop, stride, value, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The rows before `stop` and the columns before D of a (ROWS, WIDTH) value."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = pointer + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (first + row < stop)[:, None]
    if D < WIDTH:
        inside = inside & (column < D)[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=inside)


@jit()
def _place(count, together):
    """The head and the tile of this program, of `count` tiles: `together` heads take turns, tile by tile, then the next
    so many. In one dimension, since a grid's others end at 65535."""
    program = tl.program_id(0)
    turn = count * together
    within = program % turn
    return (program // turn * together + within % together).to(tl.int64), within // together


@jit()
def _load_run(runs, number):
    """start, masked, stop, shift of a `Run`."""
    at = runs + 4 * number
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@jit()
def _visible(query, key, shift, window, WINDOW: tl.constexpr):
    """Whether a query sees a key, by their rows."""
    distance = query - key + shift
    seen = distance >= 0
    if WINDOW:
        seen = seen & (distance < window)
    return seen


@jit()
def _capped(s, inner, CAP: tl.constexpr):
    """Scores as they enter the exponent, up to a factor, and their slope: tanh of them under a cap."""
    if CAP:
        fade = tl.exp2(-tl.abs(s * inner))
        share = 1.0 / (1.0 + fade)
        tanh = (1.0 - fade) * share
        s, slope = tl.where(s < 0.0, -tanh, tanh), 4.0 * fade * share * share
    else:
        slope = 1.0
    return s, slope


# The main loops' bodies.


@jit()
def _forward_step(
    acc, top, total, q, keys, values, k_row, v_row, query, first, stop, shift, inner, outer, window,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries against a tile of keys: the weighted sum of values, the largest score in bits, the sum of weights."""
    k = _load_rows(keys, first, stop, k_row, KEYS, D, WIDTH, MASKED)  # (keys, width)
    s, _ = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), inner, CAP)  # (queries, keys)
    if MASKED:
        key = first + tl.arange(0, KEYS)
        seen = _visible(query[:, None], key[None, :], shift, window, WINDOW) & (key < stop)[None, :]
        s = tl.where(seen, s, NEG_INF)
    higher = tl.maximum(top, tl.max(s, 1) * outer)
    p = tl.exp2(s * outer - higher[:, None])
    keep = tl.exp2(top - higher)
    v = _load_rows(values, first, stop, v_row, KEYS, D, WIDTH, MASKED)  # (keys, width)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, higher, total * keep + tl.sum(p, 1)


@jit()
def _query_gradient_step(
    dq, q, d_out, lse, delta, keys, values, k_row, v_row, query, first, stop, shift, inner, outer, window,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to the queries' gradient, but for the scale."""
    k = _load_rows(keys, first, stop, k_row, KEYS, D, WIDTH, MASKED)  # (keys, width)
    v = _load_rows(values, first, stop, v_row, KEYS, D, WIDTH, MASKED)  # (keys, width)
    s, slope = _capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), inner, CAP)  # (queries, keys)
    p = tl.exp2(s * outer - lse[:, None])
    if MASKED:
        key = first + tl.arange(0, KEYS)
        seen = _visible(query[:, None], key[None, :], shift, window, WINDOW) & (key < stop)[None, :]
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # (queries, keys)
    ds = p * (dp - delta[:, None]) * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit()
def _key_gradient_step(
    dk, dv, k, v, queries, d_outs, lse, delta, q_row, do_row, key, first, stop, shift, inner, outer, window,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of queries gives to the gradients of keys (but for the scale) and values."""
    query = first + tl.arange(0, QUERIES)
    q = _load_rows(queries, first, stop, q_row, QUERIES, D, WIDTH, MASKED)  # (queries, width)
    do = _load_rows(d_outs, first, stop, do_row, QUERIES, D, WIDTH, MASKED)  # (queries, width)
    if MASKED:
        lse, delta = tl.load(lse + query, mask=query < stop, other=0.0), tl.load(delta + query, query < stop, 0.0)
    else:
        lse, delta = tl.load(lse + query), tl.load(delta + query)  # (queries,)
    s, slope = _capped(tl.dot(k, tl.trans(q), input_precision=PRECISION), inner, CAP)  # (keys, queries)
    p = tl.exp2(s * outer - lse[None, :])
    if MASKED:
        seen = _visible(query[None, :], key[:, None], shift, window, WINDOW) & (query < stop)[None, :]
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (keys, queries)
    ds = p * (dp - delta[None, :]) * slope
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


# The kernels. Tensors are (heads, rows, D) by strides; `inner` and `outer` are of `_Scores`.


@jit("rows", "count", "together", "window")
def forward_kernel(
    q, k, v, out, lse, tiles, runs,
    q_head, q_row, k_head, k_row, v_head, v_row, o_head, o_row, rows, count, together, inner, outer, window,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Program (head, tile) writes its rows of `out` and of `lse` (heads, rows), the latter in bits."""
    head, tile = _place(count, together)
    start, stop, run, last_run = _load_run(tiles, tile)
    keys, values = k + head // GROUP * k_head, v + head // GROUP * v_head
    query = start + tl.arange(0, QUERIES)
    q_tile = _load_rows(q + head * q_head, start, stop, q_row, QUERIES, D, WIDTH, True)  # (queries, width)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    top = tl.zeros((QUERIES,), tl.float32) + LOWEST
    total = tl.zeros((QUERIES,), tl.float32)
    for number in tl.range(run, last_run):
        first, masked, last, shift = _load_run(runs, number)
        for at in tl.range(first, masked, KEYS):
            acc, top, total = _forward_step(
                acc, top, total, q_tile, keys, values, k_row, v_row, query, at, last, shift, inner, outer, window,
                D, WIDTH, KEYS, WINDOW, CAP, PRECISION, False,
            )  # fmt: skip
        for at in tl.range(masked, last, KEYS, num_stages=EDGE):
            acc, top, total = _forward_step(
                acc, top, total, q_tile, keys, values, k_row, v_row, query, at, last, shift, inner, outer, window,
                D, WIDTH, KEYS, WINDOW, CAP, PRECISION, True,
            )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # rows past the segment's end may see nothing
    _store_rows(out + head * o_head, start, stop, o_row, acc / total[:, None], QUERIES, D, WIDTH)
    tl.store(lse + head * rows + query, top + tl.log2(total), mask=query < stop)


@jit("rows", "count", "together", "window")
def query_gradient_kernel(
    q, k, v, out, d_out, d_q, lse, delta, tiles, runs,
    q_head, q_row, k_head, k_row, v_head, v_row, o_head, o_row, do_head, do_row, rows, count, together, scale,
    inner, outer, window,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Program (head, tile) writes its rows of `d_q`, laid out as `out` is, and of `delta` (heads, rows)."""
    head, tile = _place(count, together)
    start, stop, run, last_run = _load_run(tiles, tile)
    keys, values = k + head // GROUP * k_head, v + head // GROUP * v_head
    query = start + tl.arange(0, QUERIES)
    o = _load_rows(out + head * o_head, start, stop, o_row, QUERIES, D, WIDTH, True)  # (queries, width)
    do = _load_rows(d_out + head * do_head, start, stop, do_row, QUERIES, D, WIDTH, True)  # (queries, width)
    delta_tile = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (queries,)
    tl.store(delta + head * rows + query, delta_tile, mask=query < stop)
    q_tile = _load_rows(q + head * q_head, start, stop, q_row, QUERIES, D, WIDTH, True)  # (queries, width)
    lse_tile = tl.load(lse + head * rows + query, mask=query < stop, other=0.0)  # (queries,)
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    for number in tl.range(run, last_run):
        first, masked, last, shift = _load_run(runs, number)
        for at in tl.range(first, masked, KEYS):
            dq = _query_gradient_step(
                dq, q_tile, do, lse_tile, delta_tile, keys, values, k_row, v_row, query, at, last, shift,
                inner, outer, window, D, WIDTH, KEYS, WINDOW, CAP, PRECISION, False,
            )  # fmt: skip
        for at in tl.range(masked, last, KEYS, num_stages=EDGE):
            dq = _query_gradient_step(
                dq, q_tile, do, lse_tile, delta_tile, keys, values, k_row, v_row, query, at, last, shift,
                inner, outer, window, D, WIDTH, KEYS, WINDOW, CAP, PRECISION, True,
            )  # fmt: skip
    _store_rows(d_q + head * o_head, start, stop, o_row, dq * scale, QUERIES, D, WIDTH)


@jit("rows", "count", "together", "window")
def key_gradient_kernel(
    q, k, v, d_out, d_k, d_v, lse, delta, tiles, runs,
    q_head, q_row, k_head, k_row, v_head, v_row, do_head, do_row, dk_head, dk_row, rows, count, together, scale,
    inner, outer, window,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, tile) writes its rows of `d_k` and `d_v`, which are laid out alike."""
    kv_head, tile = _place(count, together)
    start, stop, run, last_run = _load_run(tiles, tile)
    key = start + tl.arange(0, KEYS)
    k_tile = _load_rows(k + kv_head * k_head, start, stop, k_row, KEYS, D, WIDTH, True)  # (keys, width)
    v_tile = _load_rows(v + kv_head * v_head, start, stop, v_row, KEYS, D, WIDTH, True)  # (keys, width)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        queries, d_outs = q + head * q_head, d_out + head * do_head
        lses, deltas = lse + head * rows, delta + head * rows
        for number in tl.range(run, last_run):
            first, masked, last, shift = _load_run(runs, number)
            for at in tl.range(first, masked, QUERIES):
                dk, dv = _key_gradient_step(
                    dk, dv, k_tile, v_tile, queries, d_outs, lses, deltas, q_row, do_row, key, at, last, shift,
                    inner, outer, window, D, WIDTH, QUERIES, WINDOW, CAP, PRECISION, False,
                )  # fmt: skip
            for at in tl.range(masked, last, QUERIES, num_stages=EDGE):
                dk, dv = _key_gradient_step(
                    dk, dv, k_tile, v_tile, queries, d_outs, lses, deltas, q_row, do_row, key, at, last, shift,
                    inner, outer, window, D, WIDTH, QUERIES, WINDOW, CAP, PRECISION, True,
                )  # fmt: skip
    _store_rows(d_k + kv_head * dk_head, start, stop, dk_row, dk * scale, KEYS, D, WIDTH)
    _store_rows(d_v + kv_head * dk_head, start, stop, dk_row, dv, KEYS, D, WIDTH)


# The host's side.


@dataclass(frozen=True)
class Tiling:
    """A kernel on the device: rows per tile of either side, warps per program, stages of the loads' pipeline, in the
    loops over whole tiles and in those with masks. Short runs are mostly the latter, which should wait for loads no
    more than the former."""

    queries: int
    keys: int
    warps: int
    stages: int
    edge: int | None = None  #: None: as `stages`

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        return {"QUERIES": self.queries, "KEYS": self.keys, "EDGE": self.edge or self.stages}

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler. Exponents are one multiply-add each only by name: Triton 3.10 is to fuse no longer."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Tilings(NamedTuple):
    """One for each kernel."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


# By compute capability ("8": any other from 8.0 on) and width of the heads, in 16 bits. The larger a tile the less is
# loaded per product; these compile without spills for every feature. Which of those are fastest is not measured.
# A last 1: a pipeline for the masked loop too would spill.
# "8" fits 99 KiB of shared memory, which all devices have.
_TILINGS: dict[tuple[str, int], Tilings] = {
    ("8", 64): Tilings(Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2), Tiling(32, 128, 8, 2)),
    ("8", 128): Tilings(Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 64, 8, 2, 1)),
    ("8", 256): Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 1)),
    ("9", 64): Tilings(Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2)),
    ("9", 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 2)),
    ("9", 256): Tilings(Tiling(128, 32, 8, 2), Tiling(128, 16, 8, 2), Tiling(64, 32, 8, 1)),
    ("10", 64): Tilings(Tiling(128, 64, 8, 3, 1), Tiling(64, 64, 4, 2, 1), Tiling(64, 128, 8, 2, 1)),
    ("10", 128): Tilings(Tiling(128, 64, 8, 2, 1), Tiling(128, 64, 8, 2, 1), Tiling(64, 64, 8, 2, 1)),
    ("10", 256): Tilings(Tiling(64, 32, 8, 2, 1), Tiling(64, 32, 8, 1), Tiling(32, 32, 8, 1)),
}
# A softcap's slope takes registers that some of those have not.
_CAPPED: dict[tuple[str, int], Tilings] = {
    ("9", 64): Tilings(Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 2)),
    ("9", 128): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2), Tiling(16, 128, 8, 2)),
    ("10", 64): Tilings(Tiling(128, 64, 8, 3, 1), Tiling(64, 64, 4, 2, 1), Tiling(64, 64, 8, 2, 1)),
    ("10", 128): Tilings(Tiling(128, 64, 8, 2, 1), Tiling(128, 64, 8, 2, 1), Tiling(32, 64, 8, 2, 1)),
}
# float32, everywhere: three passes split each operand in two, so its tiles are small, and 256 columns have no room.
_FLOAT32: dict[int, Tilings] = {
    64: Tilings(Tiling(32, 32, 4, 2), Tiling(16, 32, 4, 2), Tiling(16, 32, 4, 2)),
    128: Tilings(Tiling(16, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(32, 16, 8, 1)),
}
# The interpreter's: several tiles even of short rows.
_TINY = Tilings(Tiling(32, 16, 1, 1), Tiling(16, 32, 1, 1), Tiling(32, 16, 1, 1))


def tilings(head_size: int, dtype: torch.dtype, capability: tuple[int, int] | None, *, capped: bool = False) -> Tilings:
    """What the kernels run with on a device of this compute capability; None: in the interpreter."""
    if capability is None:
        return _TINY
    width = max(64, _width(head_size))
    if dtype == torch.float32:
        return _FLOAT32[width]
    key = (str(capability[0]) if capability[0] in (9, 10) else "8", width)
    return (capped and _CAPPED.get(key)) or _TILINGS[key]


def _width(head_size: int) -> int:
    """Columns of a tile: powers of two from 16 on, for the matrix units."""
    return max(16, 1 << (head_size - 1).bit_length())


@dataclass(frozen=True)
class _Scores:
    """What the scores depend on beside queries and keys."""

    scale: float
    softcap: float | None
    window: int | None

    @property
    def factors(self) -> tuple[float, float]:
        """From products q·k to exponents in bits: product · outer, or tanh(product · inner) · outer under a cap.
        The kernels' tanh is made of exp2, whose constants are in `inner` too."""
        to_bits = math.log2(math.e)
        if self.softcap is None:
            return 1.0, self.scale * to_bits
        return 2.0 * to_bits * self.scale / self.softcap, self.softcap * to_bits

    def constants(self, dtype: torch.dtype, head_size: int, group: int) -> dict[str, Any]:
        """The kernels' compile-time arguments, but for the tile."""
        return {
            "GROUP": group,
            "D": head_size,
            "WIDTH": _width(head_size),
            "WINDOW": self.window is not None,
            "CAP": self.softcap is not None,
            "PRECISION": _precision(dtype),
        }


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32: three passes of the tensor cores, one where torch may use one; 16 bits have no choice."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class Compilation:
    """A kernel as it is launched: what a compiler ahead of time needs to know."""

    name: str
    kernel: Any
    signature: dict[str, str]  # argument → Triton type
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # pointers and strides that are multiples of 16
    options: dict[str, Any]  # num_warps, num_stages and the like


_KERNELS = (forward_kernel, query_gradient_kernel, key_gradient_kernel)


def compilations(
    head_size: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> list[Compilation]:
    """The three kernels as they are launched for these arguments, with two query heads per key/value head."""
    element = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32", "runs": "*i32"}
    types |= dict.fromkeys(("rows", "count", "together", "window"), "i32")
    types |= dict.fromkeys(("scale", "inner", "outer"), "fp32")
    features = f"{element[1:]}, head {head_size}{', softcap' * bool(softcap)}{', window' * bool(window)}"
    found = []
    for kernel, tiling in zip(_KERNELS, tilings(head_size, dtype, capability, capped=softcap is not None), strict=True):
        constants = _Scores(1.0, softcap, window).constants(dtype, head_size, 2)
        constants |= tiling.constants
        strides = [name for name in kernel.arg_names if name.endswith(("_head", "_row"))]
        known = {**types, **dict.fromkeys(strides, "i32"), **dict.fromkeys(constants, "constexpr")}
        signature = {name: known.get(name, element) for name in kernel.arg_names}
        pointers = [name for name, kind in signature.items() if kind.startswith("*")]
        name = f"{kernel.fn.__name__.removesuffix('_kernel')}, {features}"
        found.append(Compilation(name, kernel, signature, constants, (*pointers, *strides), tiling.options))
    return found


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Each segment's queries over its prefix and, causally, its own keys.

    Args:
        query: (1, heads, T, D), float16 or bfloat16 with D from 1 to 256, or float32 to 128, any strides.
        key, value: (1, key/value heads, T, D), alike.
        scale: of the products q·k, positive.
        window: a query sees so many logical positions, its own included; None: all before it.
        softcap: c in c · tanh(score / c), or None.

    Returns:
        (1, heads, T, D) in the dtype of `query`, laid out as (T, heads, D). Scores, softmax and sums are float32.

    Raises:
        TypeError, ValueError: an argument is not of this form, or the device has no kernel.
    """
    _check(query, key, value, layout, scale, softcap)
    return _Attention.apply(*(_unit_stride(t) for t in (query, key, value)), layout, _Scores(scale, softcap, window))


def serves(device: torch.device | str, dtype: torch.dtype, head_size: int) -> tuple[bool, str]:
    """Whether the kernels run on `device` for these tensors, and why not (an empty string where they do)."""
    if dtype not in LARGEST_HEAD:
        return False, f"the Triton kernel takes float16, bfloat16 or float32, not {dtype}"
    if head_size > LARGEST_HEAD[dtype]:
        return False, f"the Triton kernel takes heads of up to {LARGEST_HEAD[dtype]} in {dtype}, not {head_size}"
    return available(device)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, softcap: float | None) -> None:
    fine, why = serves(query.device, query.dtype, query.shape[-1])
    if not fine:
        raise ValueError(f"packing backend 'triton' cannot run: {why}; accepted here: eager")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "packing backend 'triton' needs query, key and value of one dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.shape[0] == key.shape[0] == 1 or not query.shape[2] == key.shape[2] == layout.rows:
        raise ValueError(  # the tables would lead out of the tensors
            f"packing backend 'triton' needs (1, heads, {layout.rows}, D) for this layout, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "packing backend 'triton' needs keys and values of one shape, and as many query heads for each, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"packing backend 'triton' needs a positive scale and softcap, got {scale} and {softcap}")


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@dataclass(frozen=True)
class _Call:
    """What the three kernels have in common on one set of tensors."""

    query: Tensor
    key: Tensor
    layout: Layout
    scores: _Scores

    @property
    def tilings(self) -> Tilings:
        device = self.query.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return tilings(self.query.shape[-1], self.query.dtype, capability, capped=self.scores.softcap is not None)

    def launch(
        self,
        kernel: Any,
        tiling: Tiling,
        tiles_of: Callable[..., list[Work]],
        tensors: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        *factors: float,
    ) -> None:
        """Runs `kernel` on all tiles of all heads. Of `strided` it takes the strides of heads and rows."""
        _, heads, rows, head_size = self.query.shape
        kv_heads, window = self.key.shape[1], self.scores.window
        table = _table(tiles_of, self.layout, tiling, window, self.query.device)
        if not len(table.tiles):
            return
        count, by_query = len(table.tiles), tiles_of is query_tiles
        together = _together(kv_heads, 2 * rows * head_size * self.query.element_size(), _cache(self.query.device))
        programs = (heads if by_query else kv_heads) * count
        together *= heads // kv_heads if by_query else 1
        strides = [t.stride(i) for t in strided for i in (1, 2)]
        constants = self.scores.constants(self.query.dtype, head_size, heads // kv_heads)
        with torch.cuda.device(self.query.device) if self.query.device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](
                *tensors, table.tiles, table.runs, *strides, rows, count, together, *factors, *self.scores.factors,
                window or 0, **constants, **tiling.constants, **tiling.options,
            )  # fmt: skip


def _together(kv_heads: int, size: int, cache: int) -> int:
    """How many key/value heads take turns at the tiles. Those that run at once read all segments, so their keys and
    values, `size` bytes a head, are to stay in the cache; few rows leave room for all heads, and then the longest tiles
    of every head come first. A divisor, so that no programs are left over."""
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or n * size <= cache))


def _cache(device: torch.device) -> int:
    """Bytes of the second-level cache to count on: half, the rest is passing through. 0 in the interpreter."""
    return torch.cuda.get_device_properties(device).L2_cache_size // 2 if device.type == "cuda" else 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: _Scores) -> Tensor:
        call = _Call(query, key, layout, scores)
        out, lse = _new_rows(query), _new_sums(query)
        call.launch(
            forward_kernel, call.tilings.forward, query_tiles, (query, key, value, out, lse), (query, key, value, out)
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scores = layout, scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        call, grad = _Call(query, key, ctx.layout, ctx.scores), _unit_stride(grad)
        dq, dk, dv = (_new_rows(t) for t in (query, key, value))
        delta = _new_sums(query)
        call.launch(
            query_gradient_kernel, call.tilings.query_gradient, query_tiles,
            (query, key, value, out, grad, dq, lse, delta), (query, key, value, out, grad), ctx.scores.scale,
        )  # fmt: skip
        if not any(ctx.needs_input_grad[1:3]):
            return dq, None, None, None, None
        call.launch(
            key_gradient_kernel, call.tilings.key_gradient, key_tiles,
            (query, key, value, grad, dk, dv, lse, delta), (query, key, value, grad, dk), ctx.scores.scale,
        )  # fmt: skip
        return dq, dk, dv, None, None


def _new_rows(like: Tensor) -> Tensor:
    """An uninitialised (1, heads, T, D), laid out as (T, heads, D): what the models' projections make and take."""
    _, heads, rows, head_size = like.shape
    return like.new_empty(1, rows, heads, head_size).transpose(1, 2)


def _new_sums(query: Tensor) -> Tensor:
    """An uninitialised (heads, T), float32."""
    return query.new_empty(query.shape[1:3], dtype=torch.float32)
