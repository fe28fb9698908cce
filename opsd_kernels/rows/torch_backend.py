"""The row pass in plain torch: any device, float32 and float64, and the yardstick of the other backends.

Teacher and student are nearly the same distribution, so everything that vanishes with their difference is computed
from d = log p_S − log p_T, never as a difference of probabilities:

- r = p_S − p_T is p_T·expm1(d) or −p_S·expm1(−d), by the sign of d, so that nothing overflows;
- each divergence is a sum of non-negative terms like p_T·φ(d), φ(x) = eˣ − 1 − x, which need no cancellation;
- d carries the rounding of log Z_S − log Z_T, the same for a whole row. The sums above are insensitive to it to first
  order, and its square is taken off; the gradient loses it by being re-centred: dz = g − p_S·Σg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..across import Across
from ..objective import LogitTransform, Objective
from ..workspace import block_rows
from . import Column, LogprobColumn

HERE = Across(0, 0)  # the reductions of a vocabulary that is not split
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
    across: Across = HERE,
) -> None:
    """See the package's docstring. `across`: the reductions of a vocabulary that is split over ranks."""
    assert objective.top_k is None
    for block in _blocks(student, across):
        y_s = transformed(student[block], objective.student, objective.temperature)
        y_t = transformed(teacher[block], objective.teacher, objective.temperature)
        out = _Out(table, dz, row_scale, block)
        top_s, top_t = _top(y_s, across), _top(y_t, across)
        gap = _gap(student[block], teacher[block], y_s, y_t, objective).sub_(top_s - top_t)
        low_s, low_t = y_s - top_s, y_t - top_t
        pair = paired(low_s, low_t, gap, across)
        if out.stats:
            target = None if targets is None else targets[block].unsqueeze(-1)
            _fill_distribution_stats(out.table, pair, low_s, low_t, target, across)
        del low_s, low_t
        token = token_loss(pair, objective, dz is not None, across)
        kept = settle(out.table, token, pair.dead, objective)
        if out.stats:
            out.table[Column.DIVERGENCE] = token.divergence.masked_fill(pair.dead, 0.0)
        if token.grad is not None:
            token.grad.masked_fill_(~kept.unsqueeze(-1), 0.0)
            _write_gradient(out, token.grad, y_s, objective.student, objective.temperature)


def logprob_rows(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    temperature: float,
    *,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
    across: Across = HERE,
) -> None:
    """log p(target) and, with a second row in the table, the entropy. See the package's docstring."""
    for block in _blocks(logits, across):
        out = _Out(table, dz, row_scale, block)
        y = transformed(logits[block], transform, temperature)
        low = y - _top(y, across)
        log_z = _log_normaliser(low, across)
        target = targets[block].unsqueeze(-1)
        logprob = _log_prob(low, log_z, target, across)
        out.table[LogprobColumn.LOGPROB] = logprob
        if table.shape[0] > LogprobColumn.ENTROPY:
            out.table[LogprobColumn.ENTROPY] = entropy_of(low, log_z, across)
        if out.dz is not None:
            grad = (low - log_z).exp_().neg_()
            here = ((target >= across.offset) & (target < across.offset + y.shape[1])).to(y.dtype)
            if y.shape[1]:
                grad.scatter_add_(-1, (target - across.offset).clamp_(0, y.shape[1] - 1), here)
            grad.masked_fill_((logprob == -math.inf).unsqueeze(-1), 0.0)
            _write_gradient(out, grad, y, transform, temperature)


