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

    def buffers(self, fused: bool) -> int:
        """(n, V) buffers besides the target's own: fused, the other parts' logits, else a part's logits, and where
        there is a residual, its sum."""
        if fused:
            return len(self.parts) - 1
        return 1 + any(part.role in ("residual", "difference") for part in self.parts)

    def settled(self, bias: bool) -> Mixture:
        """The parts in the order of ROLES; without a `bias` of the student's, none refers to it."""
        parts = sorted(self.parts, key=lambda part: ROLES.index(part.role))
        return self._replace(parts=tuple(p if bias or p.bias != -1 else p._replace(bias=-2) for p in parts))

    @property
    def form(self) -> Mixture:
        """The same of other numbers and tensors, whatever they are: parts' products, factors and bias_factors of each
        token are at places 0, 1, … of a list, the student's head and bias are everyone's."""
        n, parts = len(self.parts), []
        plain = any(part.role == "difference" for part in self.parts)  # has no factors
        for i, part in enumerate(self.parts):
            factor = 1.0 if plain else 0.7 if part.role == "arithmetic" or i % 2 == 0 else -0.3
            factors, bias_factors = (n if part.factors >= 0 else -2), (n + 1 if part.bias_factors >= 0 else -2)
            cap, bias = (None if part.softcap is None else 20.0), -2 if part.bias == -2 else -1
            parts.append(Part(part.role, i, -1, bias, factor, factors, 0.9, bias_factors, 1.1, cap))
        return Mixture(tuple(parts), 0.9, None if self.bound is None else 2.0, self.smooth, self.centre)

    @classmethod
    def decoded(cls, fields: Sequence | None) -> Mixture | None:
        """From what JSON makes of one."""
        if fields is None:
            return None
        parts, *rest = fields
        return cls(tuple(Part(*part) for part in parts), *rest)


class Mixer:
    """Fills rows of target logits; `head` casts a head (V', H') and its bias to the columns and dtypes of a call.

    mixture: settled. mix_rows: a backend's; without, torch adds part after part.
    """

    def __init__(
        self,
        mixture: Mixture,
        tensors: Sequence[Tensor],
        head: Callable,
        own: tuple[Tensor, Tensor | None],
        mix_rows: Callable | None = None,
    ):
        self.mixture, self.tensors, self.mix_rows = mixture, tensors, mix_rows
        self.constants: Tensor | None = None
        made = {(-1, -1): own}
        for part in mixture.parts:
            key = (part.weight, part.bias)
            if key not in made:
                made[key] = head(own[0] if part.weight < 0 else tensors[part.weight], self._bias_of(part, own[1]))
        self.heads = made
        self.masks = any(bias is not None for _, bias in made.values())  # a bias of −inf: no such token
        self.biases: Tensor | None = None
        if mix_rows is not None and self.masks:
            self.biases = own[0].new_zeros((len(mixture.parts), own[0].shape[0]), dtype=torch.float32)
            for row, part in zip(self.biases, mixture.parts, strict=True):
                bias = made[part.weight, part.bias][1]
                if bias is not None:
                    row.copy_(bias)

    def _bias_of(self, part: Part, own: Tensor | None) -> Tensor | None:
        return own if part.bias == -1 else None if part.bias < 0 else self.tensors[part.bias]

    @property
    def width(self) -> int:
        """Elements of the widest gathered input."""
        return max(self.tensors[part.hidden].shape[1] for part in self.mixture.parts)

    @property
    def buffers(self) -> int:
        """As `Mixture.buffers`."""
        return self.mixture.buffers(self.mix_rows is not None)

    def fill(self, buffers: Tensor, rows_of: Callable, products: Products, temperature: float) -> None:
        """buffers[0] (n, V) = temperature·log target, up to a constant of each row.

        `rows_of` takes a chunk's rows of a tensor; `buffers` is (1 + `Mixer.buffers`, n, V).
        """
        if self.mix_rows is not None:
            for part, logits in zip(self.mixture.parts, buffers, strict=True):
                self._project(part, logits, rows_of, products)
            constants = self._constants(buffers.shape[1], rows_of)
            self.mix_rows(buffers, self.mixture, temperature, constants=constants, biases=self.biases)
            return
        target, *scratch = buffers
        mixture, residual, blocks = self.mixture, scratch[-1], blocks_of(target, block_rows(target), HERE)
        begun: set[str] = set()  # the buffers that hold something
        for part in mixture.parts:
            _, bias = self.heads[part.weight, part.bias]
            name = "target" if part.role in ("linear", "arithmetic") else "residual"
            into, new = target if name == "target" else residual, name not in begun
            # the first term of a sum needs no buffer of its own
            logits = into if new and part.role != "difference" else scratch[0]
            self._project(part, logits, rows_of, products)
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

    def _project(self, part: Part, logits: Tensor, rows_of: Callable, products: Products) -> None:
        weight, _ = self.heads[part.weight, part.bias]
        products.project(logits, rows_of(self.tensors[part.hidden]).to(weight.dtype), weight, None)

    def _constants(self, tokens: int, rows_of: Callable) -> Tensor:
        """What `mix_rows` takes of that name. Numbers are filled in once: nothing is copied from the host."""
        parts = self.mixture.parts
        if self.constants is None or len(self.constants) < tokens:
            self.constants = self.heads[-1, -1][0].new_empty((tokens, len(parts), 4), dtype=torch.float32)
            for i, part in enumerate(parts):
                transform = LogitTransform(part.logit_scale, part.softcap).inner_outer(part.temperature)
                for j, number in enumerate((part.factor, part.bias_factor, *transform)):
                    self.constants[:, i, j] = number
        constants = self.constants[:tokens]
        if all(place < 0 for part in parts for place in (part.factors, part.bias_factors)):
            return constants
        constants = constants.clone()
        for i, part in enumerate(parts):
            for j, place in enumerate((part.factors, part.bias_factors)):
                if place >= 0:
                    constants[:, i, j] *= rows_of(self.tensors[place])
        return constants

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
