"""The shipped Triton kernels, compiled ahead of time without a GPU: they compile, spill nothing and fit the device."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from opsd_kernels.rows import triton_backend

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.skipif(triton_backend.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ARCHITECTURES = (80, 90, 100)
REGISTERS_PER_PROCESSOR = 65536
LEAST_PROGRAMS = 2  # resident per multiprocessor, so that one's arithmetic covers another's loads
SHARED_BYTES = 48 << 10  # what every device gives without opting in
COMPILATIONS = [] if triton_backend.INTERPRETED else triton_backend.compilations()
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(compilation: triton_backend.Compilation, architecture: int):
    names = compilation.kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=compilation.kernel,
        signature=compilation.signature,
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=compilation.options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("compilation", COMPILATIONS, ids=lambda c: c.name)
def test_resources(compilation: triton_backend.Compilation, architecture: int, tmp_path: Path) -> None:
    kernel = compiled(compilation, architecture)
    assert kernel.metadata.shared <= SHARED_BYTES
    # both logit rows are read, and a narrow dz written, with the widest instructions in the unmasked loops
    assert "ld.global.v4" in kernel.asm["ptx"]
    if not TOOL.exists():
        pytest.skip("this Triton ships no cuobjdump: registers and spills cannot be read")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([TOOL, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, usage.stdout
    registers, stack, shared, local = map(int, found.groups())
    assert (stack, local) == (0, 0), f"spills: {found.group()}"
    assert registers * 32 * compilation.options["num_warps"] * LEAST_PROGRAMS <= REGISTERS_PER_PROCESSOR, found.group()
    assert shared <= SHARED_BYTES


@pytest.mark.parametrize("compilation", COMPILATIONS, ids=lambda c: c.name)
def test_a_tile_gives_every_thread_its_own_elements(compilation: triton_backend.Compilation) -> None:
    # what dz in the student's place relies on; see WIDE
    assert compilation.constants["BLOCK"] >= compilation.options["num_warps"] * 32 * 4
