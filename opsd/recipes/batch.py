"""What a recipe gets: hidden states in each context, and the tokens that they predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opsd_kernels import Stream


@dataclass(frozen=True)
class TokenBatch:
    """N sampled tokens, rollout after rollout, and what recipes need to know of them.

    All are constants. The log-probabilities are natural logarithms at the temperature of the streams.
    """

    target_ids: Tensor  #: (N,) int64
    sequence_ids: Tensor  #: (N,) int64, the number of the rollout that each belongs to
    advantage: Tensor | None = None  #: (N,), of the user's reward, a rollout's at each of its tokens
    correct: Tensor | None = None  #: (N,) bool or 0 and 1: the token's rollout is right
    sampler_logprobs: Tensor | None = None  #: (N,), log-probabilities under what they were sampled from
    reference_logprobs: Tensor | None = None  #: (N,), under a frozen reference model
    sampler_temperature: float = 1.0
    token_weight: Tensor | None = None  #: (N,), what the caller multiplies the tokens' losses by; no recipe applies it
    has_feedback: Tensor | None = None  #: (N,) bool or 0 and 1: the teacher had feedback to read on the rollout
    old_logprobs: Tensor | None = None  #: (N,), under the weights at sampling, by the scoring pass; not the sampler's
    teacher_logprobs: Tensor | None = None  #: (N,), under the teacher, computed once and kept
    confidence: Tensor | None = None  #: (N, teachers), 0 to 100; -inf: that teacher is missing there
    chunk_score: Tensor | None = None  #: (N,), a chunk's score at each of its tokens
    is_cross: Tensor | None = None  #: (N,) bool: the rollout is the other branch's
    preferred: Tensor | None = None  #: (N,) bool: the token is of the better rollout of its pair
    pair_ids: Tensor | None = None  #: (N,) int64, the number of the pair that its rollout belongs to
    decoded: Tensor | None = None  #: (N,) bool or 0 and 1: decoded at this step of the diffusion sampler
    near: Tensor | None = None  #: (N,), 0 to 1: how soon the position is decoded
    layers: Sequence[tuple[Tensor, Tensor, float]] | None = None  #: pairs of (N, d), student's and teacher's; a weight
    progress: float | Tensor | None = None  #: 0 to 1, how much of the training is done
    step: int | Tensor | None = None  #: the optimiser's step, from 0
    discrepancy_std: float | Tensor | None = None  #: standard deviation of log p_T − log p_S in the warm-up; inf in it
    warmup_perplexity: float | Tensor | None = None  #: median of the teacher's perplexity in the warm-up; inf in it
    gate_open: bool | Tensor | None = None  #: whether AntiSD's gate was open after the last step


@dataclass(frozen=True)
class TopK:
    """A constant context of which the likeliest tokens alone are known, in place of a `Stream`."""

    ids: Tensor  #: (N, k) int64, no id twice in a row
    logprobs: Tensor  #: (N, k), over the whole vocabulary at the temperature of the loss


def reduced(losses: Tensor, batch: TokenBatch, reduction: str, denominator: int) -> Tensor:
    """The share of a step's loss, 0-d, of (N,) losses, with `batch.token_weight`; as `Recipe.loss` says."""
    if batch.token_weight is not None:
        losses = losses * batch.token_weight
    if reduction == "sequence_mean":
        losses = losses / torch.bincount(batch.sequence_ids)[batch.sequence_ids]
    return losses.sum() / denominator


class Recipe(Protocol):
    """What is minimised: a loss of the student's rows beside constant rows of other contexts."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """The names of the constant streams that it needs."""

    @property
    def reduction(self) -> str:
        """Over what the loss is a mean: "mean" for tokens, "sequence_mean" for rollouts of their tokens' means."""

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these tokens contribute to the loss of a step, 0-d with a gradient to `student.hidden` and the head, and
        statistics, (N,) each, whose means over the step's tokens are reported.

        Called for one micro-batch after another. `denominator` is the step's number of tokens (for "sequence_mean" of
        rollouts), so that the parts add up. Token weights do not change it: a token counts one, whatever it weighs.
        """
