"""Reductions over a vocabulary that is split across ranks (tensor parallel), or not split at all."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WHOLE = -1  # as a vocabulary: all the columns there are


class Across:
    """The whole vocabulary is here: every reduction over ranks is the identity."""

    offset = 0  # of this rank's first column in the vocabulary

    def __init__(self, columns: int, budget: int):
        self.vocab = columns  # columns that take part, of all ranks
        self.columns = columns  # and of this one
        self.widest = columns  # the most that any rank has
        self.budget = budget  # bytes that every rank has for its workspace

    def add(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return values

    def log_sum_exp(self, values: Tensor) -> Tensor:
        return values

    def any(self, flags: Tensor) -> Tensor:
        return flags


class AcrossGroup(Across):
    """Each rank holds consecutive columns, in the order of the ranks. Ranks call each reduction in the same order."""

    def __init__(self, group: Any, rows: int, vocab: int, budget: int):
        self.group = group
        mine = torch.tensor([rows, budget], dtype=torch.int64, device=_device_of(group))
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        sizes, budgets = zip(*(pair.tolist() for pair in everyone), strict=True)
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        vocab = sum(sizes) if vocab == WHOLE else vocab
        if vocab > sum(sizes):
            raise ValueError(f"valid_vocab must be at most the {sum(sizes)} columns of all ranks, got {vocab}")
        taking_part = [max(0, min(vocab - start, size)) for start, size in zip(starts, sizes, strict=True)]
        self.offset = starts[dist.get_rank(group)]
        super().__init__(taking_part[dist.get_rank(group)], min(budgets))
        self.vocab, self.widest = vocab, max(taking_part)

    def add(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def log_sum_exp(self, values: Tensor) -> Tensor:
        most = values.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        base = most.masked_fill(most == -math.inf, 0.0)
        return self.add((values - base).exp_()).log_().add_(base)

    def any(self, flags: Tensor) -> Tensor:
        return self.add(flags.to(torch.int32)) > 0


def across_group(name: str, rows: int, vocab: int, budget: int) -> Across:
    """The reductions for a head of `rows` rows here and `vocab` valid columns in all; no `name`: nothing is split."""
    if not name:
        return Across(min(rows, vocab), budget)
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return AcrossGroup(resolve(name), rows, vocab, budget)


def _device_of(group: Any) -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )
