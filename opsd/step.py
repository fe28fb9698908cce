"""One step of On-Policy Self-Distillation, to be read from the top:

    sample rollouts from the student -> score them in both contexts -> divergence -> backward

The teacher reads [its own prompt | rollout], the student [its prompt | rollout], the same ids of the rollout in both.
Only the rows that predict rollout tokens reach the lm_head, inside the recipe, so that full logits never exist.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opsd import distributed
from opsd.clock import Clock, host_values
from opsd.models import autocast
from opsd.prompts import Example
from opsd.rewards import Rewards, rewarded
from opsd.rollouts import Rollout
from opsd.run import MicroBatch, Run, StepResult
from opsd.scoring import rollout_index, score, top_k_overlap
from opsd.siblings import Readers, readers


def opsd_step(run: Run, examples: Sequence[Example], number: int) -> StepResult:
    """Sample rollouts for each of `examples`, compare the two contexts on them, and go backward.

    The loss is that of the whole batch whatever `optim.micro_batch_size` is: each micro-batch divides by the count of
    tokens (or of rollouts) of the batch.
    """
    clock = Clock(run.device)
    with clock("rollout"):
        rollouts = run.engine.rollouts(run, examples, number)
    totals = Totals(sum(len(rollout.ids) for rollout in rollouts), run.device)
    denominator = totals.tokens if run.recipe.reduction == "mean" else len(rollouts)
    rewards = distributed.of_first(lambda: rewarded(run, examples, rollouts))
    read = readers(run, examples, rollouts, rewards)
    distributed.seed_apart(run.config.run.seed, number)
    for batch in micro_batches(run, examples, rollouts, number, rewards, read):
        student, teachers = score(run, batch, clock)
        with clock("loss"), autocast(run.config.model, run.device):
            loss, stats = run.recipe.loss(student, teachers, batch, denominator)
            if totals.overlap is None:  # on the first micro-batch only
                totals.overlap = top_k_overlap(student, teachers["teacher"])
        with clock("backward"):
            # Divided weights get the mean of the processes' gradients, where the sum is wanted.
            (loss * (0 if batch.repeated else distributed.size() if run.sharded else 1)).backward()
        if not batch.repeated:
            totals.add(loss, stats)
    totals.add_other_processes()
    if not run.sharded:
        distributed.sum_gradients(run.model)
    metrics = totals.metrics(examples, rollouts)
    if rewards is not None:
        metrics["reward"] = sum(rewards.rewards) / len(rollouts)
    if read is not None:
        metrics["read_siblings"] = sum(read.complete) / len(rollouts)
    return StepResult(totals.loss, totals.tokens, metrics, clock, rollouts)


class Totals:
    """What the micro-batches of a step add up to; on the device, so that nothing waits for it."""

    def __init__(self, tokens: int, device: torch.device):
        self.tokens, self.loss = tokens, torch.zeros((), device=device)
        self.sums: dict[str, Tensor] = {}
        self.overlap: Tensor | None = None

    def add(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """A micro-batch's share of the loss, and its statistics by token."""
        self.loss = self.loss + loss.detach()
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)

    def add_other_processes(self) -> None:
        """The shares of all processes; the overlap of the first."""
        if distributed.size() == 1:
            return
        overlap = {} if self.overlap is None else {"overlap": self.overlap}
        shares = distributed.gathered((host_values({"loss": self.loss, **overlap}), host_values(self.sums)))
        first = shares[0][0]
        self.loss = self.loss.new_tensor(sum(share["loss"] for share, _ in shares))
        self.overlap = self.loss.new_tensor(first["overlap"]) if "overlap" in first else None
        for name in dict.fromkeys(name for _, sums in shares for name in sums):
            total = sum(sums.get(name, 0.0) for _, sums in shares)
            self.sums[name] = torch.tensor(total, dtype=torch.float64, device=self.loss.device)

    def metrics(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> dict[str, Tensor | float]:
        """The means of the statistics over tokens, and what the rollouts were like."""
        lengths = [len(rollout.ids) for rollout in rollouts]
        return {
            **({} if self.overlap is None else {"top_k_overlap": self.overlap}),
            **{name: total / self.tokens for name, total in self.sums.items()},
            "rollout_length": self.tokens / len(rollouts),
            "rollout_length_min": min(lengths),
            "rollout_length_max": max(lengths),
            "truncated": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
            "teacher_context_length": sum(len(example.teacher) for example in examples) / len(examples),
        }


def micro_batches(
    run: Run,
    examples: Sequence[Example],
    rollouts: Sequence[Rollout],
    number: int = 1,
    rewards: Rewards | None = None,
    read: Readers | None = None,
) -> Iterator[MicroBatch]:
    """The rollouts in groups of at most `optim.micro_batch_size`, or 1 where `run.alone`; packed, those of a prompt
    stay together."""
    each = run.config.rollout.per_prompt
    size, together = 1 if run.alone else run.config.optim.micro_batch_size, each if run.packed else 1
    if not getattr(run.recipe, "batch_wide", False):
        size = min(size, -(-len(rollouts) // distributed.size()))  # something to do for every process
    groups = group_rollouts([len(rollout.ids) for rollout in rollouts], size, together)
    mine = distributed.own(groups)
    idle = -(-len(groups) // distributed.size()) - len(mine) if run.sharded else 0
    for chosen, repeated in [*((group, False) for group in mine), *[(groups[-1], True)] * idle]:
        written = [rollouts[i] for i in chosen]
        targets, sequences = rollout_index([rollout.ids for rollout in written], run.device)
        known = all(rollout.logprobs is not None for rollout in written)
        logprobs = [value for rollout in written for value in rollout.logprobs or ()]
        known_of: dict[str, Any] = {}
        own = [examples[i // each] if read is None else read.examples[i] for i in chosen]
        lengths = torch.tensor([len(rollout.ids) for rollout in written])
        if own[0].confidence:
            values = torch.tensor([example.confidence for example in own])
            known_of["confidence"] = values.repeat_interleave(lengths, 0).to(run.device)
        if rewards is not None:
            for name in ("advantage", "correct"):
                values = torch.tensor([getattr(rewards, name)[i] for i in chosen])
                known_of[name] = values.repeat_interleave(lengths).to(run.device)
        yield MicroBatch(
            target_ids=targets,
            sequence_ids=sequences,
            sampler_logprobs=torch.tensor(logprobs, device=run.device) if known else None,
            sampler_temperature=run.config.rollout.temperature,
            has_feedback=_has_feedback(read, chosen, lengths, targets),
            step=number - 1,
            progress=(number - 1) / run.config.optim.steps,
            **known_of,
            examples=own,
            rollouts=written,
            repeated=repeated,
        )


def _has_feedback(read: Readers | None, chosen: Sequence[int], lengths: Tensor, targets: Tensor) -> Tensor:
    if read is None:
        return torch.ones_like(targets, dtype=torch.bool)  # a teacher without anything to read is refused
    return torch.tensor([read.complete[i] for i in chosen]).repeat_interleave(lengths).to(targets.device)


def group_rollouts(lengths: Sequence[int], size: int, together: int = 1) -> list[list[int]]:
    """Numbers of the rollouts to score together, at most `size`: similar lengths, the longest first, so that memory
    runs out at once if it ever does.

    Every `together` successive rollouts belong to one prompt. They stay in one group where `size` allows it.
    """
    prompts = [range(start, start + together) for start in range(0, len(lengths), together)]
    prompts.sort(key=lambda own: -sum(lengths[i] for i in own))
    order = [i for own in prompts for i in sorted(own, key=lambda i: -lengths[i])]
    if together <= size:
        size -= size % together
    return [order[start : start + size] for start in range(0, len(order), size)]
