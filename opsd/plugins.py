"""What a user passes in: a function or a teacher of one's own, wrapped as a part of the run and checked here alone.

What it returns is checked at each call, since only then it is known; every other part of a run is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from torch import Tensor, nn

from opsd.config import Config
from opsd.evaluation import Context, Evaluation
from opsd.prompts import Example
from opsd.rollouts import Rollout
from opsd.run import Engine, MicroBatch, Run, Step, StepResult, Stream, Teacher
from opsd.scoring import vocabulary_size
from opsd_kernels import Head

OWN_NAMES = ("step", "loss", "grad_norm")
"""What the loop itself records of a step, so that nothing else may be called so."""


class Sampler(Protocol):
    """What writes the rollouts, in place of sampling from the student: a function of (run, examples, number)."""

    def __call__(self, run: Run, examples: Sequence[Example], number: int, /) -> list[Rollout]:
        """`rollout.per_prompt` rollouts of each example, all of the first example first.

        Each has at least one id, all of them within the vocabulary, and either every rollout has the sampler's
        log-probabilities or none does.
        """


class Divergence(Protocol):
    """The loss, in place of the objective: a function of (run, student_hidden, teacher_hidden, rollouts,
    denominator)."""

    def __call__(
        self,
        run: Run,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        rollouts: Sequence[Rollout],
        denominator: int,
        /,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these rollouts contribute to the loss of the batch, 0-d with a gradient, and statistics, each (R,), the
        same names in every call; the step reports their means over the batch.

        R rows of hidden states, (R, H) each, predict the R tokens of `rollouts` in order. Called once for each
        micro-batch; divide by `denominator`, the batch's number of tokens (with objective.reduction "sequence_mean" of
        rollouts), so that the micro-batches add up.
        """


class MakeTeacher(Protocol):
    """What makes the teacher, in place of `opsd.teachers.make_teacher`: a function of (config, model, tokenizer)."""

    def __call__(self, config: Config, model: nn.Module, tokenizer: Any, /) -> Teacher:
        """The teacher of `model`, the student, as it is before the first step."""


class Evaluate(Protocol):
    """An evaluation, in place of `opsd.evaluation.Evaluator`: a function of (run, model, examples, context)."""

    def __call__(self, run: Run, model: nn.Module, examples: Sequence[Example], context: Context, /) -> Evaluation:
        """How well `model`, which is not always the student, answers under the prompts of `context`."""


@dataclass(frozen=True)
class UserEngine:
    """Has the user's function write the rollouts, and `engine` all the rest."""

    function: Sampler
    engine: Engine

    @property
    def end_ids(self) -> Sequence[int]:
        return self.engine.end_ids

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        rollouts: Any = self.function(run, examples, number)
        if not isinstance(rollouts, Iterable):
            accepted = "a list of opsd.rollouts.Rollout"
            raise TypeError(f"the sampler returned {type(rollouts).__name__}; accepted: {accepted}")
        rollouts, each = list(rollouts), run.config.rollout.per_prompt
        if len(rollouts) != len(examples) * each:
            raise ValueError(
                f"the sampler returned {len(rollouts)} rollouts for {len(examples)} examples; accepted: "
                f"{len(examples) * each}, rollout.per_prompt {each} of each, in the order of the examples"
            )
        for i, rollout in enumerate(rollouts):
            _check_rollout(f"rollout {i % each} of example {i // each}", rollout, vocabulary_size(run.head))
        known = sum(rollout.logprobs is not None for rollout in rollouts)
        if 0 < known < len(rollouts):
            raise ValueError(f"{known} of {len(rollouts)} rollouts have logprobs; accepted: all or none")
        if not known and run.config.rollout.importance_cap is not None:
            raise ValueError(
                "rollout.importance_cap needs the sampler's log-probabilities: the rollouts have none "
                "(Rollout.logprobs)"
            )
        return rollouts

    def write(self, *given: Any) -> list[Rollout]:
        return self.engine.write(*given)


