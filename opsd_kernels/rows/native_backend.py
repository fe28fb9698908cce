"""The row pass compiled for this machine's CPU, float32: csrc/rows_cpu.cpp.

What it does not serve goes to the torch backend: float64, columns that are not dense. Each thread has up to six rows of
V floats of its own, besides the workspace.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import native
from ..objective import LogitTransform, Objective
from . import LogprobColumn, torch_backend


def available(device: torch.device | str = "cpu") -> tuple[bool, str]:
    """Whether the library serves `device`, being built and loaded if need be, and why not. Never raises."""
    if torch.device(device).type != "cpu":
        return False, "it is for the CPU"
    return native.available()


def supports(logits_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this backend itself, not the torch one behind it, serves such logits."""
    return logits_dtype == torch.float32 and device.type == "cpu"


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
    """See the package's docstring."""
    assert objective.top_k is None
    if not supports(student.dtype, student.device) or not _rows_are_dense(student, teacher, table, dz):
        torch_backend.divergence_rows(
            student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale
        )
        return
    n, vocab = _same_shape(student, teacher, dz)
    targets = _targets(targets, n, vocab) if table.shape[0] > 1 else None
    row_scale = _row_scale(row_scale, n)
    if n == 0 or vocab == 0:
        table.zero_()
        return
    request = divergence_request(student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale)
    native.call("opsd_divergence_rows", request)


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
    """log p(target) and, with a second row in the table, the entropy. See the package's docstring."""
    if not supports(logits.dtype, logits.device) or not _rows_are_dense(logits, logits, table, dz):
        torch_backend.logprob_rows(logits, targets, transform, temperature, table=table, dz=dz, row_scale=row_scale)
        return
    n, vocab = _same_shape(logits, logits, dz)
    checked_targets = _targets(targets, n, vocab)
    assert checked_targets is not None
    row_scale = _row_scale(row_scale, n)
    if n == 0:
        return
    request = _LogprobRequest(
        logits=logits.data_ptr(),
        targets=checked_targets.data_ptr(),
        row_scale=None if row_scale is None else row_scale.data_ptr(),
        table=table.data_ptr(),
        dz=None if dz is None else dz.data_ptr(),
        n=n,
        vocab=vocab,
        logits_stride=logits.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        table_stride=table.stride(0),
        temperature=temperature,
        transform=_Transform.of(transform),
        dz_type=native.TYPES[torch.float32 if dz is None else dz.dtype],
        want_entropy=table.shape[0] > LogprobColumn.ENTROPY,
        threads=torch.get_num_threads(),
    )
    native.call("opsd_logprob_rows", request)