def top_k_rows(
    logits: Tensor, k: int, transform: LogitTransform, temperature: float, *, across: Across = HERE
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    found = []
    for block in _blocks(logits, across):
        y = transformed(logits[block], transform, temperature)
        log_z = _log_normaliser(y, across)
        values, ids = across.top_k(y, k)
        found.append((values - log_z.masked_fill(log_z == -math.inf, 0.0), ids, log_z.squeeze(-1)))
    logprobs, ids, log_z = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logprobs, ids, log_z


def top_k_ids(logits: Tensor, k: int, *, across: Across = HERE) -> Tensor:
    """See the package's docstring."""
    return across.top_k(logits, k)[1]


def outside_rows(
    student: Tensor, teacher: Tensor | None, ids: Tensor, objective: Objective, *, across: Across = HERE
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    found = []
    for block in _blocks(student, across):
        y_s = transformed(student[block], objective.student, objective.temperature)
        inside = across.at(ids[block], y_s)
        rest_s = y_s.masked_fill(inside, -math.inf)
        if teacher is None:
            log_z = _log_normaliser(rest_s, across)
            found.append((log_z, log_z, torch.zeros_like(log_z)))
            continue
        y_t = transformed(teacher[block], objective.teacher, objective.temperature)
        gap = _gap(student[block], teacher[block], y_s, y_t, objective).masked_fill_(inside, 0.0)
        pair = paired(rest_s, y_t.masked_fill(inside, -math.inf), gap, across)
        # two log-sum-exps that differ by less than their rounding: the difference is measured entry by entry
        apart = pair.log_z_s - pair.log_z_t
        apart = torch.where(apart.isfinite(), apart + pair.normaliser_error(across), apart)
        found.append((pair.log_z_s, pair.log_z_t, apart))
    log_s, log_t, apart = (torch.cat(parts).squeeze(-1) for parts in zip(*found, strict=True))
    return log_s, log_t, apart


def tail_gradient_rows(
    logits: Tensor, transform: LogitTransform, temperature: float, *, shift: Tensor, weight: Tensor, dz: Tensor
) -> None:
    """See the package's docstring."""
    for block in _blocks(logits, HERE):
        y, scale = transformed(logits[block], transform, temperature), weight[block].unsqueeze(-1)
        grad = (y - shift[block].unsqueeze(-1)).exp_().mul_(scale).masked_fill_(scale == 0.0, 0.0)
        dz[block] = through_transform(grad, y, transform, temperature)


def _blocks(logits: Tensor, across: Across) -> list[slice]:
    return blocks_of(logits, block_rows(logits), across)


def blocks_of(rows: Tensor, step: int, across: Across) -> list[slice]:
    """`step` rows at a time; all of them where each block would cost a round of collectives."""
    step = step if across is HERE else max(1, rows.shape[0])
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]


class _Out:
    """Where a block's results go."""

    def __init__(self, table: Tensor, dz: Tensor | None, row_scale: Tensor | None, block: slice):
        self.table = table[:, block]
        self.dz = None if dz is None else dz[block]
        self.row_scale = None if row_scale is None else row_scale[block].unsqueeze(-1)
        self.stats = table.shape[0] > 1


def settle(table: Tensor, token: TokenLoss, dead: Tensor, objective: Objective) -> Tensor:
    """Token clip, infinities and dead rows: fills the columns of the loss and of the clips; which rows keep a gradient.

    A row whose loss is NaN is kept: it must stay visible.
    """
    loss = torch.where(dead, 0.0, token.loss)
    kept = ~dead & (token.loss != math.inf)
    amount = token.clipped_amount
    over = torch.zeros_like(dead)
    if objective.token_clip is not None:
        over = ~dead & (token.loss > objective.token_clip)
        kept &= ~over
        amount = amount + torch.where(over, token.loss - objective.token_clip, 0.0)
        loss = torch.where(over, objective.token_clip, loss)
    table[Column.LOSS] = loss
    if table.shape[0] > 1:
        table[Column.ENTRY_CLIPPED] = token.entry_clipped & ~dead
        table[Column.CLIPPED_AMOUNT] = torch.where(dead, 0.0, amount)
        table[Column.TOKEN_CLIPPED] = over
    return kept


def transformed(raw: Tensor, transform: LogitTransform, temperature: float) -> Tensor:
    """softcap·tanh(scale·raw / softcap) / T; −inf stays −inf. Returns `raw` itself where there is nothing to do."""
    if transform.softcap is None:
        factor = transform.logit_scale / temperature
        return raw if factor == 1.0 else raw * factor
    y = (raw * (transform.logit_scale / transform.softcap)).tanh_().mul_(transform.softcap / temperature)
    return y.masked_fill_(raw == -math.inf, -math.inf)


def _write_gradient(out: _Out, grad: Tensor, y: Tensor, transform: LogitTransform, temperature: float) -> None:
    """dz = grad (with respect to y, consumed) through the transform, times the row's weight."""
    assert out.dz is not None
    through_transform(grad, y, transform, temperature)
    if out.row_scale is not None:
        grad *= out.row_scale
    out.dz.copy_(grad)


def through_transform(grad: Tensor, y: Tensor, transform: LogitTransform, temperature: float) -> Tensor:
    """The gradient with respect to the raw logits from that to y, in its place."""
    grad *= transform.logit_scale / temperature
    if transform.softcap is not None:
        tanh_squared = (y * (temperature / transform.softcap)).square_()
        grad *= tanh_squared.neg_().add_(1.0).masked_fill_(y == -math.inf, 0.0)
    return grad


def _top(y: Tensor, across: Across) -> Tensor:
    """The largest of each row, (n, V) → (n, 1), 0 where all are −inf: less that, a normaliser has all its digits."""
    top = y.amax(-1, keepdim=True) if y.shape[1] else y.new_full((len(y), 1), -math.inf)
    top = across.max(top)
    return top.masked_fill(top == -math.inf, 0.0)


def _log_normaliser(y: Tensor, across: Across) -> Tensor:
    """log Σ exp(y), (n, V) → (n, 1); −inf for a row that is −inf everywhere."""
    return across.log_sum_exp(torch.logsumexp(y, -1, keepdim=True))


def entropy_of(y: Tensor, log_z: Tensor, across: Across) -> Tensor:
    log_p = (y - log_z).masked_fill_((y == -math.inf) | (log_z == -math.inf), -math.inf)
    return -across.add(log_p.exp().mul_(log_p.masked_fill_(log_p == -math.inf, 0.0)).sum(-1))


def _log_prob(y: Tensor, log_z: Tensor, target: Tensor, across: Across) -> Tensor:
    """y[target] − log Z, (n,); `target` (n, 1) counts in the whole vocabulary."""
    # on a GPU nothing has looked at the ids: one that is no column must not pass for a probability
    strange = (target < 0) | (target >= (y.shape[1] if across is HERE else across.vocab))
    found = across.take(y, target.masked_fill(strange, 0))
    return (found - log_z.masked_fill(log_z == -math.inf, 0.0)).masked_fill_(strange, math.nan).squeeze(-1)


def _fill_distribution_stats(
    table: Tensor, pair: Pair, y_s: Tensor, y_t: Tensor, target: Tensor | None, across: Across
) -> None:
    for y, log_z, entropy, logprob in (
        (y_s, pair.log_z_s, Column.STUDENT_ENTROPY, Column.STUDENT_LOGPROB),
        (y_t, pair.log_z_t, Column.TEACHER_ENTROPY, Column.TEACHER_LOGPROB),
    ):
        table[entropy] = entropy_of(y, log_z, across)
        if target is not None:
            table[logprob] = _log_prob(y, log_z, target, across)


@dataclass
class Pair:
    """Two distributions over the same entries; all (n, entries)."""

    p_s: Tensor
    p_t: Tensor
    d: Tensor  # log p_S − log p_T; ±inf where one of them has no mass, 0 where neither has
    r: Tensor  # p_S − p_T
    no_s: Tensor  # bool: the student's logit is −inf
    no_t: Tensor
    log_z_s: Tensor  # (n, 1), −inf for a row without any mass
    log_z_t: Tensor

    @property
    def dead(self) -> Tensor:
        """(n,) bool: a model has no mass anywhere."""
        return ((self.log_z_s == -math.inf) | (self.log_z_t == -math.inf)).squeeze(-1)

    def normaliser_error(self, across: Across) -> Tensor:
        """What d is too large by, from the rounding of the two log-normalisers: Σ p_T·e^d should be 1. Shape (n, 1)."""
        return torch.log1p(across.add(self.r.sum(-1, keepdim=True)))


def _gap(raw_s: Tensor, raw_t: Tensor, y_s: Tensor, y_t: Tensor, objective: Objective) -> Tensor:
    """y_S − y_T, from the untransformed logits: their transforms have rounded each, which a small gap does not survive.

    tanh a − tanh b = tanh(a − b)·(1 − tanh a·tanh b).
    """
    s, t = objective.student, objective.teacher
    if s.softcap != t.softcap or (y_s is raw_s and y_t is raw_t):
        return y_s - y_t
    divisor = objective.temperature if s.softcap is None else s.softcap
    gap = (raw_s - raw_t).mul_(s.logit_scale / divisor)
    if s.logit_scale != t.logit_scale:
        gap += raw_t * ((s.logit_scale - t.logit_scale) / divisor)
    if s.softcap is not None:
        inverse = objective.temperature / s.softcap
        gap = gap.tanh_().mul_((y_s * inverse).mul_(y_t * inverse).neg_().add_(1.0)).div_(inverse)
    return torch.where(gap.isfinite(), gap, y_s - y_t)  # where a logit is infinite, so is the difference


def paired(y_s: Tensor, y_t: Tensor, gap: Tensor, across: Across = HERE) -> Pair:
    """`gap`: y_S − y_T, as accurately as the caller knows it."""
    log_z_s, log_z_t = _log_normaliser(y_s, across), _log_normaliser(y_t, across)
    # 0 in place of −inf makes every probability of a dead row exp(−inf) = 0
    base_s, base_t = (log_z.masked_fill(log_z == -math.inf, 0.0) for log_z in (log_z_s, log_z_t))
    no_s, no_t = y_s == -math.inf, y_t == -math.inf
    d = (gap - (base_s - base_t)).masked_fill_(no_s & no_t, 0.0)
    p_s, p_t = (y_s - base_s).exp_(), (y_t - base_t).exp_()
    r = torch.where(d <= 0, p_t, -p_s).mul_(d.abs().neg_().expm1_())
    return Pair(p_s, p_t, d, r, no_s, no_t, log_z_s, log_z_t)


def _phi(x: Tensor) -> Tensor:
    """eˣ − 1 − x by its series, for |x| < SERIES_BELOW (relative error under 1e-8 in float64)."""
    terms = 5 if x.dtype != torch.float64 else 11
    total = torch.full_like(x, 1.0 / math.factorial(terms + 2))
    for k in range(terms + 1, 1, -1):
        total.mul_(x).add_(1.0 / math.factorial(k))
    return total.mul_(x).mul_(x)


@dataclass
class TokenLoss:
    divergence: Tensor  # (n,) before clips
    loss: Tensor  # (n,) after the entry clip
    clipped_amount: Tensor  # (n,)
    entry_clipped: Tensor  # (n,) bool
    grad: Tensor | None  # (n, entries), with respect to the student's tempered logits


def token_loss(pair: Pair, objective: Objective, want_grad: bool, across: Across) -> TokenLoss:
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
    # an error δ of d, the same for the whole row, adds φ(δ) ≈ δ²/2 to a KL and β(1−β) of that to the JSD: all too much
    # where the models agree on one token that has nearly all the probability
    slip = torch.log1p(across.add(pair.r.sum(-1)))
    divergence = across.add(accurate.sum(-1)) - slip.square() * ((beta * (1 - beta) or 1.0) / 2)

    over: Tensor | None = None
    loss, amount = divergence, torch.zeros_like(divergence)
    if tau is not None:
        over = entry > tau
        amount = across.add((entry - tau).clamp_(min=0.0).sum(-1))
        loss = divergence - amount
        if infinite is not None:
            over |= infinite
            loss = loss + tau * across.add(infinite.sum(-1, dtype=loss.dtype))
    if infinite is not None:
        unbounded = across.any(infinite.any(-1))
        divergence = torch.where(unbounded, divergence + math.inf, divergence)  # NaN stays visible
        if tau is None:
            loss = divergence
        else:
            amount = torch.where(unbounded, math.inf, amount)
    entry_clipped = torch.zeros_like(loss, dtype=torch.bool) if over is None else across.any(over.any(-1))
    if not want_grad:
        return TokenLoss(divergence, loss, amount, entry_clipped, None)

    if beta == 0.0:  # g = p_S − M·p_T
        grad = pair.r
        if over is not None:  # or −M·p_T: any multiple of p_S cancels, and p_S would swallow a small p_T
            left = across.add(pair.p_t.masked_fill(over, 0.0).sum(-1))  # of the 1 that p_T sums to
            apart = across.any(((pair.p_s > 0.5) & (pair.p_t < 0.25)).any(-1)) | (left < 0.5)
            apart = apart.unsqueeze(-1)
            grad = torch.where(over, pair.p_s.masked_fill(apart, 0.0), torch.where(apart, -pair.p_t, pair.r))
    else:
        direction = pair.d if beta == 1.0 else log_m_over_s * (beta - 1)
        direction = direction.masked_fill(pair.no_s, 0.0)
        if over is not None:  # the constant of the reverse KL's gradient, 1, cancels but for the clipped entries
            direction.masked_fill_(over, -1.0 if beta == 1.0 else 0.0)
        grad = direction.mul_(pair.p_s)
    return TokenLoss(divergence, loss, amount, entry_clipped, _centred(grad, pair.p_s, across))


def _centred(grad: Tensor, p_s: Tensor, across: Across) -> Tensor:
    """grad − p_S·Σ grad, in the place of `grad`.

    An entry with most of the probability, p, would keep the part 1 − p of its own, which float32 does not know. Any
    multiple of p_S may be taken off first: that which leaves nothing of this entry.
    """
    sure = p_s > 0.5
    own = across.add(torch.stack([grad.masked_fill(~sure, 0.0).sum(-1), p_s.masked_fill(~sure, 0.0).sum(-1)]))
    level = torch.where(own[1] > 0, own[0] / own[1], 0.0).unsqueeze(-1)
    grad = grad.sub_(p_s * level).masked_fill_(sure, 0.0)
    return grad.sub_(p_s * across.add(grad.sum(-1, keepdim=True)))


def _log_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m / p_S) and log(m / p_T) from d = log(p_S / p_T), with m = (1−β) p_S + β p_T."""
    down = d.abs().neg_().expm1_()
    # log of m over the likelier of the two; m is at least that one's share, also where 1 − β rounds to 1
    towards = torch.where(
        d > 0,
        (beta * down).log1p_().clamp_(min=math.log1p(-beta)),
        ((1 - beta) * down).log1p_().clamp_(min=math.log(beta)),
    )
    return torch.where(d > 0, towards, towards - d), torch.where(d > 0, towards + d, towards)
