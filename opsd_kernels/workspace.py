"""The memory plan: how many tokens' logits exist at a time, from a budget in bytes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
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
    return max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS["cuda"]) // max(1, logits.shape[1]))


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens [0, n) in `count` chunks of at most `rows`, as even as can be: no sliver at the end."""

    tokens: int
    rows: int

    @property
    def count(self) -> int:
        return math.ceil(self.tokens / self.rows) if self.tokens else 0

    def __iter__(self):
        return (slice(a, min(a + self.rows, self.tokens)) for a in range(0, self.tokens, self.rows))


def plan_chunks(
    tokens: int, vocab: int, device: torch.device, element: int, row_bytes: int, budget: int, whole_chunks: bool = False
) -> ChunkPlan:
    """The plan for `tokens` rows of `row_bytes` each within `budget`, the row pass's temporaries included.

    Those are blocks of (rows, vocab) tensors of `element` bytes; `whole_chunks`: of a chunk's rows, not just a few.
    Raises ValueError, naming `workspace_bytes`, where not even one row fits.
    """
    block = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // max(1, vocab)
    # a block never outgrows a chunk, so small problems are charged for the rows they have
    scratch = BLOCK_TEMPORARIES * vocab * element
    fit = (budget - max(1, block) * scratch) // max(1, row_bytes)
    if fit < block or whole_chunks:
        fit = budget // (row_bytes + scratch)
    if fit < 1 and tokens:
        raise ValueError(
            f"workspace_bytes must be at least {row_bytes + scratch} for one token of {vocab} columns, got {budget}"
        )
    fit = min(fit, tokens) or 1
    return ChunkPlan(tokens, math.ceil(tokens / math.ceil(tokens / fit)) if tokens else 1)
