"""Checks of tensor arguments: each error names the argument, what it was and what is accepted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .across import WHOLE
from .objective import Objective, integer

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_dtensor(value: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def tensor(name: str, value: Any, kind: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        what = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {what} one")
    if is_dtensor(value):  # those of a head have been gathered by now
        raise TypeError(f"{name} must be a plain tensor, got a DTensor: give this rank's tokens, as by to_local()")


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def int64(name: str, value: Any) -> None:
    tensor(name, value, "an int64 tensor")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}")


def shape(name: str, value: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    got = tuple(value.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape ({wanted}), {meaning}; got {got}")


def not_a_scalar(name: str, value: Tensor, last: str) -> None:
    if not value.ndim:
        raise ValueError(f"{name} must have shape (..., {last}), got {tuple(value.shape)}")


def same_device(like: Tensor, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the hidden states or logits, got {value.device}")


def bias_vector(name: str, value: Any, weight: Tensor) -> None:
    if value is not None:
        floating(name, value)
        shape(name, value, (weight.shape[0],), "(V,)")


def projection(name: str, hidden: Any, weight: Any, bias: Any) -> None:
    """Of the hidden states called `name` (..., H) by a head (V, H) with its bias (V,), if it has one."""
    differentiated_once(hidden, weight, bias)
    floating(name, hidden)
    floating("weight", weight)
    not_a_scalar(name, hidden, "H")
    shape("weight", weight, (None, hidden.shape[-1]), "(V, H)")
    bias_vector("bias", bias, weight)
    same_device(hidden, weight=weight, bias=bias)


def vocabulary(valid_vocab: Any, sizes: dict[str, int], *, split: bool = False) -> int:
    """The columns that take part, `sizes` being how many each of the arguments has.

    `split`: those are one rank's alone, and WHOLE stands for all there are.
    """
    if split:
        return WHOLE if valid_vocab is None else integer("valid_vocab", valid_vocab)
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"{name} must have a vocabulary of at least one token, got none")
    columns = min(sizes.values())
    return columns if valid_vocab is None else integer("valid_vocab", valid_vocab, high=columns)


def differentiated_once(*tensors: Any) -> None:
    """Raises where a derivative is asked for that the operators would leave out without a word."""
    if torch.compiler.is_compiling():
        return
    found = "torch.func transforms" if torch._C._are_functorch_transforms_active() else None
    if forward_ad._current_level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        found = found or "forward-mode derivatives (torch.autograd.forward_ad)"
    if found:
        raise RuntimeError(f"{found} are not supported: the losses differentiate once, by backward()")


def support(objective: Objective, vocab: int) -> None:
    if objective.top_k is not None and vocab != WHOLE and objective.top_k > vocab:
        raise ValueError(f"top_k must be at most the {vocab} tokens of the vocabulary, got {objective.top_k}")


def unsupported(why: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is not supported {why}: only None is accepted, got {value!r}")
