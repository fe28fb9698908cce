"""The memory plan: how many tokens' logits exist at a time, from a budget in bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .objective import integer

ENVIRONMENT_VARIABLE = "OPSD_WORKSPACE_BYTES"
DEFAULT_BYTES = {"cuda": 1536 << 20, "cpu": 384 << 20}
# The torch row pass works on a few rows at a time, so that its temporaries stay small (and, on a CPU, in the cache).
BLOCK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 18}
BLOCK_TEMPORARIES = 20  # at most this many (rows, V) tensors of a block are alive at once


def budget_bytes(device: torch.device, workspace_bytes: Any) -> int:
    """The budget in bytes: the argument, else the environment variable, else the device's default."""
    if workspace_bytes is not None:
        return integer("workspace_bytes", workspace_bytes)
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return DEFAULT_BYTES.get(device.type, DEFAULT_BYTES["cuda"])
    try:
        return integer(ENVIRONMENT_VARIABLE, int(text))
    except ValueError:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be a positive number of bytes, got {text!r}") from None


def block_rows(logits: Tensor) -> int:
    """Rows of an (n, V) tensor that the torch row pass takes at a time."""
    return _block_rows(logits.device, logits.shape[1])


def _block_rows(device: torch.device, vocab: int) -> int:
    return max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // max(1, vocab))


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens [0, n) in `count` chunks whose sizes differ by one at most: no sliver at the end."""

    tokens: int
    count: int

    @property
    def rows(self) -> int:
        """Of the largest chunk; 1 where there is none."""
        return math.ceil(self.tokens / self.count) if self.count else 1

    def __iter__(self) -> Iterator[slice]:
        edges = [i * self.tokens // self.count for i in range(self.count + 1)] if self.count else []
        return (slice(a, b) for a, b in pairwise(edges))


def plan_chunks(
    tokens: int, vocab: int, device: torch.device, element: int, row_bytes: int, budget: int, temporaries: str = "block"
) -> ChunkPlan:
    """The plan for `tokens` rows of `row_bytes` each within `budget`.

    `temporaries`: what the row pass needs besides, in (rows, vocab) tensors of `element` bytes: "none", those of a
    "block" of a few rows, or those of a whole "chunk".
    Raises ValueError, naming `workspace_bytes`, where not even one row fits.
    """
    scratch = 0 if temporaries == "none" else BLOCK_TEMPORARIES * vocab * element
    block = 0 if temporaries == "chunk" else _block_rows(device, vocab)
    fit = (budget - block * scratch) // max(1, row_bytes)
    if fit < block or not block:  # a block never outgrows a chunk: charge each row for its own temporaries
        fit = budget // max(1, row_bytes + scratch)
    if fit < 1 and tokens:
        raise ValueError(
            f"workspace_bytes must be at least {row_bytes + scratch} for one token of {vocab} columns, got {budget}"
        )
    return ChunkPlan(tokens, math.ceil(tokens / max(fit, 1)))
