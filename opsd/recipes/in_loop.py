"""The family in the training loop: recipes that ask for a rollout and for readings of it that the loop can give."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from opsd_kernels import Stream

from ..contexts import can_read
from .base import TokenRecipe
from .batch import TokenBatch, reduced
from .importance import Around, sampler_mismatch

SUPPLIED = (
    "sampler_logprobs", "advantage", "correct", "has_feedback", "confidence", "teacher_logprobs", "step", "progress",
)  # fmt: skip
"""Fields of a batch that the loop fills in, beside the tokens."""

_WARM_UP = "statistics of a warm-up; with the option plain it needs none"
_PAIRS = "rollouts of the teacher in pairs with the student's"
_SAMPLER = "the order in which the sampler of a diffusion model decodes"
OUTSIDE = {
    "discrepancy_std": _WARM_UP,
    "warmup_perplexity": _WARM_UP,
    "is_cross": "two branches that are trained side by side",
    "decoded": _SAMPLER,
    "near": _SAMPLER,
    "chunk_score": "scores of chunks by a teacher that gives text alone",
    "layers": "hidden states of inner layers, which a packed pass does not keep",
    "reference_logprobs": _PAIRS,
    "pair_ids": _PAIRS,
    "preferred": _PAIRS,
}
"""Why the loop does not fill in the others."""


def lacking(recipe: TokenRecipe) -> list[str]:
    """What `recipe` needs and the loop cannot give it; nothing where it can train with it."""
    contexts = [name for name in recipe.contexts if not can_read(name)]
    return [f"context {name!r}" for name in contexts] + [f"{name!r}" for name in recipe.needs if name not in SUPPLIED]


def why_lacking(recipe: TokenRecipe) -> str:
    """What it would take, in words; empty where the loop can train with it."""
    return "; ".join(dict.fromkeys(OUTSIDE[name] for name in recipe.needs if name in OUTSIDE))


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
        if "teacher_logprobs" in self.recipe.needs and batch.teacher_logprobs is None:  # of the teacher as it is now
            found = self.recipe._statistics({"teacher": tempered["teacher"]}, batch)["teacher"]["logprob"]
            batch = replace(batch, teacher_logprobs=found)
        losses, stats = self.recipe.token_loss(replace(student, temperature=self.temperature), tempered, batch)
        mismatch: dict[str, Tensor] = {}
        if "student_logprob" in stats:
            mismatch = sampler_mismatch(stats["student_logprob"], batch, self.temperature)
        if self.recipe.batch_wide and "mask" in stats:  # the mean is over what it keeps, and all tokens are here
            losses = losses * (losses.numel() / stats["mask"].sum().clamp(min=1))
        shown = {name: value for name, value in stats.items() if not name.endswith("logprob")}
        return reduced(losses, batch, self.reduction, denominator), shown | mismatch
