"""What a user passes in: a function or a teacher of one's own, wrapped as a part of the run and checked here alone.

What it returns is checked at each call, since only then it is known.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opsd import distributed
from opsd.config import Config
from opsd.evaluation import Context, Evaluation
from opsd.prompts import Example
from opsd.recipes.base import columns
from opsd.rollouts import Rollout
from opsd.run import Engine, MicroBatch, Run, Step, StepResult, Stream, Teacher
from opsd.vocabulary import gaps_of, of_tokens
from opsd_kernels import Head
from opsd_kernels.probe import evaluating

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


class Callback(Protocol):
    """What is called after each step, to watch or to end a run: a function of (run, record)."""

    def __call__(self, run: Run, record: Mapping[str, Any], /) -> None:
        """`record` is the step's line of `metrics.jsonl`, already written; the weights of `run.model` are those after
        the step, in evaluation mode and without gradients for this call. What it raises stops the run. Of several
        processes each calls it, with times of its own in the record; see `opsd.distributed.rank`."""


@dataclass(frozen=True)
class Callbacks:
    """The user's functions as an observer of `run`."""

    functions: tuple[Callback, ...]
    run: Run

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        with evaluating(self.run.model), torch.no_grad():  # whatever a function does to it
            for function in self.functions:
                function(self.run, dict(record))

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """Of no concern to them."""


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
        expect_type(given, Iterable, "the sampler returned", "a list of opsd.rollouts.Rollout")
        rollouts, each = distributed.gathered(list(given))[0], run.config.rollout.per_prompt
        wanted = len(examples) * each
        expect(
            len(rollouts) == wanted,
            f"the sampler returned {len(rollouts)} rollouts for {len(examples)} examples",
            f"{wanted}, rollout.per_prompt {each} of each, in the order of the examples",
        )
        for i, rollout in enumerate(rollouts):
            _check_rollout(f"rollout {i % each} of example {i // each}", rollout, run.head)
        known = sum(rollout.logprobs is not None for rollout in rollouts)
        expect(known in (0, wanted), f"{known} of {wanted} rollouts have logprobs", "all or none")
        needed = known or run.config.rollout.importance_cap is None
        expect(needed, "rollout.importance_cap needs log-probabilities, the rollouts have none", "Rollout.logprobs")
        return rollouts

    def write(self, *given: Any) -> list[Rollout]:
        return self.engine.write(*given)


def _check_rollout(name: str, rollout: Any, head: Head) -> None:
    if not isinstance(rollout, Rollout):
        raise TypeError(f"{name} must be an opsd.rollouts.Rollout, got {type(rollout).__name__}")
    ids, logprobs = rollout.ids, rollout.logprobs
    expect_type(ids, list | tuple, f"{name} has ids of type", "a list of ints")
    expect_type(logprobs, list | tuple | None, f"{name} has logprobs of type", "a list of floats, or None")
    expect_type(rollout.truncated, bool, f"{name} has truncated", "True or False", shown=repr(rollout.truncated))
    expect(ids, f"{name} is empty", "at least one token id, the end token if nothing else")
    vocabulary, gaps = columns(head), set(gaps_of(head))
    for token in ids:  # many: what to say of one is made only where it is wrong
        if type(token) is not int or not 0 <= token < vocabulary or token in gaps:
            but = f", but the {len(gaps)} without a token" if gaps else ""
            raise ValueError(f"{name} has token id {token!r}; accepted: ints from 0 to {vocabulary - 1}{but}")
    if logprobs is not None:
        expect(len(logprobs) == len(ids), f"{name} has {len(ids)} ids and {len(logprobs)} logprobs", "one for each id")
    for logprob in logprobs or ():
        if not isinstance(logprob, Real) or not math.isfinite(logprob):
            kind = ValueError if isinstance(logprob, Real) else TypeError
            raise kind(f"{name} has the log-probability {logprob!r}; accepted: a float, finite as it was sampled")


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
        expect_type(given, tuple | list, what, pair, shown=_shown(given))
        expect(len(given) == 2, f"{what} {len(given)} values", pair)
        loss, stats = given
        expect_type(loss, Tensor, what, pair, shown=f"{_shown(loss)} as the loss")
        expect(loss.ndim == 0, f"{what} a loss of shape {tuple(loss.shape)}", "0-d, as a sum over tokens is")
        computed = "one computed from student_hidden, not detached"
        expect(loss.requires_grad, f"{what} a loss without a gradient", computed)
        shown = f"{_shown(stats)} as the statistics"
        expect_type(stats, Mapping, what, "a dict of (R,) tensors, empty for none", shown=shown)
        for name, value in stats.items():
            _check_name(f"{what} a statistic", name)
            shown = f"{_shown(value)} as statistic {name!r}"
            expect_type(value, Tensor, what, f"an (R,) tensor, here ({rows},)", shown=shown)
            shown = f"statistic {name!r} of shape {tuple(value.shape)}"
            accepted = f"(R,), one value for each rollout token, here ({rows},)"
            expect(value.shape == (rows,), f"{what} {shown}", accepted)
        ours, before = (", ".join(sorted(names or ())) or "nothing" for names in (stats, self.names))
        said = f"{what} statistics called {ours}, for another micro-batch {before}"
        expect(self.names in (None, set(stats)), said, "the same names in every call")
        self.names = set(stats)
        return loss, dict(stats)


