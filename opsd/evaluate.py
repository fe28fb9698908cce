"""Exact-match accuracy with its uncertainty."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from opsd.models import autocast
from opsd.prompts import Example
from opsd.rollouts import Sampling, derive_seed, generate
from opsd.step import Run


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over `problems` with its 95 % Wilson interval `low`..`high`, all between 0 and 1.

    With several answers per problem `accuracy` is their average and the interval still counts problems, since answers
    to one problem are not independent: it is then on the wide side.
    """

    accuracy: float
    low: float
    high: float
    problems: int
    samples: int
    mean_length: float
    truncated: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, {self.problems} problems)"


def evaluate(
    run: Run, model: nn.Module, examples: Sequence[Example], context: Literal["student", "teacher"]
) -> Evaluation:
    """How often `model`, reading the prompts of `context`, reaches the answers, by the options of `eval`."""
    options = run.config.eval
    prompts = [getattr(example, context) for example in examples for _ in range(options.samples)]
    answers = [example.row.answer or "" for example in examples for _ in range(options.samples)]
    with autocast(run.config, run.device):
        rollouts = generate(
            model,
            prompts,
            Sampling(options.max_new_tokens or run.config.rollout.max_new_tokens, options.temperature),
            end_ids=run.end_ids,
            pad_id=run.pad_id,
            batch_size=options.batch_size,
            seeds=[derive_seed(run.config.run.seed, "eval", i) for i in range(len(prompts))],
        )
    texts = run.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
    right = [
        extract(text, options.answer_pattern) == answer.strip() for text, answer in zip(texts, answers, strict=True)
    ]
    accuracy = sum(right) / len(right)
    return Evaluation(
        accuracy,
        *wilson(accuracy, len(examples)),
        problems=len(examples),
        samples=options.samples,
        mean_length=sum(len(rollout.ids) for rollout in rollouts) / len(rollouts),
        truncated=sum(rollout.truncated for rollout in rollouts) / len(rollouts),
    )


def extract(text: str, pattern: str) -> str | None:
    """The one group of the last match of `pattern` in `text`, stripped, or None without a match."""
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a `share` of `n` trials; never empty, even at 0 and 1."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
