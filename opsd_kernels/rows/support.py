"""The divergence on a top-k support: what is as wide as the vocabulary is a backend's, the rest is here, for all.

The k entries, and a last one for the tail if there is one, are few: they are computed in float64, where the difference
of two logits, or of the two tails, has all the digits that it had, and needs no care.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import torch
from torch import Tensor

from ..across import Across
from ..objective import Objective
from ..workspace import block_rows_of
from . import Column, LogprobColumn
from .torch_backend import HERE, Pair, blocks_of, entropy_of, paired, settle, through_transform, token_loss, transformed


def divergence_rows(
    backend: ModuleType,
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
    across: Across = HERE,
) -> None:
    """The backend's `divergence_rows` on the support that the objective asks for; see the package's docstring.

    The support is chosen by the teacher or the student, and statistics are of the whole vocabulary.
    """
    k = objective.top_k
    assert k is not None
    if table.shape[0] > 1:  # before dz may take the student's place
        whole = dataclasses.replace(objective, entry_clip=None, token_clip=None, top_k=None, tail_bucket=False)
        alone = {"table": table, "dz": None, "row_scale": None}
        backend.divergence_rows(student, teacher, whole, targets=targets, **alone, **across.keywords())
    for block in _blocks(student, k, across):
        z_s, z_t = student[block], teacher[block]
        ids = backend.top_k_ids(z_t if objective.top_k_from == "teacher" else z_s, k, **across.keywords())
        y_s = transformed(_wide(across.take(z_s, ids)), objective.student, objective.temperature)
        y_t = transformed(_wide(across.take(z_t, ids)), objective.teacher, objective.temperature)
        if objective.tail_bucket:
            log_s, log_t, apart = map(_wide, backend.outside_rows(z_s, z_t, ids, objective, **across.keywords()))
            log_s = torch.where(apart.isfinite(), log_t + apart, log_s)
            y_s, y_t = _with(y_s, log_s), _with(y_t, log_t)
        rows = _Rows(backend, z_s, table[:, block], _part(dz, block), _part(row_scale, block), across)
        rows.fill(ids, y_s, y_t, objective)


def cached_rows(
    backend: ModuleType,
    student: Tensor,
    teacher_logprobs: Tensor,
    support: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
    across: Across = HERE,
) -> None:
    """The divergence from a teacher of which only log-probabilities (n, k) at the ids `support` (n, k) are known.

    They have been rounded to their dtype's eps, so that 1 − Σp is known to k·eps: less than that is no evidence of
    mass, and where the student has a tail the teacher's is taken to be at least that, for none would be infinitely far.
    With `objective.tail_bucket` the rest of both models' mass is one more entry, else both are renormalised. The
    statistics that need the teacher's whole distribution speak of that support.
    """
    least = math.log(support.shape[1] * torch.finfo(teacher_logprobs.dtype).eps)
    stats = table.shape[0] > 1
    if stats:  # before dz may take the student's place
        _fill_own_stats(backend, student, support, objective, targets, table, across)
    for block in _blocks(student, support.shape[1], across):
        z_s, ids, y_t = student[block], support[block], _wide(teacher_logprobs[block])
        y_s = transformed(_wide(across.take(z_s, ids)), objective.student, objective.temperature)
        if stats and targets is not None:
            hit = ids == targets[block].unsqueeze(-1)
            stored = y_t.masked_fill(~hit, -math.inf).amax(-1)
            table[Column.TEACHER_LOGPROB, block] = stored.masked_fill(~hit.any(-1), math.nan)
        if objective.tail_bucket:
            tail_s = _wide(backend.outside_rows(z_s, None, ids, objective, **across.keywords())[0])
            tail_t = _log_complement(y_t)
            nothing = (tail_s == -math.inf) & (tail_t <= least)
            y_s, y_t = _with(y_s, tail_s), _with(y_t, tail_t.clamp(min=least).masked_fill_(nothing, -math.inf))
        rows = _Rows(backend, z_s, table[:, block], _part(dz, block), _part(row_scale, block), across)
        pair, divergence = rows.fill(ids, y_s, y_t, objective)
        if stats:
            rows.table[Column.DIVERGENCE] = divergence
            rows.table[Column.TEACHER_ENTROPY] = entropy_of(y_t, pair.log_z_t, HERE)


def support_width(k: int, element: int) -> int:
    """The elements of `element` bytes that a row of k entries and a tail takes: what a block's size is reckoned by."""
    return (k + 1) * torch.float64.itemsize // element


