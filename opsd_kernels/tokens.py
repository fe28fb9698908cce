"""Which tokens count, what each weighs, and what their sum is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from .fused_linear import weighted
from .objective import REDUCTIONS, positive


@dataclass(frozen=True)
class Tokens:
    """The leading shape of a call's inputs, N tokens in all, and how their losses are reduced."""

    lead: torch.Size
    mask: Tensor | None  # (N,) bool
    targets: Tensor | None  # (N,) int64
    weight: Tensor | None  # (N,), accumulation dtype: token_weight, times 1 / length for "sequence_mean"
    reduction: str
    denominator: float | Tensor

    @classmethod
    def checked(
        cls,
        like: Tensor,
        accumulate: torch.dtype,
        *,
        mask: Any = None,
        token_weight: Any = None,
        sequence_ids: Any = None,
        target_ids: Any = None,
        reduction: Any = "mean",
        denominator: Any = None,
    ) -> Tokens:
        """Validates the per-token arguments of a call on `like`, (..., H or V)."""
        lead = like.shape[:-1]
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        per_token = {"mask": mask, "token_weight": token_weight, "sequence_ids": sequence_ids, "target_ids": target_ids}
        for name, value in per_token.items():
            if value is not None:
                checks.tensor(name, value)
                checks.shape(name, value, tuple(lead), "the leading shape of the inputs")
                checks.same_device(like, **{name: value})
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        if token_weight is not None:
            checks.floating("token_weight", token_weight)
            if token_weight.requires_grad:
                raise ValueError("token_weight must be a constant, got a tensor that requires grad: detach it")
        if sequence_ids is not None and (sequence_ids.is_floating_point() or sequence_ids.dtype == torch.bool):
            raise TypeError(f"sequence_ids must be an integer tensor, got {sequence_ids.dtype}")
        if target_ids is not None:
            checks.int64("target_ids", target_ids)
        if reduction == "sequence_mean" and sequence_ids is None and len(lead) != 2:
            raise ValueError(
                "sequence_ids must be given for reduction='sequence_mean' unless the inputs are (B, T, H), "
                f"got {tuple(lead)}"
            )
        divisor = _denominator(like, reduction, denominator)

        flat_mask = None if mask is None else mask.reshape(-1)
        weight = None if token_weight is None else token_weight.reshape(-1).to(accumulate)
        if weight is not None and flat_mask is not None:
            weight = weight.masked_fill(~flat_mask, 0.0)  # whatever stands there, it takes no part
        if reduction == "sequence_mean":
            if sequence_ids is None:
                sequence_ids = torch.arange(lead[0], device=like.device).unsqueeze(-1).expand(lead)
            share, sequences = _sequence_share(sequence_ids.reshape(-1), flat_mask, accumulate)
            weight = share if weight is None else weight * share
            divisor = sequences if divisor is None else divisor
        elif reduction == "mean" and divisor is None:
            # on a GPU the count stays there: nothing waits for it
            divisor = max(lead.numel(), 1) if flat_mask is None else flat_mask.sum().clamp(min=1).to(accumulate)
        targets = None if target_ids is None else target_ids.reshape(-1)
        if isinstance(divisor, Tensor):
            divisor = divisor.to(accumulate)
        return cls(lead, flat_mask, targets, weight, reduction, 1.0 if divisor is None else divisor)

    def row_weight(self, like: Tensor, accumulate: torch.dtype) -> Tensor:
        """(N,): what multiplies each token's loss before the sum."""
        return like.new_ones(self.lead.numel(), dtype=accumulate) if self.weight is None else self.weight

    def divided(self, total: Tensor) -> Tensor:
        return total / self.denominator

    def reduced(self, losses: Tensor) -> Tensor:
        """(N,) losses, 0 where a token is not counted → 0-d, or (...) for "none"."""
        if self.weight is not None:
            losses = weighted(losses, self.weight)
        return losses.reshape(self.lead) if self.reduction == "none" else self.divided(losses.sum())


def _sequence_share(ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 / (counted tokens of the token's sequence), (N,), and the number of sequences that have one, 0-d.

    The ids are any integers. Nothing waits for the device.
    """
    if not len(ids):
        return ids.to(dtype), ids.new_ones((), dtype=dtype)
    order = ids.argsort()
    first = torch.zeros_like(order)
    first[1:] = ids[order].diff() != 0
    group = torch.empty_like(order)
    group[order] = first.cumsum(0)
    counted = torch.ones_like(ids, dtype=dtype) if mask is None else mask.to(dtype)
    size = torch.zeros_like(counted).index_add(0, group, counted)
    return size.clamp(min=1)[group].reciprocal(), (size > 0).sum().clamp(min=1).to(dtype)


def _denominator(like: Tensor, reduction: str, denominator: Any) -> float | Tensor | None:
    if denominator is None:
        return None
    if reduction not in ("mean", "sequence_mean"):
        raise ValueError(f"denominator is for reduction='mean' or 'sequence_mean', got reduction={reduction!r}")
    if not isinstance(denominator, Tensor):
        return positive("denominator", denominator)
    checks.tensor("denominator", denominator)
    if denominator.dtype == torch.bool:
        raise TypeError("denominator must be a positive number or a constant 0-d tensor of one, got torch.bool")
    if denominator.ndim or denominator.requires_grad or denominator.is_complex():
        raise ValueError(
            f"denominator must be a positive number or a constant 0-d tensor, got shape {tuple(denominator.shape)}"
            f"{' that requires grad' if denominator.requires_grad else ''}"
        )
    if denominator.device.type != "cpu":
        checks.same_device(like, denominator=denominator)
    elif not torch.compiler.is_compiling() and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator.item()}")
    return denominator
