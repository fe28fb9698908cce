"""What users call: argument checks, documentation, reductions."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from . import backends, checks
from .across import WHOLE
from .fused_linear import Inputs, Spec, fused_linear_loss, top_k_of
from .logits import logits_loss
from .objective import Objective, flag, integer, positive
from .rows import DROPPED, Column, LogprobColumn
from .tokens import Tokens
from .workspace import budget_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack


OBJECTIVE_OPTIONS = tuple(inspect.signature(Objective.checked).parameters)
# Rows of the table by the names of TokenStats; plain integers, since torch 2.11 traces no loop over an enumeration.
_STATISTICS = {column.name.lower(): int(column) for column in Column if column != Column.LOSS}


@dataclass(frozen=True)
class TokenStats:
    """What happened at each token: detached, in the leading shape of the inputs, 0 where the token is not counted.

    All over the full vocabulary at temperature T, in nats, whatever the support of the loss; only what the clips did
    (`entry_clipped`, `clipped_amount`, `token_clipped`) speaks of the loss's own support. All before `token_weight`.
    Floats are in the accumulation dtype.

    Attributes:
        divergence: nats, before clips; +inf where the token's divergence is.
        student_entropy: nats, of the student's distribution.
        teacher_entropy: nats, of the teacher's.
        entry_clipped: bool; `entry_clip` lowered at least one vocabulary entry's term.
        clipped_amount: nats, what entry and token clip together took from the divergence: the token's loss is the
            divergence over its support less this. +inf where they made an infinite divergence finite.
        token_clipped: bool; `token_clip` lowered the token's loss, as the entry clip had left it.
        student_logprob: nats, the student's log-probability of `target_ids`; None without them.
        teacher_logprob: nats, the teacher's.
        gradient_dropped: with `gradient_filter`, else None: bound on the norm of what the token's row of
            d loss / d student_hidden lacks, for a unit gradient of the token's own loss; NaN where the gradient is
            computed in backward only (unreduced losses with a trainable head) or not at all.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    entry_clipped: Tensor
    clipped_amount: Tensor
    token_clipped: Tensor
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    gradient_dropped: Tensor | None = None


class LossOptions(TypedDict, total=False):
    """The options that `jsd_loss_from_logits` shares with `jsd_loss`, where each is explained."""

    beta: float
    temperature: float
    entry_clip: float | None
    token_clip: float | None
    top_k: int | None
    top_k_from: str
    tail_bucket: bool
    mask: Tensor | None
    token_weight: Tensor | None
    sequence_ids: Tensor | None
    target_ids: Tensor | None
    logit_scale: float
    softcap: float | None
    teacher_logit_scale: float | None
    teacher_softcap: float | None
    valid_vocab: int | None
    reduction: str
    denominator: float | Tensor | None
    return_stats: bool
    gradient_filter: float | None
    process_group: Any
    backend: str
    workspace_bytes: int | None


