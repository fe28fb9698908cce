"""The teachers: the same model with the solution to read, or another one. They score rollouts without a gradient."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opsd import distributed
from opsd.config import Config
from opsd.errors import ConfigError
from opsd.models import body, is_adapted, load_tokenizer, load_trained
from opsd.options import ModelConfig
from opsd.run import Teacher
from opsd.scoring import rollout_hidden
from opsd.served_teacher import ServedTeacher
from opsd.teacher_cache import CachedTeacher
from opsd.vocabulary import of_tokens
from opsd_kernels import lm_head_of
from opsd_kernels.probe import evaluating


class ModelTeacher:
    """Scores with `model`; the source "base" switches its adapters off, which makes it what it was before training."""

    def __init__(self, model: nn.Module, source: str | nn.Module):
        body(model)  # refuses now what it would at the first step
        self.model, self.adapters_off = model, source == "base"
        self.head = lm_head_of(model)
        self.source: str | nn.Module = source

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        model: Any = self.model
        with evaluating(model), model.disable_adapter() if self.adapters_off else nullcontext():
            yield model

    @torch.no_grad()
    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        with self.active() as model:
            return rollout_hidden(model, prompts, rollouts)

    def update(self, step: int) -> None:
        pass

    def follow(self, student: nn.Module) -> None:
        """Takes up the parameters of `student` and its own anew."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"this teacher keeps nothing, got {len(state)} tensors")


class _AverageTeacher(ModelTeacher):
    """A second copy of what is trained, and of nothing else, that follows the student as a moving average."""

    def __init__(self, student: nn.Module, decay: float, every: int):
        copied = _frozen_copy(student)
        super().__init__(copied, copied)
        self.decay, self.every = decay, every
        self.follow(student)

    def follow(self, student: nn.Module) -> None:
        mine = dict(self.model.named_parameters())
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
                self.exact[name].copy_(distributed.like(state[name], teacher))
            teacher.copy_(distributed.like(state[name], teacher))


def make_teacher(config: Config, model: nn.Module, tokenizer: Any) -> Teacher:
    """The teacher of `config.teacher` for `model`, to be made before the first step.

    "live" is the weights being trained. "base" is the initial weights: with adapters, the model without them; else a
    frozen copy, a second model in memory. "ema" is their moving average, a second copy of what is trained. "model" is
    `teacher.path`, which must have the same vocabulary. "cached" and "server" are no models here.

    Raises:
        ConfigError: the other model cannot be loaded or has another vocabulary; the cache or the server does not serve.
    """
    if config.teacher.kind in ("cached", "server"):
        kind: Any = CachedTeacher if config.teacher.kind == "cached" else ServedTeacher
        head = of_tokens(lm_head_of(model), tokenizer)
        return kind(config, head, tokenizer, next(model.parameters()).device)
    teacher = _model_teacher(config, model, tokenizer)
    teacher.head = of_tokens(teacher.head, tokenizer)
    return teacher


def _model_teacher(config: Config, model: nn.Module, tokenizer: Any) -> Teacher:
    options = config.teacher
    if options.kind == "live":
        return ModelTeacher(model, "live")
    if options.kind == "ema":
        return _AverageTeacher(model, options.ema_decay, options.ema_every)
    if options.kind == "model":
        return _other_model(config.model, options.path, model, tokenizer)
    if is_adapted(model):
        return ModelTeacher(model, "base")
    frozen = _frozen_copy(model)
    return ModelTeacher(frozen, frozen)


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares the tensors that are not trained."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def _other_model(options: ModelConfig, path: str | None, model: nn.Module, tokenizer: Any) -> Teacher:
    """The model of `path`, in the types of `options`, as the teacher of `model`."""
    theirs = load_tokenizer(path, "teacher.path", trust_remote_code=options.trust_remote_code).get_vocab()
    ours = tokenizer.get_vocab()
    if theirs != ours:
        raise ConfigError(
            f"teacher.path {path!r} has another vocabulary than model.path: {len(theirs)} and {len(ours)} tokens, "
            f"{_first_difference(theirs, ours)}"
        )
    other = load_trained(options, path, next(model.parameters()).device, "teacher.path")
    teacher = ModelTeacher(other.eval().requires_grad_(False), other)
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