def _check_rollout(name: str, rollout: Any, vocabulary: int) -> None:
    if not isinstance(rollout, Rollout):
        raise TypeError(f"{name} must be an opsd.rollouts.Rollout, got {type(rollout).__name__}")
    if not isinstance(rollout.ids, list | tuple):
        raise TypeError(f"{name} has ids of type {type(rollout.ids).__name__}; accepted: a list of ints")
    if not isinstance(rollout.logprobs, list | tuple | None):
        kind = type(rollout.logprobs).__name__
        raise TypeError(f"{name} has logprobs of type {kind}; accepted: a list of floats, or None")
    if not isinstance(rollout.truncated, bool):
        raise TypeError(f"{name} has truncated {rollout.truncated!r}; accepted: True or False")
    if not rollout.ids:
        raise ValueError(f"{name} is empty; a rollout has at least one token id, the end token if nothing else")
    for token in rollout.ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"{name} has token id {token!r}; accepted: ints from 0 to {vocabulary - 1}")
    if rollout.logprobs is not None and len(rollout.logprobs) != len(rollout.ids):
        raise ValueError(f"{name} has {len(rollout.ids)} ids and {len(rollout.logprobs)} logprobs")
    for logprob in rollout.logprobs or ():
        if not isinstance(logprob, Real):
            raise TypeError(f"{name} has the log-probability {logprob!r}; accepted: a float")
        if not math.isfinite(logprob):
            raise ValueError(f"{name} has the log-probability {logprob} for a token that was sampled")


class UserLoss:
    """The user's function as a recipe of `run`."""

    contexts = ("teacher",)

    def __init__(self, function: Divergence, run: Run):
        self.function, self.run = function, run
        self.reduction = run.config.objective.reduction
        self.names: set[str] | None = None  # of the statistics, once they are known

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: MicroBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = len(student.hidden)
        returned: Any = self.function(self.run, student.hidden, teachers["teacher"].hidden, batch.rollouts, denominator)
        what, accepted = (
            "the loss function (loss) returned",
            "(loss, statistics), a 0-d tensor and a dict of (R,) tensors",
        )
        if not isinstance(returned, tuple | list):
            raise TypeError(f"{what} {_shown(returned)}; accepted: {accepted}")
        if len(returned) != 2:
            raise ValueError(f"{what} {len(returned)} values; accepted: {accepted}")
        loss, stats = returned
        if not isinstance(loss, Tensor):
            raise TypeError(f"{what} {_shown(loss)} as the loss; accepted: {accepted}")
        if loss.ndim:
            raise ValueError(f"{what} a loss of shape {tuple(loss.shape)}; accepted: 0-d, as a sum over tokens is")
        if not loss.requires_grad:
            raise ValueError(
                f"{what} a loss without a gradient; accepted: one computed from student_hidden, not detached"
            )
        if not isinstance(stats, Mapping):
            raise TypeError(
                f"{what} {_shown(stats)} as the statistics; accepted: a dict of (R,) tensors, empty for none"
            )
        for name, value in stats.items():
            _check_name(f"{what} a statistic", name)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{what} {_shown(value)} as statistic {name!r}; accepted: an (R,) tensor, here ({rows},)"
                )
            if value.shape != (rows,):
                raise ValueError(
                    f"{what} statistic {name!r} of shape {tuple(value.shape)}; accepted: (R,), one value for each "
                    f"rollout token, here ({rows},)"
                )
        if self.names is not None and self.names != stats.keys():
            raise ValueError(
                f"{what} statistics called {', '.join(stats) or 'nothing'}, for another micro-batch "
                f"{', '.join(self.names) or 'nothing'}; accepted: the same names in every call"
            )
        self.names = set(stats)
        return loss, dict(stats)