def jsd_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    top_k: int | None = None,
    top_k_from: str = "teacher",
    tail_bucket: bool = False,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float | None = None,
    teacher_softcap: float | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    return_stats: bool = False,
    gradient_filter: float | None = None,
    process_group: Any = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence between the next-token distributions of a student and a constant teacher, from hidden states.

    Never holds more than a chunk of tokens' logits. With p = softmax(z / T) and
    z = softcap·tanh(logit_scale·(h·Wᵀ + bias) / softcap):

    - beta 0: forward KL(p_T‖p_S); beta 1: reverse KL(p_S‖p_T);
    - between: (1−β) KL(p_S‖m) + β KL(p_T‖m) with m = (1−β) p_S + β p_T (arXiv 2306.13649), which tends to 0, not to
      the KLs, at the two ends.

    Args:
        student_hidden: (..., H) floating; the head's input, after the final norm. Receives the gradient.
        teacher_hidden: (..., H_t) floating, same leading shape. Never receives a gradient.
        weight: (V, H) head of the student, and of the teacher too unless `teacher_weight` is given. Receives a
            gradient if it requires one, through the student's logits only.
        teacher_weight: (V, H_t). With `valid_vocab`, the two heads may be padded to different heights.
        bias: (V,), like `weight`. A shared head shares it.
        teacher_bias: (V,), constant; default none with a `teacher_weight`, else `bias`.
        beta: in [0, 1]. Within about 0.001 of an end, float32 loses digits: 0 and 1 themselves are the KLs.
        temperature: above 0, divides both logits; no T² factor.
        entry_clip: nats; each vocabulary entry's term counts at most this (the published recipe uses 0.05). Only the
            upper side is clamped, so the loss can be negative.
        token_clip: nats; a token's loss counts at most this.
        top_k: compare only the k likeliest tokens of `top_k_from` ("teacher" or "student"), renormalised, or with
            `tail_bucket` together with one entry that holds the rest of the mass.
        mask: (...) bool, True where the token counts. Others cost nothing.
        token_weight: (...) floating constant that multiplies the token's loss after the clips.
        sequence_ids: (...) integers, for "sequence_mean"; default: the row of a (B, T) input.
        target_ids: (...) int64, the sampled tokens; only for the statistics.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: the heads' post-processing; the teacher's default
            to the student's (`teacher_softcap=math.inf` for a teacher without). Columns of −inf bias stay masked.
        valid_vocab: columns from here on are padding of the head and take no part.
        reduction: "mean" over counted tokens, "sequence_mean" (mean over sequences with a counted token of their mean),
            "sum", or "none" for losses of shape (...).
        denominator: number or 0-d tensor to divide by instead of the count of tokens ("mean") or sequences
            ("sequence_mean"): the whole batch's count makes micro-batches add up to the batch's gradient.
        return_stats: also return a `TokenStats`.
        gradient_filter: eps > 0; drop the columns of a chunk in which no |d token's loss / d logit| exceeds eps, so
            that the products of the gradient cost little. Lossy: `TokenStats.gradient_dropped` bounds what dX lacks,
            for a unit gradient of the token's own loss. Waits for the device once a chunk.
        process_group: the vocabulary is split over its ranks in order, `weight` (and `teacher_weight`, `bias`, …)
            being this rank's rows. `target_ids` and `valid_vocab` count in the whole vocabulary. Every rank gets the
            whole loss and student_hidden's whole gradient. Ranks first agree on their slices, for which each call
            waits.
        backend: "auto" (the fastest that works here, see `python -m opsd_kernels`), "torch", "triton", "native" or
            "cluster" (on Hopper, by name alone).
        workspace_bytes: upper bound for the chunk workspace; default OPSD_WORKSPACE_BYTES or by device.

    Returns:
        The loss, 0-d or (...), in float32 (float64 for float64 inputs); with `return_stats`, (loss, TokenStats).
        Gradients come in their input's dtype. The logits are computed in autocast's dtype where it is on, else in that
        of `student_hidden`, with float32 results. Differentiable once. If no token counts: 0, with zero gradients.

    Infinite divergences (one model has mass where the other's logit is −inf) are +inf with zero gradient for the token
    under the KLs; under an entry clip, they count as clipped; the JSD is finite. A token whose logits are all −inf
    counts 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is accepted, before any work is done.
    """
    weight, bias, teacher_weight, teacher_bias = (whole(t) for t in (weight, bias, teacher_weight, teacher_bias))
    checks.projection("student_hidden", student_hidden, weight, bias)
    checks.floating("teacher_hidden", teacher_hidden)
    if teacher_weight is weight:  # one product then serves both
        teacher_weight = None
        if teacher_bias is None and bias is not None:  # a bias is shared only where no weight is named
            teacher_bias = weight.new_zeros(weight.shape[0])
    head = weight if teacher_weight is None else teacher_weight
    if teacher_weight is not None:
        checks.floating("teacher_weight", teacher_weight)
        checks.shape("teacher_weight", teacher_weight, (None, None), "(V, H_t)")
        if (valid_vocab is None or process_group is not None) and teacher_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"teacher_weight must have the {weight.shape[0]} rows of weight, got {tuple(teacher_weight.shape)}; "
                "for heads padded to different heights give valid_vocab"
            )
    lead = student_hidden.shape[:-1]
    checks.shape(
        "teacher_hidden", teacher_hidden, (*lead, head.shape[1]), "the leading shape of student_hidden, and H_t"
    )
    checks.bias_vector("teacher_bias", teacher_bias, head)
    checks.same_device(
        student_hidden, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias
    )
    sizes = {"weight": weight.shape[0], "teacher_weight": head.shape[0]}
    vocab = checks.vocabulary(valid_vocab, sizes, split=process_group is not None)
    objective = Objective.checked(
        beta=beta, temperature=temperature, entry_clip=entry_clip, token_clip=token_clip, top_k=top_k,
        top_k_from=top_k_from, tail_bucket=tail_bucket, logit_scale=logit_scale, softcap=softcap,
        teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    checks.support(objective, vocab)
    flag("return_stats", return_stats)
    if gradient_filter is not None:
        gradient_filter = positive("gradient_filter", gradient_filter)
    spec = make_spec(
        "divergence", objective, student_hidden, vocab, backend, workspace_bytes, process_group,
        columns=len(Column) + (gradient_filter is not None) if return_stats else 1,
        gradient_filter=gradient_filter,
    )  # fmt: skip
    tokens = Tokens.checked(
        student_hidden, spec.accumulate, mask=mask, token_weight=token_weight, sequence_ids=sequence_ids,
        target_ids=target_ids, reduction=reduction, denominator=denominator,
    )  # fmt: skip

    inputs = Inputs(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        weight,
        bias,
        teacher=teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight=constant(teacher_weight),
        teacher_bias=constant(bias if teacher_weight is None and teacher_bias is None else teacher_bias),
    )
    return loss_of(inputs, spec, tokens, return_stats)


def jsd_loss_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, **options: Unpack[LossOptions]
) -> Tensor | tuple[Tensor, TokenStats]:
    """`jsd_loss` for a trainer that already holds logits, before scale and cap; −inf masks a column.

    Args:
        student_logits: (..., V) floating. Receives the gradient, in its dtype.
        teacher_logits: (..., V) floating, same leading shape. Constant.
        options: those of `jsd_loss` but the head's (`teacher_weight`, `bias`, `teacher_bias`).

    Returns and raises as `jsd_loss` does.
    """
    unknown = sorted(set(options) - set(LossOptions.__annotations__))
    if unknown:
        raise TypeError(
            f"jsd_loss_from_logits has no option {unknown[0]!r}; accepted: {', '.join(LossOptions.__annotations__)}"
        )
    checks.differentiated_once(student_logits)
    checks.floating("student_logits", student_logits)
    checks.floating("teacher_logits", teacher_logits)
    checks.not_a_scalar("student_logits", student_logits, "V")
    valid_vocab = options.get("valid_vocab")
    columns = None if valid_vocab is not None else student_logits.shape[-1]
    checks.shape("teacher_logits", teacher_logits, (*student_logits.shape[:-1], columns), "that of student_logits")
    checks.same_device(student_logits, teacher_logits=teacher_logits)
    sizes = {"student_logits": student_logits.shape[-1], "teacher_logits": teacher_logits.shape[-1]}
    vocab = checks.vocabulary(valid_vocab, sizes)
    objective = Objective.checked(**{name: value for name, value in options.items() if name in OBJECTIVE_OPTIONS})
    checks.support(objective, vocab)
    checks.unsupported("for given logits", **{k: options.get(k) for k in ("gradient_filter", "process_group")})
    return_stats = flag("return_stats", options.get("return_stats", False))
    spec = make_spec(
        "divergence", objective, student_logits, vocab, options.get("backend", "auto"), options.get("workspace_bytes"),
        None, columns=len(Column) if return_stats else 1, compute=student_logits.dtype,
    )  # fmt: skip
    named = ("mask", "token_weight", "sequence_ids", "target_ids", "denominator")
    tokens = Tokens.checked(
        student_logits, spec.accumulate, reduction=options.get("reduction", "mean"),
        **{name: options.get(name) for name in named},
    )  # fmt: skip
    losses, table = logits_loss(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.detach().reshape(-1, teacher_logits.shape[-1]),
        tokens.mask,
        tokens.targets,
        spec,
    )
    loss = tokens.reduced(losses)
    return (loss, _stats(table, tokens)) if return_stats else loss


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    process_group: Any = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(target) at each position, at temperature T, never holding more than a chunk of tokens' logits.

    Args:
        hidden: (..., H) floating; the head's input, after the final norm.
        weight: (V, H). bias: (V,).
        target_ids: (...) int64 in [0, V).
        mask: (...) bool, True where the token counts; others cost nothing and come back as 0.
        return_entropy: also return the entropy, in nats, detached.
        The rest as for `jsd_loss`.

    Returns:
        (...) float32 (float64 for float64 inputs), differentiable once in hidden, weight and bias; with
        `return_entropy`, (logprobs, entropy). A target of zero probability gives −inf and no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is accepted, before any work is done.
    """
    weight, bias = whole(weight), whole(bias)
    checks.projection("hidden", hidden, weight, bias)
    checks.int64("target_ids", target_ids)
    vocab = checks.vocabulary(valid_vocab, {"weight": weight.shape[0]}, split=process_group is not None)
    objective = Objective.checked(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    flag("return_entropy", return_entropy)
    spec = make_spec(
        "logprob", objective, hidden, vocab, backend, workspace_bytes, process_group,
        columns=len(LogprobColumn) if return_entropy else 1,
    )  # fmt: skip
    tokens = Tokens.checked(hidden, spec.accumulate, mask=mask, target_ids=target_ids, reduction="none")
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias, mask=tokens.mask, targets=tokens.targets)
    logprobs, table = fused_linear_loss(inputs, spec)
    logprobs = tokens.reduced(logprobs)
    return (logprobs, table[LogprobColumn.ENTROPY].reshape(tokens.lead)) if return_entropy else logprobs


def top_k_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    mask: Tensor | None = None,
    process_group: Any = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens at each position: what a cached or served teacher stores for `jsd_loss_from_top_k`.

    Args:
        hidden: (..., H) floating; the head's input, after the final norm.
        weight: (V, H). bias: (V,).
        k: at most V.
        mask: (...) bool, True where the token counts; others cost nothing and come back as 0.
        The rest as for `jsd_loss`.

    Returns:
        (logprobs (..., k) over the whole vocabulary at temperature T, likeliest first; ids (..., k) int64;
        logsumexp (...) of the tempered logits), without gradient, floats in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is accepted, before any work is done.
    """
    weight, bias = whole(weight), whole(bias)
    checks.projection("hidden", hidden, weight, bias)
    vocab = checks.vocabulary(valid_vocab, {"weight": weight.shape[0]}, split=process_group is not None)
    top_k = integer("k", k, high=math.inf if vocab == WHOLE else vocab)
    objective = Objective.checked(temperature=temperature, logit_scale=logit_scale, softcap=softcap, top_k=top_k)
    spec = make_spec("top_k", objective, hidden, vocab, backend, workspace_bytes, process_group, columns=1)
    tokens = Tokens.checked(hidden, spec.accumulate, mask=mask, reduction="none")
    inputs = Inputs(hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), constant(bias), mask=tokens.mask)
    logprobs, ids, log_z = top_k_of(inputs, spec)
    lead = tokens.lead
    return logprobs.reshape(*lead, k), ids.reshape(*lead, k), log_z.reshape(lead)


def jsd_loss_from_top_k(
    student_hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    tail_bucket: bool = True,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    return_stats: bool = False,
    process_group: Any = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """`jsd_loss` against a teacher of which only the likeliest tokens are known: a cached or a served one.

    Args:
        student_hidden: (..., H) floating. Receives the gradient.
        weight: (V, H). bias: (V,).
        teacher_ids: (..., k) int64 in [0, V), no id twice at a position where the token counts (on a GPU, where it
            would have to wait, that is not checked, nor are the values of teacher_logprobs).
        teacher_logprobs: (..., k) floating, log-probabilities over the whole vocabulary at the same `temperature`
            (`top_k_logprobs` gives them). Constant.
        tail_bucket: the rest of both models' mass is one more entry (the teacher's is 1 − Σp, to the accuracy of what
            was stored); False: both are renormalised on the k tokens.
        The rest as for `jsd_loss`; the statistics that need the teacher's whole distribution (`divergence`,
        `teacher_entropy`) speak of the support, and `teacher_logprob` is NaN where the token was not stored.

    Returns and raises as `jsd_loss` does.
    """
    weight, bias = whole(weight), whole(bias)
    checks.projection("student_hidden", student_hidden, weight, bias)
    checks.int64("teacher_ids", teacher_ids)
    checks.floating("teacher_logprobs", teacher_logprobs)
    lead = student_hidden.shape[:-1]
    checks.shape("teacher_ids", teacher_ids, (*lead, None), "the leading shape of student_hidden, and k")
    k = teacher_ids.shape[-1]
    checks.shape("teacher_logprobs", teacher_logprobs, (*lead, k), "that of teacher_ids")
    checks.same_device(student_hidden, teacher_ids=teacher_ids, teacher_logprobs=teacher_logprobs)
    vocab = checks.vocabulary(valid_vocab, {"weight": weight.shape[0]}, split=process_group is not None)
    if k < 1 or k > vocab != WHOLE:
        raise ValueError(f"teacher_ids must hold 1 to {vocab} tokens a position, got {k}")
    objective = Objective.checked(
        beta=beta, temperature=temperature, entry_clip=entry_clip, token_clip=token_clip, top_k=k,
        tail_bucket=tail_bucket, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
    flag("return_stats", return_stats)
    spec = make_spec("cached", objective, student_hidden, vocab, backend, workspace_bytes, process_group,
                 columns=len(Column) if return_stats else 1)  # fmt: skip
    tokens = Tokens.checked(
        student_hidden, spec.accumulate, mask=mask, token_weight=token_weight, sequence_ids=sequence_ids,
        target_ids=target_ids, reduction=reduction, denominator=denominator,
    )  # fmt: skip
    inputs = Inputs(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        weight,
        bias,
        teacher=teacher_logprobs.detach().reshape(-1, k),
        support=teacher_ids.reshape(-1, k),
    )
    return loss_of(inputs, spec, tokens, return_stats)


def make_spec(
    kind: str,
    objective: Objective,
    like: Tensor,
    vocab: int,
    backend: Any,
    workspace_bytes: Any,
    process_group: Any,
    *,
    columns: int,
    compute: torch.dtype | None = None,
    gradient_filter: float | None = None,
) -> Spec:
    """`like`: the student's hidden states, whose device and dtype (or autocast's) the call has."""
    compute = compute_dtype(like) if compute is None else compute
    group = "" if process_group is None else _group_name(process_group)
    budget = budget_bytes(like.device, workspace_bytes)
    return Spec(kind, objective, columns, vocab, compute, budget, backends.known(backend), gradient_filter, group)


def loss_of(inputs: Inputs, spec: Spec, tokens: Tokens, return_stats: bool) -> Tensor | tuple[Tensor, TokenStats]:
    inputs.mask, inputs.targets = tokens.mask, tokens.targets
    head = (inputs.weight, inputs.bias)
    trainable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head)
    inside = trainable and tokens.reduction != "none"  # the weights go into dz, so that dW needs no second pass
    if inside:
        inputs.row_weight = tokens.row_weight(inputs.x, spec.accumulate)
    result, table = fused_linear_loss(inputs, spec)
    loss = tokens.divided(result) if inside else tokens.reduced(result)
    return (loss, _stats(table, tokens)) if return_stats else loss


def _stats(table: Tensor, tokens: Tokens) -> TokenStats:
    """The statistics from the row pass's table (columns, N)."""
    columns = {name: table[row].reshape(tokens.lead) for name, row in _STATISTICS.items()}
    for clip in ("entry_clipped", "token_clipped"):
        columns[clip] = columns[clip] != 0
    if tokens.targets is None:
        del columns["student_logprob"], columns["teacher_logprob"]
    if table.shape[0] > DROPPED:
        columns["gradient_dropped"] = table[DROPPED].reshape(tokens.lead)
    return TokenStats(**columns)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def whole(tensor: Any) -> Any:
    """A tensor sharded as a DTensor (FSDP2) is gathered, once a call.

    Its gradient goes back to the shards as the mean over ranks, which is what data parallelism does.
    """
    if not checks.is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _group_name(process_group: Any) -> str:
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    return process_group.group_name
