"""One step of On-Policy Self-Distillation, to be read from the top:

    sample rollouts from the student -> score them in both contexts -> divergence -> backward

The teacher reads [its own prompt | rollout], the student [its prompt | rollout], the same ids of the rollout in both.
Only the rows that predict rollout tokens reach the lm_head, inside `opsd_kernels`, so that full logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opsd.config import Config, ObjectiveConfig
from opsd.metrics import Clock
from opsd.models import autocast
from opsd.prompts import Example
from opsd.rollouts import Rollout, Sampling, derive_seed, generate
from opsd.scoring import rollout_hidden, rollout_index
from opsd.teachers import Teacher
from opsd_kernels import Head, dual_hidden_states, jsd_loss, lm_head_of, pack_dual_context, token_logprobs


@dataclass(frozen=True)
class Run:
    """What a step works with. The trainer owns the optimiser; a step leaves gradients on `model`."""

    config: Config
    model: nn.Module
    tokenizer: Any
    head: Head
    teacher: Teacher
    device: torch.device
    end_ids: list[int]
    pad_id: int
    packed: bool = False


@dataclass
class StepResult:
    """What a step did. `loss` and the tensors of `metrics` are 0-d and stay on the device."""

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    clock: Clock | None = None
    rollouts: list[Rollout] = field(default_factory=list)


Step = Callable[[Run, Sequence[Example], int], StepResult]
"""step(run, examples, number): adds the gradient of its loss to the parameters of `run.model`; numbers start at 1."""


def opsd_step(run: Run, examples: Sequence[Example], number: int) -> StepResult:
    """Sample one rollout for each of `examples`, compare the two contexts on it, and go backward.

    The loss is that of the whole batch whatever `optim.micro_batch_size` is: each micro-batch divides by the count of
    tokens (or of rollouts) of the batch.
    """
    config, clock = run.config, Clock(run.device)

    with clock("rollout"):
        rollouts = sample(run, examples, number)
    written = [rollout.ids for rollout in rollouts]
    tokens = sum(map(len, written))
    denominator = tokens if config.objective.reduction == "mean" else len(written)

    loss: Tensor = torch.zeros((), device=run.device)
    sums: dict[str, Tensor] = {}
    for chosen in micro_batches(list(map(len, written)), config.optim.micro_batch_size):
        ids, batch = [written[i] for i in chosen], [examples[i] for i in chosen]
        with clock("score"), autocast(config, run.device):
            student_hidden, teacher_hidden = score(run, batch, ids)
        with clock("loss"):
            with autocast(config, run.device):
                part, stats = divergence(run, student_hidden, teacher_hidden, ids, denominator)
            part.backward()
        loss = loss + part.detach()
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value.sum(dtype=torch.float64)

    metrics: dict[str, Tensor | float] = {name: total / tokens for name, total in sums.items()}
    metrics["rollout_length"] = tokens / len(rollouts)
    metrics["truncated"] = sum(rollout.truncated for rollout in rollouts) / len(rollouts)
    return StepResult(loss, tokens, metrics, clock, rollouts)


def score(run: Run, examples: Sequence[Example], rollouts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the rollouts' tokens, (R, H) each: the student's, with a gradient, the teacher's.

    Packed, both contexts run without padding, and a gradient-checkpointed model takes them in one pass.
    """
    student, teacher = [example.student for example in examples], [example.teacher for example in examples]
    if run.packed:
        batch = pack_dual_context(student, teacher, rollouts)
        return dual_hidden_states(run.model, batch, teacher=run.teacher.source)
    teacher_hidden = run.teacher.hidden(teacher, rollouts)
    return rollout_hidden(run.model, student, rollouts), teacher_hidden


