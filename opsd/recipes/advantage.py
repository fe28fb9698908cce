"""Recipes of the sampled token that redistribute, or schedule, the advantage A of the user's reward.

l_c = log p_c(y) in context c, d = l_T − l_S, s = sign(A), clip1(w, ε) = clip(w, 1 − ε, 1 + ε).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Stream

from .base import Losses, choice, count, flag, fraction, number, positive
from .batch import TokenBatch
from .policy import SampledToken
from .weights import Sequences, clip1, hysteresis, linear_decay, per_sequence_znorm, phi, window_min


@dataclass(frozen=True, kw_only=True)
class RLSD(SampledToken):
    """w = A·[(1 − λ) + λ·clip1(exp(s·d), ε)]: the teacher, which reads the answer, shares the advantage out.

    arXiv 2604.03128. `coefficient` is λ, `clip` ε; with `decay_steps` λ goes linearly to 0 in so many optimiser steps
    (`batch.step`).
    """

    paper, source = "2604.03128", "notes: the paper; form as in ms-swift's documentation"
    coefficient: float = fraction(0.5)
    clip: float = positive(0.2)
    decay_steps: int | None = count(None)

    @property
    def needs(self) -> Any:
        return ("advantage",) if self.decay_steps is None else ("advantage", "step")

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._logprobs(teachers, batch)["teacher"]
        return self._shared_out(teacher - own, batch), {"teacher_logprob": teacher}

    def _shared_out(self, difference: Tensor, batch: TokenBatch) -> Tensor:
        advantage, share = batch.advantage, torch.as_tensor(self.coefficient)
        assert advantage is not None
        if self.decay_steps is not None:
            assert batch.step is not None
            share = linear_decay(self.coefficient, batch.step, self.decay_steps)
        share = share.to(difference)
        return advantage * ((1 - share) + share * clip1((advantage.sign() * difference).exp(), self.clip))


@dataclass(frozen=True, kw_only=True)
class CEPO(RLSD):
    """RLSD with d = l₊ − l₋: "positive" reads a right answer, "negative" a wrong one, of a rejected rollout.

    arXiv 2605.19436. λ goes from 0.5 to 0 in 25 steps.
    """

    paper, source = "2605.19436", "notes: the paper, details secondary"
    contexts = ("positive", "negative")
    decay_steps: int | None = count(25, none=True)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        logprobs = self._logprobs(teachers, batch)
        weight = self._shared_out(logprobs["positive"] - logprobs["negative"], batch)
        return weight, {f"{name}_logprob": value for name, value in logprobs.items()}


@dataclass(frozen=True, kw_only=True)
class RLRT(RLSD):
    """RLSD with the difference reversed, l_S − l_T, on right rollouts; w = A on the others.

    The teacher reads another right rollout of the model itself. arXiv 2605.10781. ε = 1 is of the only launcher
    found, one without the gate on the reward.
    """

    paper, source = "2605.10781", "secondary: two notes, and a launcher in an AntiSD tree"
    clip: float = positive(1.0)

    @property
    def needs(self) -> Any:
        return (*super().needs, "correct")

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._logprobs(teachers, batch)["teacher"]
        assert batch.advantage is not None
        assert batch.correct is not None
        weight = self._shared_out(own - teacher, batch).where(batch.correct.bool(), batch.advantage.to(own.dtype))
        return weight, {"teacher_logprob": teacher}


@dataclass(frozen=True, kw_only=True)
class EGRSD(SampledToken):
    """w = A·clip1(exp(s·d), ε)·clip(1 − a·H_T/max H_T, floor, 1): less where the teacher is unsure.

    arXiv 2605.13255. The maximum is over this batch. `coefficient` is a, `clip` ε; at the defaults the floor cannot
    act, since 1 − 0.3 is above 0.1.
    """

    paper, source = "2605.13255", "notes: the paper; coefficient to be checked"
    needs = ("advantage",)
    batch_wide = True
    coefficient: float = number(0.3)
    clip: float = positive(0.2)
    floor: float = fraction(0.1)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._statistics({"teacher": teachers["teacher"]}, batch)["teacher"]
        advantage, difference = batch.advantage, teacher["logprob"] - own
        assert advantage is not None
        entropy = self._entropy(teacher["entropy"], batch)
        if len(entropy):
            entropy = entropy / entropy.max().clamp(min=torch.finfo(entropy.dtype).tiny)
        confidence = (1 - self.coefficient * entropy).clamp(self.floor, 1)
        weight = advantage * clip1((advantage.sign() * difference).exp(), self.clip) * confidence
        return weight, {"teacher_logprob": teacher["logprob"], "teacher_entropy": teacher["entropy"]}

    def _entropy(self, entropy: Tensor, batch: TokenBatch) -> Tensor:
        return entropy


@dataclass(frozen=True, kw_only=True)
class CLEGRSD(EGRSD):
    """EGRSD of the least teacher entropy among the token and the `window` − 1 after it. `window` = 8 is our choice."""

    source = "notes: the paper; window not stated, coefficient to be checked"
    window: int = count(8)

    def _entropy(self, entropy: Tensor, batch: TokenBatch) -> Tensor:
        return window_min(entropy, self.window, batch.sequence_ids)


@dataclass(frozen=True, kw_only=True)
class AntiSD(SampledToken):
    """w = A + λ_i·clip(z(−φ(clip(d))), ±5), φ(d) = ½·(softplus(d) − ln 2): ascends the JSD at 0.5.

    d is clipped to ±min(5, 2·σ) with σ = `batch.discrepancy_std`; z is to zero mean and unit variance within the
    rollout i. With the teacher's perplexity P_i of the rollout and its median M in the warm-up
    (`batch.warmup_perplexity`), λ_i = clip(0.1·2·ln(P_i/(0.93·M)), 0, 0.5), and 0 where P_i > 3. Infinite M in the
    warm-up itself makes λ 0. arXiv 2605.11609.

    `scope="batch"` takes the median of P over the batch's rollouts and a gate with hysteresis for all: shut under
    0.93·M, open above 1.07·M. It starts at `batch.gate_open` (None: open); the statistic of that name goes into the
    next step's batch. `plain`: w = A − λ·φ(d), λ = `coefficient`, without any of the clips and norms.
    """

    paper, source = "2605.11609", "primary: launcher, config and kernel of an AntiSD release (possibly a fork)"
    coefficient: float = number(0.1)
    slope: float = positive(2.0)
    largest: float = positive(0.5)
    target: float = positive(0.93)
    rearm: float = positive(1.07)
    highest_perplexity: float = positive(3.0)
    limit: float = positive(5.0)
    deviations: float = positive(2.0)
    scope: str = choice("sequence", "batch")
    plain: bool = flag(False)

    @property
    def needs(self) -> Any:
        return ("advantage",) if self.plain else ("advantage", "discrepancy_std", "warmup_perplexity")

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._logprobs(teachers, batch)["teacher"]
        stats, difference, advantage = {"teacher_logprob": teacher}, teacher - own, batch.advantage
        assert advantage is not None
        if self.plain:
            return advantage - self.coefficient * phi(difference), stats
        std = torch.as_tensor(batch.discrepancy_std, dtype=own.dtype, device=own.device)
        limit = (self.deviations * std).clamp(max=self.limit)
        shaped = -phi(difference.clamp(-limit, limit))
        shaped = per_sequence_znorm(shaped, batch.sequence_ids).clamp(-self.limit, self.limit)
        strength, state = self._strength(teacher, batch)
        return advantage + strength * shaped, stats | state

    def _strength(self, teacher: Tensor, batch: TokenBatch) -> Losses:
        """λ of each token's rollout."""
        sequences = Sequences.of(batch.sequence_ids)
        each = (-sequences.sum(teacher) / sequences.lengths).exp()  # (S,)
        perplexity = each[sequences.row]
        if self.scope == "batch" and len(each):
            perplexity = each.median().expand_as(teacher)
        median = torch.as_tensor(batch.warmup_perplexity, dtype=teacher.dtype, device=teacher.device)
        strength = self.coefficient * self.slope * (perplexity / (self.target * median)).log()
        strength = strength.clamp(0, self.largest).where(perplexity <= self.highest_perplexity, 0.0)
        if self.scope == "sequence":
            return strength, {"strength": strength}
        was = torch.as_tensor(True if batch.gate_open is None else batch.gate_open).to(teacher.device, torch.bool)
        gate = hysteresis(was, perplexity, self.target * median, self.rearm * median)
        return strength.where(gate, 0.0), {"strength": strength, "gate_open": gate}


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(SampledToken):
    """−A·log p_S(y), or with `ratio` −A·r, r = p_S(y)/p_sampler(y), for rollouts of another policy.

    With `clip_low` or `clip_high` PPO's surrogate, −min(A·r, A·clip(r, 1 − low, 1 + high)).
    """

    contexts = ()
    ratio: bool = flag(False)
    clip_low: float | None = positive(None)
    clip_high: float | None = positive(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None and not self.ratio:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: None without ratio")

    @property
    def needs(self) -> Any:
        return ("advantage", "sampler_logprobs") if self.ratio else ("advantage",)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        assert batch.advantage is not None
        return batch.advantage, {}

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        if not self.ratio:
            return super()._losses(student, teachers, batch)
        logprob = self._logprob(student, batch)
        weight, stats = self._weight(logprob.detach(), teachers, batch)
        assert batch.sampler_logprobs is not None
        ratio = (logprob - batch.sampler_logprobs).exp()
        losses = -weight * ratio
        if self.clip_low is not None or self.clip_high is not None:
            low = 0.0 if self.clip_low is None else 1 - self.clip_low
            high = torch.inf if self.clip_high is None else 1 + self.clip_high
            losses = torch.maximum(losses, -weight * ratio.clamp(low, high))
        return losses, {"weight": weight, "student_logprob": logprob, "ratio": ratio, **stats}


@dataclass(frozen=True, kw_only=True)
class NPO(PolicyGradient):
    """GRPO whose groups hold verified rollouts of a later checkpoint, with the ratio to the policy that wrote them.

    arXiv 2604.20733. The mixing is the caller's.
    """

    paper, source = "2604.20733", "secondary: a summary"
    ratio: bool = flag(True)


@dataclass(frozen=True, kw_only=True)
class ZPPO(PolicyGradient):
    """The token part: a policy gradient of A; prompts and replay are outside. No arXiv id was found."""

    source = "unsettled: formula and id of the paper not found, the form is our choice"


@dataclass(frozen=True, kw_only=True)
class ActGuide(PolicyGradient):
    """The token part: a policy gradient of A, with `ratio` for mixed policies; the guidance is outside.

    arXiv 2605.12004.
    """

    paper, source = "2605.12004", "unsettled: formula not found, the form is our choice"


@dataclass(frozen=True, kw_only=True)
class OmniOPD(SampledToken):
    """w = a chunk's score, by a teacher that gives text alone, at each of the chunk's tokens.

    arXiv 2606.01476. `centre` takes the batch's mean off. Where chunks begin (peaks of the student's entropy) is the
    caller's.
    """

    paper, source = "2606.01476", "secondary: title from the paper, formula from a summary"
    contexts = ()
    needs = ("chunk_score",)
    centre: bool = flag(False)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        score = batch.chunk_score
        assert score is not None
        score = score.to(own.dtype)
        return score - score.mean() if self.centre else score, {}


@dataclass(frozen=True, kw_only=True)
class Temporal(SampledToken):
    """w = A·m, m = 1 at the positions that the training has reached: a share of each rollout that grows to all of it.

    With x = clip(progress/`end`, 0, 1) the share is start + (1 − start)·f(x), f linear, x^gamma, or a logistic curve
    scaled to [0, 1]. Position i of n counts where its percentile (i + ½)/n, from the end if `first="late"`, is below
    it. arXiv 2605.25381. The form is ours, after the examples of the repository: its text has the signal move from
    later to earlier positions.
    """

    paper, source = "2605.25381", "primary: README of Jinghaoleven/RLVR-Schedule alone; order and form not stated"
    contexts = ()
    needs = ("advantage", "progress")
    start: float = fraction(0.1)
    end: float = positive(0.8)
    curve: str = choice("linear", "sigmoid", "gamma")
    gamma: float = positive(2.0)
    first: str = choice("late", "early")

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        sequences = Sequences.of(batch.sequence_ids)
        percentile = (sequences.position + 0.5) / sequences.length
        if self.first == "late":
            percentile = 1 - percentile
        x = (torch.as_tensor(batch.progress).to(own) / self.end).clamp(0, 1)
        if self.curve == "sigmoid":
            low, high = torch.sigmoid(x.new_tensor([-6.0, 6.0]))
            x = (torch.sigmoid(12 * x - 6) - low) / (high - low)
        elif self.curve == "gamma":
            x = x**self.gamma
        reached = percentile < self.start + (1 - self.start) * x
        assert batch.advantage is not None
        return batch.advantage.to(own.dtype).where(reached, 0.0), {"reached": reached}
