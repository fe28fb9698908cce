"""Rollouts as plain data: what a model wrote, how its tokens were chosen, and the seeds that they depend on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rollout:
    """What the model wrote: at least one id, the first end token last. `truncated`: it never came to an end token.

    `logprobs` holds, for each id, its log-probability (nats) under the distribution that it was really sampled from,
    temperature and cut-offs (top-k, top-p, min-p) included; None where nothing was sampled or nobody wrote it down.
    """

    ids: list[int]
    truncated: bool
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; `temperature` 0 is greedy. Nothing else changes the distribution.

    The cut-offs act in this order, each on what the ones before it left: temperature, top_k (0: off), top_p (1: off),
    min_p (0: off).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def by_options(cls, options: Any, max_new_tokens: int) -> Sampling:
        """Of the section rollout or eval, which have the same cut-offs."""
        return cls(max_new_tokens, options.temperature, options.top_p, options.top_k, options.min_p)


def first_end(ids: Sequence[int], end_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> Rollout:
    """`ids`, and their `logprobs` where there are any, up to and including the first of `end_ids`."""
    ends = set(end_ids)
    stop = next((position + 1 for position, token in enumerate(ids) if token in ends), None)
    return Rollout(list(ids[:stop]), stop is None, None if logprobs is None else list(logprobs[: stop or len(ids)]))


def derive_seed(*parts: object) -> int:
    """A seed for torch that depends on all of `parts`, the same on every machine."""
    return random.Random("/".join(map(str, parts))).getrandbits(32)
