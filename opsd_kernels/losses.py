"""What users call: argument checks, documentation, reductions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .fused_linear import Job, fused_linear_loss, weighted
from .gemm import accumulation_dtype
from .logits import logits_loss
from .objective import REDUCTIONS, Objective, integer, logit_transform, positive
from .rows import Column, LogprobColumn
from .rows.torch_backend import divergence_rows, logprob_rows
from .workspace import budget_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKENDS = ("auto", "torch")


@dataclass(frozen=True)
class TokenStats:
    """What happened at each token: detached, in the leading shape of the inputs, 0 where the token is not counted.

    All over the full vocabulary at temperature T, in nats, whatever the support of the loss; only what the clips did
    (`entry_clipped`, `clipped_amount`, `token_clipped`) speaks of the loss's own support. Floats are in the
    accumulation dtype.
    """

    divergence: Tensor  #: before clips and weights; +inf where it is
    student_entropy: Tensor
    teacher_entropy: Tensor
    entry_clipped: Tensor  #: bool, at least one entry was clipped
    clipped_amount: Tensor  #: what entry and token clip took from the divergence
    token_clipped: Tensor  #: bool
    student_logprob: Tensor | None = None  #: of target_ids, where given
    teacher_logprob: Tensor | None = None


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
        beta: in [0, 1]. temperature: above 0, divides both logits; no T² factor.
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
        gradient_filter, process_group: not supported yet; only None is accepted.
        backend: "auto" or "torch".
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
    _floating("student_hidden", student_hidden)
    _floating("teacher_hidden", teacher_hidden)
    _floating("weight", weight)
    if student_hidden.ndim < 2:
        raise ValueError(f"student_hidden must have shape (..., H), got {tuple(student_hidden.shape)}")
    _shape("weight", weight, (None, student_hidden.shape[-1]), "(V, H)")
    lead = student_hidden.shape[:-1]
    head = weight if teacher_weight is None else teacher_weight
    if teacher_weight is not None:
        _floating("teacher_weight", teacher_weight)
        _shape("teacher_weight", teacher_weight, (None, None), "(V, H_t)")
        if valid_vocab is None and teacher_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"teacher_weight must have the {weight.shape[0]} rows of weight, got {tuple(teacher_weight.shape)}; "
                "for heads padded to different heights give valid_vocab"
            )
    _shape("teacher_hidden", teacher_hidden, (*lead, head.shape[1]), "the leading shape of student_hidden, and H_t")
    for name, vector, of in (("bias", bias, weight), ("teacher_bias", teacher_bias, head)):
        if vector is not None:
            _floating(name, vector)
            _shape(name, vector, (of.shape[0],), "(V,)")
    _same_device(student_hidden, teacher_hidden=teacher_hidden, weight=weight, teacher_weight=teacher_weight,
                 bias=bias, teacher_bias=teacher_bias)  # fmt: skip
    vocab = _vocab(valid_vocab, min(weight.shape[0], head.shape[0]))
    objective = Objective.checked(
        beta=beta, temperature=temperature, entry_clip=entry_clip, token_clip=token_clip, top_k=top_k,
        top_k_from=top_k_from, tail_bucket=tail_bucket, logit_scale=logit_scale, softcap=softcap,
        teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
    )  # fmt: skip
    _check_support(objective, vocab)
    _check_unsupported(backend, gradient_filter=gradient_filter, process_group=process_group)
    compute = _compute_dtype(student_hidden)
    tokens = _Tokens.checked(
        student_hidden, lead, vocab, accumulation_dtype(compute),
        mask=mask, token_weight=token_weight, sequence_ids=sequence_ids, target_ids=target_ids,
        reduction=reduction, denominator=denominator,
    )  # fmt: skip
    budget = budget_bytes(student_hidden.device, workspace_bytes)

    trainable_head = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    inside = trainable_head and reduction != "none"
    job = Job(
        row_pass=partial(_divergence_pass, objective),
        columns=len(Column) if return_stats else 1,
        compute=compute,
        budget=budget,
        vocab=vocab,
        rows=tokens.rows,
        targets=tokens.targets,
        teacher=teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias=_constant(bias if teacher_weight is None and teacher_bias is None else teacher_bias),
        row_weight=tokens.row_weight() if inside else None,
    )
    result = fused_linear_loss(student_hidden.reshape(-1, student_hidden.shape[-1]), weight, bias, job)
    loss = tokens.divided(result) if inside else tokens.reduced(result)
    return (loss, tokens.stats(job.table)) if return_stats else loss


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
    _floating("student_logits", student_logits)
    _floating("teacher_logits", teacher_logits)
    if student_logits.ndim < 2:
        raise ValueError(f"student_logits must have shape (..., V), got {tuple(student_logits.shape)}")
    lead = student_logits.shape[:-1]
    valid_vocab = options.get("valid_vocab")
    columns = None if valid_vocab is not None else student_logits.shape[-1]
    _shape("teacher_logits", teacher_logits, (*lead, columns), "the shape of student_logits")
    _same_device(student_logits, teacher_logits=teacher_logits)
    vocab = _vocab(valid_vocab, min(student_logits.shape[-1], teacher_logits.shape[-1]))
    fields = {"logit_scale", "softcap", "teacher_logit_scale", "teacher_softcap"}
    fields |= {f.name for f in dataclasses.fields(Objective)}
    objective = Objective.checked(**{k: v for k, v in options.items() if k in fields})
    _check_support(objective, vocab)
    _check_unsupported(
        options.get("backend", "auto"),
        gradient_filter=options.get("gradient_filter"),
        process_group=options.get("process_group"),
    )
    accumulate = accumulation_dtype(student_logits.dtype)
    named = ("mask", "token_weight", "sequence_ids", "target_ids", "denominator")
    tokens = _Tokens.checked(
        student_logits, lead, vocab, accumulate,
        reduction=options.get("reduction", "mean"), **{k: options.get(k) for k in named},
    )  # fmt: skip
    return_stats = options.get("return_stats", False)
    job = Job(
        row_pass=partial(_divergence_pass, objective),
        columns=len(Column) if return_stats else 1,
        compute=student_logits.dtype,
        budget=budget_bytes(student_logits.device, options.get("workspace_bytes")),
        vocab=vocab,
        rows=tokens.rows,
        targets=tokens.targets,
        teacher=teacher_logits.detach().reshape(-1, teacher_logits.shape[-1]),
    )
    loss = tokens.reduced(logits_loss(student_logits.reshape(-1, student_logits.shape[-1]), job))
    return (loss, tokens.stats(job.table)) if return_stats else loss


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
    _floating("hidden", hidden)
    _floating("weight", weight)
    if hidden.ndim < 2:
        raise ValueError(f"hidden must have shape (..., H), got {tuple(hidden.shape)}")
    _shape("weight", weight, (None, hidden.shape[-1]), "(V, H)")
    if bias is not None:
        _floating("bias", bias)
        _shape("bias", bias, (weight.shape[0],), "(V,)")
    if target_ids is None:
        raise TypeError("target_ids must be an int64 tensor, got None")
    _same_device(hidden, weight=weight, bias=bias)
    vocab = _vocab(valid_vocab, weight.shape[0])
    transform, divisor = logit_transform(logit_scale, softcap), positive("temperature", temperature)
    _check_unsupported(backend, process_group=process_group)
    compute = _compute_dtype(hidden)
    tokens = _Tokens.checked(
        hidden,
        hidden.shape[:-1],
        vocab,
        accumulation_dtype(compute),
        mask=mask,
        target_ids=target_ids,
        reduction="none",
    )

    def row_pass(
        logits: Tensor, _: Tensor | None, targets: Tensor | None, table: Tensor, dz: Tensor | None, scale: Tensor | None
    ) -> None:
        assert targets is not None
        logprob_rows(logits, targets, transform, divisor, table=table, dz=dz, row_scale=scale)

    job = Job(
        row_pass=row_pass,
        columns=len(LogprobColumn) if return_entropy else 1,
        compute=compute,
        budget=budget_bytes(hidden.device, workspace_bytes),
        vocab=vocab,
        rows=tokens.rows,
        targets=tokens.targets,
    )
    logprobs = tokens.reduced(fused_linear_loss(hidden.reshape(-1, hidden.shape[-1]), weight, bias, job))
    return (logprobs, tokens.scattered(job.table[LogprobColumn.ENTROPY])) if return_entropy else logprobs


def _divergence_pass(
    objective: Objective,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    scale: Tensor | None,
) -> None:
    assert teacher is not None
    divergence_rows(student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=scale)


@dataclass(frozen=True)
class _Tokens:
    """Which tokens count, what each weighs, and what the sum is divided by; N tokens of which n are counted."""

    lead: torch.Size
    count: int
    rows: Tensor | None  # (n,) int64; None: all N
    targets: Tensor | None  # (n,) int64
    weight: Tensor | None  # (n,), in the accumulation dtype: token_weight, times 1 / length for "sequence_mean"
    reduction: str
    denominator: float | Tensor
    accumulate: torch.dtype
    device: torch.device

    @classmethod
    def checked(
        cls,
        like: Tensor,
        lead: torch.Size,
        vocab: int,
        accumulate: torch.dtype,
        *,
        mask: Any = None,
        token_weight: Any = None,
        sequence_ids: Any = None,
        target_ids: Any = None,
        reduction: Any = "mean",
        denominator: Any = None,
    ) -> _Tokens:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        for name, value in (("mask", mask), ("token_weight", token_weight), ("sequence_ids", sequence_ids),
                            ("target_ids", target_ids)):  # fmt: skip
            if value is not None:
                _tensor(name, value)
                _shape(name, value, tuple(lead), "the leading shape of the inputs")
                _same_device(like, **{name: value})
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        if token_weight is not None:
            _floating("token_weight", token_weight)
            if token_weight.requires_grad:
                raise ValueError("token_weight must be a constant, got a tensor that requires grad: detach it")
        if sequence_ids is not None and (sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool):
            raise TypeError(f"sequence_ids must be an integer tensor, got {sequence_ids.dtype}")
        if target_ids is not None and target_ids.dtype != torch.int64:
            raise TypeError(f"target_ids must be an int64 tensor, got {target_ids.dtype}")
        if reduction == "sequence_mean" and sequence_ids is None and len(lead) != 2:
            raise ValueError(
                "sequence_ids must be given for reduction='sequence_mean' unless the inputs are (B, T, H), "
                f"got {tuple(lead)}"
            )
        divisor = _denominator(like, reduction, denominator)

        rows = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)  # the one host sync there is
        count = lead.numel() if rows is None else rows.shape[0]

        def counted(value: Tensor) -> Tensor:
            flat = value.detach().reshape(-1)
            return flat if rows is None else flat[rows]

        targets = None if target_ids is None else counted(target_ids)
        if (
            targets is not None
            and not targets.is_cuda
            and count
            and (int(targets.min()) < 0 or int(targets.max()) >= vocab)
        ):
            raise ValueError(
                f"target_ids must be in [0, {vocab}) where the token counts, "
                f"got {int(targets.min())} to {int(targets.max())}"
            )
        weight = None if token_weight is None else counted(token_weight).to(accumulate)
        if reduction == "sequence_mean":
            ids = (
                torch.arange(lead[0], device=like.device).unsqueeze(-1).expand(lead)
                if sequence_ids is None
                else sequence_ids
            )
            share, sequences = _sequence_share(counted(ids), accumulate)
            weight = share if weight is None else weight * share
            divisor = sequences if divisor is None else divisor
        elif reduction == "mean" and divisor is None:
            divisor = max(count, 1)
        return cls(
            lead, count, rows, targets, weight, reduction, 1.0 if divisor is None else divisor, accumulate, like.device
        )

    def row_weight(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        return torch.ones(self.count, dtype=self.accumulate, device=self.device)

    def divided(self, total: Tensor) -> Tensor:
        return total / self.denominator

    def reduced(self, losses: Tensor) -> Tensor:
        """(n,) losses → 0-d, or (...) for "none"."""
        if self.weight is not None:
            losses = weighted(losses, self.weight)
        return self.scattered(losses) if self.reduction == "none" else self.divided(losses.sum())

    def scattered(self, values: Tensor) -> Tensor:
        """(n,) values of the counted tokens → (...), 0 elsewhere."""
        if self.rows is not None:
            values = values.new_zeros(self.lead.numel()).index_copy(0, self.rows, values)
        return values.reshape(self.lead)

    def stats(self, table: Tensor) -> TokenStats:
        """The statistics from the row pass's table (columns, n)."""
        columns = {column.name.lower(): self.scattered(table[column]) for column in Column if column != Column.LOSS}
        for flag in ("entry_clipped", "token_clipped"):
            columns[flag] = columns[flag] != 0
        if self.targets is None:
            del columns["student_logprob"], columns["teacher_logprob"]
        return TokenStats(**columns)