class UserTeacher:
    """The user's teacher, whose hidden states are checked; all else is its own.

    Raises:
        TypeError, ValueError: it is no `opsd.run.Teacher`; the message says what is missing or wrong.
    """

    def __init__(self, teacher: Any):
        what = f"the teacher (teacher) is of type {type(teacher).__name__}"
        missing = [
            name
            for name in ("head", "source", "active", "hidden", "update", "state_dict", "load_state_dict")
            if not hasattr(teacher, name) or not (name in ("head", "source") or callable(getattr(teacher, name)))
        ]
        if missing:
            raise TypeError(f"{what}, which lacks {', '.join(missing)}; accepted: an opsd.teachers.Teacher")
        if not isinstance(teacher.head, Head):
            kind = type(teacher.head).__name__
            raise TypeError(
                f"{what}, its head of type {kind}; accepted: an opsd_kernels.Head, as lm_head_of(model) gives"
            )
        source = teacher.source
        if not isinstance(source, nn.Module) and not (isinstance(source, str) and source in ("live", "base")):
            raise ValueError(f"{what}, its source {source!r}; accepted: 'live', 'base' or the model that it is")
        active = teacher.active()
        if not isinstance(active, AbstractContextManager):
            raise TypeError(
                f"{what}, whose active() is no context manager; accepted: one that yields a torch.nn.Module"
            )
        with active as model:
            if not isinstance(model, nn.Module):
                raise TypeError(f"{what}, whose active() yields {type(model).__name__}; accepted: a torch.nn.Module")
        self._teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        hidden = self._teacher.hidden(prompts, rollouts)
        wanted = (sum(map(len, rollouts)), self._teacher.head.weight.shape[1])
        accepted = f"(R, H) rows of hidden states that its head takes, without a gradient, here {wanted}"
        if not isinstance(hidden, Tensor):
            raise TypeError(f"the teacher's hidden() returned {type(hidden).__name__}; accepted: {accepted}")
        if tuple(hidden.shape) != wanted:
            raise ValueError(f"the teacher's hidden() returned shape {tuple(hidden.shape)}; accepted: {accepted}")
        if hidden.requires_grad:
            raise ValueError(f"the teacher's hidden() returned states with a gradient; accepted: {accepted}")
        return hidden


@dataclass(frozen=True)
class UserStep:
    """The user's function in place of the whole step."""

    function: Step

    def __call__(self, run: Run, examples: Sequence[Example], number: int) -> StepResult:
        result: Any = self.function(run, examples, number)
        what = "the step function (step) returned"
        if not isinstance(result, StepResult):
            raise TypeError(f"{what} {type(result).__name__}; accepted: an opsd.step.StepResult")
        if not isinstance(result.loss, Tensor) or result.loss.ndim:
            shape = tuple(result.loss.shape) if isinstance(result.loss, Tensor) else repr(result.loss)
            raise TypeError(f"{what} a loss that is {shape}; accepted: a 0-d tensor")
        if not isinstance(result.tokens, int) or result.tokens < 0:
            raise TypeError(f"{what} tokens {result.tokens!r}; accepted: an int, how many rollout tokens there were")
        if not isinstance(result.metrics, Mapping):
            raise TypeError(f"{what} metrics of type {type(result.metrics).__name__}; accepted: a dict of numbers")
        for name, value in result.metrics.items():
            _check_name(f"{what} a metric", name)
            if value.ndim if isinstance(value, Tensor) else not isinstance(value, Real):
                shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise TypeError(f"{what} metric {name!r} {shown}; accepted: a number or a 0-d tensor")
        if not isinstance(result.rollouts, list) or not all(isinstance(r, Rollout) for r in result.rollouts):
            raise TypeError(
                f"{what} rollouts {result.rollouts!r:.80}; accepted: a list of opsd.Rollout, empty for none"
            )
        return result


@dataclass(frozen=True)
class UserEvaluation:
    """The user's function in place of the evaluation."""

    function: Evaluate

    def __call__(self, run: Run, model: nn.Module, examples: Sequence[Example], context: Context) -> Evaluation:
        result: Any = self.function(run, model, examples, context)
        if not isinstance(result, Evaluation):
            kind = type(result).__name__
            raise TypeError(f"the evaluation function (evaluate) returned {kind}; accepted: an opsd.Evaluation")
        result.check()
        return result


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or name in OWN_NAMES:
        raise ValueError(f"{what} called {name!r}; accepted: text other than {', '.join(OWN_NAMES)}")


def _shown(value: Any) -> str:
    """A wrong value for a message, short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
