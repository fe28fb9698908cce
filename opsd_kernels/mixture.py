"""A teacher's logits made of several streams' logits, a chunk of tokens at a time.

    log target = normalise(Σ a·log p + g(Σ b·log p)),  or  log Σ w·p

The chunk holds whole rows of the vocabulary, so that the normalisers that a non-linear g needs are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gemm import Products
from .objective import LogitTransform
from .rows.torch_backend import HERE, blocks_of, transformed
from .workspace import block_rows

ROLES = ("linear", "residual", "difference", "arithmetic")


class Part(NamedTuple):
    """factor·y with y = transform(h·Wᵀ + bias_factor·bias) / temperature, one product with a head.

    Tensors are given by their places in a list; −1: the student's head or bias, −2: none.
    """

    role: str  # of ROLES; "difference": y_F − y_P of F and the one linear part P, which F's normaliser needs
    hidden: int
    weight: int = -1
    bias: int = -1
    factor: float = 1.0
    factors: int = -2  # of each token, times `factor`
    bias_factor: float = 1.0
    bias_factors: int = -2
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Mixture(NamedTuple):
    """What the parts become. g(x) = scale·x, scale·clip(x, ±bound) or, with `smooth`, scale·bound·tanh(x / bound)."""

    parts: tuple[Part, ...]
    scale: float = 1.0
    bound: float | None = None
    smooth: bool = False
    centre: bool = False  # the residual less its mean over the vocabulary, before g

    @property
    def buffers(self) -> int:
        """(n, V) buffers besides the target's own: a part's logits, and where there is a residual, its sum."""
        return 1 + any(part.role in ("residual", "difference") for part in self.parts)

    @classmethod
    def decoded(cls, fields: Sequence | None) -> Mixture | None:
        """From what JSON makes of one."""
        if fields is None:
            return None
        parts, *rest = fields
        return cls(tuple(Part(*part) for part in parts), *rest)


class Mixer:
    """Fills rows of target logits; `head` casts a head (V', H') and its bias to the columns and dtypes of a call."""

    def __init__(self, mixture: Mixture, tensors: Sequence[Tensor], head: Callable, own: tuple[Tensor, Tensor | None]):
        self.mixture, self.tensors = mixture, tensors
        made = {(-1, -1): own}
        for part in mixture.parts:
            key = (part.weight, part.bias)
            if key not in made:
                made[key] = head(own[0] if part.weight < 0 else tensors[part.weight], self._bias_of(part, own[1]))
        self.heads = made
        self.masks = any(bias is not None for _, bias in made.values())  # a bias of −inf: no such token

    def _bias_of(self, part: Part, own: Tensor | None) -> Tensor | None:
        return own if part.bias == -1 else None if part.bias < 0 else self.tensors[part.bias]

    @property
    def width(self) -> int:
        """Elements of the widest gathered input."""
        return max(self.tensors[part.hidden].shape[1] for part in self.mixture.parts)

    def fill(
        self, target: Tensor, scratch: Sequence[Tensor], rows_of: Callable, products: Products, temperature: float
    ) -> None:
        """target (n, V) = temperature·log target, up to a constant of each row.

        `rows_of` takes a chunk's rows of a tensor; `scratch` has `Mixture.buffers` tensors like `target`.
        """
        mixture, residual, blocks = self.mixture, scratch[-1], blocks_of(target, block_rows(target), HERE)
        begun: set[str] = set()  # the buffers that hold something
        for part in sorted(mixture.parts, key=lambda part: ROLES.index(part.role)):
            weight, bias = self.heads[part.weight, part.bias]
            name = "target" if part.role in ("linear", "arithmetic") else "residual"
            into, new = target if name == "target" else residual, name not in begun
            # the first term of a sum needs no buffer of its own
            logits = into if new and part.role != "difference" else scratch[0]
            products.project(logits, rows_of(self.tensors[part.hidden]).to(weight.dtype), weight, None)
            factor = self._factor(part.factor, part.factors, rows_of)
            bias_factor = self._factor(part.bias_factor, part.bias_factors, rows_of)
            transform = LogitTransform(part.logit_scale, part.softcap)
            for block in blocks:
                y = _with_bias(logits[block], bias, _of(bias_factor, block))
                y = transformed(y, transform, part.temperature)
                self._add(part.role, into[block], target[block], y, _of(factor, block), new=new)
            begun.add(name)
        if "residual" in begun:
            for block in blocks:
                self._add_residual(target[block], residual[block], fresh="target" not in begun)
        if temperature != 1.0:
            target *= temperature

    def _add(self, role: str, out: Tensor, target: Tensor, y: Tensor, factor: float | Tensor, *, new: bool) -> None:
        """A part's tempered logits y into the sum that it belongs to, of which they are the first term or not."""
        if role == "arithmetic":
            log_p = y - (torch.logsumexp(y, -1, keepdim=True) - _log(factor))
            out.copy_(log_p if new else torch.logaddexp(out, log_p))
        elif role == "linear":
            part = _times(y, factor, -math.inf if self.masks else None)
            if part is not out:
                out.copy_(part) if new else out.add_(part)
        elif role == "difference":
            if self.masks:
                y = y.masked_fill(target == -math.inf, 0.0)
            before = torch.logsumexp(target, -1, keepdim=True)
            torch.sub(y, torch.logsumexp(target + y, -1, keepdim=True) - before, out=out)
        else:
            if not self.mixture.centre:  # then constants of a row matter
                y = y - torch.logsumexp(y, -1, keepdim=True)
            part = _times(y, factor, 0.0 if self.masks else None)
            if part is not out:
                out.copy_(part) if new else out.add_(part)

    def _add_residual(self, target: Tensor, residual: Tensor, *, fresh: bool) -> None:
        mixture = self.mixture
        if mixture.centre and (fresh or not self.masks):
            residual -= residual.mean(-1, keepdim=True)
        elif mixture.centre:
            counted = target != -math.inf
            total = residual.masked_fill(~counted, 0.0).sum(-1, keepdim=True)
            residual -= total / counted.sum(-1, keepdim=True).clamp(min=1)
        scale, bound = mixture.scale, mixture.bound
        assert bound is not None  # without, the residual is part of the linear sum
        if mixture.smooth:
            residual.mul_(1 / bound).tanh_()
            scale *= bound
        else:
            residual.clamp_(-bound, bound)
        torch.mul(residual, scale, out=target) if fresh else target.add_(residual, alpha=scale)

    def _factor(self, constant: float, place: int, rows_of: Callable) -> float | Tensor:
        return constant if place < 0 else rows_of(self.tensors[place]).unsqueeze(-1) * constant


def _of(factor: float | Tensor, block: slice) -> float | Tensor:
    return factor[block] if isinstance(factor, Tensor) else factor


def _log(factor: float | Tensor) -> float | Tensor:
    if isinstance(factor, Tensor):
        return factor.log()
    return math.log(factor) if factor else -math.inf


def _with_bias(logits: Tensor, bias: Tensor | None, factor: float | Tensor) -> Tensor:
    """A column whose bias is −inf has no token, whatever the factor."""
    if bias is None:
        return logits
    none = bias == -math.inf
    finite = logits + bias.masked_fill(none, 0.0) * factor
    return finite.masked_fill_(none, -math.inf)


def _times(y: Tensor, factor: float | Tensor, masked: float | None) -> Tensor:
    """factor·y, y itself for 1; `masked` for an entry of −inf, also under a factor of 0, where there can be any."""
    if isinstance(factor, float) and factor == 1.0 and masked in (None, -math.inf):
        return y
    return y * factor if masked is None else (y * factor).masked_fill_(y == -math.inf, masked)