def top_k_rows(logits: Tensor, k: int, transform: LogitTransform, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    log_z = logits.new_empty(logits.shape[0])
    if not supports(logits.dtype, logits.device) or not _rows_are_dense(logits, logits, log_z[None], None):
        return torch_backend.top_k_rows(logits, k, transform, temperature)
    request, ids = _top_k_request(logits, k)
    logprobs = torch.empty_like(ids, dtype=logits.dtype)
    request.logprobs, request.log_sums = logprobs.data_ptr(), log_z.data_ptr()
    request.temperature, request.transform = temperature, _Transform.of(transform)
    native.call("opsd_top_k_rows", request)
    return logprobs, ids, log_z


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """See the package's docstring; of equal logits those with the smaller ids, and NaN above all."""
    if not supports(logits.dtype, logits.device) or not _is_dense(logits):
        return torch_backend.top_k_ids(logits, k)
    request, ids = _top_k_request(logits, k)
    native.call("opsd_top_k_rows", request)
    return ids


def outside_rows(
    student: Tensor, teacher: Tensor | None, ids: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring; in float64."""
    other = student if teacher is None else teacher
    fit = other.dtype == student.dtype and supports(student.dtype, student.device)
    if not fit or not _is_dense(student, other):
        return torch_backend.outside_rows(student, teacher, ids, objective)
    n, vocab = _same_shape(student, other, None)
    ids = _ids("support ids", ids, (n, ids.shape[-1]), vocab)
    log_s, log_t, apart = (student.new_zeros(n, dtype=torch.float64) for _ in range(3))
    request = _OutsideRequest(
        student=student.data_ptr(),
        teacher=None if teacher is None else teacher.data_ptr(),
        ids=ids.data_ptr(),
        log_sums_s=log_s.data_ptr(),
        log_sums_t=log_t.data_ptr(),
        differences=apart.data_ptr(),
        n=n,
        vocab=vocab,
        k=ids.shape[1],
        student_stride=student.stride(0),
        teacher_stride=other.stride(0),
        temperature=objective.temperature,
        student_transform=_Transform.of(objective.student),
        teacher_transform=_Transform.of(objective.teacher),
        threads=torch.get_num_threads(),
    )
    native.call("opsd_outside_rows", request)
    return log_s, log_s if teacher is None else log_t, apart


def tail_gradient_rows(
    logits: Tensor, transform: LogitTransform, temperature: float, *, shift: Tensor, weight: Tensor, dz: Tensor
) -> None:
    """See the package's docstring."""
    if not supports(logits.dtype, logits.device) or not _is_dense(logits, dz) or dz.dtype not in native.TYPES:
        torch_backend.tail_gradient_rows(logits, transform, temperature, shift=shift, weight=weight, dz=dz)
        return
    n, vocab = _same_shape(logits, logits, dz)
    shift, weight = _of_rows("shift", shift, n), _of_rows("weight", weight, n)
    request = _TailGradientRequest(
        logits=logits.data_ptr(),
        shift=shift.data_ptr(),
        weight=weight.data_ptr(),
        dz=dz.data_ptr(),
        n=n,
        vocab=vocab,
        logits_stride=logits.stride(0),
        dz_stride=dz.stride(0),
        temperature=temperature,
        transform=_Transform.of(transform),
        dz_type=native.TYPES[dz.dtype],
        threads=torch.get_num_threads(),
    )
    native.call("opsd_tail_gradient_rows", request)


# ---------------------------------------------------------------------------------------------------------- arguments


class _Transform(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_double), ("softcap", ctypes.c_double))

    @classmethod
    def of(cls, transform: LogitTransform) -> _Transform:
        return cls(transform.logit_scale, transform.softcap or 0.0)


class DivergenceRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "targets", "row_scale", "table", "dz")),
        *((name, ctypes.c_int64) for name in ("n", "vocab")),
        *((name, ctypes.c_int64) for name in ("student_stride", "teacher_stride", "dz_stride", "table_stride")),
        *((name, ctypes.c_double) for name in ("beta", "temperature", "entry_clip", "token_clip")),
        *((name, _Transform) for name in ("student_transform", "teacher_transform")),
        *((name, ctypes.c_int32) for name in ("dz_type", "statistics", "threads")),
    )


class _LogprobRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "row_scale", "table", "dz")),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "logits_stride", "dz_stride", "table_stride")),
        ("temperature", ctypes.c_double),
        ("transform", _Transform),
        *((name, ctypes.c_int32) for name in ("dz_type", "want_entropy", "threads")),
    )


class _TopKRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "logprobs", "ids", "log_sums")),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "k", "logits_stride")),
        ("temperature", ctypes.c_double),
        ("transform", _Transform),
        ("threads", ctypes.c_int32),
    )


class _OutsideRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "ids", "log_sums_s", "log_sums_t", "differences")),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "k", "student_stride", "teacher_stride")),
        ("temperature", ctypes.c_double),
        *((name, _Transform) for name in ("student_transform", "teacher_transform")),
        ("threads", ctypes.c_int32),
    )


class _TailGradientRequest(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "shift", "weight", "dz")),
        *((name, ctypes.c_int64) for name in ("n", "vocab", "logits_stride", "dz_stride")),
        ("temperature", ctypes.c_double),
        ("transform", _Transform),
        *((name, ctypes.c_int32) for name in ("dz_type", "threads")),
    )


def divergence_request(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None,
    table: Tensor,
    dz: Tensor | None,
    row_scale: Tensor | None,
) -> DivergenceRequest:
    """`divergence_rows`' arguments as csrc/requests.h has them, for the CPU's functions and a GPU's.

    It holds pointers alone: the tensors, whose rows have no gaps, must outlive it. targets and row_scale are dense.
    """
    n, vocab = student.shape
    return DivergenceRequest(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        targets=None if targets is None else targets.data_ptr(),
        row_scale=None if row_scale is None else row_scale.data_ptr(),
        table=table.data_ptr(),
        dz=None if dz is None else dz.data_ptr(),
        n=n,
        vocab=vocab,
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        table_stride=table.stride(0),
        beta=objective.beta,
        temperature=objective.temperature,
        entry_clip=math.inf if objective.entry_clip is None else objective.entry_clip,
        token_clip=math.inf if objective.token_clip is None else objective.token_clip,
        student_transform=_Transform.of(objective.student),
        teacher_transform=_Transform.of(objective.teacher),
        dz_type=native.TYPES[torch.float32 if dz is None else dz.dtype],
        statistics=table.shape[0] > 1,
        threads=torch.get_num_threads(),
    )


def _top_k_request(logits: Tensor, k: int) -> tuple[_TopKRequest, Tensor]:
    """For the ids alone, (n, k), which come with it."""
    n, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be in [1, {vocab}], got {k}")
    ids = logits.new_empty(n, k, dtype=torch.int64)
    request = _TopKRequest(
        logits=logits.data_ptr(),
        ids=ids.data_ptr(),
        n=n,
        vocab=vocab,
        k=k,
        logits_stride=logits.stride(0),
        threads=torch.get_num_threads(),
    )
    return request, ids


def _same_shape(student: Tensor, teacher: Tensor, dz: Tensor | None) -> tuple[int, int]:
    """The library trusts its pointers, so nothing with another shape may get there."""
    if student.shape != teacher.shape or (dz is not None and dz.shape != student.shape):
        shapes = [tuple(t.shape) for t in (student, teacher, dz) if t is not None]
        raise ValueError(f"logits and dz must have one shape, got {shapes}")
    return student.shape[0], student.shape[1]


def _rows_are_dense(student: Tensor, teacher: Tensor, table: Tensor, dz: Tensor | None) -> bool:
    """Whether every tensor is as the library reads and writes it: on the CPU, of its dtype, a row without gaps."""
    wide = table.dtype == teacher.dtype == torch.float32 and table.shape[1:] == student.shape[:1]
    known = dz is None or dz.dtype in native.TYPES
    return wide and known and _is_dense(*(t for t in (student, teacher, table, dz) if t is not None))


def _is_dense(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and (t.shape[-1] <= 1 or t.stride(-1) == 1) for t in tensors)


def _targets(targets: Tensor | None, n: int, vocab: int) -> Tensor | None:
    return None if targets is None else _ids("targets", targets, (n,), vocab)


def _ids(name: str, ids: Tensor, shape: tuple[int, ...], vocab: int) -> Tensor:
    if ids.shape != shape or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab):
        raise IndexError(f"{name} must be {shape} token ids in [0, {vocab}), got shape {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64).contiguous()


def _row_scale(row_scale: Tensor | None, n: int) -> Tensor | None:
    return None if row_scale is None else _of_rows("row_scale", row_scale, n)


def _of_rows(name: str, values: Tensor, n: int) -> Tensor:
    if values.shape != (n,):
        raise ValueError(f"{name} must be ({n},), got {tuple(values.shape)}")
    return values.detach().to("cpu", torch.float32).contiguous()
