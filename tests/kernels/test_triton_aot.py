"""The shipped Triton kernels, compiled ahead of time without a GPU: they compile, spill nothing and fit the device."""

from __future__ import annotations

from pathlib import Path

import pytest
from _aot import compiled, usage

from opsd_kernels.rows import triton_backend

pytestmark = [
    pytest.mark.skipif(triton_backend.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ARCHITECTURES = (80, 90, 100)
REGISTERS_PER_PROCESSOR = 65536
LEAST_PROGRAMS = 2  # resident per multiprocessor, so that one's arithmetic covers another's loads
SHARED_BYTES = 48 << 10  # what every device gives without opting in
COMPILATIONS: list[triton_backend.Compilation] = [] if triton_backend.INTERPRETED else triton_backend.compilations()
WIDE = [c for c in COMPILATIONS if "BLOCK" in c.constants]  # the kernels that read rows of logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compilation", COMPILATIONS, ids=lambda c: c.name)
def test_resources(compilation: triton_backend.Compilation, architecture: int, tmp_path: Path) -> None:
    kernel = compiled(compilation, architecture)
    assert kernel.metadata.shared <= SHARED_BYTES
    # both logit rows are read, and a narrow dz written, with the widest instructions in the unmasked loops
    assert "ld.global.v4" in kernel.asm["ptx"] or compilation not in WIDE
    found = usage(kernel, tmp_path)
    assert (found.stack, found.local) == (0, 0), f"spills: {found}"
    assert found.registers * 32 * compilation.options["num_warps"] * LEAST_PROGRAMS <= REGISTERS_PER_PROCESSOR, found
    assert found.shared <= SHARED_BYTES


@pytest.mark.parametrize("compilation", WIDE, ids=lambda c: c.name)
def test_a_tile_gives_every_thread_its_own_elements(compilation: triton_backend.Compilation) -> None:
    # what dz in the student's place relies on; see WIDE
    assert compilation.constants["BLOCK"] >= compilation.options["num_warps"] * 32 * 4
