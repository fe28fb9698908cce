"""The memory plan: how many tokens' logits exist at a time, from a budget in bytes, and where they are."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .objective import integer

ENVIRONMENT_VARIABLE = "OPSD_WORKSPACE_BYTES"
DEFAULT_BYTES = {"cuda": 1536 << 20, "cpu": 384 << 20}
# What is computed in torch takes a few rows at a time: its temporaries stay small (and, on a CPU, in the cache).
BLOCK_ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 18}
BLOCK_TEMPORARIES = 20  # at most this many (rows, width) tensors of a block are alive at once
HUGE_FROM = 32 << 20  # bytes from which memory is mapped for itself, so that its advice is no one else's
ALIGNED_ELEMENTS = 8  # what the row pass reads and writes with one instruction, in bfloat16
GATHERED_SHARE = 16  # one part in so many of the budget is for the head's rows that a gradient filter gathers at a time


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
    return block_rows_of(logits.device, logits.shape[1])


def filter_bytes(vocab: int, weight: Tensor) -> int:
    """What the gradient filter needs to look at a block of dz, `vocab` wide: its size, in dz's dtype, and a bool."""
    return block_rows_of(weight.device, vocab) * vocab * (weight.itemsize + 1)


def block_rows_of(device: torch.device, width: int) -> int:
    """Rows of `width` elements in a block."""
    return max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // max(1, width))


def row_stride(width: int, device: torch.device) -> int:
    """Elements from one row of logits to the next: on a GPU, such that every row begins at a multiple of 16 bytes."""
    return -(-width // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS if device.type == "cuda" else width


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
    tokens: int, width: int, device: torch.device, element: int, row_bytes: int, budget: int, temporaries: str = "block"
) -> ChunkPlan:
    """The plan for `tokens` rows of `row_bytes` each within `budget`.

    `temporaries`: what the row pass needs besides, in (rows, width) tensors of `element` bytes: "none", those of a
    "block" of a few rows, or those of a whole "chunk".
    Raises ValueError, naming `workspace_bytes`, where not even one row fits.
    """
    scratch = 0 if temporaries == "none" else BLOCK_TEMPORARIES * width * element
    block = 0 if temporaries == "chunk" else block_rows_of(device, width)
    fit = (budget - block * scratch) // max(1, row_bytes)
    if fit < block or not block:  # a block never outgrows a chunk: charge each row for its own temporaries
        fit = budget // max(1, row_bytes + scratch)
    if fit < 1 and tokens:
        raise ValueError(f"workspace_bytes must be at least {row_bytes + scratch} for one token, got {budget}")
    return ChunkPlan(tokens, math.ceil(tokens / max(fit, 1)))


_kept: list[Tensor] = []  # at most one; a call takes it out, so that no two ever share it


@contextmanager
def workspace(
    device: torch.device, buffers: Sequence[tuple[tuple[int, int], torch.dtype]], budget: int
) -> Iterator[list[Tensor]]:
    """Uninitialised tensors of these shapes and dtypes, for as long as the context lasts.

    A CPU's allocator returns such sizes to the system at once, and touching new pages costs up to a twelfth of a loss.
    So the last call's memory serves the next one where it fits, within the next one's budget; until then the system may
    take its pages back. A GPU's allocator does the like by itself.
    """
    if device.type != "cpu" or _madvise() is None:
        yield [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in buffers]
        return
    ends = list(accumulate((-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape, dtype in buffers), initial=0))
    memory = _kept.pop() if _kept else None
    if memory is None or not ends[-1] <= memory.nbytes <= max(budget, ends[-1]):
        memory = None  # the old one goes before the new one comes
        with torch.inference_mode(False):
            memory = torch.empty(ends[-1], dtype=torch.uint8)
        if hasattr(mmap, "MADV_HUGEPAGE") and memory.nbytes >= HUGE_FROM:
            _advise(memory, mmap.MADV_HUGEPAGE)  # fewer faults, and rows lie far apart: fewer pages to look up
    yield [
        memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, (shape, dtype) in zip(ends, buffers, strict=False)
    ]
    if _reclaimable(memory[: ends[-1]]):
        _kept[:] = [memory]


def release() -> None:
    """Gives the memory that is kept for the next call back to the system."""
    _kept.clear()


@cache
def _madvise() -> Callable[..., int] | None:
    """The system's, where it knows pages that it may take back; without, nothing is kept."""
    return getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" and hasattr(mmap, "MADV_FREE") else None


def _reclaimable(memory: Tensor) -> bool:
    """Tells the system that nothing in the memory's whole pages is needed any more; whether it could be told."""
    return _advise(memory, mmap.MADV_FREE)


def _advise(memory: Tensor, advice: int) -> bool:
    """About the memory's whole pages; whether the system took it."""
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (memory.data_ptr() + memory.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise()
    assert advise is not None
    return length <= 0 or advise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0
