"""Recipes that minimise a divergence to one teacher over the vocabulary, token weights included."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from opsd_kernels import Stream, TokenStats

from .base import (
    Losses,
    TokenRecipe,
    choice,
    columns,
    count,
    described,
    flag,
    fraction,
    kept,
    number,
    positive,
    token_ids,
)
from .batch import TokenBatch
from .weights import in_ids, ratio_clip, suffix_sum


@dataclass(frozen=True, kw_only=True)
class Divergence(TokenRecipe):
    """D_β(p_T, p_S) of each token: KL(T‖S) at β = 0, KL(S‖T) at 1, the generalised JSD between.

    `entry_clip` bounds each vocabulary entry's term and `token_clip` each token's sum, in nats. `top_k` compares the
    k likeliest entries of the teacher or the student (`top_k_from`), renormalised or with one entry for the rest
    (`tail_bucket`); of a smaller vocabulary, all.
    """

    beta: float = fraction(0.5)
    entry_clip: float | None = positive(None)
    token_clip: float | None = positive(None)
    top_k: int | None = count(None)
    top_k_from: str = choice("teacher", "student")
    tail_bucket: bool = flag(False)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._to(student, teachers["teacher"], batch)
        return losses, described(stats)

    def _to(self, student: Stream, teacher: Stream, batch: TokenBatch) -> tuple[Tensor, TokenStats]:
        return self._divergence(
            student,
            teacher,
            batch,
            beta=self.beta,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
            top_k=self.top_k,
            top_k_from=self.top_k_from,
            tail_bucket=self.tail_bucket,
        )


@dataclass(frozen=True, kw_only=True)
class OPSD(Divergence):
    """On-policy self-distillation: the teacher also reads the reference solution; entry clip 0.05 (0.06 at 8 B).

    arXiv 2601.18734. The paper's own runs take beta 0; the family's default, 0.5, is the safer one.
    """

    paper, source = "2601.18734", "primary: official code siyan-zhao/OPSD, opsd_trainer.py"
    entry_clip: float | None = positive(0.05, none=True)


@dataclass(frozen=True, kw_only=True)
class GKD(Divergence):
    """Generalised knowledge distillation: another model is the teacher and reads the same prompt.

    arXiv 2306.13649. Which share of the batches is on-policy (0.5) is the caller's, the temperature (0.9 in TRL) the
    streams'.
    """

    paper, source = "2306.13649", "notes: the paper and TRL's trainer"


@dataclass(frozen=True, kw_only=True)
class SDFT(Divergence):
    """Self-distillation fine-tuning: reverse KL to a moving average of the student that reads a demonstration.

    arXiv 2601.19897. The top-k tail and the ratio cap of SDPO are not shown for it and are not used.
    """

    paper, source = "2601.19897", "secondary: surveys"
    beta: float = fraction(1.0)


@dataclass(frozen=True, kw_only=True)
class RGSD(Divergence):
    """Rubric-guided self-distillation: the teacher reads the rubric; JSD at 0.5 with an entry clip.

    arXiv 2606.12507.
    """

    paper, source = "2606.12507", "notes: the paper"
    entry_clip: float | None = positive(0.05, none=True)


@dataclass(frozen=True, kw_only=True)
class VPD(Divergence):
    """Variational policy distillation, the M-step: reverse KL to a teacher that reads feedback.

    arXiv 2605.15113. The E-step, which trains the teacher, is outside.
    """

    paper, source = "2605.15113", "notes: the paper"
    beta: float = fraction(1.0)


@dataclass(frozen=True, kw_only=True)
class PiPlay(Divergence):
    """π-Play: reverse KL to a moving average (0.05) that reads how the question was constructed.

    arXiv 2604.14054. The examiner's loop is outside.
    """

    paper, source = "2604.14054", "secondary: surveys"
    beta: float = fraction(1.0)


@dataclass(frozen=True, kw_only=True)
class DOPSD(Divergence):
    """d-OPSD for masked diffusion models: the divergence at the positions decoded at this step, others 0.

    The teacher reads the self-generated answer as a suffix. No arXiv id was found; beta 0.5 is our choice. The caller
    gathers the rows, and the sampler is outside.
    """

    source = "notes: the paper; beta not stated"
    needs = ("decoded",)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._to(student, teachers["teacher"], batch)
        mask = batch.decoded.bool()  # type: ignore[union-attr]
        return kept(losses, mask), described(stats) | {"mask": mask}


@dataclass(frozen=True, kw_only=True)
class SDPO(Divergence):
    """Self-distillation policy optimisation: D_β over the student's top 100 and a tail, times
    min(p_S(y)/p_old(y), cap), where the rollout has feedback.

    arXiv 2601.20802. `batch.sampler_logprobs` is p_old; if `batch.old_logprobs` is given too, that is p_old and
    min(p_old/p_sampler, cap) is one more factor, the official rollout correction. The tail is the log-sum of the
    rest, the official one 1 − sum.
    """

    paper, source = "2601.20802", "primary: official code lasgroup/SDPO, core_algos.py, actor.yaml, sdpo.yaml"
    needs = ("sampler_logprobs", "has_feedback")
    top_k: int | None = count(100, none=True)
    top_k_from: str = choice("student", "teacher")
    tail_bucket: bool = flag(True)
    ratio_cap: float = positive(2.0)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._to(student, teachers["teacher"], batch)
        sampler, old = batch.sampler_logprobs, batch.old_logprobs
        assert stats.student_logprob is not None
        assert sampler is not None
        weight = ratio_clip(stats.student_logprob - (sampler if old is None else old), self.ratio_cap)
        if old is not None:
            weight = weight * ratio_clip(old - sampler, self.ratio_cap)
        mask = batch.has_feedback.bool()  # type: ignore[union-attr]
        return kept(losses * weight, mask), described(stats) | {"weight": weight, "mask": mask}


@dataclass(frozen=True, kw_only=True)
class Rock(Divergence):
    """Reverse KL, but 0 at tokens of a set: KL(S‖T)·(1 − 1[y ∈ ids]).

    arXiv 2605.09253. The paper's set is the 100 ids of the highest frequency times mean KL.
    """

    paper, source = "2605.09253", "notes: the paper"
    beta: float = fraction(1.0)
    ids: tuple[int, ...] = token_ids(())

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._to(student, teachers["teacher"], batch)
        weight = ~in_ids(batch.target_ids, self.ids)
        return kept(losses, weight), described(stats) | {"weight": weight}


@dataclass(frozen=True, kw_only=True)
class MSD(Divergence):
    """Multilingual self-distillation: KL(S‖T)·w_T·w_S with w_S = 1 − p_S(y) and, of the teacher's K likeliest tokens
    renormalised, w_T = 1 − H_K/ln K.

    arXiv 2605.02971. That confident teachers weigh more is how the author's page has it; `teacher_weight="entropy"`
    is the other direction, w_T = H_K/ln K. K = 20 is our choice.
    """

    paper, source = "2605.02971", "secondary: three surveys and the author's page; direction of w_T not settled"
    beta: float = fraction(1.0)
    entropy_top_k: int = count(20)
    teacher_weight: str = choice("confidence", "entropy")

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        teacher = teachers["teacher"]
        losses, stats = self._to(student, teacher, batch)
        k = min(self.entropy_top_k, columns(teacher))
        share = self._statistics({"teacher": teacher}, batch, k)["teacher"]["top_k_entropy"] / math.log(max(k, 2))
        assert stats.student_logprob is not None
        weight = (share if self.teacher_weight == "entropy" else 1 - share) * -stats.student_logprob.expm1()
        return losses * weight, described(stats) | {"weight": weight}


@dataclass(frozen=True, kw_only=True)
class DistIL(TokenRecipe):
    """Distillation as imitation: CE_t + c·sg(Σ_{i>t} CE_i)·log p_S(y_t), CE the teacher's cross-entropy.

    arXiv 2606.05152. In expectation the gradient of the rollout's expected sum of CE: later tokens' costs are a
    policy gradient on earlier ones. `coefficient` c, 0: only CE, whose gradient is forward KL's. `top_k` is the
    paper's ablation.
    """

    paper, source = "2606.05152", "primary: the authors' project page, rishabh-1086/project-distIL"
    coefficient: float = number(1.0)
    top_k: int | None = count(None)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._divergence(student, teachers["teacher"], batch, beta=0.0, value="ce", top_k=self.top_k)
        if not self.coefficient:
            return losses, described(stats)
        weight = -self.coefficient * suffix_sum(losses.detach(), batch.sequence_ids, strict=True)
        return losses - weight * self._logprob(student, batch), described(stats) | {"weight": weight}


@dataclass(frozen=True, kw_only=True)
class TAD(TokenRecipe):
    """Time-aware distillation of diffusion models: near·(−log p_S(y)) + far·KL(T‖S), far = 1 − near.

    `near` says how soon a position is decoded. No arXiv id was found. The caller gathers the rows, and the sampler is
    outside.
    """

    source = "secondary: id of the paper not found"
    needs = ("near",)
    near_coefficient: float = number(1.0)
    far_coefficient: float = number(1.0)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        far, stats = self._divergence(student, teachers["teacher"], batch, beta=0.0)
        near = batch.near
        assert near is not None
        losses = -self.near_coefficient * near * self._logprob(student, batch)
        losses = losses + kept(self.far_coefficient * (1 - near) * far, near < 1)
        return losses, described(stats) | {"weight": near}
