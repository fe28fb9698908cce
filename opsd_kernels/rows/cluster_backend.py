"""The row pass over the whole vocabulary on Hopper (sm_90), each logit read once: csrc/rows_cluster.cu.

float32 logits, up to MOST_COLUMNS of them a row. Whatever else there is, and every function but `divergence_rows`, is
the Triton backend's or, where that is not to be had, the torch one's.

The library is built by nvcc on first use, which takes about half a minute, or is the file that the environment
variable OPSD_CLUSTER_LIBRARY names: `build` makes one, on any machine with nvcc.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import native
from ..objective import LogitTransform, Objective
from . import torch_backend, triton_backend
from .native_backend import DivergenceRequest, divergence_request

UNIT = "rows_cluster.cu"
SOURCES = (UNIT, "cluster_kernel.cuh", "hopper.cuh", "requests.h", "row_math.h", "row_parts.h")
# the target written so: the shorthand -arch=sm_90a also compiles for others with some versions
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90a,code=sm_90a")
CAPABILITY = (9, 0)
MOST_COLUMNS = 458_752  # what the shared memory of 16 multiprocessors holds
LIBRARY_VARIABLE = "OPSD_CLUSTER_LIBRARY"
BUILD_SECONDS = 600


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether this backend runs on `device`, its library being built if need be, and why not. Never raises."""
    device = torch.device(device)
    if device.type != "cuda":
        return False, f"the device is {device.type}, not cuda"
    if torch.version.hip is not None:
        return False, "only NVIDIA devices are supported"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return False, f"it is for compute capability 9.0 (Hopper), the device's is {capability[0]}.{capability[1]}"
    library, reason = _load()
    return library is not None, reason


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """See the package's docstring. dz may be `student` itself only in float32.

    Raises RuntimeError where the kernel cannot be launched.
    """
    assert objective.top_k is None
    if not serves(student, teacher, table, dz):
        _next_backend(student.device).divergence_rows(
            student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale
        )
        return
    triton_backend.check_dz(dz, student, may_alias=student)
    triton_backend.check_dz(dz, teacher, may_alias=None)
    if student.shape[0] == 0:
        return
    # by name: the request holds pointers alone
    student, teacher = triton_backend.row_major(student), triton_backend.row_major(teacher)
    targets = None if targets is None else targets.contiguous()
    row_scale = None if row_scale is None else row_scale.float().contiguous()
    request = divergence_request(student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale)
    _launch(request, student.device)


def serves(student: Tensor, teacher: Tensor, table: Tensor, dz: Tensor | None) -> bool:
    """Whether the kernel itself, not the backend behind this one, does such a row pass."""
    wide = all(t.dtype == torch.float32 for t in (student, teacher, table))
    dense = table.stride(1) == 1 or table.shape[1] <= 1
    return wide and dense and 0 < student.shape[1] <= MOST_COLUMNS and (dz is None or dz.dtype in native.TYPES)


def logprob_rows(
    logits: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    temperature: float,
    *,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """See the package's docstring; by the next backend."""
    _next_backend(logits.device).logprob_rows(
        logits, targets, transform, temperature, table=table, dz=dz, row_scale=row_scale
    )


def top_k_rows(logits: Tensor, k: int, transform: LogitTransform, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring; by the next backend."""
    return _next_backend(logits.device).top_k_rows(logits, k, transform, temperature)


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """See the package's docstring; by the next backend."""
    return _next_backend(logits.device).top_k_ids(logits, k)


def outside_rows(
    student: Tensor, teacher: Tensor | None, ids: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring; by the next backend."""
    return _next_backend(student.device).outside_rows(student, teacher, ids, objective)


def tail_gradient_rows(
    logits: Tensor, transform: LogitTransform, temperature: float, *, shift: Tensor, weight: Tensor, dz: Tensor
) -> None:
    """See the package's docstring; by the next backend."""
    _next_backend(logits.device).tail_gradient_rows(logits, transform, temperature, shift=shift, weight=weight, dz=dz)


def _next_backend(device: torch.device) -> ModuleType:
    return triton_backend if triton_backend.available(device)[0] else torch_backend


def _launch(request: DivergenceRequest, device: torch.device) -> None:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the cluster backend is not available: {reason}")
    with torch.cuda.device(device):
        index, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
        code = library.opsd_cluster_divergence_rows(ctypes.byref(request), index, ctypes.c_void_p(stream))
    if code:
        message = library.opsd_cluster_error(code).decode()
        raise RuntimeError(f"the cluster row pass could not be launched on {device}: {message}")


# ----------------------------------------------------------------------------------------------------------- building


def build(library: str | os.PathLike[str], *options: str) -> str:
    """Compiles the library to the path `library`, with further `options` of nvcc; returns what nvcc printed.

    Needs no GPU. Raises FileNotFoundError where there is no nvcc, RuntimeError where it fails.
    """
    unit = native.source_directory() / UNIT
    command = [_nvcc(), *FLAGS, *options, str(unit), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {(output.strip() or f'exit status {done.returncode}').splitlines()[0]}")
    return output


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. Tried once."""
    try:
        chosen = os.environ.get(LIBRARY_VARIABLE)
        library = ctypes.CDLL(chosen or str(_built()))
        library.opsd_cluster_error.restype = ctypes.c_char_p
        library.opsd_cluster_most_columns.restype = ctypes.c_int64
        if library.opsd_cluster_most_columns() != MOST_COLUMNS:
            return None, f"{chosen} is of another version of this package"
    except Exception as error:  # whatever it is, another backend serves
        return None, " ".join(str(error).split())[:500]
    return library, ""


def _built() -> Path:
    identity = [_nvcc(), native.version_of([_nvcc()]), " ".join(FLAGS)]
    return native.built("cluster", SOURCES, identity, build)


def _nvcc() -> str:
    """$NVCC, or nvcc from the PATH, $CUDA_HOME or where CUDA is usually installed."""
    chosen, home = os.environ.get("NVCC"), os.environ.get("CUDA_HOME")
    places = [chosen] if chosen else ["nvcc", *([f"{home}/bin/nvcc"] if home else []), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        found = shutil.which(place)
        if found:
            return found
    raise FileNotFoundError(f"no nvcc found: tried {', '.join(places)}; {LIBRARY_VARIABLE} may name a library")
