"""Matrix products that read the compute dtype and accumulate and write in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Where there is no mixed product, operands are converted a few columns of the vocabulary at a time, in two blocks of
# about this many elements.
CONVERTED_ELEMENTS = 1 << 16


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if compute == torch.float64 else torch.float32


def project(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = x·weightᵀ + bias. Shapes (n, V), (n, H), (V, H), (V,); out and bias in the accumulation dtype."""
    if x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    elif out.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        for rows in _blocks(weight, x.shape[0]):
            torch.mm(wide, weight[rows].to(out.dtype).t(), out=out[:, rows])
    if bias is not None:
        out += bias


def back_project(out: Tensor, dz: Tensor, weight: Tensor, *, first: bool = True) -> None:
    """out (+)= dz·weight, the gradient of `project` for x. Shapes (n, H), (n, V), (V, H)."""
    if dz.dtype == out.dtype:
        torch.mm(dz, weight, out=out) if first else torch.addmm(out, dz, weight, out=out)
    elif out.is_cuda:
        if first:
            torch.mm(dz, weight, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dz, weight, out_dtype=out.dtype, out=out)
    else:
        if first:
            out.zero_()
        for rows in _blocks(weight, dz.shape[0]):
            out.addmm_(dz[:, rows].to(out.dtype), weight[rows].to(out.dtype))


def accumulate_weight_gradient(out: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """out (+)= dzᵀ·x, the gradient of `project` for the weight. Shapes (V, H), (n, V), (n, H)."""
    if dz.dtype == out.dtype:
        torch.addmm(out, dz.t(), x, beta=0 if first else 1, out=out)
    elif out.is_cuda:
        if first:
            torch.mm(dz.t(), x, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dz.t(), x, out_dtype=out.dtype, out=out)
    else:
        wide = x.to(out.dtype)
        for rows in _blocks(out, x.shape[0]):
            part = dz[:, rows].to(out.dtype).t()
            torch.addmm(out[rows], part, wide, beta=0 if first else 1, out=out[rows])


def conversion_bytes(out: torch.dtype) -> int:
    """What the two blocks take, about."""
    return 2 * CONVERTED_ELEMENTS * out.itemsize


def _blocks(weight: Tensor, tokens: int) -> list[slice]:
    """Of the vocabulary: `weight` has (V, H) elements, a block of dz (tokens, columns)."""
    step = max(64, CONVERTED_ELEMENTS // max(1, weight.shape[1], tokens))
    return [slice(a, a + step) for a in range(0, weight.shape[0], step)]
