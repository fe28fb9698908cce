"""What the user's reward says of rollouts, for the recipes that ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from opsd.errors import Undecided
from opsd.prompts import Example
from opsd.rollouts import Rollout
from opsd.run import Run

REWARDED = {"advantage", "correct"}
"""Fields of a batch that are made of rewards."""

RIGHT = 0.5
"""A rollout with this reward or more is right."""


@dataclass(frozen=True)
class Rewards:
    """One value for each rollout."""

    rewards: list[float]
    advantage: list[float]

    @property
    def correct(self) -> list[bool]:
        return [reward >= RIGHT for reward in self.rewards]


def rewarded(run: Run, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> Rewards | None:
    """The rewards of a step's rollouts, `rollout.per_prompt` for each example; None where the recipe needs none.

    A text that the scorer cannot judge has the reward 0. Raises ScorerError: the user's function failed.
    """
    if run.reward is None:
        return None
    each, found = run.config.rollout.per_prompt, []
    texts = run.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
    for i, text in enumerate(texts):
        try:
            found.append(float(run.reward(text, examples[i // each].row)))
        except Undecided:
            found.append(0.0)
    return Rewards(found, advantages(found, each, run.config.objective.advantage))


def advantages(rewards: Sequence[float], group: int, kind: str) -> list[float]:
    """Of each rollout: "raw", the reward; "centred", less the mean of its prompt's `group` rollouts; "normalised", that
    over their standard deviation, 0 where all have the same reward (GRPO, arXiv 2402.03300)."""
    if kind == "raw":
        return list(rewards)
    found: list[float] = []
    for start in range(0, len(rewards), group):
        own = rewards[start : start + group]
        mean, spread = fmean(own), pstdev(own) if kind == "normalised" else 1.0
        found += [(reward - mean) / spread if spread else 0.0 for reward in own]
    return found
