"""Attention over packed rows: each segment causally over itself and fully over its prefix.

`packed_attention` is what a transformers model calls under the private name `NAME`; the `Pass` that describes the rows
travels to it as a keyword argument of the model, and without one it raises rather than let rows see each other.

Backends: "sdpa" (CPU; fused kernels on ranges of rows), "varlen" (torch's FlashAttention) and "flash" (the package
flash-attn), both CUDA in 16 bits, "triton" (this project's kernel, CUDA in 16 or 32 bits, see `triton_attention`), and
"eager" (plain matrix products tile by tile, anywhere, the tests' reference).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Layout, Range, Segment

logger = logging.getLogger(__name__)

NAME = "opsd_packed_rows"
KEYWORD = "opsd_packed_pass"
BACKENDS = ("auto", "sdpa", "varlen", "flash", "triton", "eager")
_ON_CUDA = {  # most wanted first
    "varlen": "torch's own FlashAttention",
    "flash": "the package flash-attn",
    "triton": "this project's Triton kernel",
}
_TILE = 512  # query rows per call where scores or masks are materialised


class LayoutMissing(RuntimeError):
    """An attention layer ran by `NAME` without the rows' layout."""


@dataclass
class Pass:
    """One trip of packed rows through a model, as its attention layers see it."""

    layout: Layout
    backend: str = "auto"
    calls: int = 0  #: attention layers that ran; fewer than layers means that some never saw the layout
    windows: int = 0  #: those of them that were given a sliding window


def register() -> None:
    """Makes `NAME` known to transformers. Deliberately without a mask function, so that no mask is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls.

    Args:
        query: (1, heads, T, D).
        key, value: (1, key/value heads, T, D).
        sliding_window: a query sees so many logical positions, its own included.

    Returns:
        (1, T, heads, D), and None in place of the weights.

    Raises:
        LayoutMissing: no layout came.
        RuntimeError: it is not that of these rows.
        ValueError: the layer asks for something that packed rows cannot give.
    """
    packed = kwargs.get(KEYWORD)
    name = type(module).__name__
    if not isinstance(packed, Pass):
        raise LayoutMissing(f"{name}: attention {NAME!r} needs its layout; call the model by dual_hidden_states")
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == packed.layout.rows:
        raise RuntimeError(
            f"{name}: the layout has {packed.layout.rows} rows, query is {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if attention_mask is not None:
        raise ValueError(f"{name} brings an attention mask, packed rows take none")
    if dropout:
        raise ValueError(f"{name} has attention dropout {dropout:g} in training; packed rows accept 0")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{name} is not causal")
    for unknown in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(unknown) is not None:
            raise ValueError(f"{name} passes {unknown} to its attention, which packed rows do not support")
    packed.calls += 1
    packed.windows += sliding_window is not None
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for any attention kernel: norms may have left float32 behind
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # A window no context reaches the end of is none.
    window = sliding_window if sliding_window is not None and sliding_window < packed.layout.longest else None
    backend = packed.backend
    if backend == "auto":
        backend, _ = choose_backend(query.device, query.dtype, query.shape[-1], softcap)
        if value.shape[-1] != query.shape[-1]:
            backend = "eager"
    return _attend(backend, query, key, value, packed.layout, scale, window, softcap).transpose(1, 2), None


def _attend(backend: str, *arguments: Any) -> Tensor:
    """(1, heads, T, D), by a backend that is not "auto"."""
    call = {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash, "triton": _triton, "eager": _eager}[backend]
    return call(*arguments)


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_size: int = 64, softcap: float | None = None
) -> tuple[str, str]:
    """What "auto" stands for, and why: on a GPU the first that takes such tensors and passes its self-check."""
    if device.type == "cpu":
        if softcap is not None:
            return "eager", "no fused CPU kernel has a softcap"
        return "sdpa", "the fused CPU kernel"
    if device.type != "cuda":
        return "eager", f"no fused kernel for {device.type}"
    obstacles: list[str] = []
    for name, what in _ON_CUDA.items():
        obstacle = backend_obstacle(name, device, dtype, head_size, softcap)
        if obstacle is None:
            exact = torch.get_float32_matmul_precision() == "highest"
            obstacle = self_check(name, device, dtype, head_size, capped=softcap is not None, exact=exact)
        if obstacle is None:
            return name, "; ".join([what, *obstacles])
        obstacles.append(f"{name} {obstacle}")
    return "eager", "; ".join(obstacles)


