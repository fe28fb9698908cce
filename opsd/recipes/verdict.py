"""Recipes that learn from right and wrong rollouts side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opsd_kernels import Stream

from .base import Losses, TokenRecipe, fraction, positive
from .batch import TokenBatch
from .weights import Sequences, log1mexp


@dataclass(frozen=True, kw_only=True)
class PBSD(TokenRecipe):
    """Preference-based self-distillation: −ln σ(b·[(L₊ − L₊ʳᵉᶠ) − (L₋ − L₋ʳᵉᶠ)]) of each pair of rollouts.

    L is a rollout's log-probability, the sum over its tokens, under the prompt alone; the better one ("preferred") is
    sampled by the teacher, the other by the student. arXiv 2605.05040 (not 2606.09348, another PBSD). A pair's loss is
    spread evenly over its tokens: their sum is the sum over pairs. `coefficient` b = 0.1 is our choice.
    """

    paper, source = "2605.05040", "secondary: a check of the paper's text; coefficient not stated"
    contexts = ()
    needs = ("reference_logprobs", "pair_ids", "preferred")
    coefficient: float = positive(0.1)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        assert batch.preferred is not None
        assert batch.pair_ids is not None
        assert batch.reference_logprobs is not None
        preferred, pairs = batch.preferred.bool(), Sequences.of(batch.pair_ids)
        better = pairs.sum(preferred.long())
        if bool(((better == 0) | (better == pairs.lengths)).any()):
            raise ValueError("batch.pair_ids has a pair of one kind of rollout; accepted: a preferred and another one")
        logprob = self._logprob(student, batch)
        gain = logprob - batch.reference_logprobs
        margin = pairs.sum(torch.where(preferred, gain, -gain))
        losses = torch.nn.functional.softplus(-self.coefficient * margin)
        stats = {"student_logprob": logprob, "pair_loss": losses[pairs.row], "margin": margin[pairs.row]}
        return (losses / pairs.lengths)[pairs.row], stats


@dataclass(frozen=True, kw_only=True)
class SPEAR(TokenRecipe):
    """−log p_S(y) on right rollouts; on wrong ones c·(−ln(1 − p_S(y))) at their last tokens, c = sg p_S(y).

    arXiv 2605.07977. c and the tail, the last quarter of a rollout, are our choices.
    """

    paper, source = "2605.07977", "secondary: a summary; confidence weight and tail not stated"
    contexts = ()
    needs = ("correct",)
    tail: float = fraction(0.25)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        assert batch.correct is not None
        sequences = Sequences.of(batch.sequence_ids)
        logprob = self._logprob(student, batch)
        probability = logprob.detach().exp()
        tail = sequences.position >= (1 - self.tail) * sequences.length
        unlikelihood = torch.where(tail, -probability * log1mexp(logprob), 0.0)
        good = batch.correct.bool()
        return torch.where(good, -logprob, unlikelihood), {"student_logprob": logprob, "tail": tail & ~good}
