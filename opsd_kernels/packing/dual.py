"""Packed rows through a transformers model: as two passes (`two_pass`), or both contexts in one (`joint`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..probe import evaluating
from .attention import BACKENDS, backend_obstacle, choose_backend, register
from .joint import DualHidden, run_joint
from .layout import DualContextBatch
from .prove import try_joint, try_rows
from .switches import adapters_off, no_weight_cache
from .two_pass import run_context
from .vet import Body, active_dropouts, check_base, joint_obstacle


@dataclass(frozen=True)
class Plan:
    """What `dual_hidden_states` will do; `reason` is for people to read."""

    passes: Literal["two", "joint"]
    share_contexts: bool  #: teacher rows use the student's rows of the common beginning of both prompts
    backend: str
    reason: str


def dual_hidden_states(
    model: nn.Module,
    batch: DualContextBatch,
    *,
    teacher: str | nn.Module = "live",
    passes: str = "auto",
    backend: str = "auto",
) -> DualHidden:
    """The hidden states that predict the rollout tokens of `batch` in both contexts.

    With the first call each model is tried on a few tokens, in eval mode: packed rows must give the hidden states of
    plain passes, and those of one pass over both contexts the gradients, too. Sharded weights are not tried, with a
    `UserWarning`, since that would take all processes.

    Args:
        model: a causal language model of transformers, with or without peft, in the mode (train or eval) that the
            student is to run in. The teacher always runs with dropout off and without a gradient.
        teacher: "live", the weights of `model`; "base", `model` with its LoRA adapters off; or another such model.
        passes: "two", "joint", or "auto": joint if the model checkpoints its layers anyway and the teacher runs on the
            same base weights.
        backend: of the attention: "auto", "sdpa", "varlen", "flash", "triton" or "eager"; see
            `packing.attention`.

    Returns:
        Two tensors, (R, H) and (K·R, H of the teacher), on the device of the models; K is `batch.contexts`, usually 1.

    Raises:
        TypeError, ValueError: an argument is not of this form, or the model does something that packed rows cannot
            give it; the message names it and says why.
    """
    if not isinstance(batch, DualContextBatch):
        raise TypeError(f"batch must be a DualContextBatch from pack_dual_context, got {type(batch).__name__}")
    student, other = _bodies(model, teacher, passes, backend)
    plan = _plan(student, other, teacher, passes, backend)
    for name, body, side in (("model", student, batch.student), ("teacher", other, batch.teacher)):
        body.check(name, batch.largest_id, side.layout.longest)
    if not batch.student.layout.rows:
        empty = [b.embedding.weight.new_zeros(0, b.width) for b in (student, other)]
        return DualHidden(empty[0].requires_grad_(torch.is_grad_enabled()), empty[1])
    register()
    if plan.passes == "joint":
        joint = batch.to(student.device).joint(share_contexts=plan.share_contexts)
        return run_joint(student, joint, backend, base_teacher=teacher == "base")
    with (
        torch.no_grad(),
        evaluating(other.model),
        adapters_off(other.model, teacher == "base"),
        no_weight_cache(other.device),
    ):
        side = batch.teacher.to(other.device)
        teacher_hidden = run_context(other, side, backend)
    return DualHidden(run_context(student, batch.student.to(student.device), backend), teacher_hidden)


def context_hidden_states(model: nn.Module, batch: DualContextBatch, *, backend: str = "auto") -> Tensor:
    """(R, H): as `dual_hidden_states`, of the student's context alone, with a graph where gradients are on.

    For a teacher that is no model here, of which the log-probabilities are known. Raises as `dual_hidden_states` does.
    """
    body, _ = _bodies(model, "live", "two", backend)
    plan = _plan(body, body, "live", "two", backend)
    body.check("model", batch.largest_id, batch.student.layout.longest)
    if not batch.student.layout.rows:
        return body.embedding.weight.new_zeros(0, body.width).requires_grad_(torch.is_grad_enabled())
    register()
    return run_context(body, batch.student.to(body.device), plan.backend)


def plan_passes(
    model: nn.Module,
    *,
    teacher: str | nn.Module = "live",
    passes: str = "auto",
    backend: str = "auto",
    longest: int = 0,
) -> Plan:
    """What `dual_hidden_states` does with these arguments, which are its own, and raises as it does.

    Args:
        longest: tokens of the longest context to come, so that what only shows in long ones shows now: windows are
            tried beyond their end, and a rotary embedding that changes at this length is refused.
    """
    bodies = _bodies(model, teacher, passes, backend)
    for name, body in zip(("model", "teacher"), bodies, strict=True):
        body.check(name, 0, longest)
    return _plan(*bodies, teacher, passes, backend, longest)


def _bodies(model: nn.Module, teacher: str | nn.Module, passes: str, backend: str) -> tuple[Body, Body]:
    """The model's and the teacher's, the same one twice where they are one model; the arguments are checked."""
    if isinstance(teacher, str):
        if teacher not in ("live", "base"):
            raise ValueError(f"teacher must be 'live', 'base' or a torch.nn.Module, got {teacher!r}")
    elif not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be 'live', 'base' or a torch.nn.Module, got {type(teacher).__name__}")
    if passes not in ("auto", "two", "joint"):
        raise ValueError(f"passes must be 'auto', 'two' or 'joint', got {passes!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    body = Body(model, "model")
    other = Body(teacher, "teacher") if isinstance(teacher, nn.Module) else body
    if other.device != body.device:
        raise ValueError(f"teacher is on device {other.device}, model on {body.device}; accepted: one device for both")
    if body.device.type == "meta":
        raise ValueError(f"model {type(body.lm).__name__} is on device meta; accepted: one that holds data")
    if teacher == "base":
        check_base(model)
    return body, other


def _plan(body: Body, other: Body, teacher: str | nn.Module, passes: str, backend: str, longest: int = 0) -> Plan:
    for one in (body, other):
        obstacle = backend_obstacle(backend, *one.attention)
        if obstacle:
            there = [repr(name) for name in BACKENDS if name == "auto" or not backend_obstacle(name, *one.attention)]
            raise ValueError(
                f"packing backend {backend!r} {obstacle} ({one.argument} {type(one.lm).__name__}); "
                f"accepted here: {', '.join(there)}"
            )
    obstacle = joint_obstacle(body, teacher)
    if passes == "joint" and obstacle:
        raise ValueError(f"passes='joint' is not possible: {obstacle}; accepted here: 'two'")
    trials = [try_rows(one, longest) for one in ([body] if other is body else [body, other])]
    for one, trial in zip((body, other), trials, strict=False):
        if trial.refusal:
            raise one.refused(trial.refusal)
    if not obstacle and (passes == "joint" or (passes == "auto" and body.checkpoints)):
        trials.append(try_joint(body, base_teacher=teacher == "base"))
        obstacle = trials[-1].refusal
        if passes == "joint" and obstacle:
            raise ValueError(f"passes='joint' is not possible: {obstacle}; accepted here: 'two'")
    if obstacle:
        chosen, reason = "two", obstacle
    elif passes != "auto":
        chosen, reason = passes, "as asked"
    elif body.checkpoints:
        chosen, reason = "joint", "the layers are checkpointed, so nothing is computed twice that was not before"
    else:
        chosen, reason = "two", "without checkpointing the joint pass would compute the student's forward pass twice"
    untried = next((trial.untried for trial in trials if trial.untried), None)
    if untried:
        reason += f"; not tried on tokens: {untried}"
    share = chosen == "joint" and teacher == "live" and not active_dropouts(body.inner)
    if backend == "auto":
        backend, why = choose_backend(*body.attention)
        reason += f"; attention {backend}: {why}"
    return Plan("joint" if chosen == "joint" else "two", share, backend, reason)
