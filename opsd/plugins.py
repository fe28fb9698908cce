"""What a user passes in: a function or a teacher of one's own, wrapped as a part of the run and checked here alone.

What it returns is checked at each call, since only then it is known; every other part of a run is trusted.
"""

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
        self, run: Run, student_hidden: Tensor, teacher_hidden: Tensor, rollouts: Sequence[Rollout], denominator: int, /
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
class Parts:
    """What the user has put in place of parts of a run; None: the run's own."""

    rollouts: Sampler | None = None
    teacher: MakeTeacher | None = None
    loss: Divergence | None = None
    evaluate: Evaluate | None = None
    step: Step | None = None


@dataclass(frozen=True)
class UserEngine:
    """Has the user's function write the rollouts, and `engine` all the rest."""

    function: Sampler
    engine: Engine

    @property
    def end_ids(self) -> Sequence[int]:
        return self.engine.end_ids

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        given: Any = self.function(run, examples, number)
        kind, each = type(given).__name__, run.config.rollout.per_prompt
        _expect(isinstance(given, Iterable), f"the sampler returned {kind}; accepted: a list of opsd.rollouts.Rollout")
        rollouts, wanted = list(given), len(examples) * each
        if len(rollouts) != wanted:
            raise ValueError(
                f"the sampler returned {len(rollouts)} rollouts for {len(examples)} examples; accepted: {wanted}, "
                f"rollout.per_prompt {each} of each, in the order of the examples"
            )
        for i, rollout in enumerate(rollouts):
            _check_rollout(f"rollout {i % each} of example {i // each}", rollout, vocabulary_size(run.head))
        known = sum(rollout.logprobs is not None for rollout in rollouts)
        if 0 < known < wanted:
            raise ValueError(f"{known} of {wanted} rollouts have logprobs; accepted: all or none")
        if not known and run.config.rollout.importance_cap is not None:
            needed = "the sampler's log-probabilities: the rollouts have none (Rollout.logprobs)"
            raise ValueError(f"rollout.importance_cap needs {needed}")
        return rollouts

    def write(self, *given: Any) -> list[Rollout]:
        return self.engine.write(*given)


def _check_rollout(name: str, rollout: Any, vocabulary: int) -> None:
    _expect(isinstance(rollout, Rollout), f"{name} must be an opsd.rollouts.Rollout, got {type(rollout).__name__}")
    ids, logprobs, truncated = rollout.ids, rollout.logprobs, rollout.truncated
    _expect(isinstance(ids, list | tuple), f"{name} has ids of type {type(ids).__name__}; accepted: a list of ints")
    accepted = "accepted: a list of floats, or None"
    _expect(
        isinstance(logprobs, list | tuple | None), f"{name} has logprobs of type {type(logprobs).__name__}; {accepted}"
    )
    _expect(isinstance(truncated, bool), f"{name} has truncated {truncated!r}; accepted: True or False")
    if not ids:
        raise ValueError(f"{name} is empty; a rollout has at least one token id, the end token if nothing else")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"{name} has token id {token!r}; accepted: ints from 0 to {vocabulary - 1}")
    if logprobs is not None and len(logprobs) != len(ids):
        raise ValueError(f"{name} has {len(ids)} ids and {len(logprobs)} logprobs")
    for logprob in logprobs or ():
        _expect(isinstance(logprob, Real), f"{name} has the log-probability {logprob!r}; accepted: a float")
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
        hidden, rows = (student.hidden, teachers["teacher"].hidden), len(student.hidden)
        given: Any = self.function(self.run, *hidden, batch.rollouts, denominator)
        what, pair = "the loss function (loss) returned", "(loss, statistics), a 0-d tensor and a dict of (R,) tensors"
        _expect(isinstance(given, tuple | list), f"{what} {_shown(given)}; accepted: {pair}")
        if len(given) != 2:
            raise ValueError(f"{what} {len(given)} values; accepted: {pair}")
        loss, stats = given
        _expect(isinstance(loss, Tensor), f"{what} {_shown(loss)} as the loss; accepted: {pair}")
        if loss.ndim:
            raise ValueError(f"{what} a loss of shape {tuple(loss.shape)}; accepted: 0-d, as a sum over tokens is")
        if not loss.requires_grad:
            raise ValueError(
                f"{what} a loss without a gradient; accepted: one computed from student_hidden, not detached"
            )
        accepted = "a dict of (R,) tensors, empty for none"
        _expect(isinstance(stats, Mapping), f"{what} {_shown(stats)} as the statistics; accepted: {accepted}")
        for name, value in stats.items():
            _check_name(f"{what} a statistic", name)
            accepted = f"accepted: an (R,) tensor, here ({rows},)"
            _expect(isinstance(value, Tensor), f"{what} {_shown(value)} as statistic {name!r}; {accepted}")
            if value.shape != (rows,):
                accepted = f"accepted: (R,), one value for each rollout token, here ({rows},)"
                raise ValueError(f"{what} statistic {name!r} of shape {tuple(value.shape)}; {accepted}")
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
        missing = [name for name in ("head", "source") if not hasattr(teacher, name)]
        methods = ("active", "hidden", "update", "state_dict", "load_state_dict")
        missing += [name for name in methods if not callable(getattr(teacher, name, None))]
        _expect(not missing, f"{what}, which lacks {', '.join(missing)}; accepted: an opsd.run.Teacher")
        kind, accepted = type(teacher.head).__name__, "an opsd_kernels.Head, as lm_head_of(model) gives"
        _expect(isinstance(teacher.head, Head), f"{what}, its head of type {kind}; accepted: {accepted}")
        source = teacher.source
        if not isinstance(source, nn.Module) and not (isinstance(source, str) and source in ("live", "base")):
            raise ValueError(f"{what}, its source {source!r}; accepted: 'live', 'base' or the model that it is")
        active, accepted = teacher.active(), "accepted: one that yields a torch.nn.Module"
        _expect(isinstance(active, AbstractContextManager), f"{what}, whose active() is no context manager; {accepted}")
        with active as model:
            kind = type(model).__name__
            _expect(isinstance(model, nn.Module), f"{what}, whose active() yields {kind}; accepted: a torch.nn.Module")
        self._teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        hidden, what = self._teacher.hidden(prompts, rollouts), "the teacher's hidden() returned"
        wanted = (sum(map(len, rollouts)), self._teacher.head.weight.shape[1])
        accepted = f"accepted: (R, H) rows of hidden states that its head takes, without a gradient, here {wanted}"
        _expect(isinstance(hidden, Tensor), f"{what} {type(hidden).__name__}; {accepted}")
        if tuple(hidden.shape) != wanted:
            raise ValueError(f"{what} shape {tuple(hidden.shape)}; {accepted}")
        if hidden.requires_grad:
            raise ValueError(f"{what} states with a gradient; {accepted}")
        return hidden


