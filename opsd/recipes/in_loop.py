"""The family in the training loop: the recipes that ask for no more than a rollout and the teacher's reading of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import Stream as RowsAndHead

from .base import TokenRecipe
from .batch import Stream, TokenBatch
from .importance import sampler_mismatch

SUPPLIED = ("sampler_logprobs",)
"""Fields of a batch that the loop fills in, beside the tokens."""


def lacking(recipe: TokenRecipe) -> list[str]:
    """What `recipe` needs and the loop cannot give it; nothing where it can train with it."""
    contexts = [name for name in recipe.contexts if name != "teacher"]
    found = [f"context {name!r}" for name in contexts] + [f"{name!r}" for name in recipe.needs if name not in SUPPLIED]
    return found + ["all rollouts of a step in one call"] * recipe.batch_wide


@dataclass(frozen=True)
class InLoop:
    """`recipe` as the loop wants it: reduced over the step."""

    recipe: TokenRecipe
    temperature: float
    reduction: str = "mean"

    @property
    def contexts(self) -> tuple[str, ...]:
        return self.recipe.contexts

    @property
    def backend(self) -> str:
        return self.recipe.backend

    @property
    def workspace_bytes(self) -> int | None:
        return self.recipe.workspace_bytes

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: self._rows(teachers[name]) for name in self.recipe.contexts}
        losses, stats = self.recipe.token_loss(self._rows(student), given, batch)
        if batch.token_weight is not None:
            losses = losses * batch.token_weight
        if self.reduction == "sequence_mean":
            losses = losses / torch.bincount(batch.sequence_ids)[batch.sequence_ids]
        mismatch: dict[str, Tensor] = {}
        if "student_logprob" in stats:
            mismatch = sampler_mismatch(stats["student_logprob"], batch, self.temperature)
        shown = {name: value for name, value in stats.items() if not name.endswith("logprob")}
        return losses.sum() / denominator, shown | mismatch

    def _rows(self, stream: Stream) -> RowsAndHead:
        return RowsAndHead(stream.hidden, stream.head.weight, **stream.head.options(), temperature=self.temperature)
