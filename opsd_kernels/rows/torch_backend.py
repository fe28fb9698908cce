"""The row pass in plain torch: any device, float32 and float64, and the yardstick of the other backends.

Teacher and student are nearly the same distribution, so everything that vanishes with their difference is computed
from d = log p_S − log p_T, never as a difference of probabilities:

- r = p_S − p_T is p_T·expm1(d) or −p_S·expm1(−d), by the sign of d, so that nothing overflows;
- each divergence is a sum of non-negative terms like p_T·φ(d), φ(x) = eˣ − 1 − x, which need no cancellation;
- d carries the rounding of log Z_S − log Z_T, the same for a whole row. The sums above are insensitive to it to first
  order, and the gradient loses it by being re-centred: dz = g − p_S·Σg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objective import LogitTransform, Objective
from ..workspace import block_rows
from . import Column, LogprobColumn

SERIES_BELOW = 0.1  # |x| under which φ(x) is summed as a series; above, the direct form loses under 5 bits


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """See the package's docstring."""
    step = block_rows(student)
    for start in range(0, student.shape[0], step):
        block = slice(start, start + step)
        _divergence_block(
            student[block],
            teacher[block],
            objective,
            None if targets is None else targets[block],
            table[:, block],
            None if dz is None else dz[block],
            None if row_scale is None else row_scale[block],
        )