class UserTeacher:
    """The user's teacher, whose hidden states are checked; all else is its own.

    Raises:
        TypeError, ValueError: it is no `opsd.run.Teacher`; the message says what is missing or wrong.
    """

    def __init__(self, teacher: Any, tokenizer: Any):
        what = f"the teacher (teacher) is of type {type(teacher).__name__}"
        missing = [name for name in ("head", "source") if not hasattr(teacher, name)]
        methods = ("active", "hidden", "update", "state_dict", "load_state_dict")
        missing += [name for name in methods if not callable(getattr(teacher, name, None))]
        expect(not missing, f"{what}, which lacks {', '.join(missing)}", "an opsd.run.Teacher", TypeError)
        head = "an opsd_kernels.Head, as lm_head_of(model) gives"
        expect_type(teacher.head, Head, f"{what}, its head of type", head)
        source = teacher.source
        good = isinstance(source, nn.Module) or (isinstance(source, str) and source in ("live", "base"))
        expect(good, f"{what}, its source {source!r}", "'live', 'base' or the model that it is")
        active, accepted = teacher.active(), "one that yields a torch.nn.Module"
        expect_type(active, AbstractContextManager, f"{what}, whose active() is no", accepted, shown="context manager")
        with active as model:
            expect_type(model, nn.Module, f"{what}, whose active() yields", "a torch.nn.Module")
        self._teacher, self._tokenizer = teacher, tokenizer
        self._heads: tuple[Any, Any] = None, None  # its own as it was seen last, and what became of it

    @property
    def head(self) -> Head:
        if self._heads[0] is not self._teacher.head:
            self._heads = self._teacher.head, of_tokens(self._teacher.head, self._tokenizer)
        return self._heads[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        hidden, what = self._teacher.hidden(prompts, rollouts), "the teacher's hidden() returned"
        wanted = (sum(map(len, rollouts)), self._teacher.head.weight.shape[1])
        accepted = f"(R, H) rows of hidden states that its head takes, without a gradient, here {wanted}"
        expect_type(hidden, Tensor, what, accepted)
        expect(tuple(hidden.shape) == wanted, f"{what} shape {tuple(hidden.shape)}", accepted)
        expect(not hidden.requires_grad, f"{what} states with a gradient", accepted)
        return hidden


def check_callbacks(callbacks: Iterable[Callback]) -> tuple[Callback, ...]:
    """`callbacks`, if each can be called."""
    expect_type(callbacks, Iterable, "callbacks is", "a list of functions of (run, record)")
    functions = tuple(callbacks)
    for function in functions:
        expect(callable(function), f"callbacks has {function!r:.80}", "functions of (run, record)", TypeError)
    return functions


def check_step_result(result: Any) -> StepResult:
    """`result`, if it is what a step returns."""
    what = "the step function (step) returned"
    expect_type(result, StepResult, what, "an opsd.run.StepResult")
    loss, tokens, metrics, rollouts = result.loss, result.tokens, result.metrics, result.rollouts
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)
    expect(shape == (), f"{what} a loss that is {shape}", "a 0-d tensor", TypeError)
    good = isinstance(tokens, int) and tokens >= 0
    expect(good, f"{what} tokens {tokens!r}", "an int, how many rollout tokens there were", TypeError)
    expect_type(metrics, Mapping, f"{what} metrics of type", "a dict of numbers")
    for name, value in metrics.items():
        _check_name(f"{what} a metric", name)
        shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        good = not value.ndim if isinstance(value, Tensor) else isinstance(value, Real)
        expect(good, f"{what} metric {name!r} {shown}", "a number or a 0-d tensor", TypeError)
    good = isinstance(rollouts, list) and all(isinstance(rollout, Rollout) for rollout in rollouts)
    expect(good, f"{what} rollouts {rollouts!r:.80}", "a list of opsd.Rollout, empty for none", TypeError)
    return result


def check_evaluation(result: Any) -> Evaluation:
    """`result`, if it is what an evaluation returns."""
    expect_type(result, Evaluation, "the evaluation function (evaluate) returned", "an opsd.Evaluation")
    result.check()
    return result


def expect(good: Any, said: str, accepted: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` unless `good`: what is wrong, and what is accepted."""
    if not good:
        raise error(f"{said}; accepted: {accepted}")


def expect_type(value: Any, kind: Any, said: str, accepted: str, shown: str | None = None) -> None:
    """Raises a TypeError unless `value` is of `kind`; it says the name of its type, or what is to be `shown` of it."""
    expect(isinstance(value, kind), f"{said} {shown or type(value).__name__}", accepted, TypeError)


def _check_name(what: str, name: Any) -> None:
    good = isinstance(name, str) and name not in OWN_NAMES
    expect(good, f"{what} called {name!r}", f"text other than {', '.join(OWN_NAMES)}")


def _shown(value: Any) -> str:
    """A wrong value for a message, short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
