"""The shipped Triton kernels, compiled ahead of time without a GPU: they compile, spill nothing and fit the device."""

from __future__ import annotations

from pathlib import Path

import pytest
from _aot import compiled, hot_loops, usage

from opsd_kernels.rows import triton_backend
from opsd_kernels.triton_jit import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.exhaustive,
]

ARCHITECTURES = (80, 90, 100)
REGISTERS_PER_PROCESSOR = 65536
LEAST_PROGRAMS = 2  # resident per multiprocessor, so that one's arithmetic covers another's loads
SHARED_BYTES = 48 << 10  # what every device gives without opting in
SHIPPED: list[tuple[int, triton_backend.Compilation]] = []
if not INTERPRETED:
    SHIPPED += [(a, c) for a in ARCHITECTURES for c in triton_backend.compilations(a // 10)]
OF_HOPPER = {c.name: c for architecture, c in SHIPPED if architecture == 90}
# At most so many instructions per vocabulary entry, in the sweeps that most rows take and in all; the careful kernel's
# are there to notice growth.
INSTRUCTIONS = {
    "jsd": (85, 125),
    "jsd, no gradient": (66, 90),
    "forward KL": (63, 84),
    "reverse KL": (63, 86),
    "careful: forward KL, clipped": (166, 166),
}
LEAN_REGISTERS = 64  # four programs to a multiprocessor


@pytest.mark.parametrize(("architecture", "compilation"), SHIPPED, ids=[f"sm_{a}, {c.name}" for a, c in SHIPPED])
def test_resources(compilation: triton_backend.Compilation, architecture: int, tmp_path: Path) -> None:
    kernel = compiled(compilation, architecture)
    assert kernel.metadata.shared <= SHARED_BYTES
    # both logit rows are read, and a narrow dz written, with the widest instructions in the unmasked loops
    assert "ld.global.v4" in kernel.asm["ptx"] or "BLOCK" not in compilation.constants
    found = usage(kernel, tmp_path)
    assert (found.stack, found.local) == (0, 0), f"spills: {found}"
    assert found.registers * 32 * compilation.options["num_warps"] * LEAST_PROGRAMS <= REGISTERS_PER_PROCESSOR, found
    if compilation.kernel is triton_backend.lean_kernel and architecture < 100:
        assert found.registers <= LEAN_REGISTERS, found
    assert found.shared <= SHARED_BYTES


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_per_entry(name: str, tmp_path: Path) -> None:
    compilation = OF_HOPPER[name]
    loops = hot_loops(compiled(compilation, 90), tmp_path)
    assert len(loops) == 3, "the sweeps were not found in the binary"
    entries = compilation.constants["BLOCK"] / (32 * compilation.options["num_warps"])  # of a thread, in each turn
    usual, most = INSTRUCTIONS[name]
    again = loops[1] if compilation.kernel is triton_backend.lean_kernel else 0  # its first sweep, done anew
    assert (sum(loops) - again) / entries <= usual, [n / entries for n in loops]
    assert sum(loops) / entries <= most, [n / entries for n in loops]


@pytest.mark.parametrize("compilation", [c for c in OF_HOPPER.values() if "BLOCK" in c.constants], ids=lambda c: c.name)
def test_a_tile_gives_every_thread_its_own_elements(compilation: triton_backend.Compilation) -> None:
    # what dz in the student's place relies on; see WIDE
    assert compilation.constants["BLOCK"] >= compilation.options["num_warps"] * 32 * 4