def _sequence_share(ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 / (counted tokens of the token's sequence), (n,), and the number of sequences, 0-d. No host sync."""
    if not len(ids):
        return ids.to(dtype), ids.new_ones((), dtype=dtype)
    order = ids.argsort()
    first = torch.ones_like(order)
    first[1:] = ids[order].diff() != 0
    group = torch.empty_like(order)
    group[order] = first.cumsum(0) - 1
    size = torch.zeros(len(ids), dtype=dtype, device=ids.device).index_add_(0, group, torch.ones_like(ids, dtype=dtype))
    return size[group].reciprocal(), first.sum().to(dtype)


def _denominator(like: Tensor, reduction: str, denominator: Any) -> float | Tensor | None:
    if denominator is None:
        return None
    if reduction not in ("mean", "sequence_mean"):
        raise ValueError(f"denominator is for reduction='mean' or 'sequence_mean', got reduction={reduction!r}")
    if not isinstance(denominator, Tensor):
        return positive("denominator", denominator)
    if denominator.ndim or denominator.requires_grad or denominator.is_complex():
        raise ValueError(
            f"denominator must be a positive number or a constant 0-d tensor, got shape {tuple(denominator.shape)}"
            f"{' that requires grad' if denominator.requires_grad else ''}"
        )
    if denominator.device.type != "cpu":
        _same_device(like, denominator=denominator)
    elif not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator.item()}")
    return denominator


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _floating(name: str, value: Any) -> None:
    _tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def _shape(name: str, value: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    got = tuple(value.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({wanted}), {meaning}; got {got}")


def _same_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the hidden states or logits, got {value.device}")


def _vocab(valid_vocab: Any, columns: int) -> int:
    if columns == 0:
        raise ValueError("weight must have at least one row (a vocabulary of one token), got none")
    return columns if valid_vocab is None else integer("valid_vocab", valid_vocab, high=columns)


def _check_support(objective: Objective, vocab: int) -> None:
    if objective.top_k is not None and objective.top_k > vocab:
        raise ValueError(f"top_k must be at most the {vocab} tokens of the vocabulary, got {objective.top_k}")


def _check_unsupported(backend: Any, **options: Any) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} in this version, got {backend!r}")
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is not supported in this version: only None is accepted, got {value!r}")


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
