"""Triton kernels compiled ahead of time, and what their binaries ask of a multiprocessor."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Usage:
    registers: int  #: per thread
    stack: int  #: bytes per thread: spills
    shared: int  #: bytes, static
    local: int  #: bytes per thread


def compiled(compilation: Any, architecture: int) -> Any:
    """`compilation` as a backend lists it, for sm_80, sm_90, ..."""
    names = compilation.kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=compilation.kernel,
        signature=compilation.signature,
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=compilation.options)


def usage(kernel: Any, folder: Path) -> Usage:
    """Read from the binary; skips the test where this Triton ships no tool for it."""
    if not TOOL.exists():
        pytest.skip("this Triton ships no cuobjdump: registers and spills cannot be read")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    found = subprocess.run([TOOL, "-res-usage", cubin], capture_output=True, text=True, check=True)
    text = found.stdout + found.stderr
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert numbers, text
    return Usage(*map(int, numbers.groups()))
