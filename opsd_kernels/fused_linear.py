"""The chunk loop and its autograd: project → row pass → dX / dW, one token chunk's logits at a time.

Cost, with u one N·H·V product: 1u for each model's logits, 1u for dX, 1u for dW, each computed once (Liger Kernel takes
the gradient in the forward pass in the same way). Row i of dX depends on token i alone, so with a frozen head dX is
computed for a unit upstream gradient and saved; backward multiplies its rows by whatever upstream gradient arrives.
With a trainable head and a scalar loss the row weights are known up front and go into dz. Only unreduced losses with
a trainable head are recomputed in backward.

The loop is a torch operator, opaque to torch.compile and with an autograd formula of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, library

from . import backends
from .across import Across, across_group
from .gemm import Products, accumulation_dtype
from .mixture import Mixer, Mixture
from .objective import LogitTransform, Objective
from .rows import DROPPED, Column
from .rows.support import cached_rows, support_width
from .workspace import GATHERED_SHARE, ChunkPlan, block_rows, filter_bytes, plan_chunks, row_stride, workspace

# Of the operators that take a mask: the host waits for the number of its tokens, and the workspace outlives a call.
# So no CUDA graph may hold them; those of torch.compile leave them out.
WAITS = (torch.Tag.cudagraph_unsafe,)


@dataclass(frozen=True)
class Spec:
    """What a call computes, apart from its tensors."""

    kind: str  # "divergence", "logprob", "top_k" or "cached" (a divergence from a teacher's stored top-k)
    objective: Objective
    columns: int  # of the table that is filled; the first is the loss
    vocab: int  # the columns of the head from here on are padding and take no part; global with a group
    compute: torch.dtype
    budget: int  # bytes
    backend: str = "torch"  # as asked for: resolved where the device is known and code runs, within the operators
    gradient_filter: float | None = None
    group: str = ""  # name of the process group over which the vocabulary is split
    mixture: Mixture | None = None  # what the teacher's logits are made of, in place of a second model's

    @property
    def accumulate(self) -> torch.dtype:
        return accumulation_dtype(self.compute)

    def encoded(self) -> str:
        """As JSON, which fits through the schema of a torch operator; by hand, since torch.compile traces this."""
        fields = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        objective = {name: getattr(self.objective, name) for name in _OBJECTIVE_FIELDS}
        return _json({**fields, "compute": str(self.compute)[len("torch.") :], "objective": objective})

    @classmethod
    def decoded(cls, options: str) -> Spec:
        """The inverse of `encoded`. What a training run repeats is decoded once."""
        return _decoded(options)


_PLAIN_FIELDS = ("kind", "columns", "vocab", "budget", "backend", "gradient_filter", "group", "mixture")
_OBJECTIVE_FIELDS = tuple(field.name for field in dataclasses.fields(Objective))


def _json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "{" + ", ".join([f'"{key}": {_json(item)}' for key, item in value.items()]) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(item) for item in value]) + "]"
    return f"{value!r}"


@lru_cache(maxsize=256)
def _decoded(options: str) -> Spec:
    fields = json.loads(options)
    objective = fields.pop("objective")
    for model in ("student", "teacher"):
        objective[model] = LogitTransform(*objective[model])
    fields["compute"], fields["mixture"] = getattr(torch, fields["compute"]), Mixture.decoded(fields["mixture"])
    return Spec(objective=Objective(**objective), **fields)


@dataclass
class Inputs:
    """The tensors of a call: N tokens of which `mask` says which count, and a head of V rows."""

    x: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    teacher: Tensor | None = None  # (N, H_t), or for "cached" the (N, k) log-probabilities
    teacher_weight: Tensor | None = None  # (V, H_t); None: the student's
    teacher_bias: Tensor | None = None  # (V,)
    support: Tensor | None = None  # (N, k) int64, for "cached"
    mask: Tensor | None = None  # (N,) bool
    targets: Tensor | None = None  # (N,) int64
    row_weight: Tensor | None = None  # (N,); given, the gradients are those of Σ row_weight·loss
    mixed: list[Tensor] = field(default_factory=list)  # what the parts of a mixture speak of, constants

    def all(self) -> list[Any]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


_ALONE = len(dataclasses.fields(Inputs)) - 2  # the tensors but for the weights of rows and the list of a mixture


def fused_linear_loss(inputs: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    """(losses or total, table): the (N,) losses, or with `row_weight` their weighted sum; differentiable once in x,
    weight and bias. The table (columns, N) is detached, 0 where a token is not counted.
    """
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (inputs.x, inputs.weight, inputs.bias)]
    total, table, *_ = _fused_linear(*inputs.all(), spec.encoded(), wanted)
    return (table[0] if inputs.row_weight is None else total), table.detach()


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """losses·weights, where a weight of 0 silences an infinite loss too (but not NaN)."""
    return losses.masked_fill((weights == 0) & losses.isinf(), 0.0) * weights


@library.custom_op("opsd::fused_linear", mutates_args=(), tags=WAITS)
def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    support: Tensor | None,
    mask: Tensor | None,
    targets: Tensor | None,
    row_weight: Tensor | None,
    mixed: Sequence[Tensor],
    options: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total (), table (columns, N), dX (N, H), dW (V, H), db (V,)); a gradient that is not wanted has no elements.

    The arguments are the fields of `Inputs`, a `Spec` encoded, and which of the three gradients are wanted. A schema is
    flat; everything else in this module passes the two objects.
    """
    inputs = Inputs(
        x, weight, bias, teacher, teacher_weight, teacher_bias, support, mask, targets, row_weight, list(mixed)
    )
    spec, now = Spec.decoded(options), Wanted(*wanted).now(row_weight)
    size: Tensor | None = None
    if row_weight is not None and x.shape[0] and spec.compute == torch.float16:
        # weights as small as 1 / tokens would take dz below what it can hold: they go in relative to the largest
        size = row_weight.abs().amax().clamp(min=torch.finfo(row_weight.dtype).tiny)
        inputs.row_weight = row_weight / size
    with torch.autocast(x.device.type, enabled=False):
        table, gradients = _Sweep(inputs, spec, now).run()
    if size is not None:
        for gradient in gradients:
            gradient *= size
    total = table.new_zeros(()) if row_weight is None else weighted(table[0], row_weight).sum()
    dx, dw, db = gradients
    return total, table, dx, dw, db


