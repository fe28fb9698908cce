"""The row pass over logits that the caller already holds, with its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused_linear import Job
from .gemm import accumulation_dtype
from .workspace import plan_chunks


def logits_loss(student: Tensor, job: Job) -> Tensor:
    """The losses (n,) of the job's counted tokens from the student's logits (N, V) and the teacher's in `job.teacher`.

    Fills `job.table`. Differentiable once, in `student`.
    """
    job.wants_grad = torch.is_grad_enabled()
    return _LogitsLoss.apply(student, job)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, job: Job) -> Tensor:
        assert job.teacher is not None
        accumulate = accumulation_dtype(job.compute)
        tokens = student.shape[0] if job.rows is None else job.rows.shape[0]
        wanted = job.wants_grad and ctx.needs_input_grad[0]
        # a chunk is copied, since scale, cap and softmax work in the accumulation dtype; its gradient is kept
        row_bytes = job.vocab * 3 * accumulate.itemsize
        plan = plan_chunks(tokens, job.vocab, student.device, accumulate, row_bytes, job.budget)
        table = torch.empty(job.columns, tokens, dtype=accumulate, device=student.device)
        grad = student.new_empty(tokens, job.vocab) if wanted else None
        for chunk in plan:
            rows = chunk if job.rows is None else job.rows[chunk]
            job.row_pass(
                student[rows, : job.vocab].to(accumulate),
                job.teacher[rows, : job.vocab].to(accumulate),
                None if job.targets is None else job.targets[chunk],
                table[:, chunk],
                None if grad is None else grad[chunk],
                None,
            )
        job.table = table
        ctx.rows, ctx.shape = job.rows, student.shape
        ctx.save_for_backward(grad)
        return table[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        vocab = grad.shape[1]
        if ctx.rows is None:
            torch.mul(grad, upstream.unsqueeze(-1), out=out[:, :vocab])
        else:
            out[ctx.rows, :vocab] = (grad * upstream.unsqueeze(-1)).to(grad.dtype)
        return out, None
