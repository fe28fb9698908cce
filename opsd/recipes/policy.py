"""Recipes of the sampled token whose weight comes from teachers: −w·log p_S(y) with w a constant.

l_c = log p_c(y) in context c, d = l_T − l_S. A positive weight raises p_S(y).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Stream
from opsd_kernels.streams import kl_at, mass_at

from .base import Losses, TokenRecipe, columns, count, fraction, kept, number, positive
from .batch import TokenBatch
from .weights import jsd_weight, qnorm, top_fraction


@dataclass(frozen=True, kw_only=True)
class SampledToken(TokenRecipe):
    """−w·log p_S(y). A subclass says what w is."""

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        logprob = self._logprob(student, batch)
        own = logprob.detach()
        weight, stats = self._weight(own, teachers, batch)
        return -weight.detach() * logprob, {"weight": weight, "student_logprob": own, **stats}

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        """(N,) w, and statistics; `own` is log p_S(y), a constant."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Lightning(SampledToken):
    """w = d with l_T computed once for fixed rollouts (`batch.teacher_logprobs`), by the teacher that wrote the data.

    arXiv 2604.13010.
    """

    paper, source = "2604.13010", "notes: the paper"
    contexts = ()
    needs = ("teacher_logprobs",)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = batch.teacher_logprobs
        assert teacher is not None
        return teacher - own, {"teacher_logprob": teacher}


@dataclass(frozen=True, kw_only=True)
class OPDPlus(SampledToken):
    """The weight whose expected gradient is that of D_β: e^d at β = 0, d − 1 at 1, (1−β)·ln((1−β) + β·e^d) between.

    arXiv 2606.01039. d is clamped to ±`limit`, our choice.
    """

    paper, source = "2606.01039", "notes: the paper; formula derived anew"
    beta: float = fraction(0.5)
    limit: float = positive(20.0)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._logprobs(teachers, batch)["teacher"]
        difference = (teacher - own).clamp(-self.limit, self.limit)
        return jsd_weight(difference, self.beta), {"teacher_logprob": teacher}


@dataclass(frozen=True, kw_only=True)
class CREDIT(SampledToken):
    """w = d + λ·(l_T − mean_b l_b), l_b under feedback on other, shuffled prompts ("shuffled_1", ...).

    arXiv 2605.11613. `coefficient` is λ, `shuffles` how many there are.
    """

    paper, source = "2605.11613", "secondary: the abstract, and an option of the same author's AntiSD code"
    coefficient: float = number(0.1)
    shuffles: int = count(1)

    @property
    def contexts(self) -> Any:
        return ("teacher", *(f"shuffled_{b}" for b in range(1, self.shuffles + 1)))

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        logprobs = self._logprobs(teachers, batch)
        teacher = logprobs.pop("teacher")
        other = sum(logprobs.values()) / self.shuffles
        return teacher - own + self.coefficient * (teacher - other), {"teacher_logprob": teacher}


@dataclass(frozen=True, kw_only=True)
class CoPD(SampledToken):
    """Co-evolving branches: w = b·d on rollouts of the other branch (`is_cross`), A on the branch's own.

    The teacher is the other branch on the same prompt. arXiv 2604.27083. `coefficient` b = 1 is our choice; the order
    of the two kinds of step and the merging are outside.
    """

    paper, source = "2604.27083", "secondary: a detailed note; coefficient not stated"
    needs = ("advantage", "is_cross")
    coefficient: float = number(1.0)

    def _weight(self, own: Tensor, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = self._logprobs(teachers, batch)["teacher"]
        assert batch.is_cross is not None
        assert batch.advantage is not None
        weight = (self.coefficient * (teacher - own)).where(batch.is_cross.bool(), batch.advantage.to(own.dtype))
        return weight, {"teacher_logprob": teacher}


@dataclass(frozen=True, kw_only=True)
class TAOPD(TokenRecipe):
    """w = d at the ⌈share·N⌉ tokens of the highest n(KL)·n(C); the others do not count, also in the mean ("mask").

    KL(T‖S) is over the union of both top-k lists, each renormalised, C the teacher's mass on the student's top k, n
    the clip to the 5 % and 95 % quantiles of this batch. A rollout without such a token keeps that of the highest
    1 − (1 − n(H))·(1 − n(KL·C)), H the student's entropy over its top k, in parts of ln k. arXiv 2605.26844. `share`
    is 0.05 in the paper and 0.10 in its launcher.
    """

    paper, source = "2605.26844", "primary: official code as in ckjsuperhh/taopd-baseline, tip_compat.py"
    batch_wide = True
    share: float = fraction(0.05)
    top_k: int = count(16)
    low_quantile: float = fraction(0.05)
    high_quantile: float = fraction(0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_quantile >= self.high_quantile:
            raise ValueError(f"low_quantile is {self.low_quantile!r}; accepted: below high_quantile")

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher, k = teachers["teacher"], min(self.top_k, columns(student))
        logprob = self._logprob(student, batch)
        found = self._statistics({"teacher": teacher, "student": student}, batch, k)
        own, theirs = logprob.detach(), found["teacher"]["logprob"]
        ids = [found[name]["top_k_ids"] for name in ("teacher", "student")]
        kl, mass = kl_at(teacher, student, torch.cat(ids, 1)), mass_at(teacher, ids[1], found["teacher"]["logsumexp"])
        entropy = found["student"]["top_k_entropy"] / math.log(max(k, 2))
        share, divergence, uncertain, product = (
            qnorm(values, self.low_quantile, self.high_quantile) for values in (mass, kl, entropy, kl * mass)
        )
        either = 1 - (1 - uncertain) * (1 - product)
        mask = top_fraction(divergence * share, self.share, batch.sequence_ids, fallback=either)
        stats = {"weight": theirs - own, "student_logprob": own, "teacher_logprob": theirs, "mask": mask}
        return kept(-(theirs - own) * logprob, mask), stats