@_fused_linear.register_fake
def _(x, weight, bias, teacher, tw, tb, support, mask, targets, row_weight, mixed, options, wanted):
    spec, now, make = Spec.decoded(options), Wanted(*wanted).now(row_weight), x.new_empty
    return (
        make((), dtype=spec.accumulate),
        make((spec.columns, x.shape[0]), dtype=spec.accumulate),
        make(x.shape if now.x else (0,), dtype=spec.accumulate),
        make(weight.shape if now.weight else (0,), dtype=spec.accumulate),
        make(weight.shape[:1] if now.bias else (0,), dtype=spec.accumulate),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, mixed, ctx.options, wanted = inputs
    ctx.mixed = len(mixed)
    ctx.wanted, ctx.dtypes = wanted, [t.dtype if t is not None else None for t in tensors[:3]]
    ctx.scalar = tensors[-1] is not None
    ctx.recompute = Wanted(*wanted).later(tensors[-1])
    if ctx.recompute:  # a teacher from inference mode cannot be saved as it is
        kept = [t.clone() if t is not None and t.is_inference() else t for t in tensors[:-1]]
        kept += [t.clone() if t.is_inference() else t for t in mixed]
    ctx.save_for_backward(*(kept if ctx.recompute else output[2:]))
    ctx.set_materialize_grads(False)  # zeros of the size of dX and dW, for outputs that nobody differentiates


def _backward(ctx: Any, total: Tensor | None, table: Tensor | None, *_: None) -> tuple[Any, ...]:
    upstream = total if ctx.scalar or table is None else table[0]
    if upstream is None:
        return (*[None] * 10, [None] * ctx.mixed, None, None)
    if ctx.recompute:
        options = dataclasses.replace(Spec.decoded(ctx.options), columns=1).encoded()
        wanted = [asked and need for asked, need in zip(ctx.wanted, ctx.needs_input_grad, strict=False)]
        tensors, mixed = ctx.saved_tensors[:_ALONE], list(ctx.saved_tensors[_ALONE:])
        _, _, *gradients = _fused_linear(*tensors, upstream, mixed, options, wanted)
        upstream = None
    else:
        gradients, wanted = ctx.saved_tensors, ctx.wanted
    results = [
        scaled(gradient, upstream, dtype) if computed else None
        for gradient, computed, dtype in zip(gradients, wanted, ctx.dtypes, strict=True)
    ]
    return (*results, *[None] * 7, [None] * ctx.mixed, None, None)


_fused_linear.register_autograd(_backward, setup_context=_setup_context)


@library.custom_op("opsd::scaled", mutates_args=())
def scaled(gradient: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The saved gradient times the upstream one, 0-d or one a row, in a new tensor of `dtype`.

    An operator whose autograd formula raises, so that a second derivative is not silently wrong.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    if upstream is None:
        return out.copy_(gradient)
    return torch.mul(gradient, upstream.unsqueeze(-1) if upstream.ndim else upstream, out=out)


@scaled.register_fake
def _(gradient, upstream, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _no_second_derivative(ctx: Any, _: Tensor) -> None:
    raise RuntimeError("second derivatives are not supported: the losses differentiate once, by backward()")


scaled.register_autograd(_no_second_derivative)


@dataclass
class Wanted:
    """Which gradients are computed."""

    x: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.x or self.weight or self.bias

    def later(self, row_weight: Tensor | None) -> bool:
        """An unreduced loss with a trainable head: recomputed in backward, when its upstream gradient is known."""
        return (self.weight or self.bias) and row_weight is None

    def now(self, row_weight: Tensor | None) -> Wanted:
        return Wanted(False, False, False) if self.later(row_weight) else self


def check_ids(name: str, ids: Tensor | None, rows: Tensor | None, vocab: int) -> None:
    """Raises ValueError where a counted token's id is outside the vocabulary; not on a GPU, where it would wait."""
    if ids is None or ids.is_cuda:
        return
    counted = ids if rows is None else ids[rows]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocab):
        found = f"{int(counted.min())} to {int(counted.max())}"
        raise ValueError(f"{name} must be in [0, {vocab}) where the token counts, got {found}")


def check_stored(ids: Tensor, logprobs: Tensor, rows: Tensor | None) -> None:
    """Raises ValueError where a counted token's k ids or their log-probabilities are none; not on a GPU, as above."""
    if ids.is_cuda:
        return
    # a value that was rounded, or is a difference of two that were, is a few eps above 0 at most
    most = max(8 * torch.finfo(logprobs.dtype).eps, 1e-4)
    step = max(1, (1 << 14) // ids.shape[1])  # rows at a time: sorting takes memory
    for start in range(0, ids.shape[0] if rows is None else rows.shape[0], step):
        block: Any = slice(start, start + step) if rows is None else rows[start : start + step]
        ordered = ids[block].sort(-1).values
        again = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
        if again.numel():
            raise ValueError(
                f"teacher_ids must not repeat an id at a position where the token counts, got {int(again[0])} twice"
            )
        largest = float(logprobs[block].amax())
        if not largest <= most:  # also refuses NaN
            raise ValueError(f"teacher_logprobs must be at most 0, and not NaN, where the token counts, got {largest}")


class _Sweep:
    """One pass over the counted tokens."""

    def __init__(self, inputs: Inputs, spec: Spec, wanted: Wanted):
        self.inputs, self.spec, self.wanted = inputs, spec, wanted
        self.across: Across = across_group(spec.group, inputs.weight.shape[0], spec.vocab, spec.budget)
        x, teacher = inputs.x, inputs.teacher
        self.backend = backends.chosen(spec.backend, x.device, spec.compute, spec.group)
        self.products = Products(self.backend, x.device, spec.compute, self.across.budget)
        self.rows = None if inputs.mask is None else inputs.mask.nonzero().squeeze(-1)  # for which the host waits
        self.tokens = x.shape[0] if self.rows is None else self.rows.shape[0]
        self.vocab = self.across.columns
        self.weight, self.bias = self._head(inputs.weight, inputs.bias)
        self.mixer: Mixer | None = None
        if spec.mixture is not None:
            mixture = spec.mixture.settled(self.bias is not None)
            mix_rows = backends.mix_rows(self.backend, x.device, mixture)
            self.mixer = Mixer(mixture, inputs.mixed, self._head, (self.weight, self.bias), mix_rows)
        self.second = self.mixer is not None or (teacher is not None and spec.kind == "divergence")
        self.shared = self.second and self.mixer is None and inputs.teacher_weight is None
        if self.second and self.mixer is None:
            self.teacher_weight, self.teacher_bias = self._head(inputs.teacher_weight, inputs.teacher_bias)
        self.filter = None
        if spec.gradient_filter is not None and wanted:
            self.filter = _Filter(spec.gradient_filter, self.weight, spec.accumulate, self.across)
        k = spec.objective.top_k
        if k is not None and k > self.across.vocab:  # where the vocabulary is split, only now it is known
            name = {"top_k": "k", "cached": "teacher_ids' last dimension"}.get(spec.kind, "top_k")
            raise ValueError(f"{name} must be at most the {self.across.vocab} tokens of all ranks, got {k}")
        for name, ids in (("target_ids", inputs.targets), ("teacher_ids", inputs.support)):
            check_ids(name, ids, self.rows, self.across.vocab)
        if inputs.support is not None and inputs.teacher is not None:
            check_stored(inputs.support, inputs.teacher, self.rows)

    def _head(self, weight: Any, bias: Tensor | None) -> tuple[Any, Tensor | None]:
        """The columns that take part; no weight: the student's serves both."""
        vocab, compute, accumulate = self.vocab, self.spec.compute, self.spec.accumulate
        return (
            None if weight is None else weight[:vocab].to(compute),
            None if bias is None else bias[:vocab].to(accumulate),
        )

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """The table, and dX, dW, db of Σ row_weight·loss (unit weights if none are given)."""
        plan = self._plan()
        while True:
            try:
                with self._workspace(plan.rows) as buffers:
                    return self._sweep(plan, *buffers)
            except torch.cuda.OutOfMemoryError:
                # other ranks would wait for chunks that no longer match theirs
                if self.spec.group or plan.rows == 1:
                    raise
                plan = ChunkPlan(plan.tokens, min(2 * plan.count, plan.tokens))
            torch.cuda.empty_cache()

    def _plan(self) -> ChunkPlan:
        spec, own_dz = self.spec, self._own_dz()
        streams = self._streams()
        element = spec.accumulate.itemsize
        stride = row_stride(self.across.widest, self.inputs.x.device)
        row_bytes = stride * (streams * element + own_dz * spec.compute.itemsize)
        widths = self.inputs.x.shape[1]
        if self.second and self.inputs.teacher is not None:
            widths += self.inputs.teacher.shape[1]
        if self.mixer is not None:
            widths += self.mixer.width
        # the gathered inputs, and their widened copies where the device has no mixed-precision product
        row_bytes += widths * (spec.compute.itemsize + own_dz * element)
        budget = max(self.across.budget - self.products.bytes, self.across.budget // 2)
        if self.filter is not None:
            row_bytes += self.filter.step * spec.compute.itemsize
            budget = max(budget - self.filter.bytes, budget // 2)
        in_torch, k = self.backend == "torch", spec.objective.top_k
        width = self.across.widest
        if k is not None and spec.kind != "top_k":  # the support's entries are computed in torch by every backend
            width = max(support_width(k, element), width if in_torch else 0)
            row_bytes += math.ceil(self.across.widest / 8)  # Triton marks the support by a bit for each column
            in_torch = True
        in_torch = in_torch or (self.mixer is not None and self.mixer.mix_rows is None)
        # a collective for each block of a few rows would cost more than it saves
        temporaries = ("chunk" if spec.group else "block") if in_torch else "none"
        return plan_chunks(self.tokens, width, self.inputs.x.device, element, row_bytes, budget, temporaries)

    def _streams(self) -> int:
        """Rows of logits for a token: the student's, then the teacher's, then what a mixture needs."""
        return (2 if self.second else 1) + (0 if self.mixer is None else self.mixer.buffers)

    def _own_dz(self) -> bool:
        """Whether dz has a buffer of its own; in the logits' dtype it takes the student logits' place."""
        return bool(self.wanted) and self.spec.compute != self.spec.accumulate

    @contextmanager
    def _workspace(self, n: int) -> Iterator[list[Tensor]]:
        """For n tokens: their logits, the student's above the teacher's, and dz where it has a buffer of its own."""
        spec, device = self.spec, self.inputs.x.device
        stride = row_stride(self.vocab, device)
        buffers = [((self._streams() * n, stride), spec.accumulate)]
        if self._own_dz():
            buffers.append(((n, stride), spec.compute))
        buffers.append(((1, self.products.bytes if self.products.native else 0), torch.uint8))
        with workspace(device, buffers, spec.budget) as (*of_tokens, self.products.scratch):
            yield [rows[:, : self.vocab] for rows in of_tokens]

    def _sweep(self, plan: ChunkPlan, logits: Tensor, dz_buffer: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        inputs, spec, wanted, n = self.inputs, self.spec, self.wanted, plan.rows
        x, accumulate = inputs.x, spec.accumulate
        new = x.new_empty if self.rows is None and self.tokens else x.new_zeros
        table = new((spec.columns, x.shape[0]), dtype=accumulate)
        dx = new(x.shape if wanted.x else (0,), dtype=accumulate)
        # padding rows, and everything if there is no chunk, get no gradient
        whole = self.tokens and self.vocab == inputs.weight.shape[0]
        dw = (x.new_empty if whole else x.new_zeros)(inputs.weight.shape if wanted.weight else (0,), dtype=accumulate)
        db = x.new_zeros(inputs.weight.shape[:1] if wanted.bias else (0,), dtype=accumulate)

        dz_buffer = logits if dz_buffer is None else dz_buffer
        gathered = self._buffers(n)
        row_pass = self._row_pass()
        for chunk in plan:
            size = chunk.stop - chunk.start
            chunk_x = self._project(chunk, logits, gathered)
            dz = dz_buffer[:size] if wanted else None
            part = table[:, chunk] if self.rows is None else table.new_empty(spec.columns, size)
            if inputs.targets is None:  # what the row pass then leaves alone
                part[Column.STUDENT_LOGPROB : DROPPED] = 0
            row_pass(
                logits[:size],
                logits[size : 2 * size] if self.second else None,
                chunk=chunk,
                table=part[: len(Column)],
                dz=dz,
                row_scale=self._counted(inputs.row_weight, chunk),
            )
            part[len(Column) :] = math.nan  # until a gradient is computed
            if dz is not None:
                self._gradients(chunk, dz, chunk_x, dx, dw[: self.vocab] if wanted.weight else dw, db, part)
            if self.rows is not None:
                table[:, self.rows[chunk]] = part
        if wanted.x:
            self.across.add(dx)
        return table, [dx, dw, db]

    def top_k(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `top_k_of`."""
        plan, x, objective = self._plan(), self.inputs.x, self.spec.objective
        top_k_rows, k = backends.module(self.backend).top_k_rows, objective.top_k
        assert k is not None
        logprobs = x.new_zeros((x.shape[0], k), dtype=self.spec.accumulate)
        ids, log_z = torch.zeros_like(logprobs, dtype=torch.int64), torch.zeros_like(logprobs[:, 0])
        gathered = self._buffers(plan.rows)
        with self._workspace(plan.rows) as (logits,):
            for chunk in plan:
                self._project(chunk, logits, gathered)
                at = chunk if self.rows is None else self.rows[chunk]
                part = logits[: chunk.stop - chunk.start]
                found = top_k_rows(part, k, objective.student, objective.temperature, **self.across.keywords())
                logprobs[at], ids[at], log_z[at] = found
        return logprobs, ids, log_z

    def _gradients(
        self, chunk: slice, dz: Tensor, x: Tensor, dx: Tensor, dw: Tensor, db: Tensor, table: Tensor
    ) -> None:
        wanted, weight, first = self.wanted, self.weight, chunk.start == 0
        own = x.shape[0], dx.shape[-1]
        part = dx[chunk] if self.rows is None or not wanted.x else dx.new_empty(own)
        if self.filter is None:
            if wanted.x:
                self.products.back_project(part, dz, weight)
            if wanted.weight:
                self.products.accumulate_weight_gradient(dw, dz, x, first=first)
            if wanted.bias:
                db[: self.vocab] += dz.sum(0, dtype=db.dtype)
        else:
            columns, dropped = self.filter.columns(dz, self._counted(self.inputs.row_weight, chunk))
            if table.shape[0] > DROPPED:
                table[DROPPED] = self.across.add(dropped)
            if first and wanted.weight:
                dw.zero_()
            if not len(columns):
                part.zero_()
            for start in range(0, len(columns), self.filter.step):
                some = columns[start : start + self.filter.step]
                dense = dz[:, some]
                if wanted.x:
                    self.products.back_project(part, dense, weight[some], first=start == 0)
                if wanted.weight:
                    rows = dw.new_empty(len(some), dw.shape[1])
                    self.products.accumulate_weight_gradient(rows, dense, x, first=True)
                    dw.index_add_(0, some, rows)
                if wanted.bias:
                    db.index_add_(0, some, dense.sum(0, dtype=db.dtype))
        if wanted.x and self.rows is not None:
            dx[self.rows[chunk]] = part

    def _row_pass(self) -> Callable:
        inputs, spec = self.inputs, self.spec
        backend = backends.module(self.backend)

        def divergence(student: Tensor, teacher: Tensor, *, chunk: slice, **out: Tensor | None) -> None:
            targets = self._counted(inputs.targets, chunk)
            backends.divergence_rows(
                backend, student, teacher, spec.objective, targets=targets, **self.across.keywords(), **out
            )

        def logprob(logits: Tensor, _: None, *, chunk: slice, **out: Tensor | None) -> None:
            targets = self._counted(inputs.targets, chunk)
            transform, temperature = spec.objective.student, spec.objective.temperature
            backend.logprob_rows(logits, targets, transform, temperature, **self.across.keywords(), **out)

        def cached(student: Tensor, _: None, *, chunk: slice, **out: Any) -> None:
            support, logprobs = self._counted(inputs.support, chunk), self._counted(inputs.teacher, chunk)
            assert support is not None
            assert logprobs is not None
            targets = self._counted(inputs.targets, chunk)
            cached_rows(
                backend, student, logprobs, support, spec.objective, targets=targets, **self.across.keywords(), **out
            )

        passes: dict[str, Callable] = {"divergence": divergence, "logprob": logprob, "cached": cached}
        return passes[spec.kind]

    def _counted(self, per_token: Tensor | None, chunk: slice) -> Tensor | None:
        return None if per_token is None else self._rows_of(per_token, chunk)

    def _rows_of(self, per_token: Tensor, chunk: slice) -> Tensor:
        return per_token[chunk] if self.rows is None else per_token[self.rows[chunk]]

    def _buffers(self, n: int) -> list[Tensor]:
        """For the student's inputs of a chunk, with the teacher's stacked below where one product serves both."""
        x, teacher, compute = self.inputs.x, self.inputs.teacher, self.spec.compute
        buffers = [x.new_empty(((2 if self.shared else 1) * n, x.shape[1]), dtype=compute)]
        if self.second and not self.shared and teacher is not None:
            buffers.append(x.new_empty((n, teacher.shape[1]), dtype=compute))
        return buffers

    def _project(self, chunk: slice, logits: Tensor, gathered: list[Tensor]) -> Tensor:
        """Fills both models' rows of logits; returns the chunk's student inputs (n, H)."""
        n = chunk.stop - chunk.start
        x = gathered[0][:n].copy_(self._rows_of(self.inputs.x, chunk))
        if self.mixer is not None:
            student, buffers = logits[:n], logits[n : self._streams() * n].unflatten(0, (-1, n))
            self.products.project(student, x, self.weight, self.bias)
            temperature = self.spec.objective.temperature
            self.mixer.fill(buffers, lambda t: self._rows_of(t, chunk), self.products, temperature)
            return x
        if not self.second or self.inputs.teacher is None:
            self.products.project(logits[:n], x, self.weight, self.bias)
            return x
        x_t = gathered[0][n : 2 * n] if self.shared else gathered[1][:n]
        x_t.copy_(self._rows_of(self.inputs.teacher, chunk))
        student, teacher = logits[:n], logits[n : 2 * n]
        if self.shared:  # one product for both, so that the weight is read once
            self.products.project(logits[: 2 * n], gathered[0][: 2 * n], self.weight, None)
            for part, bias in ((student, self.bias), (teacher, self.teacher_bias)):
                if bias is not None:
                    part += bias
        else:
            self.products.project(student, x, self.weight, self.bias)
            self.products.project(teacher, x_t, self.teacher_weight, self.teacher_bias)
        return x


class _Filter:
    """Which columns of a chunk's dz matter. Those that do are gathered, with their rows of the head, `step` at a time.

    Apple's Cut Cross-Entropy drops blocks of the cross-entropy's gradient in the same spirit.
    """

    def __init__(self, eps: float, weight: Tensor, accumulate: torch.dtype, across: Across):
        vocab, width, budget = across.widest, weight.shape[1], across.budget
        self.eps = eps
        gathered = weight.itemsize + accumulate.itemsize  # a row of the head, and one of its gradient
        self.step = min(max(1, vocab), max(1, budget // GATHERED_SHARE // (max(1, width) * gathered)))
        self.lengths = torch.cat(
            [torch.linalg.vector_norm(rows, dim=1, dtype=accumulate) for rows in weight.split(self.step)]
        )  # ‖W_v‖
        of_columns = 4 * accumulate.itemsize + 8  # lengths and what is made of them, and the columns' ids
        self.bytes = self.step * width * gathered + vocab * of_columns + filter_bytes(vocab, weight)

    def columns(self, dz: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The columns of dz (n, V) where some |dz| exceeds eps, (kept,) int64, and a bound on what is lost, (n,).

        Both for a unit gradient of each token's loss, whatever `row_weight` (n,) dz has been multiplied with. The bound
        is Σ|dz|·max‖W_v‖ over the dropped columns: dX's row is off by at most that, in norm. Waits for the device.
        """
        accumulate, blocks = self.lengths.dtype, dz.split(block_rows(dz))
        weights = dz.new_ones(len(dz), dtype=accumulate) if row_weight is None else row_weight.abs()
        kept = torch.zeros_like(self.lengths, dtype=torch.bool)
        for block, weight in zip(blocks, weights.split(block_rows(dz)), strict=True):
            kept |= (block.abs() > self.eps * weight.unsqueeze(-1)).any(0)
        dropped = torch.cat([block.abs().masked_fill_(kept, 0.0).sum(-1, dtype=accumulate) for block in blocks])
        longest = self.lengths.masked_fill(kept, 0.0).amax() if len(kept) else dz.new_zeros((), dtype=accumulate)
        return kept.nonzero().squeeze(-1), torch.where(weights > 0, dropped / weights, 0.0) * longest


def top_k_of(inputs: Inputs, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities (N, k), ids (N, k), log-normalisers (N,)) of the k likeliest tokens, likeliest first."""
    return _top_k(inputs.x, inputs.weight, inputs.bias, inputs.mask, spec.encoded())


@library.custom_op("opsd::top_k", mutates_args=(), tags=WAITS)
def _top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    options: str,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = Spec.decoded(options)
    with torch.autocast(x.device.type, enabled=False):
        return _Sweep(Inputs(x, weight, bias, mask=mask), spec, Wanted(False, False, False)).top_k()


@_top_k.register_fake
def _(x, weight, bias, mask, options):
    spec = Spec.decoded(options)
    shape = (x.shape[0], spec.objective.top_k)
    return (
        x.new_empty(shape, dtype=spec.accumulate),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(shape[:1], dtype=spec.accumulate),
    )
