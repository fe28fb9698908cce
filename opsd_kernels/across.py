"""Reductions over a vocabulary that is split across ranks (tensor parallel), or not split at all."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WHOLE = -1  # as a vocabulary: all the columns there are


class Across:
    """The whole vocabulary is here: every reduction over ranks is the identity."""

    offset = 0  # of this rank's first column in the vocabulary

    def __init__(self, columns: int, budget: int):
        self.vocab = columns  # columns that take part, of all ranks
        self.columns = columns  # and of this one
        self.widest = columns  # the most that any rank has
        self.budget = budget  # bytes that every rank has for its workspace

    def keywords(self) -> dict[str, Any]:
        """For a backend: only torch's, which alone is used for a vocabulary that is split, knows the argument."""
        return {}

    def add(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest over ranks."""
        return values

    def log_sum_exp(self, values: Tensor) -> Tensor:
        return values

    def any(self, flags: Tensor) -> Tensor:
        return flags

    def top_k(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row of `values` (n, columns), largest first, and their ids in the vocabulary."""
        return values.topk(k, dim=-1)

    def take(self, values: Tensor, ids: Tensor) -> Tensor:
        """`values` (n, columns) at `ids` (n, k) of the vocabulary."""
        return values.gather(-1, ids)

    def put(self, out: Tensor, ids: Tensor, values: Tensor) -> None:
        """The columns of `out` (n, columns) that are at `ids` (n, k) become `values` (n, k); no id twice in a row."""
        out.scatter_(-1, ids, values)

    def at(self, ids: Tensor, like: Tensor) -> Tensor:
        """Which columns of `like` (n, columns) are at `ids` (n, k); bool."""
        return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, ids, True)


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
        self.vocab, self.widest, self.taking_part = vocab, max(taking_part), taking_part

    def keywords(self) -> dict[str, Any]:
        return {"across": self}

    def add(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        most = values.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return most

    def log_sum_exp(self, values: Tensor) -> Tensor:
        most = self.max(values)
        base = most.masked_fill(most == -math.inf, 0.0)
        return self.add((values - base).exp_()).log_().add_(base)

    def any(self, flags: Tensor) -> Tensor:
        return self.add(flags.to(torch.int32)) > 0

    def top_k(self, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        own, own_ids = values.topk(min(k, self.columns), dim=-1)
        missing = (0, min(k, self.widest) - own.shape[1])  # ranks send the same shape; the rest is cut off again
        everyone = []
        for mine in (nn.functional.pad(own, missing), nn.functional.pad(own_ids + self.offset, missing)):
            parts = [torch.empty_like(mine) for _ in self.taking_part]
            dist.all_gather(parts, mine.contiguous(), group=self.group)
            everyone.append(torch.cat([p[:, :columns] for p, columns in zip(parts, self.taking_part, strict=True)], -1))
        candidates, ids = everyone
        # stable, so that every rank has the same order among equals
        best, order = candidates.sort(dim=-1, descending=True, stable=True)
        return best[:, :k], ids.gather(-1, order[:, :k])

    def take(self, values: Tensor, ids: Tensor) -> Tensor:
        local, mine = self._local(ids)
        found = values.gather(-1, local) if self.columns else torch.zeros_like(ids, dtype=values.dtype)
        return self.add(found.masked_fill_(~mine, 0.0))

    def put(self, out: Tensor, ids: Tensor, values: Tensor) -> None:
        if self.columns:
            local, mine = self._local(ids)
            # what another rank has is added as 0: where it would go, something else may stand
            out.masked_fill_(self.at(ids, out), 0.0).scatter_add_(-1, local, values.masked_fill(~mine, 0.0))

    def at(self, ids: Tensor, like: Tensor) -> Tensor:
        count = torch.zeros_like(like, dtype=torch.uint8)
        if self.columns:
            local, mine = self._local(ids)
            count.scatter_add_(-1, local, mine.to(count.dtype))
        return count > 0

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's columns for ids of the vocabulary, and whether they are here; 0 for those that are not."""
        local = ids - self.offset
        mine = (local >= 0) & (local < self.columns)
        return local.masked_fill_(~mine, 0), mine


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
