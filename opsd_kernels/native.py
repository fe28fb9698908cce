"""The C++ of csrc/, built for this machine's CPU on first use and loaded by ctypes; and its matrix products.

The sources include nothing of torch, so building takes seconds and any C++17 compiler with vector extensions (GCC,
Clang) will do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")  # after $CXX
UNITS = ("rows_cpu.cpp", "gemm_cpu.cpp")  # what is compiled
SOURCES = (*UNITS, "requests.h", "row_math.h", "threads.h", "vectors.h")
# Not -ffast-math: infinities and NaN mean something here.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
TARGETS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())  # the first that compiles
BUILD_SECONDS = 300
# AMD's models of family 26 (Zen 5) that compute with 512 bits at once: servers and desktops, not the mobile ones.
WIDE_ZEN_5 = (*range(0x00, 0x20), *range(0x40, 0x50))
MOST_THREADS = 16  # that meet often enough without waiting long; beyond, torch multiplies
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the library numbers them
GEMM_SCRATCH_BYTES = 6 << 20  # at least what a product of any shape takes


def available() -> tuple[bool, str]:
    """Whether the library is there, being built and loaded if need be, and why not. Never raises."""
    library, reason = _load()
    return library is not None, reason


def loaded() -> ctypes.CDLL:
    """Raises RuntimeError where there is none."""
    found, reason = _load()
    if found is None:
        raise RuntimeError(f"the native library is not available: {reason}")
    return found


def call(name: str, request: ctypes.Structure) -> None:
    """A function of the library that takes a pointer to its request. Raises MemoryError where it had too little."""
    function = getattr(loaded(), name)
    function.argtypes, function.restype = (ctypes.POINTER(type(request)),), ctypes.c_int
    if function(ctypes.byref(request)):
        raise MemoryError(f"{name} had no memory for the intermediates of its {request.threads} threads")


# ----------------------------------------------------------------------------------------------------------- products


class _GemmRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "scratch")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int64) for name in ("a_row", "a_column", "b_row", "b_column", "c_stride")),
        *((name, ctypes.c_int32) for name in ("a_type", "b_type", "add", "threads")),
    )


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scratch: Tensor | None = None) -> None:
    """out = a·b, or with `add` out += a·b: (m, n), (m, k) and (k, n), on the CPU.

    `out` is float32, row by row without gaps, and shares no memory with a or b. These are float32, bfloat16 or float16;
    what has gaps along both of its dimensions is copied first. `scratch` is memory to work in, GEMM_SCRATCH_BYTES or
    more; without, it is allocated. Raises RuntimeError where there is no library, ValueError where a tensor is not like
    that.
    """
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k or out.shape != (m, n):
        shapes = f"out {tuple(out.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ValueError(f"out, a and b must be (m, n), (m, k) and (k, n), got {shapes}")
    if out.dtype != torch.float32 or not _dense(out):
        raise ValueError(f"out must be float32 with dense rows, got {out.dtype} with strides {out.stride()}")
    for name, t in (("out", out), ("a", a), ("b", b)):
        if t.dtype not in TYPES or t.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU and one of {list(TYPES)}, got {t.dtype} on {t.device}")
    a, b = (t if _dense(t) or _dense(t.t()) else t.contiguous() for t in (a, b))
    if not (m and n and k):
        if not add:
            out.zero_()
        return
    if scratch is None:
        scratch = torch.empty(GEMM_SCRATCH_BYTES, dtype=torch.uint8)
    if scratch.nbytes < GEMM_SCRATCH_BYTES or scratch.device.type != "cpu" or not scratch.is_contiguous():
        found = f"{scratch.nbytes} bytes on {scratch.device}"
        raise ValueError(f"scratch must be {GEMM_SCRATCH_BYTES} bytes of the CPU's memory, got {found}")
    request = _GemmRequest(
        *(t.data_ptr() for t in (a, b, out, scratch)),
        *(m, n, k),
        *(*_strides(a), *_strides(b), out.stride(0)),
        *(TYPES[a.dtype], TYPES[b.dtype], add, torch.get_num_threads()),
    )
    call("opsd_gemm", request)


@cache
def outruns_torch() -> tuple[bool, str]:
    """Whether these products are the faster ones on this CPU, and why (not).

    MKL, which torch has for x86, uses vectors of 512 bits on Intel's CPUs only. AMD's server and desktop CPUs compute
    with all of them at once since Zen 5: there, MKL's products run at half the speed that there is. Decided by what the
    CPU is and not by a clock, so that results can be repeated.
    """
    there, reason = available()
    if not there:
        return False, reason
    if not torch.backends.mkl.is_available():
        return False, "torch's products are not MKL's"
    processor = _processor()
    vendor, family, model = (processor.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))
    which = f"a CPU of {vendor}, family {family}, model {model}"
    wide = (vendor, family) == ("AuthenticAMD", "26") and model in map(str, WIDE_ZEN_5)
    if loaded().opsd_vector_lanes() != 16 or not wide:
        return False, f"not known to be faster on {which}"
    return True, f"on {which}, MKL uses vectors of 256 bits, these products of 512"


def _dense(matrix: Tensor) -> bool:
    """Each row without gaps, and no two rows in one place."""
    rows, columns = matrix.shape
    return (columns <= 1 or matrix.stride(1) == 1) and (rows <= 1 or matrix.stride(0) >= columns)


def _strides(matrix: Tensor) -> tuple[int, int]:
    """1 for the dense dimension, also where a dimension of one element has any stride."""
    return (matrix.stride(0), 1) if _dense(matrix) else (1, matrix.stride(1))


# ----------------------------------------------------------------------------------------------------------- building

_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, str] | None = None


def _load() -> tuple[ctypes.CDLL | None, str]:
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                _loaded = ctypes.CDLL(str(_built())), ""
            except Exception as error:  # whatever it is, torch serves
                _loaded = None, " ".join(str(error).split())[:500]
                logger.warning("the native library is not available, plain torch serves: %s", _loaded[1])
        return _loaded


def _built() -> Path:
    """The CPU's library."""
    source = source_directory()
    compiler = _compiler()
    identity = [" ".join(compiler), version_of(compiler), " ".join(FLAGS), repr(TARGETS), _machine()]
    return built("csrc", SOURCES, identity, lambda library: _compile(compiler, source, library))


def built(name: str, sources: Sequence[str], identity: Sequence[str], compile_to: Callable[[Path], object]) -> Path:
    """A library's path: from the cache if it was built from these files of csrc/ and under this identity before.

    Else `compile_to` makes it. Raises RuntimeError where there is no directory to keep it in, and what `compile_to`
    raises.
    """
    source = source_directory()
    parts = [*identity, *((source / file).read_text(encoding="utf-8") for file in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    problems = []
    for directory in _cache_directories():
        library = directory / f"{name}-{key}.so"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _refuse_strangers(directory)
            if library.is_file():
                return library
            with tempfile.TemporaryDirectory(dir=directory) as work:
                made = Path(work) / library.name
                compile_to(made)
                os.replace(made, library)  # atomic: another process sees the whole library or none
            return library
        except OSError as error:
            problems.append(str(error))
    raise RuntimeError(f"no directory to build in: {'; '.join(problems)}")


def version_of(compiler: list[str]) -> str:
    """What a compiler says of itself."""
    command = [*compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True).stdout


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    """Builds the units in the directory `source`."""
    message = ""
    for target in TARGETS:
        command = [*compiler, *FLAGS, *target, *(str(source / unit) for unit in UNITS), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode == 0:
            return
        message = done.stderr.strip() or f"exit status {done.returncode}"
    raise RuntimeError(f"{compiler[0]} failed: {message.splitlines()[0]}")


def source_directory() -> Path:
    """Where csrc/ is."""
    package = Path(__file__).resolve().parent
    places = (package / "csrc", package.parent / "csrc")  # an installed wheel, a checkout
    for place in places:
        if all((place / name).is_file() for name in SOURCES):
            return place
    raise FileNotFoundError(f"{SOURCES[0]} is in neither {places[0]} nor {places[1]}")


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    for candidate in ([chosen] if chosen else []) + list(COMPILERS):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler found: tried $CXX, {', '.join(COMPILERS)}")


def _machine() -> str:
    """What -march=native depends on: a cache may be shared by different machines."""
    return repr((platform.system(), platform.machine(), platform.libc_ver(), sorted(_processor().items())))


def _processor() -> dict[str, str]:
    """What the system says of its first CPU."""
    lines: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name in (
                "vendor_id",
                "cpu family",
                "model",
                "model name",
                "flags",
                "Features",
                "CPU part",
                "CPU implementer",
            ):
                lines.setdefault(name, value)
    except OSError:
        lines["processor"] = platform.processor()
    return lines


def _cache_directories() -> list[Path]:
    """Where libraries are kept; the second is for when the first cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base else Path.home() / ".cache"
    return [home / "opsd_kernels", Path(tempfile.gettempdir()) / f"opsd_kernels-{_user()}"]


def _refuse_strangers(directory: Path) -> None:
    """What is loaded from here runs: no one else may have put it there."""
    status = directory.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{directory} belongs to another user or is writable by others")


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
