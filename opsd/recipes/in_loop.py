"""The family in the training loop: recipes that ask for a rollout and for readings of it that the loop can give."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from opsd_kernels import Stream

from ..contexts import CONTEXTS
from .base import TokenRecipe
from .batch import TokenBatch, reduced
from .importance import Around, sampler_mismatch

SUPPLIED = ("sampler_logprobs", "advantage", "correct", "has_feedback", "step", "progress")
"""Fields of a batch that the loop fills in, beside the tokens."""

READ = ("teacher", *CONTEXTS)
"""Contexts that the loop can have read."""


def lacking(recipe: TokenRecipe) -> list[str]:
    """What `recipe` needs and the loop cannot give it; nothing where it can train with it."""
    contexts = [name for name in recipe.contexts if name not in READ]
    return [f"context {name!r}" for name in contexts] + [f"{name!r}" for name in recipe.needs if name not in SUPPLIED]


@dataclass(frozen=True)
class InLoop(Around):
    """The token recipe `recipe` as the loop wants it: reduced over the step."""

    temperature: float
    reduction: str = "mean"

    @property
    def backend(self) -> str:
        return self.recipe.backend

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tempered = {name: replace(stream, temperature=self.temperature) for name, stream in teachers.items()}
        losses, stats = self.recipe.token_loss(replace(student, temperature=self.temperature), tempered, batch)
        mismatch: dict[str, Tensor] = {}
        if "student_logprob" in stats:
            mismatch = sampler_mismatch(stats["student_logprob"], batch, self.temperature)
        if self.recipe.batch_wide and "mask" in stats:  # the mean is over what it keeps, and all tokens are here
            losses = losses * (losses.numel() / stats["mask"].sum().clamp(min=1))
        shown = {name: value for name, value in stats.items() if not name.endswith("logprob")}
        return reduced(losses, batch, self.reduction, denominator), shown | mismatch
