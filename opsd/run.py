"""What a run works with, as plain data, and what each of its parts has to offer, as Protocols.

`opsd.step` is written against these alone. The parts that are there: engines in `opsd.engines`, recipes in
`opsd.recipes`, teachers in `opsd.teachers`, observers in `opsd.run_dir`, `opsd.trackers` and `opsd.display`.
`opsd.plugins` makes parts out of functions of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opsd.clock import Clock
from opsd.config import Config
from opsd.prompts import Example, Prompter
from opsd.recipes.batch import Recipe, TokenBatch
from opsd.rollouts import Rollout, Sampling
from opsd.scorers import Scorer
from opsd_kernels import Head, Stream

__all__ = ["Engine", "MicroBatch", "Observer", "Recipe", "Run", "Step", "StepResult", "Stream", "Teacher"]


@dataclass(frozen=True)
class Run:
    """What a step works with. The loop owns the optimiser; a step leaves gradients on `model`."""

    config: Config
    model: nn.Module
    tokenizer: Any
    head: Head
    teacher: Teacher
    engine: Engine
    recipe: Recipe
    device: torch.device
    packed: bool = False  #: all contexts run as rows without padding
    joint: bool = False  #: packed, the student's contexts and the constant ones in one pass
    alone: bool = False  #: each rollout is scored by itself, since the model's batches are not its single passes
    reward: Scorer | None = None  #: of rollouts, where the recipe needs it
    prompter: Prompter | None = None  #: where a context reads what is known in the step alone
    sharded: bool = False  #: the processes divide the weights


@dataclass(frozen=True, kw_only=True)
class MicroBatch(TokenBatch):
    """Rollouts that are scored together, and the example of each, so that one may come several times."""

    examples: Sequence[Example]
    rollouts: Sequence[Rollout]
    repeated: bool = False  #: another process counts it; here it keeps pace, as all must where they divide the weights


@dataclass
class StepResult:
    """What a step did. `loss` and the tensors of `metrics` are 0-d and stay on the device.

    `rollouts` come prompt by prompt: those of example i are numbers i * G to (i + 1) * G - 1.
    """

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    clock: Clock | None = None
    rollouts: list[Rollout] = field(default_factory=list)


class Step(Protocol):
    """A whole step, in place of `opsd_step`: a function of (run, examples, number)."""

    def __call__(self, run: Run, examples: Sequence[Example], number: int, /) -> StepResult:
        """Adds the gradient of its loss to the parameters of `run.model`; numbers start at 1."""


class Engine(Protocol):
    """What writes text with a model."""

    @property
    def end_ids(self) -> Sequence[int]:
        """Any of these ends a rollout."""

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        """`rollout.per_prompt` rollouts of each example, all of the first example first, for the step `number`: from
        the student's prompt alone, by its weights as they are now."""

    def write(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], batch: int
    ) -> list[Rollout]:
        """One rollout of `model`, which need not be the student, for each prompt and seed, `batch` at a time."""


class Teacher(Protocol):
    """What a step, an evaluation and a checkpoint need of a teacher."""

    head: Head
    """Holds the student's own weight tensor where the two share it."""

    @property
    def source(self) -> str | nn.Module | None:
        """What `opsd_kernels.dual_hidden_states` calls this teacher: "live", "base", or the model it is. None: it is
        no model here, but an `opsd.top_k.TopKTeacher`."""

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


class Observer(Protocol):
    """What hears of a run's steps and evaluations, to show or to keep them."""

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """`record` is a line of `metrics.jsonl`, `samples` are the step's lines of `samples.jsonl`, usually none."""

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        """`record` is a line of `evaluations.jsonl`."""
