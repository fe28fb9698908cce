"""Rollouts whose sampler is not quite the student: how far the two are apart, and weights that make up for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Stream, token_logprobs

from .batch import TokenBatch


def sampler_mismatch(student_logprob: Tensor, batch: TokenBatch, temperature: float) -> dict[str, Tensor]:
    """The statistic of that name, |log p_student - log p_sampler| of each token, where it costs nothing: at the same
    temperature, and unless `importance_weights` has computed it."""
    if batch.token_weight is not None or batch.sampler_logprobs is None or temperature != batch.sampler_temperature:
        return {}
    return {"sampler_mismatch": (student_logprob - batch.sampler_logprobs).abs()}


@dataclass(frozen=True)
class Around:
    """A recipe made of another one, which says what it reads and what memory it takes."""

    recipe: Any

    @property
    def contexts(self) -> tuple[str, ...]:
        return self.recipe.contexts

    @property
    def workspace_bytes(self) -> int | None:
        return self.recipe.workspace_bytes

    @property
    def batch_wide(self) -> bool:
        return getattr(self.recipe, "batch_wide", False)


@dataclass(frozen=True)
class ImportanceWeighted(Around):
    """`recipe` with each token weighted by min(p_student / p_sampler, cap)."""

    cap: float

    @property
    def reduction(self) -> str:
        return self.recipe.reduction

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights, weighing = importance_weights(self.recipe, student, batch, self.cap)
        loss, stats = self.recipe.loss(student, teachers, replace(batch, token_weight=weights), denominator)
        return loss, stats | weighing


@torch.no_grad()
def importance_weights(recipe: Any, student: Stream, batch: TokenBatch, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """min(p_student / p_sampler, cap) for each token, a constant, and statistics of it.

    p_student is over the whole vocabulary at the sampler's temperature, by the weights and the arithmetic of the
    scoring pass. It costs one more product of the hidden states with the head, without a gradient.

    Returns:
        (N,), and (N,) each: `sampler_mismatch`, |log p_student - log p_sampler|, in which the cut-offs of rollouts
        (top_p, top_k, min_p) take part, since p_sampler is what they leave; `importance_capped`, whether the cap acts;
        `importance_weight`.
    """
    logprobs = token_logprobs(
        student.hidden,
        student.weight,
        batch.target_ids,
        **student.options() | {"temperature": batch.sampler_temperature},
        backend=recipe.backend,
        workspace_bytes=recipe.workspace_bytes,
    )
    gap = logprobs - batch.sampler_logprobs  # type: ignore[operator]
    ratio = gap.exp()
    weights = ratio.clamp(max=cap)
    return weights, {"sampler_mismatch": gap.abs(), "importance_capped": ratio > cap, "importance_weight": weights}
