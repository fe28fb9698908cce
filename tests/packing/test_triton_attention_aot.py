"""The Triton attention, compiled ahead of time without a GPU: it compiles, spills nothing and fits the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _aot import compiled, triton, usage

from opsd_kernels.packing.triton_attention import Compilation, compilations
from opsd_kernels.triton_jit import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.exhaustive,
]

# What a program may have at most. Those for 8.0 serve 8.6, 8.9 and 12.x as well, which have less than its 163 KiB.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
BF16, FP32 = torch.bfloat16, torch.float32
SHIPPED: list[tuple[int, Compilation]] = []
if not INTERPRETED:
    SHIPPED += [(a, c) for a in SHARED_BYTES for d in (64, 96, 128, 256) for c in compilations(d, BF16, (a // 10, 0))]
    SHIPPED += [(a, c) for a in SHARED_BYTES for c in compilations(128, BF16, (a // 10, 0), softcap=50.0)]
    SHIPPED += [(90, c) for d in (64, 256) for c in compilations(d, BF16, (9, 0), softcap=50.0, window=4096)]
    SHIPPED += [(100, c) for c in compilations(64, BF16, (10, 0), softcap=50.0)]
    SHIPPED += [(80, c) for d in (64, 128) for c in compilations(d, FP32, (8, 0), softcap=50.0, window=4096)]


@pytest.mark.parametrize(("architecture", "compilation"), SHIPPED, ids=[f"sm_{a}, {c.name}" for a, c in SHIPPED])
def test_resources(architecture: int, compilation: Compilation, tmp_path: Path) -> None:
    kernel = compiled(compilation, architecture)
    assert kernel.metadata.shared <= SHARED_BYTES[architecture]
    ptx = kernel.asm["ptx"]
    assert "ld.global.v4" in ptx or "cp.async.cg" in ptx  # 16 bytes at a time
    if compilation.constants["KEYS"] >= 64 <= compilation.constants["QUERIES"]:  # Hopper's and Blackwell's least tile
        assert MATRIX_UNITS[architecture] in ptx
    found = usage(kernel, tmp_path)
    # The tilings were chosen with 3.9; older compilers spill a few bytes in some of them.
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert found.stack <= (0 if recent else 512), f"spills: {found}"
    assert found.local == 0, f"spills: {found}"
    assert found.registers * 32 * compilation.options["num_warps"] <= 65536, found