def logprob_rows(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    temperature: float,
    *,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """log p(target) and, with a second row in the table, the entropy. See the package's docstring."""
    step = block_rows(logits)
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        y = _transformed(logits[block], transform, temperature)
        log_z = _log_normaliser(y)
        target = targets[block].unsqueeze(-1)
        logprob = _log_prob(y, log_z, target)
        table[LogprobColumn.LOGPROB, block] = logprob
        if table.shape[0] > LogprobColumn.ENTROPY:
            table[LogprobColumn.ENTROPY, block] = _entropy(y, log_z)
        if dz is not None:
            grad = (y - log_z).exp_().neg_()
            grad.scatter_add_(-1, target, torch.ones_like(grad[:, :1]))
            grad.masked_fill_((logprob == -math.inf).unsqueeze(-1), 0.0)
            _write_gradient(dz[block], grad, y, transform, temperature, None if row_scale is None else row_scale[block])


def _divergence_block(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    y_s = _transformed(student, objective.student, objective.temperature)
    y_t = _transformed(teacher, objective.teacher, objective.temperature)
    want_stats = table.shape[0] > 1
    if want_stats:
        _fill_distribution_stats(table, y_s, y_t, targets)
    if objective.top_k is None:
        token = _token_loss(_pair(y_s, y_t), objective, dz is not None)
        divergence, grad = token.divergence, token.grad
    else:
        support = _support(y_s, y_t, objective)
        token = _token_loss(_pair(support.student, support.teacher, support.gap), objective, dz is not None)
        grad = None if token.grad is None else support.spread(token.grad, y_s)
        # the statistic is over the full vocabulary
        divergence = _token_loss(_pair(y_s, y_t), objective, False).divergence if want_stats else token.divergence

    live = (y_s.amax(-1) != -math.inf) & (y_t.amax(-1) != -math.inf)
    loss = torch.where(live, token.loss, 0.0)
    kept = live & (token.loss != math.inf)
    amount = token.clipped_amount
    over = torch.zeros_like(live)
    if objective.token_clip is not None:
        over = live & (token.loss > objective.token_clip)
        kept &= ~over
        amount = amount + torch.where(over, token.loss - objective.token_clip, 0.0)
        loss = torch.where(over, objective.token_clip, loss)
    table[Column.LOSS] = loss
    if want_stats:
        table[Column.DIVERGENCE] = torch.where(live, divergence, 0.0)
        table[Column.ENTRY_CLIPPED] = token.entry_clipped & live
        table[Column.CLIPPED_AMOUNT] = torch.where(live, amount, 0.0)
        table[Column.TOKEN_CLIPPED] = over
    if dz is not None:
        assert grad is not None
        grad.masked_fill_(~kept.unsqueeze(-1), 0.0)  # a row whose loss is NaN is kept: it must stay visible
        _write_gradient(dz, grad, y_s, objective.student, objective.temperature, row_scale)


def _transformed(raw: Tensor, transform: LogitTransform, temperature: float) -> Tensor:
    """softcap·tanh(scale·raw / softcap) / T; −inf stays −inf. Returns `raw` itself where there is nothing to do."""
    if transform.softcap is None:
        factor = transform.logit_scale / temperature
        return raw if factor == 1.0 else raw * factor
    y = (raw * (transform.logit_scale / transform.softcap)).tanh_().mul_(transform.softcap / temperature)
    return y.masked_fill_(raw == -math.inf, -math.inf)


def _write_gradient(
    dz: Tensor, grad: Tensor, y: Tensor, transform: LogitTransform, temperature: float, row_scale: Tensor | None
) -> None:
    """dz = grad (with respect to y, consumed) through temperature, cap and scale, times the row's weight."""
    grad *= transform.logit_scale / temperature
    if transform.softcap is not None:
        tanh_squared = (y * (temperature / transform.softcap)).square_()
        grad *= tanh_squared.neg_().add_(1.0).masked_fill_(y == -math.inf, 0.0)
    if row_scale is not None:
        grad *= row_scale.unsqueeze(-1)
    dz.copy_(grad)


def _log_normaliser(y: Tensor) -> Tensor:
    """log Σ exp(y), (n, V) → (n, 1); 0 for a row that is −inf everywhere, so that its probabilities come out 0."""
    log_z = torch.logsumexp(y, -1, keepdim=True)
    return log_z.masked_fill_(log_z == -math.inf, 0.0)


def _entropy(y: Tensor, log_z: Tensor) -> Tensor:
    log_p = y - log_z
    return -(log_p.exp().mul_(log_p.masked_fill_(y == -math.inf, 0.0))).sum(-1)


def _log_prob(y: Tensor, log_z: Tensor, target: Tensor) -> Tensor:
    return (y.gather(-1, target) - log_z).squeeze(-1)


def _fill_distribution_stats(table: Tensor, y_s: Tensor, y_t: Tensor, targets: Tensor | None) -> None:
    for y, entropy, logprob in (
        (y_s, Column.STUDENT_ENTROPY, Column.STUDENT_LOGPROB),
        (y_t, Column.TEACHER_ENTROPY, Column.TEACHER_LOGPROB),
    ):
        log_z = _log_normaliser(y)
        table[entropy] = _entropy(y, log_z)
        if targets is not None:
            table[logprob] = _log_prob(y, log_z, targets.unsqueeze(-1))


@dataclass
class _Pair:
    """Two distributions over the same entries; all (n, entries)."""

    p_s: Tensor
    p_t: Tensor
    d: Tensor  # log p_S − log p_T; ±inf where one of them has no mass, 0 where neither has
    r: Tensor  # p_S − p_T
    no_s: Tensor  # bool: the student's logit is −inf
    no_t: Tensor

    @property
    def normaliser_error(self) -> Tensor:
        """What d is too large by, from the rounding of the two log-normalisers: Σ p_T·e^d should be 1. Shape (n, 1)."""
        return torch.log1p(self.r.sum(-1, keepdim=True))


def _pair(y_s: Tensor, y_t: Tensor, gap: Tensor | None = None) -> _Pair:
    """`gap`: y_S − y_T where the caller knows it more accurately than the two logits tell."""
    log_z_s, log_z_t = _log_normaliser(y_s), _log_normaliser(y_t)
    no_s, no_t = y_s == -math.inf, y_t == -math.inf
    d = (y_s - y_t if gap is None else gap.clone()).sub_(log_z_s - log_z_t).masked_fill_(no_s & no_t, 0.0)
    p_s, p_t = (y_s - log_z_s).exp_(), (y_t - log_z_t).exp_()
    r = torch.where(d <= 0, p_t, -p_s).mul_(d.abs().neg_().expm1_())
    return _Pair(p_s, p_t, d, r, no_s, no_t)


def _phi(x: Tensor) -> Tensor:
    """eˣ − 1 − x by its series, for |x| < SERIES_BELOW (relative error under 1e-8 in float64)."""
    terms = 5 if x.dtype != torch.float64 else 11
    total = torch.full_like(x, 1.0 / math.factorial(terms + 2))
    for k in range(terms + 1, 1, -1):
        total.mul_(x).add_(1.0 / math.factorial(k))
    return total.mul_(x).mul_(x)


@dataclass
class _TokenLoss:
    divergence: Tensor  # (n,) before clips
    loss: Tensor  # (n,) after the entry clip
    clipped_amount: Tensor  # (n,)
    entry_clipped: Tensor  # (n,) bool
    grad: Tensor | None  # (n, entries), with respect to the student's tempered logits


def _token_loss(pair: _Pair, objective: Objective, want_grad: bool) -> _TokenLoss:
    """Divergence, entry clip and gradient of each row; the caller zeroes the gradient of infinite losses."""
    beta, tau = objective.beta, objective.entry_clip
    near = pair.d.abs() < SERIES_BELOW
    infinite: Tensor | None = None
    log_m_over_s = pair.d  # replaced below for the JSD
    if beta == 0.0:  # ℓ = −p_T·d; summed as p_T·φ(d) = r − p_T·d
        absent, infinite = pair.no_s | pair.no_t, pair.no_s & ~pair.no_t
        entry = (-pair.d).masked_fill_(absent, 0.0).mul_(pair.p_t)
        accurate = torch.where(near, pair.p_t * _phi(pair.d), entry + pair.r)
    elif beta == 1.0:  # ℓ = p_S·d; summed as p_S·φ(−d) = p_S·d − r
        absent, infinite = pair.no_s | pair.no_t, pair.no_t & ~pair.no_s
        entry = pair.d.masked_fill(absent, 0.0).mul_(pair.p_s)
        accurate = torch.where(near, pair.p_s * _phi(-pair.d), entry - pair.r)
    else:
        log_m_over_s, log_m_over_t = _log_mixture(pair.d, beta)
        entry = -beta * pair.p_t * log_m_over_t.masked_fill(pair.no_t, 0.0)
        entry -= (1 - beta) * pair.p_s * log_m_over_s.masked_fill(pair.no_s, 0.0)
        # entry by entry the same as the line above, since Σ over {T, S} of its weight times (m/p − 1) is zero
        series = beta * pair.p_t * _phi(log_m_over_t) + (1 - beta) * pair.p_s * _phi(log_m_over_s)
        accurate = entry = torch.where(near, series, entry)
    divergence = accurate.sum(-1)

    over: Tensor | None = None
    loss, amount = divergence, torch.zeros_like(divergence)
    if tau is not None:
        over = entry > tau
        amount = (entry - tau).clamp_(min=0.0).sum(-1)
        loss = divergence - amount
        if infinite is not None:
            over |= infinite
            loss = loss + tau * infinite.sum(-1)
    if infinite is not None:
        unbounded = infinite.any(-1)
        divergence = torch.where(unbounded, math.inf, divergence)
        if tau is None:
            loss = divergence
        else:
            amount = torch.where(unbounded, math.inf, amount)
    entry_clipped = torch.zeros_like(loss, dtype=torch.bool) if over is None else over.any(-1)
    if not want_grad:
        return _TokenLoss(divergence, loss, amount, entry_clipped, None)

    if beta == 0.0:  # g = p_S − M·p_T
        grad = pair.r if over is None else torch.where(over, pair.p_s, pair.r)
    else:
        direction = pair.d if beta == 1.0 else log_m_over_s * (beta - 1)
        direction = direction.masked_fill(pair.no_s, 0.0)
        if over is not None:  # the constant of the reverse KL's gradient, 1, cancels but for the clipped entries
            direction.masked_fill_(over, -1.0 if beta == 1.0 else 0.0)
        grad = direction.mul_(pair.p_s)
    return _TokenLoss(divergence, loss, amount, entry_clipped, grad - pair.p_s * grad.sum(-1, keepdim=True))


def _log_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m / p_S) and log(m / p_T) from d = log(p_S / p_T), with m = (1−β) p_S + β p_T."""
    down = d.abs().neg_().expm1_()
    towards = torch.where(d > 0, beta * down, (1 - beta) * down).log1p_()  # log of m over the likelier of the two
    return torch.where(d > 0, towards, towards - d), torch.where(d > 0, towards + d, towards)


@dataclass
class _Support:
    """Tempered logits on the top-k support, (n, k) or with the tail (n, k + 1)."""

    student: Tensor
    teacher: Tensor
    gap: Tensor
    chosen: Tensor  # (n, k) int64
    tail: bool

    def spread(self, grad: Tensor, y_s: Tensor) -> Tensor:
        """The gradient over the vocabulary (n, V): the tail's is shared among its tokens by their probability in it."""
        if not self.tail:
            return torch.zeros_like(y_s).scatter_(-1, self.chosen, grad)
        tail = self.student[:, -1:]
        full = (y_s - tail.masked_fill(tail == -math.inf, 0.0)).exp_().mul_(grad[:, -1:])
        return full.scatter_(-1, self.chosen, grad[:, :-1])


def _support(y_s: Tensor, y_t: Tensor, objective: Objective) -> _Support:
    assert objective.top_k is not None
    chosen = (y_t if objective.top_k_from == "teacher" else y_s).topk(objective.top_k, dim=-1).indices
    student, teacher = y_s.gather(-1, chosen), y_t.gather(-1, chosen)
    gap = student - teacher
    if not objective.tail_bucket:
        return _Support(student, teacher, gap, chosen, False)
    rest_s, rest_t = y_s.scatter(-1, chosen, -math.inf), y_t.scatter(-1, chosen, -math.inf)
    tail_s, tail_t = torch.logsumexp(rest_s, -1, keepdim=True), torch.logsumexp(rest_t, -1, keepdim=True)
    # two log-sum-exps that differ by less than their rounding: measure the difference entry by entry
    correction = _pair(rest_s, rest_t).normaliser_error
    correction = correction.masked_fill(~(tail_s.isfinite() & tail_t.isfinite()), 0.0)
    return _Support(
        torch.cat([student, tail_s], -1),
        torch.cat([teacher, tail_t], -1),
        torch.cat([gap, tail_s - tail_t + correction], -1),
        chosen,
        True,
    )
