"""What every Triton file here needs: Triton if it is there, its decorators, and arithmetic of one instruction each.

`fma`, `exp2`, `log2` and `reciprocal` are the hardware's: fused, and approximate to 2⁻²² (of the value; between 0.5 and
2, of log2 in absolute terms), with arguments and results below 2⁻¹²⁶ taken as 0. The interpreter, which knows no
assembly, has numpy's, made as wrong as the hardware's may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(*runtime: str) -> Callable[[Any], Any]:
    """triton.jit, with `runtime` the integers whose value must not select a compilation; nothing without Triton."""
    return (lambda function: function) if triton is None else triton.jit(do_not_specialize=list(runtime))


def constant(value: Any) -> Any:
    """A module's constant that kernels may read."""
    return value if tl is None else tl.constexpr(value)


LOG2E = constant(math.log2(math.e))
LN2 = constant(math.log(2.0))


if INTERPRETED:

    @jit()
    def _error(x):
        """Something between −2⁻²² and 2⁻²² that is the same for the same x, and unlike for x of other digits."""
        bits = x.to(tl.int32, bitcast=True) * -1640531527
        return (bits ^ (bits >> 15)).to(tl.float32) * 2.0**-53

    @jit()
    def fma(x, y, z):
        """x·y + z, rounded once."""
        return (x.to(tl.float64) * y + z).to(tl.float32)

    @jit()
    def exp2(x):
        """2^x."""
        return tl.exp2(x) * (1.0 + _error(x))

    @jit()
    def log2(x):
        """log2 x."""
        y = tl.log2(x)
        return y + _error(x) * tl.maximum(1.0, tl.abs(y))

    @jit()
    def reciprocal(x):
        """1 / x."""
        return (1.0 + _error(x)) / x

else:

    @jit()
    def fma(x, y, z):
        """x·y + z, rounded once."""
        return tl.fma(x, y, z)

    @jit()
    def exp2(x):
        """2^x."""
        return tl.exp2(x)

    @jit()
    def log2(x):
        """log2 x."""
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @jit()
    def reciprocal(x):
        """1 / x."""
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