@dataclass(frozen=True)
class UserStep:
    """The user's function in place of the whole step."""

    function: Step

    def __call__(self, run: Run, examples: Sequence[Example], number: int) -> StepResult:
        result: Any = self.function(run, examples, number)
        what = "the step function (step) returned"
        kind = type(result).__name__
        _expect(isinstance(result, StepResult), f"{what} {kind}; accepted: an opsd.run.StepResult")
        loss, tokens, metrics, rollouts = result.loss, result.tokens, result.metrics, result.rollouts
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)
        _expect(shape == (), f"{what} a loss that is {shape}; accepted: a 0-d tensor")
        accepted = "accepted: an int, how many rollout tokens there were"
        _expect(isinstance(tokens, int) and tokens >= 0, f"{what} tokens {tokens!r}; {accepted}")
        kind = type(metrics).__name__
        _expect(isinstance(metrics, Mapping), f"{what} metrics of type {kind}; accepted: a dict of numbers")
        for name, value in metrics.items():
            _check_name(f"{what} a metric", name)
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            number_like = not value.ndim if isinstance(value, Tensor) else isinstance(value, Real)
            _expect(number_like, f"{what} metric {name!r} {shown}; accepted: a number or a 0-d tensor")
        good = isinstance(rollouts, list) and all(isinstance(rollout, Rollout) for rollout in rollouts)
        _expect(good, f"{what} rollouts {rollouts!r:.80}; accepted: a list of opsd.Rollout, empty for none")
        return result


@dataclass(frozen=True)
class UserEvaluation:
    """The user's function in place of the evaluation."""

    function: Evaluate

    def __call__(self, run: Run, model: nn.Module, examples: Sequence[Example], context: Context) -> Evaluation:
        result: Any = self.function(run, model, examples, context)
        what, kind = "the evaluation function (evaluate) returned", type(result).__name__
        _expect(isinstance(result, Evaluation), f"{what} {kind}; accepted: an opsd.Evaluation")
        result.check()
        return result


def _expect(good: bool, message: str) -> None:
    if not good:
        raise TypeError(message)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or name in OWN_NAMES:
        raise ValueError(f"{what} called {name!r}; accepted: text other than {', '.join(OWN_NAMES)}")


def _shown(value: Any) -> str:
    """A wrong value for a message, short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
