"""Matrix products that read the compute dtype and accumulate and write in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

# Where there is no mixed product, operands are converted a few columns of the vocabulary at a time, in two blocks of
# about this many elements.
CONVERTED_ELEMENTS = 1 << 16
NATIVE_SHARE = 16  # native products take at most one part in so many of the budget, or are left alone


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if compute == torch.float64 else torch.float32


class Products:
    """The three products of a call, by torch or, where that is faster and the budget in bytes allows it, by csrc/."""

    scratch: Tensor | None = None  # of `bytes`, for native products; made for each of them where it is not given

    def __init__(self, backend: str, device: torch.device, compute: torch.dtype, budget: int):
        self.native = (
            backend == "native"
            and device.type == "cpu"
            and compute in native.TYPES
            and budget // NATIVE_SHARE >= native.GEMM_SCRATCH_BYTES
            and torch.get_num_threads() <= native.MOST_THREADS
            and native.outruns_torch()[0]
        )
        self.compute, self.on_cpu = compute, device.type == "cpu"

    @property
    def bytes(self) -> int:
        """What a product takes besides its operands and its result, at most, or about."""
        if self.native:
            return native.GEMM_SCRATCH_BYTES
        accumulate = accumulation_dtype(self.compute)
        return 2 * CONVERTED_ELEMENTS * accumulate.itemsize if self.on_cpu and self.compute != accumulate else 0

    def project(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """out = x·weightᵀ + bias. Shapes (n, V), (n, H), (V, H), (V,); out and bias in the accumulation dtype."""
        if not self._whole(out, x, weight.t()):
            wide = x.to(out.dtype)
            for rows in _blocks(weight, x.shape[0]):
                torch.mm(wide, weight[rows].to(out.dtype).t(), out=out[:, rows])
        if bias is not None:
            out += bias

    def back_project(self, out: Tensor, dz: Tensor, weight: Tensor, *, first: bool = True) -> None:
        """out (+)= dz·weight, the gradient of `project` for x. Shapes (n, H), (n, V), (V, H)."""
        if not self._whole(out, dz, weight, add=not first):
            if first:
                out.zero_()
            for rows in _blocks(weight, dz.shape[0]):
                out.addmm_(dz[:, rows].to(out.dtype), weight[rows].to(out.dtype))

    def accumulate_weight_gradient(self, out: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
        """out (+)= dzᵀ·x, the gradient of `project` for the weight. Shapes (V, H), (n, V), (n, H)."""
        if not self._whole(out, dz.t(), x, add=not first):
            wide = x.to(out.dtype)
            for rows in _blocks(out, x.shape[0]):
                part = dz[:, rows].to(out.dtype).t()
                torch.addmm(out[rows], part, wide, beta=0 if first else 1, out=out[rows])

    def _whole(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> bool:
        """out (+)= a·b as one product; False where there is none for these dtypes here."""
        if self.native:
            native.multiply(out, a, b, add=add, scratch=self.scratch)
        elif a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
        elif out.is_cuda and add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        elif out.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            return False
        return True


def _blocks(weight: Tensor, tokens: int) -> list[slice]:
    """Of the vocabulary: `weight` has (V, H) elements, a block of dz (tokens, columns)."""
    step = max(64, CONVERTED_ELEMENTS // max(1, weight.shape[1], tokens))
    return [slice(a, a + step) for a in range(0, weight.shape[0], step)]
