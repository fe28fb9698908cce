"""What the recipes share: their options and the checks of these, what they need, and the calls of the kernels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from opsd_kernels import Head, Stream, Target, TokenStats, divergence, logprob, statistics

from .batch import TokenBatch

Losses = tuple[Tensor, dict[str, Tensor]]

SCALARS = ("progress", "step", "discrepancy_std", "warmup_perplexity", "gate_open")
"""Fields of a batch that may be one value for all tokens."""


def _option(default: Any, accepted: str, fits: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"accepted": accepted, "fits": fits})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fraction(default: float) -> Any:
    return _option(default, "number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)


def number(default: float) -> Any:
    return _option(default, "finite number", lambda value: _is_number(value) and math.isfinite(value))


def positive(default: float | None, none: bool = False) -> Any:
    none = none or default is None
    return _option(
        default,
        "number > 0 or None" if none else "number > 0",
        lambda value: (none and value is None) or (_is_number(value) and value > 0),
    )


def count(default: int | None, none: bool = False) -> Any:
    none = none or default is None

    def fits(value: Any) -> bool:
        return (none and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)

    return _option(default, "integer >= 1 or None" if none else "integer >= 1", fits)


def choice(default: str, *others: str) -> Any:
    accepted = (default, *others)
    return _option(default, ", ".join(map(repr, accepted)), lambda value: value in accepted)


def flag(default: bool) -> Any:
    return _option(default, "True or False", lambda value: isinstance(value, bool))


def token_ids(default: tuple[int, ...]) -> Any:
    def fits(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(one, int) and one >= 0 for one in value)

    return _option(default, "tuple of token ids", fits)


@dataclass(frozen=True, kw_only=True)
class TokenRecipe:
    """A loss of N sampled tokens. Every subclass is one entry of the family, its fields the options.

    `backend` and `workspace_bytes` are those of `opsd_kernels`.

    Raises:
        ValueError: an option is out of its range; the message names it, its value and what is accepted.
    """

    backend: str = choice("auto", "torch", "triton", "native", "cluster")
    workspace_bytes: int | None = count(None)

    paper = ""  # arXiv id, empty where it was not found
    source = ""  # how well the formula is known: "primary", "notes", "secondary" or "unsettled", and from where
    contexts: ClassVar[Any] = ("teacher",)  # names of the constant streams
    needs: ClassVar[Any] = ()  # names of the batch's fields that must be given
    batch_wide: ClassVar[bool] = False  # what a token weighs depends on the other rollouts of the same call

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not one.metadata["fits"](value):
                raise ValueError(f"{one.name} is {value!r}; accepted: {one.metadata['accepted']}")

    def token_loss(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        """The loss of each token, and constants that describe it.

        Args:
            student: rows (N, H) that predict `batch.target_ids`; receives the gradient.
            teachers: a stream of N rows for each name of `contexts`; they never receive a gradient, except NCA's
                "privileged_student".
            batch: with the fields that `needs` names.

        Returns:
            (N,) losses, not reduced and without `batch.token_weight`; a dict of (N,) constants. Where it has "mask"
            (bool), a mean over tokens is meant over those that it keeps; the losses of the others are 0.

        Raises:
            ValueError: a context or a field of the batch is missing, or its shape does not fit.
        """
        self._check(student, teachers, batch)
        losses, stats = self._losses(student, teachers, batch)
        return losses, {name: value.detach().expand(losses.shape) for name, value in stats.items()}

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        raise NotImplementedError

    def _check(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> None:
        kind, rows = type(self).__name__, len(student.hidden)
        for name in self.contexts:
            if name not in teachers:
                given = ", ".join(teachers) or "none"
                raise ValueError(f"teachers has no {name!r} (given: {given}); {kind} needs {', '.join(self.contexts)}")
            if len(teachers[name].hidden) != rows:
                got = len(teachers[name].hidden)
                raise ValueError(f"teachers[{name!r}].hidden has {got} rows; accepted: the student's {rows}")
        for name in ("target_ids", "sequence_ids", *self.needs):
            value = getattr(batch, name)
            if value is None:
                raise ValueError(f"batch.{name} is None; {kind} needs it")
            if name == "layers" or (name in SCALARS and (not isinstance(value, Tensor) or not value.ndim)):
                continue
            if not isinstance(value, Tensor) or value.shape[:1] != (rows,) or value.ndim != 1 + (name == "confidence"):
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                wanted = f"({rows}, teachers)" if name == "confidence" else f"({rows},)"
                raise ValueError(f"batch.{name} is of {found}; accepted: a tensor of shape {wanted}")

    def _divergence(
        self, student: Stream, target: Stream | Target, batch: TokenBatch, **options: Any
    ) -> tuple[Tensor, TokenStats]:
        if options.get("top_k") is not None and options["top_k"] >= columns(student):  # the whole vocabulary
            options |= {"top_k": None, "tail_bucket": False}
        known: dict[str, Any] = {
            "target_ids": batch.target_ids,
            "backend": self.backend,
            "workspace_bytes": self.workspace_bytes,
        }
        return divergence(student, target, **options, **known)

    def _logprob(self, student: Stream, batch: TokenBatch) -> Tensor:
        """(N,) log p_S(y), with a gradient."""
        return logprob(student, batch.target_ids, backend=self.backend, workspace_bytes=self.workspace_bytes)

    def _statistics(
        self, streams: Mapping[str, Stream], batch: TokenBatch, top_k: int | None = None
    ) -> dict[str, dict[str, Tensor]]:
        return statistics(
            streams, batch.target_ids, top_k=top_k, backend=self.backend, workspace_bytes=self.workspace_bytes
        )

    def _logprobs(self, teachers: Mapping[str, Stream], batch: TokenBatch) -> dict[str, Tensor]:
        """(N,) log p(y) under each of `contexts`, constants."""
        found = self._statistics({name: teachers[name] for name in self.contexts}, batch)
        return {name: values["logprob"] for name, values in found.items()}


def columns(stream: Stream | Head) -> int:
    """How many columns of the logits are tokens and take part."""
    return stream.weight.shape[0] if stream.valid_vocab is None else stream.valid_vocab


def described(stats: TokenStats) -> dict[str, Tensor]:
    """The statistics of a divergence that every recipe reports."""
    names = ("divergence", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
    found = {name: getattr(stats, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def kept(losses: Tensor, mask: Tensor) -> Tensor:
    """The losses where `mask`, else 0, also of an infinite one."""
    return torch.where(mask, losses, 0.0)
