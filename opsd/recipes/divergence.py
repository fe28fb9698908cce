"""The divergence between student and teacher over the whole vocabulary: OPSD itself, and GKD's generalised JSD."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opsd_kernels import Stream, jsd_loss, jsd_loss_from_top_k

from .batch import TokenBatch, TopK
from .importance import sampler_mismatch

STATISTICS = ("divergence", "student_entropy", "teacher_entropy", "entry_clipped", "clipped_amount", "token_clipped")


@dataclass(frozen=True)
class FullDivergence:
    """`opsd_kernels.jsd_loss` of the two streams, whose docstring has the options and the formula.

    Against a teacher that is a `TopK` it is `jsd_loss_from_top_k`, on the tokens that are known.
    """

    beta: float = 0.5
    temperature: float = 1.0
    entry_clip: float | None = None
    token_clip: float | None = None
    top_k: int | None = None
    top_k_from: str = "teacher"
    tail_bucket: bool = False
    reduction: str = "mean"
    backend: str = "auto"
    workspace_bytes: int | None = None

    contexts = ("teacher",)

    def loss(
        self, student: Stream, teachers: Mapping[str, Any], batch: TokenBatch, denominator: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = teachers["teacher"]
        options = dict(vars(self))  # all of them, by the names that they have there
        if isinstance(teacher, TopK):
            loss_of: Any = jsd_loss_from_top_k
            rows: Any = (student.weight, teacher.ids, teacher.logprobs)
            del options["top_k"], options["top_k_from"]
        else:
            loss_of, rows = jsd_loss, (teacher.hidden, student.weight)
            if teacher.weight is not student.weight:  # one shared tensor lets the kernels project both at once
                options |= {
                    "teacher_weight": teacher.weight,
                    "teacher_bias": teacher.bias,
                    "teacher_logit_scale": teacher.logit_scale,
                    "teacher_softcap": math.inf if teacher.softcap is None else teacher.softcap,
                }
        loss, stats = loss_of(
            student.hidden,
            *rows,
            **student.options() | options,
            token_weight=batch.token_weight,
            sequence_ids=batch.sequence_ids,
            target_ids=batch.target_ids,
            denominator=denominator,
            return_stats=True,
        )
        assert stats.student_logprob is not None  # target_ids were given
        found = {name: getattr(stats, name) for name in STATISTICS}
        return loss, found | sampler_mismatch(stats.student_logprob, batch, self.temperature)
