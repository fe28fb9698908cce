"""The policy gradient of the reverse KL, from the sampled token of each position alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Stream, token_logprobs

from .batch import TokenBatch, reduced
from .importance import sampler_mismatch


@dataclass(frozen=True)
class SampledToken:
    """-A log p_S(y) with the advantage A = log p_T(y) - log p_S(y) held constant."""

    temperature: float = 1.0
    reduction: str = "mean"
    backend: str = "auto"
    workspace_bytes: int | None = None

    contexts = ("teacher",)

    def loss(
        self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher_logp, teacher_entropy = self._logprobs(teachers["teacher"], batch.target_ids)
        student_logp, student_entropy = self._logprobs(student, batch.target_ids)
        advantage = teacher_logp - student_logp.detach()
        loss = reduced(-advantage * student_logp, batch, self.reduction, denominator)
        stats = {"divergence": -advantage, "student_entropy": student_entropy, "teacher_entropy": teacher_entropy}
        return loss, stats | sampler_mismatch(student_logp.detach(), batch, self.temperature)

    def _logprobs(self, stream: Stream, target_ids: Tensor) -> Any:
        return token_logprobs(
            stream.hidden,
            stream.weight,
            target_ids,
            **stream.options() | {"temperature": self.temperature},
            return_entropy=True,
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
        )