def sample(run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
    """One rollout for each example from the student's prompt alone, by the weights as they are now."""
    options = run.config.rollout
    with autocast(run.config, run.device):
        return generate(
            run.model,
            [example.student for example in examples],
            Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.min_p),
            end_ids=run.end_ids,
            pad_id=run.pad_id,
            batch_size=options.batch_size,
            seed=derive_seed(run.config.run.seed, "rollout", number),
        )


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the rollouts to score together: similar lengths, the longest first, so that memory runs out at once if
    it ever does."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def divergence(
    run: Run, student_hidden: Tensor, teacher_hidden: Tensor, rollouts: Sequence[Sequence[int]], denominator: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the batch's loss that these rollouts contribute, and statistics of their tokens.

    Args:
        student_hidden: (R, H); receives the gradient.
        teacher_hidden: (R, H).
        rollouts: the R token ids that the rows predict.
        denominator: tokens of the whole batch for the reduction "mean", rollouts for "sequence_mean".

    Returns:
        The loss, 0-d, and for each name of a statistic an (R,) tensor.
    """
    o = run.config.objective
    student, teacher = run.head, run.teacher.head
    targets, sequences = rollout_index(rollouts, student_hidden.device)
    if o.form == "sampled_token":
        return _sampled_token(o, student_hidden, student, teacher_hidden, teacher, targets, sequences, denominator)
    other: dict[str, Any] = {}
    if teacher.weight is not student.weight:  # one shared tensor lets the kernels project both at once
        other = {
            "teacher_weight": teacher.weight,
            "teacher_bias": teacher.bias,
            "teacher_logit_scale": teacher.logit_scale,
            "teacher_softcap": math.inf if teacher.softcap is None else teacher.softcap,
        }
    loss, stats = jsd_loss(
        student_hidden,
        teacher_hidden,
        student.weight,
        **student.options(),
        **other,
        beta=o.beta,
        temperature=o.temperature,
        entry_clip=o.entry_clip,
        token_clip=o.token_clip,
        top_k=o.top_k,
        top_k_from=o.top_k_from,
        tail_bucket=o.tail_bucket,
        sequence_ids=sequences,
        target_ids=targets,
        reduction=o.reduction,
        denominator=denominator,
        return_stats=True,
        backend=o.backend,
        workspace_bytes=o.workspace_bytes,
    )
    names = ("divergence", "student_entropy", "teacher_entropy", "entry_clipped", "clipped_amount", "token_clipped")
    return loss, {name: getattr(stats, name) for name in names}


def _sampled_token(
    o: ObjectiveConfig,
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    targets: Tensor,
    sequences: Tensor,
    denominator: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log p_S(y) with the advantage A = log p_T(y) - log p_S(y) held constant: policy gradient of the reverse KL."""
    options: dict[str, Any] = {
        "temperature": o.temperature,
        "return_entropy": True,
        "backend": o.backend,
        "workspace_bytes": o.workspace_bytes,
    }
    with torch.no_grad():
        teacher_logp, teacher_entropy = token_logprobs(
            teacher_hidden, teacher.weight, targets, **teacher.options(), **options
        )
    student_logp, student_entropy = token_logprobs(
        student_hidden, student.weight, targets, **student.options(), **options
    )
    advantage = teacher_logp - student_logp.detach()
    losses = -advantage * student_logp
    if o.reduction == "sequence_mean":
        losses = losses / torch.bincount(sequences)[sequences]
    stats = {"divergence": -advantage, "student_entropy": student_entropy, "teacher_entropy": teacher_entropy}
    return losses.sum() / denominator, stats


def supervised_loss(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], denominator: float
) -> Tensor:
    """Cross-entropy of `completions` after `prompts`, summed over their tokens and divided by `denominator`: the loss
    of supervised fine-tuning, for steps that are compared with `opsd_step`."""
    hidden = rollout_hidden(model, prompts, completions)
    targets, _ = rollout_index(completions, hidden.device)
    head = lm_head_of(model)
    logprobs = token_logprobs(hidden, head.weight, targets, **head.options())
    return -logprobs.sum() / denominator  # type: ignore[union-attr]
