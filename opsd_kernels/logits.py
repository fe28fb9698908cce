"""The row pass over logits that the caller already holds, as a torch operator with its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from . import backends
from .fused_linear import WAITS, Spec, check_ids, scaled
from .rows.support import support_width
from .workspace import plan_chunks


def logits_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, targets: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """(losses (N,), table (columns, N)) from logits (N, V); the losses are differentiable once in `student`."""
    wanted = torch.is_grad_enabled() and student.requires_grad
    table, _ = _logits_loss(student, teacher, mask, targets, spec.encoded(), wanted)
    return table[0], table.detach()


@library.custom_op("opsd::logits_loss", mutates_args=(), tags=WAITS)
def _logits_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    options: str,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """(table (columns, N), gradient (N, V) for a unit upstream one, or no elements)."""
    spec = Spec.decoded(options)
    backend = backends.module(backends.chosen(spec.backend, student.device, spec.compute))
    accumulate, vocab = spec.accumulate, spec.vocab
    rows = None if mask is None else mask.nonzero().squeeze(-1)
    check_ids("target_ids", targets, rows, vocab)
    tokens = student.shape[0] if rows is None else rows.shape[0]
    # a chunk is copied where the softmax needs another dtype, and its gradient is written apart
    element = accumulate.itemsize
    k = spec.objective.top_k
    width = vocab if k is None else max(vocab, support_width(k, element))
    plan = plan_chunks(tokens, width, student.device, element, vocab * 3 * element, spec.budget)
    table = student.new_zeros((spec.columns, student.shape[0]), dtype=accumulate)
    grad = student.new_zeros(student.shape if wanted else (0,))
    for chunk in plan:
        at = chunk if rows is None else rows[chunk]
        part = table.new_zeros((spec.columns, chunk.stop - chunk.start))
        dz = grad.new_empty(chunk.stop - chunk.start, vocab) if wanted else None
        backends.divergence_rows(
            backend,
            student[at, :vocab].to(accumulate),
            teacher[at, :vocab].to(accumulate),
            spec.objective,
            targets=None if targets is None else targets[at],
            table=part,
            dz=dz,
            row_scale=None,
        )
        table[:, at] = part
        if dz is not None:
            grad[at, :vocab] = dz
    return table, grad


@_logits_loss.register_fake
def _(student, teacher, mask, targets, options, wanted):
    spec = Spec.decoded(options)
    table = student.new_empty((spec.columns, student.shape[0]), dtype=spec.accumulate)
    return table, student.new_empty(student.shape if wanted else (0,))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.wanted = inputs[-1]
    ctx.set_materialize_grads(False)  # zeros (N, V), for an output that nobody differentiates


def _backward(ctx: Any, table: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return (None if table is None or not ctx.wanted else scaled(grad, table[0], grad.dtype), *[None] * 5)


_logits_loss.register_autograd(_backward, setup_context=_setup_context)