@dataclasses.dataclass
class _Rows:
    """Where a block's results go."""

    backend: ModuleType
    student: Tensor  # (n, V), raw
    table: Tensor  # (C, n)
    dz: Tensor | None  # (n, V)
    row_scale: Tensor | None  # (n,)
    across: Across

    def fill(self, ids: Tensor, y_s: Tensor, y_t: Tensor, objective: Objective) -> tuple[Pair, Tensor]:
        """Loss, clips and dz from the tempered logits (n, k), or (n, k + 1) with the tail; the divergence (n,) too."""
        pair = paired(y_s, y_t, y_s - y_t)
        token = token_loss(pair, objective, self.dz is not None, HERE)
        kept = settle(self.table, token, pair.dead, objective)
        if token.grad is not None:
            grad = token.grad.masked_fill_(~kept.unsqueeze(-1), 0.0)
            if self.row_scale is not None:
                grad *= self.row_scale.unsqueeze(-1)
            self._spread(grad, ids, y_s, objective)
        return pair, token.divergence.masked_fill(pair.dead, 0.0)

    def _spread(self, grad: Tensor, ids: Tensor, y_s: Tensor, objective: Objective) -> None:
        """dz from the gradient on the support: the tail's is shared among its tokens by their probability in it."""
        assert self.dz is not None
        k, transform, temperature = ids.shape[1], objective.student, objective.temperature
        if objective.tail_bucket:
            tail = y_s[:, k].masked_fill(y_s[:, k] == -math.inf, 0.0)
            shift = tail.to(torch.float32 if self.student.dtype != torch.float64 else torch.float64)
            weight = grad[:, k] * (shift - tail).exp()  # what rounding took from the shift
            self.backend.tail_gradient_rows(
                self.student, transform, temperature, shift=shift, weight=weight.to(shift.dtype), dz=self.dz
            )
        else:
            self.dz.zero_()
        near = through_transform(grad[:, :k], y_s[:, :k], transform, temperature)
        self.across.put(self.dz, ids, near.to(self.dz.dtype))


def _fill_own_stats(
    backend: ModuleType,
    student: Tensor,
    support: Tensor,
    objective: Objective,
    targets: Tensor | None,
    table: Tensor,
    across: Across,
) -> None:
    """The columns of the student's whole distribution."""
    own = table.new_empty(len(LogprobColumn), table.shape[1])
    at = support[:, 0].contiguous() if targets is None else targets
    alone = {"table": own, "dz": None, "row_scale": None}
    backend.logprob_rows(student, at, objective.student, objective.temperature, **alone, **across.keywords())
    table[Column.STUDENT_ENTROPY] = own[LogprobColumn.ENTROPY]
    if targets is not None:
        table[Column.STUDENT_LOGPROB] = own[LogprobColumn.LOGPROB]


def _blocks(student: Tensor, k: int, across: Across) -> list[slice]:
    return blocks_of(student, block_rows_of(student.device, support_width(k, student.itemsize)), across)


def _part(rows: Tensor | None, block: slice) -> Tensor | None:
    return None if rows is None else rows[block]


def _wide(values: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _with(entries: Tensor, tail: Tensor) -> Tensor:
    return torch.cat([entries, tail.unsqueeze(-1)], -1)


def _log_complement(logprobs: Tensor) -> Tensor:
    """log(1 − Σ p), (n, k) → (n,), −inf where nothing is left."""
    return torch.log(-torch.expm1(torch.logsumexp(logprobs, -1).clamp_(max=0.0)))
