"""One validated description of a divergence between two next-token distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

REDUCTIONS = ("mean", "sequence_mean", "sum", "none")
TOP_K_SOURCES = ("teacher", "student")


def number(name: str, value: Any, accepted: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns `value` as a float if it is a real number in [low, high], else raises naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return float(value)


def positive(name: str, value: Any, *, finite: bool = True) -> float:
    """Returns `value` as a float if it is a number above zero, else raises naming the argument."""
    accepted = "a positive finite number" if finite else "a positive number"
    return number(name, value, accepted, low=math.nextafter(0.0, 1.0), high=1.7e308 if finite else math.inf)


def integer(name: str, value: Any, *, low: int = 1, high: float = math.inf) -> int:
    """Returns `value` if it is an int in [low, high], else raises naming the argument."""
    accepted = f"an integer >= {low}" if high == math.inf else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """Returns `value` if it is a bool, else raises naming the argument."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


class LogitTransform(NamedTuple):
    """What a model does to its head's output a = h·Wᵀ + b: z = softcap·tanh(logit_scale·a / softcap).

    Without a cap, z = logit_scale·a. A column that is −inf in `a` stays −inf: masking outlives the cap.

    A named tuple, since torch.compile meets it as a default value, and torch 2.11 takes no dataclass there.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def inner_outer(self, temperature: float) -> tuple[float, float]:
        """The factors inside and outside the tanh of z / temperature; without a cap, the one factor and an unused 1."""
        if self.softcap is None:
            return self.logit_scale / temperature, 1.0
        return self.logit_scale / self.softcap, self.softcap / temperature


_UNCHANGED = LogitTransform()


def logit_transform(logit_scale: Any, softcap: Any, prefix: str = "") -> LogitTransform:
    """Validates one model's scale and cap; an infinite cap means none."""
    scale = positive(f"{prefix}logit_scale", logit_scale)
    cap = None if softcap is None else positive(f"{prefix}softcap", softcap, finite=False)
    return LogitTransform(scale, None if cap == math.inf else cap)


@dataclass(frozen=True)
class Objective:
    """The divergence of one token, as a function of its two rows of logits.

    beta: 0 forward KL(p_T‖p_S), 1 reverse KL(p_S‖p_T), between the generalised JSD with m = (1−β) p_S + β p_T.
    temperature: divides both logits before the softmax; no T² factor.
    entry_clip: upper bound, in nats, of each vocabulary entry's term; the term's gradient is 0 above it.
    token_clip: upper bound, in nats, of the token's loss; its gradient is 0 above it.
    top_k: restrict both distributions to the k likeliest tokens of `top_k_from` and renormalise;
        with tail_bucket the rest of the mass is kept as one more entry.

    Build it with `Objective.checked`, which names a bad option.
    """

    beta: float = 0.5
    temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None
    top_k: int | None = None
    top_k_from: str = "teacher"
    tail_bucket: bool = False
    student: LogitTransform = _UNCHANGED
    teacher: LogitTransform = _UNCHANGED

    @classmethod
    def checked(
        cls,
        *,
        beta: Any = 0.5,
        temperature: Any = 1.0,
        entry_clip: Any = None,
        token_clip: Any = None,
        top_k: Any = None,
        top_k_from: Any = "teacher",
        tail_bucket: Any = False,
        logit_scale: Any = 1.0,
        softcap: Any = None,
        teacher_logit_scale: Any = None,
        teacher_softcap: Any = None,
    ) -> Objective:
        """Validates every option; raises TypeError or ValueError naming the option, the value and what is accepted."""
        if top_k_from not in TOP_K_SOURCES:
            raise ValueError(f"top_k_from must be one of {TOP_K_SOURCES}, got {top_k_from!r}")
        if flag("tail_bucket", tail_bucket) and top_k is None:
            raise ValueError("tail_bucket=True needs top_k: without a support there is no tail")
        student = logit_transform(logit_scale, softcap)
        return cls(
            beta=number("beta", beta, "a number in [0, 1]", low=0.0, high=1.0),
            temperature=positive("temperature", temperature),
            entry_clip=None if entry_clip is None else positive("entry_clip", entry_clip),
            token_clip=None if token_clip is None else positive("token_clip", token_clip),
            top_k=None if top_k is None else integer("top_k", top_k),
            top_k_from=top_k_from,
            tail_bucket=tail_bucket,
            student=student,
            teacher=logit_transform(
                student.logit_scale if teacher_logit_scale is None else teacher_logit_scale,
                student.softcap if teacher_softcap is None else teacher_softcap,
                "teacher_",
            ),
        )
