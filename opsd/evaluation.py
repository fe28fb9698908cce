"""How often a model is right, and how sure that is: avg@k and pass@k with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from opsd.errors import DataError, Undecided
from opsd.options import EvalConfig
from opsd.prompts import Example
from opsd.rollouts import Sampling, derive_seed
from opsd.run import Engine
from opsd.scorers import Scorer

Context = Literal["student", "teacher"]
"""Whose prompts are answered."""


@dataclass(frozen=True)
class Answer:
    """One answer and its score. `length` counts its tokens; `truncated`: it never came to an end token; `undecided`:
    why the scorer could not judge it, which makes the score 0."""

    source: str
    problem: str
    answer: str
    text: str
    score: float
    length: int
    truncated: bool
    undecided: str | None = None


@dataclass(frozen=True)
class PassAt:
    """pass@k, the share of problems with a right one among `k` answers, with its 95 % interval `low`..`high`."""

    k: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `samples` answers to each of `problems` problems say of a model.

    `accuracy` is the average score (avg@k with k = `samples`) and `low`..`high` its 95 % interval, see `interval`; all
    are between 0 and 1. `mean_length` is in tokens, `truncated` the share of answers without an end. `pass_at` has k =
    1, 2, 4, ... and `samples`; it counts answers with the score 1. `undecided` answers could not be judged.
    """

    accuracy: float
    low: float
    high: float
    problems: int
    samples: int
    mean_length: float
    truncated: float
    pass_at: tuple[PassAt, ...] = ()
    undecided: int = 0

    def check(self) -> None:
        """Raises TypeError or ValueError, which names the field, if the numbers are not what they are to be."""
        for name in ("accuracy", "low", "high", "mean_length", "truncated"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise TypeError(f"Evaluation.{name} is {value!r}; accepted: a finite float")
        for name in ("problems", "samples", "undecided"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"Evaluation.{name} is {getattr(self, name)!r}; accepted: an int")
        if not isinstance(self.pass_at, tuple) or not all(isinstance(passed, PassAt) for passed in self.pass_at):
            raise TypeError(f"Evaluation.pass_at is {self.pass_at!r}; accepted: a tuple of opsd.evaluation.PassAt")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Evaluation:
        """Back from what `dataclasses.asdict` or JSON made of it, among other things."""
        known = {field.name: record[field.name] for field in fields(cls)}
        return cls(**{**known, "pass_at": tuple(PassAt(**passed) for passed in record["pass_at"])})

    def __str__(self) -> str:
        text = f"{self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, {self.problems} problems"
        if self.samples > 1:
            text += f" of {self.samples} answers"
        text += ")"
        if self.samples > 1 and self.pass_at:
            text += f", pass@{self.pass_at[-1].k} {self.pass_at[-1].value:.1%}"
        return text + (f", {self.undecided} answers could not be judged" if self.undecided else "")


@dataclass(frozen=True)
class Evaluator:
    """Has a model answer problems, by the options of `eval`, and counts how often it is right."""

    samples: int  #: answers to each problem
    sampling: Sampling
    batch_size: int
    seed: int
    tokenizer: Any
    engine: Engine
    scorer: Scorer

    @classmethod
    def of(
        cls, options: EvalConfig, max_new_tokens: int, seed: int, tokenizer: Any, engine: Engine, scorer: Scorer
    ) -> Evaluator:
        """By `options`; answers are as long as rollouts, `max_new_tokens`, where these say nothing of it."""
        sampling = Sampling.by_options(options, options.max_new_tokens or max_new_tokens)
        return cls(options.samples, sampling, options.batch_size, seed, tokenizer, engine, scorer)

    def __call__(self, run: object, model: nn.Module, examples: Sequence[Example], context: Context) -> Evaluation:
        """How often `model`, reading the prompts of `context`, is right, whatever the run. Errors are those of
        `answers`."""
        return summarise(self.answers(model, examples, context), self.samples)

    def answers(self, model: nn.Module, examples: Sequence[Example], context: Context) -> list[Answer]:
        """`eval.samples` answers of `model` to each of `examples`, those to one problem next to each other.

        Raises:
            DataError: an example lacks the prompt of `context` or the answer.
            ScorerError: the user's scorer failed, or gave something else than a score.
        """
        check_examples(examples, context)
        repeated = [example for example in examples for _ in range(self.samples)]
        prompts = [getattr(example, context) for example in repeated]
        seeds = [derive_seed(self.seed, "eval", i) for i in range(len(prompts))]
        rollouts = self.engine.write(model, prompts, self.sampling, seeds, self.batch_size)
        texts = self.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
        found = []
        for example, rollout, text in zip(repeated, rollouts, texts, strict=True):
            row, undecided = example.row, None
            try:
                score = float(self.scorer(text, row))
            except Undecided as error:
                score, undecided = 0.0, str(error)
            problem, length = row.problem_text, len(rollout.ids)
            found.append(
                Answer(row.source, problem, row.answer or "", text, score, length, rollout.truncated, undecided)
            )
        return found


def check_examples(examples: Sequence[Example], context: Context) -> None:
    """Raises DataError, which names the row, if one of `examples` lacks the prompt of `context` or the answer."""
    for example in examples:
        if not getattr(example, context):
            raise DataError(
                f"{example.row.source}: has nothing that the teacher may read, no solution or teacher_prompt"
            )
        if example.row.answer is None:
            raise DataError(f"{example.row.source}: 'answer' is missing")


def summarise(answers: Sequence[Answer], samples: int) -> Evaluation:
    """The evaluation of `answers`, of which each `samples` in a row belong to one problem.

    Raises:
        ValueError: there are none, or their number is no multiple of `samples`.
    """
    if not answers or len(answers) % samples:
        raise ValueError(f"answers has {len(answers)} entries; accepted: a positive multiple of samples, {samples}")
    scores = [[a.score for a in answers[i : i + samples]] for i in range(0, len(answers), samples)]
    means = [sum(of_problem) / samples for of_problem in scores]
    right = [sum(score == 1 for score in of_problem) for of_problem in scores]
    passes = []
    for k in [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]:
        values = [pass_at(k, samples, count) for count in right]
        passes.append(PassAt(k, sum(values) / len(values), *interval(values)))
    return Evaluation(
        sum(means) / len(means),
        *interval(means),
        problems=len(scores),
        samples=samples,
        mean_length=sum(a.length for a in answers) / len(answers),
        truncated=sum(a.truncated for a in answers) / len(answers),
        pass_at=tuple(passes),
        undecided=sum(a.undecided is not None for a in answers),
    )


def pass_at(k: int, n: int, right: int) -> float:
    """The share of the choices of `k` among `n` answers, `right` of them right, that hold a right one.

    1 - C(n - right, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1).
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"k {k}, n {n}, right {right}; accepted: 1 <= k <= n and 0 <= right <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, one from 0 to 1 for each problem, the average of its answers, say.

    Problems are independent, answers to one of them are not, so the problems are what is counted (as in Miller 2024,
    arXiv 2411.00640). The normal interval of the problems' mean is empty when all are 0 or all are 1, so this is
    Wilson's with an effective sample size, as for clustered samples (Franco, Little, Louis and Slud 2019, Journal of
    Survey Statistics and Methodology 7): the number of coin tosses whose mean would vary as much as that of `values`.
    Values of 0 and 1 vary as coin tosses do, which leaves the plain Wilson interval. Others vary less, and narrow it.

    The variance is estimated with two problems more, a 0 and a 1: near 0 and 1 a few problems say little of it, and
    there the interval goes back to the plain one, which supposes that the answers to a problem are all alike.
    """
    n, mean = len(values), sum(values) / len(values)
    padded = [*values, 0.0, 1.0]
    centre = sum(padded) / len(padded)
    variance = sum((value - centre) ** 2 for value in padded) / len(padded)
    return wilson(mean, n * centre * (1 - centre) / variance)


def wilson(share: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a `share` of `n` trials; never empty, even at 0 and 1."""
    share = min(1.0, max(0.0, share))  # rounding may have put a mean of floats beyond, and put the ends so below
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
