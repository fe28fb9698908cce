"""What a recipe gets: hidden states in each context, and the tokens that they predict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opsd_kernels import Head


@dataclass(frozen=True)
class Stream:
    """One context's rows, which predict the batch's tokens, and the head that makes logits of them."""

    hidden: Tensor  #: (N, H)
    head: Head


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """N sampled tokens, rollout after rollout."""

    target_ids: Tensor  #: (N,) int64
    sequence_ids: Tensor  #: (N,) int64, the number of the rollout that each belongs to
    sampler_logprobs: Tensor | None = None  #: (N,), log-probabilities under what they were sampled from
    sampler_temperature: float = 1.0
    token_weight: Tensor | None = None  #: (N,), constants that multiply the tokens' losses


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
