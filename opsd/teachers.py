"""The teacher: the same model, told more. It never generates during training and never gets a gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from opsd.models import evaluating, is_adapted
from opsd.scoring import rollout_hidden
from opsd_kernels import Head, lm_head_of


class Teacher(Protocol):
    """What a step and an evaluation need of a teacher."""

    head: Head
    """Holds the student's own weight tensor where the two share it."""

    source: str | nn.Module
    """What `opsd_kernels.dual_hidden_states` calls this teacher: "live", "base", or the model it is."""

    def active(self) -> AbstractContextManager[nn.Module]:
        """A context in which the value it yields is the teacher as a model: its weights, dropout off."""

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        """(R, H) inputs of its head that predict the R rollout tokens after its own prompts, without a gradient."""


class _ModelTeacher:
    """Scores with `model`; the source "base" switches its adapters off, which makes it what it was before training."""

    def __init__(self, model: nn.Module, source: str | nn.Module):
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


def make_teacher(kind: str, model: nn.Module) -> Teacher:
    """The teacher of `kind` for `model`, to be made before the first step.

    "live" is the weights being trained. "base" is the initial weights: with adapters, the model without them; else a
    frozen copy, a second model in memory.
    """
    if kind == "live":
        return _ModelTeacher(model, "live")
    if kind != "base":
        raise ValueError(f"teacher kind {kind!r}; accepted: base, live")
    if is_adapted(model):
        return _ModelTeacher(model, "base")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return _ModelTeacher(frozen, frozen)
