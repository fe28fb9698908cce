"""The teacher: the same model, told more. It scores rollouts, never writes them, and never gets a gradient."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opsd.config import Config, ConfigError
from opsd.models import body, evaluating, is_adapted, load_tokenizer, load_weights
from opsd.scoring import rollout_hidden
from opsd_kernels import Head, lm_head_of


class Teacher(Protocol):
    """What a step, an evaluation and a checkpoint need of a teacher."""

    head: Head
    """Holds the student's own weight tensor where the two share it."""

    source: str | nn.Module
    """What `opsd_kernels.dual_hidden_states` calls this teacher: "live", "base", or the model it is."""

    def active(self) -> AbstractContextManager[nn.Module]:
        """A context in which the value it yields is the teacher as a model: its weights, dropout off."""

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        """(R, H) inputs of its head that predict the R rollout tokens after its own prompts, without a gradient."""

    def update(self, step: int) -> None:
        """Called once after each step of the optimiser, numbered from 1."""

    def state_dict(self) -> dict[str, Tensor]:
        """What changes in the course of a run and is no part of the student; empty where nothing does."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""


def check_teacher(teacher: Any) -> None:
    """Raises TypeError or ValueError, which says what is missing or wrong, if `teacher` is no `Teacher`."""
    told = f"the teacher (teacher) is of type {type(teacher).__name__}"
    missing = [
        name
        for name in ("head", "source", "active", "hidden", "update", "state_dict", "load_state_dict")
        if not hasattr(teacher, name) or not (name in ("head", "source") or callable(getattr(teacher, name)))
    ]
    if missing:
        raise TypeError(f"{told}, which lacks {', '.join(missing)}; accepted: an opsd.teachers.Teacher")
    if not isinstance(teacher.head, Head):
        kind = type(teacher.head).__name__
        raise TypeError(f"{told}, its head of type {kind}; accepted: an opsd_kernels.Head, as lm_head_of(model) gives")
    source = teacher.source
    if not isinstance(source, nn.Module) and not (isinstance(source, str) and source in ("live", "base")):
        raise ValueError(f"{told}, its source {source!r}; accepted: 'live', 'base' or the model that it is")
    active = teacher.active()
    if not isinstance(active, AbstractContextManager):
        raise TypeError(f"{told}, whose active() is no context manager; accepted: one that yields a torch.nn.Module")
    with active as model:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{told}, whose active() yields {type(model).__name__}; accepted: a torch.nn.Module")


def check_hidden(teacher: Teacher, hidden: Any, rows: int) -> None:
    """Raises TypeError or ValueError if `hidden` is not what `teacher.hidden` has to return for so many tokens."""
    wanted = (rows, teacher.head.weight.shape[1])
    accepted = f"(R, H) rows of hidden states that its head takes, without a gradient, here {wanted}"
    if not isinstance(hidden, Tensor):
        raise TypeError(f"the teacher's hidden() returned {type(hidden).__name__}; accepted: {accepted}")
    if tuple(hidden.shape) != wanted:
        raise ValueError(f"the teacher's hidden() returned shape {tuple(hidden.shape)}; accepted: {accepted}")
    if hidden.requires_grad:
        raise ValueError(f"the teacher's hidden() returned states with a gradient; accepted: {accepted}")


class _ModelTeacher:
    """Scores with `model`; the source "base" switches its adapters off, which makes it what it was before training."""

    def __init__(self, model: nn.Module, source: str | nn.Module):
        body(model)  # refuses now what it would at the first step
        self.model, self.adapters_off = model, source == "base"
        self.head = lm_head_of(model)
        self.source: str | nn.Module = source

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        with evaluating(self.model):
            if self.adapters_off:
                with self.model.disable_adapter():  # type: ignore[operator]
                    yield self.model
            else:
                yield self.model

    @torch.no_grad()
    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        with self.active() as model:
            return rollout_hidden(model, prompts, rollouts)

    def update(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"this teacher keeps nothing, got {len(state)} tensors")


class _AverageTeacher(_ModelTeacher):
    """A second copy of what is trained, and of nothing else, that follows the student as a moving average."""

    def __init__(self, student: nn.Module, decay: float, every: int):
        copied = _frozen_copy(student)
        super().__init__(copied, copied)
        self.decay, self.every = decay, every
        mine = dict(copied.named_parameters())
        self.pairs = {n: (mine[n], p) for n, p in student.named_parameters() if p.requires_grad}
        # An update is about (1 - decay) of a step of the optimiser: 16-bit weights would round it away.
        self.exact = {n: t.detach().float() for n, (t, _) in self.pairs.items() if t.element_size() < 4}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % self.every:
            return
        for name, (teacher, student) in self.pairs.items():
            average = self.exact.get(name, teacher)
            average.lerp_(student.to(average.dtype), 1 - self.decay)
            if average is not teacher:
                teacher.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self.exact.get(name, teacher).detach() for name, (teacher, _) in self.pairs.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.pairs.keys():
            raise ValueError(
                f"the average of {len(self.pairs)} tensors, got {len(state)}: {_first_difference(state, self.pairs)}"
            )
        for name, (teacher, _) in self.pairs.items():
            if name in self.exact:
                self.exact[name].copy_(state[name])
            teacher.copy_(state[name])


def make_teacher(config: Config, model: nn.Module, tokenizer: Any) -> Teacher:
    """The teacher of `config.teacher` for `model`, to be made before the first step.

    "live" is the weights being trained. "base" is the initial weights: with adapters, the model without them; else a
    frozen copy, a second model in memory. "ema" is their moving average, a second copy of what is trained. "model" is
    `teacher.path`, which must have the same vocabulary.

    Raises:
        ConfigError: the other model cannot be loaded or has another vocabulary.
    """
    options = config.teacher
    if options.kind == "live":
        return _ModelTeacher(model, "live")
    if options.kind == "ema":
        return _AverageTeacher(model, options.ema_decay, options.ema_every)
    if options.kind == "model":
        return _other_model(config, model, tokenizer)
    if is_adapted(model):
        return _ModelTeacher(model, "base")
    frozen = _frozen_copy(model)
    return _ModelTeacher(frozen, frozen)


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares the tensors that are not trained."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def _other_model(config: Config, model: nn.Module, tokenizer: Any) -> Teacher:
    path = config.teacher.path
    theirs = load_tokenizer(path, "teacher.path").get_vocab()
    ours = tokenizer.get_vocab()
    if theirs != ours:
        raise ConfigError(
            f"teacher.path {path!r} has another vocabulary than model.path: {len(theirs)} and {len(ours)} tokens, "
            f"{_first_difference(theirs, ours)}"
        )
    other = load_weights(config, path, "teacher.path").to(next(model.parameters()).device)
    teacher = _ModelTeacher(other.eval().requires_grad_(False), other)
    # Published sizes of one family pad the vocabulary differently.
    rows, wanted = teacher.head.weight.shape[0], lm_head_of(model).weight.shape[0]
    if rows < wanted:
        raise ConfigError(f"teacher.path {path!r}: its lm_head has {rows} rows, fewer than the {wanted} of model.path")
    if rows > wanted:
        bias = teacher.head.bias
        teacher.head = dataclasses.replace(
            teacher.head, weight=teacher.head.weight[:wanted], bias=None if bias is None else bias[:wanted]
        )
    return teacher


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = sorted(one.keys() ^ other.keys()) or sorted(n for n in one if one[n] is not other[n] and one[n] != other[n])
    return f"first difference {names[0]!r}"
