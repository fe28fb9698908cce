"""A teacher that is no model here: of each position its likeliest tokens are known, and their log-probabilities."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from opsd.prompts import Example
from opsd.recipes.base import columns
from opsd.recipes.batch import TopK
from opsd.rollouts import Rollout
from opsd.vocabulary import gaps_of
from opsd_kernels import Head


class TopKTeacher:
    """An `opsd.run.Teacher` of which `source` is None. As it stands it finds all tokens equally likely, for trials;
    kinds that know better override `top_k`.

    `head` is the student's, whose columns are the vocabulary; `k` is how many tokens of a position are known.
    """

    source = None

    def __init__(self, head: Head, k: int, device: torch.device):
        self.head, self.k, self.device = head, k, device

    def top_k(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> TopK:
        """(R, k) for the R tokens of `rollouts`, each read after the teacher's prompt of its example."""
        rows = sum(len(rollout.ids) for rollout in rollouts)
        gaps = set(gaps_of(self.head))
        tokens = [i for i in range(self.k + len(gaps)) if i not in gaps]
        ids = torch.tensor(tokens[: self.k], device=self.device).expand(rows, self.k)
        return TopK(ids, torch.full((rows, self.k), -math.log(columns(self.head)), device=self.device))

    def unasked(self) -> "TopKTeacher":
        """One of the same shape that neither reads nor asks."""
        return TopKTeacher(self.head, self.k, self.device)

    def active(self) -> AbstractContextManager[nn.Module]:
        self._refuse()

    def hidden(self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is no model here: its likeliest tokens alone are known (top_k)")

    def update(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"this teacher keeps nothing, got {len(state)} tensors")
