"""The chunk loop and its autograd: project → row pass → dX / dW, one token chunk's logits at a time.

Cost, with u one N·H·V product: 1u for each model's logits, 1u for dX, 1u for dW, each computed once (Liger Kernel takes
the gradient in the forward pass in the same way). Row i of dX depends on token i alone, so with a frozen head dX is
computed for a unit upstream gradient and saved; backward multiplies its rows by whatever upstream gradient arrives.
With a trainable head and a scalar loss the row weights are known up front and go into dz. Only unreduced losses with
a trainable head are recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gemm import accumulate_weight_gradient, accumulation_dtype, back_project, project
from .workspace import ChunkPlan, plan_chunks

# (student logits, teacher logits or None, targets or None, table, dz or None, row_scale or None) → fills table and dz
RowPass = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None], None]


@dataclass
class Job:
    """A loss over the counted tokens of flat inputs; everything but the tensors that may receive a gradient."""

    row_pass: RowPass
    columns: int  # of the table that the row pass fills; the first is the loss
    compute: torch.dtype
    budget: int  # bytes
    vocab: int  # columns from here on are padding
    rows: Tensor | None = None  # (n,) int64, the counted tokens; None: all of them
    targets: Tensor | None = None  # (n,) int64
    teacher: Tensor | None = None  # (N, H_t)
    teacher_weight: Tensor | None = None  # (V, H_t); None: the student's
    teacher_bias: Tensor | None = None  # (V,)
    row_weight: Tensor | None = None  # (n,): the loss is Σ row_weight·loss; None: the (n,) losses themselves
    wants_grad: bool = True
    table: Tensor = field(default_factory=lambda: torch.empty(0))  # (columns, n), filled by the forward pass

    def constants(self) -> list[Tensor]:
        return [t for t in (self.teacher, self.teacher_weight, self.teacher_bias) if t is not None]


def fused_linear_loss(x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
    """Runs the job on x (N, H), weight (V, H) and bias (V,), filling `job.table`; differentiable once in those three.

    Returns the (n,) losses of the counted tokens, or their weighted sum if `job.row_weight` is set.
    """
    job.wants_grad = torch.is_grad_enabled()
    return _FusedLinear.apply(x, weight, bias, job)


@dataclass
class _Wanted:
    x: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.x or self.weight or self.bias

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass
class _Gradients:
    """In the accumulation dtype; x only for the counted rows (n, H), weight and bias up to job.vocab."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> Tensor:
        wanted = _Wanted(*(job.wants_grad and need for need in ctx.needs_input_grad[:3]))
        ctx.job, ctx.wanted = job, wanted
        ctx.recompute = wanted.head and job.row_weight is None
        now = _Wanted(False, False, False) if ctx.recompute else wanted
        job.table, grads = _run(job, x, weight, bias, now, job.row_weight if wanted.head else None)
        if ctx.recompute:
            ctx.save_for_backward(x, weight, bias, *job.constants())
        else:
            ctx.save_for_backward(grads.x, grads.weight, grads.bias)
            ctx.like = (x.new_empty(0), weight.new_empty(0), None if bias is None else bias.new_empty(0))
            ctx.shapes = (x.shape, weight.shape)
        losses = job.table[0]
        return losses.clone() if job.row_weight is None else weighted(losses, job.row_weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        job, wanted = ctx.job, ctx.wanted
        if ctx.recompute:
            x, weight, bias, *_ = ctx.saved_tensors  # the constants are only checked for in-place changes
            _, grads = _run(job, x, weight, bias, wanted, upstream)
            like, (x_shape, weight_shape) = (x, weight, bias), (x.shape, weight.shape)
            scale = None
        else:
            grads = _Gradients(*ctx.saved_tensors)
            like, (x_shape, weight_shape) = ctx.like, ctx.shapes
            scale = upstream
        grad_x = None if grads.x is None else _expanded(grads.x, scale, job, like[0].new_zeros(x_shape))
        grad_weight = None if grads.weight is None else _padded(grads.weight, scale, like[1].new_empty(weight_shape))
        grad_bias = None if grads.bias is None else _padded(grads.bias, scale, like[2].new_empty(weight_shape[:1]))
        return grad_x, grad_weight, grad_bias, None


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """losses·weights, where a weight of 0 silences an infinite loss too."""
    return torch.where(weights == 0, 0.0, losses * weights)


def _expanded(dx: Tensor, scale: Tensor | None, job: Job, out: Tensor) -> Tensor:
    """The counted rows' gradient times the upstream one, in its place in `out`; by parts, to bound the memory."""
    for start in range(0, dx.shape[0], 1024):
        rows = slice(start, start + 1024)
        piece = dx[rows]
        if scale is not None:
            piece = piece * (scale if scale.ndim == 0 else scale[rows].unsqueeze(-1))
        if job.rows is None:
            out[rows] = piece
        else:
            out[job.rows[rows]] = piece.to(out.dtype)
    return out


def _padded(gradient: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    kept = gradient.shape[0]
    out[kept:] = 0
    if scale is None:
        out[:kept] = gradient
    else:
        torch.mul(gradient, scale, out=out[:kept])
    return out


def _run(
    job: Job, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: _Wanted, row_scale: Tensor | None
) -> tuple[Tensor, _Gradients]:
    """One sweep over the tokens: the table, and the gradients that are wanted, of Σ row_scale·loss (unit for None)."""
    with torch.autocast(x.device.type, enabled=False):
        return _Sweep(job, x, weight, bias, wanted).run(row_scale)


class _Sweep:
    def __init__(self, job: Job, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: _Wanted):
        self.job, self.x, self.wanted = job, x, wanted
        self.accumulate = accumulation_dtype(job.compute)
        self.weight, self.bias = self._head(weight, bias)
        self.shared = job.teacher is not None and job.teacher_weight is None
        if job.teacher is not None:
            self.teacher_weight, self.teacher_bias = self._head(
                weight if job.teacher_weight is None else job.teacher_weight, job.teacher_bias
            )
        tokens = x.shape[0] if job.rows is None else job.rows.shape[0]
        streams = 1 if job.teacher is None else 2
        widths = [x.shape[1]] + ([] if job.teacher is None else [job.teacher.shape[1]])
        own_dz = bool(wanted) and job.compute != self.accumulate
        row_bytes = job.vocab * (streams * self.accumulate.itemsize + own_dz * job.compute.itemsize)
        # the gathered inputs, and their widened copies where the device has no mixed-precision product
        row_bytes += sum(widths) * (job.compute.itemsize + own_dz * self.accumulate.itemsize)
        self.plan: ChunkPlan = plan_chunks(tokens, job.vocab, x.device, self.accumulate, row_bytes, job.budget)

        n = self.plan.rows
        new = torch.empty
        self.logits = new(streams * n, job.vocab, dtype=self.accumulate, device=x.device)
        # dz may take the student logits' place where it has their dtype: the row pass reads a row before it writes it
        self.dz = new(n, job.vocab, dtype=job.compute, device=x.device) if own_dz else self.logits
        self.inputs = [new((2 if self.shared else 1) * n, x.shape[1], dtype=job.compute, device=x.device)]
        if job.teacher is not None and not self.shared:
            self.inputs.append(new(n, job.teacher.shape[1], dtype=job.compute, device=x.device))

    def _head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vocab = self.job.vocab
        return weight[:vocab].to(self.job.compute), None if bias is None else bias[:vocab].to(self.accumulate)

    def run(self, row_scale: Tensor | None) -> tuple[Tensor, _Gradients]:
        job, wanted, device = self.job, self.wanted, self.x.device
        tokens, hidden = self.plan.tokens, self.x.shape[1]
        table = torch.empty(job.columns, tokens, dtype=self.accumulate, device=device)
        make = torch.empty if tokens else torch.zeros
        grads = _Gradients(
            make(tokens, hidden, dtype=self.accumulate, device=device) if wanted.x else None,
            make(job.vocab, hidden, dtype=self.accumulate, device=device) if wanted.weight else None,
            torch.zeros(job.vocab, dtype=self.accumulate, device=device) if wanted.bias else None,
        )
        for chunk in self.plan:
            n = chunk.stop - chunk.start
            x, student, teacher = self._project(chunk, n)
            dz = self.dz[:n] if wanted else None
            scale = None if row_scale is None else row_scale[chunk]
            targets = None if job.targets is None else job.targets[chunk]
            job.row_pass(student, teacher, targets, table[:, chunk], dz, scale)
            if dz is None:
                continue
            if grads.x is not None:
                back_project(grads.x[chunk], dz, self.weight)
            if grads.weight is not None:
                accumulate_weight_gradient(grads.weight, dz, x, first=chunk.start == 0)
            if grads.bias is not None:
                grads.bias += dz.sum(0, dtype=self.accumulate)
        return table, grads

    def _project(self, chunk: slice, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The chunk's student inputs (n, H) and both rows of logits (n, V)."""
        job = self.job
        x = self._gather(self.x, chunk, self.inputs[0][:n])
        if job.teacher is None:
            project(self.logits[:n], x, self.weight, self.bias)
            return x, self.logits[:n], None
        student, teacher = self.logits[:n], self.logits[n : 2 * n]
        if self.shared:  # one product for both, so that the weight is read once
            self._gather(job.teacher, chunk, self.inputs[0][n : 2 * n])
            project(self.logits[: 2 * n], self.inputs[0][: 2 * n], self.weight, None)
            for logits, bias in ((student, self.bias), (teacher, self.teacher_bias)):
                if bias is not None:
                    logits += bias
        else:
            x_t = self._gather(job.teacher, chunk, self.inputs[1][:n])
            project(student, x, self.weight, self.bias)
            project(teacher, x_t, self.teacher_weight, self.teacher_bias)
        return x, student, teacher

    def _gather(self, source: Tensor, chunk: slice, out: Tensor) -> Tensor:
        return out.copy_(source[chunk] if self.job.rows is None else source[self.job.rows[chunk]])