def backend_obstacle(
    backend: str, device: torch.device, dtype: torch.dtype, head_size: int = 64, softcap: float | None = None
) -> str | None:
    """What `backend` needs and such tensors have not, or None."""
    if backend == "sdpa" and (device.type != "cpu" or softcap is not None):
        return f"needs the CPU and no softcap, got {device.type}, softcap {softcap}"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn, which is not installed"
    if backend in ("varlen", "flash"):
        if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size > 256:
            return (
                "needs a CUDA device, float16 or bfloat16 and heads of up to 256, "
                f"got {device.type}, {dtype}, head size {head_size}"
            )
        if backend == "varlen" and softcap is not None:
            return f"has no softcap, got {softcap}"
    if backend == "triton":
        from .triton_attention import serves

        fine, why = serves(device, dtype, head_size)
        return None if fine else f"cannot run: {why}"
    return None


# The reference: scores tile by tile, differentiated by autograd.


def _eager(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    lengths = [s.stop - s.start for s in layout.segments]
    # Splitting once and slicing within the pieces: backward of a slice is as large as what it was cut from.
    queries, keys, values = (t[0].split(lengths, dim=1) for t in (query, key, value))
    owner = {s.start: i for i, s in enumerate(layout.segments)}

    def gather(pieces: tuple[Tensor, ...], ranges: tuple[Range, ...]) -> Tensor:
        found = []
        for start, stop in ranges:
            i = _holder(layout, owner, start)
            first = layout.segments[i].start
            found.append(pieces[i][:, start - first : stop - first])
        return torch.cat(found, dim=1).repeat_interleave(groups, dim=0)

    out = []
    for tile in layout.tiles(_TILE, window):
        first = layout.segments[tile.segment].start
        q = queries[tile.segment][:, tile.start - first : tile.stop - first]
        ranges = (*tile.prefix, tile.own)
        scores = (q @ gather(keys, ranges).transpose(1, 2)).to(_accumulation(q.dtype)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = _hidden_keys(tile.position, tile.stop - tile.start, tile.key_position, window, q.device)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
        out.append(weights @ gather(values, ranges))
    return torch.cat(out, dim=1)[None]


def _holder(layout: Layout, owner: dict[int, int], row: int) -> int:
    """The number of the segment that holds `row`."""
    if row not in owner:
        owner[row] = next(i for i, s in enumerate(layout.segments) if s.start <= row < s.stop)
    return owner[row]


def _hidden_keys(position: int, queries: int, key_position: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: True where the key lies after the query or before its window."""
    keys = position + queries - key_position
    distance = torch.arange(position, position + queries, device=device)[:, None] - torch.arange(
        key_position, key_position + keys, device=device
    )
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# CPU: the fused kernel on ranges of rows.


@dataclass(frozen=True)
class _Part:
    """Query rows against some of their keys. A row's result is the sum over its parts, weighted by normalisers."""

    start: int
    stop: int
    keys: tuple[Range, ...]
    causal: bool = False
    masked: tuple[int, int, int] | None = None  #: position, key_position, window


def _parts(layout: Layout, window: int | None) -> tuple[_Part, ...]:
    """First the parts that touch each row once, then the prefixes: one call for all the siblings after one of them."""
    key = ("parts", window)
    if key not in layout._cache:
        own, prefixes = [], []
        for siblings in layout.siblings():
            whole = [s for s in siblings if window is None or s.position + s.stop - s.start <= window]
            own += [_Part(s.start, s.stop, ((s.start, s.stop),), causal=True) for s in whole]
            if whole and whole[0].prefix:
                runs = (
                    [(whole[0].start, whole[-1].stop)]
                    if whole == list(siblings)
                    else [(s.start, s.stop) for s in whole]
                )
                prefixes += [_Part(start, stop, whole[0].prefix) for start, stop in runs]
        if window is not None:
            for tile in layout.tiles(min(_TILE, max(64, window)), window):
                s = layout.segments[tile.segment]
                if s.position + s.stop - s.start > window:
                    mask = (tile.position, tile.key_position, window)
                    own.append(_Part(tile.start, tile.stop, (*tile.prefix, tile.own), masked=mask))
        layout._cache[key] = (*own, *prefixes)
    return layout._cache[key]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    if softcap is not None or query.device.type != "cpu":
        raise ValueError(
            f"packing backend 'sdpa' needs the CPU and no softcap, got {query.device.type}, softcap {softcap}; "
            "accepted here: eager"
        )
    return _FusedOnCpu.apply(query, key, value, _parts(layout, window), scale)


class _FusedOnCpu(torch.autograd.Function):
    """A row's softmax over several ranges of keys, from one fused call per range.

    Forward merges the partial results by their log-sum-exp. Backward needs no gradient through that merge: the fused
    backward kernel, given a row's *final* output and log-sum-exp, returns the exact gradients for its range alone,
    since dS = P ∘ (dO·Vᵀ - rowsum(dO ∘ O)) and P = exp(S - logsumexp) depend on the rest of the row through those only.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: tuple[_Part, ...], scale: float) -> Tensor:
        q, k, v = _by_group(query, key, value)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        into = out[0].unflatten(0, q.shape[:2])
        normaliser = torch.empty(q.shape[:3], dtype=_accumulation(q.dtype))
        seen = 0
        for part in parts:
            rows = slice(part.start, part.stop)
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, rows],
                _take(k, part.keys),
                _take(v, part.keys),
                0.0,
                part.causal,
                attn_mask=_additive(part, q.dtype),
                scale=scale,
            )
            if seen < query.shape[2]:
                into[:, :, rows], normaliser[:, :, rows] = o, lse
                seen += part.stop - part.start
            else:
                both = torch.logaddexp(normaliser[:, :, rows], lse)
                into[:, :, rows].mul_((normaliser[:, :, rows] - both).exp_()[..., None])
                into[:, :, rows].addcmul_(o, (lse - both).exp_()[..., None].to(o.dtype))
                normaliser[:, :, rows] = both
        ctx.save_for_backward(query, key, value, out, normaliser)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser = ctx.saved_tensors
        q, k, v = _by_group(query, key, value)
        o, do = (t[0].unflatten(0, q.shape[:2]) for t in (out, grad))
        dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
        dq_rows = dq[0].unflatten(0, q.shape[:2])
        for part in ctx.parts:
            rows = slice(part.start, part.stop)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do[:, :, rows],
                q[:, :, rows],
                _take(k, part.keys),
                _take(v, part.keys),
                o[:, :, rows],
                normaliser[:, :, rows],
                0.0,
                part.causal,
                attn_mask=_additive(part, q.dtype),
                scale=ctx.scale,
            )
            dq_rows[:, :, rows] += gq
            _give(dk[0], gk.sum(1), part.keys)
            _give(dv[0], gv.sum(1), part.keys)
        return dq, dk, dv, None, None


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, T, D) as (key/value heads, queries per key, T, D); keys are repeated by stride alone."""
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    q = query[0].unflatten(0, (kv_heads, groups))
    return q, key[0][:, None].expand(-1, groups, -1, -1), value[0][:, None].expand(-1, groups, -1, -1)


def _take(t: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    if len(ranges) == 1:
        return t[:, :, slice(*ranges[0])]
    joined = torch.cat([t[:, 0, slice(*r)] for r in ranges], dim=1)
    return joined[:, None].expand(-1, t.shape[1], -1, -1)


def _give(into: Tensor, grad: Tensor, ranges: tuple[Range, ...]) -> None:
    taken = 0
    for start, stop in ranges:
        into[:, start:stop] += grad[:, taken : taken + stop - start]
        taken += stop - start


def _additive(part: _Part, dtype: torch.dtype) -> Tensor | None:
    if part.masked is None:
        return None
    position, key_position, window = part.masked
    hidden = _hidden_keys(position, part.stop - part.start, key_position, window, torch.device("cpu"))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


# CUDA: variable-length FlashAttention, a shared prefix by gathering keys as [prefix | own] per segment.


@dataclass(frozen=True)
class _Ragged:
    """What a variable-length kernel needs to know; on the device."""

    cu_q: Tensor  #: (segments + 1,) int32
    cu_k: Tensor  #: (segments + 1,) int32
    max_q: int
    max_k: int
    gather: Tensor | None  #: int64 rows of the keys, or None where each segment's keys are its own rows


def _ragged(layout: Layout, device: torch.device) -> _Ragged:
    key = ("ragged", device)
    if key not in layout._cache:
        q = [s.stop - s.start for s in layout.segments]
        k = [s.position + s.stop - s.start for s in layout.segments]
        gather = None
        if any(s.prefix for s in layout.segments):
            ranges = [r for s in layout.segments for r in (*s.prefix, (s.start, s.stop))]
            gather = torch.cat([torch.arange(*r) for r in ranges]).to(device)
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (q, k))
        layout._cache[key] = _Ragged(cu_q, cu_k, max(q), max(k), gather)
    return layout._cache[key]


def _rows_first(query: Tensor, key: Tensor, value: Tensor, ragged: _Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, T, D) as (T, heads, D), keys and values gathered."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if ragged.gather is not None:
        k, v = k.index_select(0, ragged.gather), v.index_select(0, ragged.gather)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _varlen_call(
    q: Tensor, k: Tensor, v: Tensor, ragged: _Ragged, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError(f"packing backend 'varlen' has no softcap, got {softcap}; accepted here: flash, triton, eager")
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q.shape[1] != k.shape[1] and _asks_for_grouped_queries(varlen_attn):
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, ragged.cu_q, ragged.cu_k, ragged.max_q, ragged.max_k, **options)  # type: ignore[return-value]


@functools.cache
def _asks_for_grouped_queries(varlen_attn: Any) -> bool:
    """Whether this torch wants to be told of them; 2.11 takes them as they come, as FlashAttention does."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash_call(
    q: Tensor, k: Tensor, v: Tensor, ragged: _Ragged, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        ragged.cu_q,
        ragged.cu_k,
        ragged.max_q,
        ragged.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0,
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    ragged = _ragged(layout, query.device)
    _check_alignment("varlen", query.device, query.dtype)
    out = _varlen_call(*_rows_first(query, key, value, ragged), ragged, scale, window, softcap)
    return out.transpose(0, 1)[None]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    ragged = _ragged(layout, query.device)
    _check_alignment("flash", query.device, query.dtype)
    out = _flash_call(*_rows_first(query, key, value, ragged), ragged, scale, window, softcap)
    return out.transpose(0, 1)[None]


@functools.cache
def _check_alignment(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Once per process: causal must mean that the *last* query sees the last key. FlashAttention before 2.1 aligned the
    first ones, and then a rollout would not see most of its prompt."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        q, keys = torch.ones(2, 1, 64, device=device, dtype=dtype), 4
        k = torch.zeros(keys, 1, 64, device=device, dtype=dtype)
        v = torch.arange(1, keys + 1, device=device, dtype=dtype)[:, None, None].expand(-1, 1, 64).contiguous()
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (2, keys))
        call = _varlen_call if backend == "varlen" else _flash_call
        got = call(q, k, v, _Ragged(cu_q, cu_k, 2, keys, None), 1.0, None, None)[:, 0, 0].tolist()
    if any(abs(a - b) > 0.05 for a, b in zip(got, (2.0, 2.5), strict=True)):
        raise RuntimeError(f"packing backend {backend!r} does not align causal masks at the last key: {got}")


# CUDA: this project's Triton kernel, on ranges of rows.


def _triton(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from .triton_attention import attend

    return attend(query, key, value, layout, scale, window, softcap)


# Whether a backend is right on this device.


@functools.cache
def self_check(
    backend: str, device: torch.device, dtype: torch.dtype, head_size: int, *, capped: bool, exact: bool
) -> str | None:
    """Why the backend is not to be trusted with such tensors on this device, or None. Never raises.

    Once per process, since a compiler, a driver or another version of a library may do what no test has seen. What is
    compared: output and gradients, on the layout of `_check_layout` under grouped queries, with and without a window,
    against "eager" on the CPU in float64.

    Args:
        capped: whether scores have a softcap.
        exact: whether float32 products are to be those of float32.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            error = _largest_error(backend, device, dtype, head_size, capped)
        except Exception as failure:  # whatever goes wrong in a compiler or a driver, there is another backend
            reason = f"fails on {device} ({type(failure).__name__}: {failure})"
        else:
            if error <= (1e-4 if exact and dtype == torch.float32 else 0.05):
                return None
            reason = f"is off by {error:.1e} in its self-check on {device}"
    logger.warning("opsd_kernels: packing backend %s %s; using another one", backend, reason)
    return reason


def _check_layout() -> Layout:
    """A prompt of several tiles with three rollouts, one of them a single token, and one with a single rollout."""
    lengths = ((160, (70, 33, 1)), (20, (10,)))
    segments: list[Segment] = []
    positions: list[int] = []
    for prompt, rollouts in lengths:
        first = len(positions)
        segments.append(Segment(first, first + prompt))
        positions += range(prompt)
        for rollout in rollouts:
            start = len(positions)
            segments.append(Segment(start, start + rollout, ((first, first + prompt),)))
            positions += range(prompt, prompt + rollout)
    ids = torch.zeros(len(positions), dtype=torch.int64)
    return Layout(ids, torch.tensor(positions), tuple(segments))


def _largest_error(backend: str, device: torch.device, dtype: torch.dtype, head_size: int, capped: bool) -> float:
    """Of any row of the output and the gradients, relative to its norm, or to the root mean square of the rows' norms
    where that is larger; not finite where one of them is not."""
    layout, draw = _check_layout(), torch.Generator().manual_seed(0)
    shapes = [(1, heads, layout.rows, head_size) for heads in (4, 2, 2, 4)]
    given = [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]

    def run(backend: str, device: torch.device, dtype: torch.dtype, window: int | None) -> list[Tensor]:
        *inputs, grad = (t.to(device, dtype) for t in given)
        inputs = [t.requires_grad_() for t in inputs]
        out = _attend(backend, *inputs, layout, head_size**-0.5, window, 2.0 if capped else None)
        return [t.double().cpu() for t in (out.detach(), *torch.autograd.grad(out, inputs, grad))]

    errors = []
    for window in (None, 100):
        want = run("eager", torch.device("cpu"), torch.float64, window)
        for mine, right in zip(run(backend, device, dtype, window), want, strict=True):
            sizes = right.norm(dim=-1)
            errors.append(((mine - right).norm(dim=-1) / sizes.clamp(min=sizes.square().mean().sqrt())).amax())
    return float(torch.stack(errors).amax())  # which NaN outlives
