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


def _dumped(kernel: Any, folder: Path, option: str) -> str:
    """What the tool says of the binary; skips the test where this Triton ships none."""
    if not TOOL.exists():
        pytest.skip("this Triton ships no cuobjdump: binaries cannot be read")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    found = subprocess.run([TOOL, option, cubin], capture_output=True, text=True, check=True)
    return found.stdout + found.stderr


def hot_loops(kernel: Any, folder: Path) -> list[int]:
    """Instructions of each loop over whole tiles, in the order of the binary: those that load 16 bytes at a time."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _dumped(kernel, folder, "-sass"))
    instructions = [(int(address, 16), text) for address, text in code]
    found = []
    for end, text in instructions:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < end:
            body = [t for address, t in instructions if int(jump[1], 16) <= address <= end]
            if any(".128" in t and "LDG" in t for t in body):
                found.append(len(body))
    return found


def usage(kernel: Any, folder: Path) -> Usage:
    """Read from the binary."""
    text = _dumped(kernel, folder, "-res-usage")
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert numbers, text
    return Usage(*map(int, numbers.groups()))
