"""Which backend runs the row pass: the fastest one that is there and has shown to be right on this device."""

from __future__ import annotations

import importlib
import logging
import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native
from .objective import LogitTransform, Objective
from .rows import Column, LogprobColumn, support

logger = logging.getLogger(__name__)

NAMES = ("auto", "torch", "triton", "native", "cluster")
FASTEST = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}  # by device, most wanted first
UNPROVEN = {"cluster": "no device has run it yet"}  # those that "auto" never takes, and why
TOLERANCE = 1e-4  # of the self-check, relative; the backends' own errors are under 1e-5


def module(name: str) -> ModuleType:
    """The backend's module, with the functions that the docstring of `rows` describes."""
    return importlib.import_module(f".rows.{name}_backend", __package__)


def divergence_rows(backend: ModuleType, student: Tensor, teacher: Tensor, objective: Objective, **out: Any) -> None:
    """The backend's row pass over the whole vocabulary or, where the objective asks for one, a support."""
    if objective.top_k is None:
        backend.divergence_rows(student, teacher, objective, **out)
    else:
        support.divergence_rows(backend, student, teacher, objective, **out)


def known(name: Any) -> str:
    """`name` if it is one of NAMES, else raises ValueError."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {NAMES}, got {name!r}")
    return name


def chosen(requested: str, device: torch.device, compute: torch.dtype, group: str = "") -> str:
    """The backend to use: "auto" takes the first of FASTEST that is fit and passes the self-check on this device.

    Raises ValueError where a backend that is asked for by name cannot be used, with the reason.
    """
    if requested == "auto":
        return next(name for name in candidates(device) if not unfit(name, device, compute, group))
    reason = unfit(requested, device, compute, group, check=False)
    if reason:
        raise ValueError(f"backend must be one that can be used here, got {requested!r}: {reason}")
    return requested


def candidates(device: torch.device) -> tuple[str, ...]:
    return FASTEST.get(device.type, ("torch",))


def unfit(name: str, device: torch.device, compute: torch.dtype, group: str = "", *, check: bool = True) -> str:
    """Why the backend cannot be used for such a call; empty where it can."""
    if name == "torch":
        return ""
    if compute == torch.float64:
        return "it computes in float32, and the inputs are float64"
    if group:
        return "only the torch backend reduces over a process group"
    if device.type == "meta":
        return "there is nothing to compute"
    there, reason = _available(name, device)
    if not there:
        return reason
    if not check:
        return ""
    error = self_check(name, device)
    return "" if error <= TOLERANCE else f"its self-check on {device} is off by {error:.1e}"


@cache
def _available(name: str, device: torch.device) -> tuple[bool, str]:
    try:
        return module(name).available(device)
    except Exception as error:  # an import can fail in more ways than one
        return False, f"{type(error).__name__}: {error}"


@cache
def self_check(name: str, device: torch.device) -> float:
    """The largest error of the backend's loss, statistics and gradient against float64, on a few small rows.

    Relative to the largest value of each; infinite if the backend fails. Of its products too, where it has its own.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(5, 1031, generator=generator)
    student = teacher + 0.5 * torch.randn(5, 1031, generator=generator)
    teacher[1, :9], student[2, :9] = -math.inf, -math.inf
    targets = torch.arange(5) * 200 + 10
    worst = 0.0
    through = LogitTransform(0.9, 20.0)
    for objective in (
        Objective(beta=0.5),
        Objective(beta=0.0),
        Objective(beta=0.0, entry_clip=0.05),
        Objective(beta=1.0, entry_clip=0.05, temperature=1.3, student=through, teacher=through),
        Objective(beta=0.5, top_k=16, tail_bucket=True),
    ):
        expected = _row_pass("torch", torch.device("cpu"), student.double(), teacher.double(), targets, objective)
        try:
            got = _row_pass(name, device, student, teacher, targets, objective)
        except Exception as error:  # whatever goes wrong in a compiler or a driver, there is another backend
            logger.warning("opsd_kernels: backend %s fails on %s (%s); using the next one", name, device, error)
            return math.inf
        for mine, want in zip(got, expected, strict=True):
            finite = want.isfinite()
            if not torch.equal(finite, mine.isfinite()):
                return math.inf
            difference = (mine - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1.0)
            worst = max(worst, float(difference))
    if name == "native" and native.outruns_torch()[0]:
        worst = max(worst, _product_error(generator))
    return worst


def _product_error(generator: torch.Generator) -> float:
    """Of native products with several blocks in each dimension, shared by all threads, as `self_check` has it."""
    a, b = (torch.randn(*shape, generator=generator) for shape in ((1100, 520), (520, 1700)))
    exact = a.double() @ b.double()
    worst = 0.0
    for x, y in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):  # dense along either dimension
        product = torch.full(exact.shape, math.nan)
        try:
            native.multiply(product, x, y)
        except Exception as error:
            logger.warning("opsd_kernels: native products fail (%s); using the next backend", error)
            return math.inf
        off = float((product - exact).abs().max() / exact.abs().max())
        worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def _row_pass(
    name: str,
    device: torch.device,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    objective: Objective,
) -> list[Tensor]:
    student, teacher, targets = student.to(device, copy=True), teacher.to(device), targets.to(device)
    scale = torch.linspace(0.5, 1.0, len(student), device=device, dtype=student.dtype)
    backend = module(name)
    logprobs = student.new_full((len(LogprobColumn), len(student)), math.nan)
    dz = torch.full_like(student, math.nan)
    transform, temperature = objective.student, objective.temperature
    backend.logprob_rows(student, targets, transform, temperature, table=logprobs, dz=dz, row_scale=scale)
    table = student.new_full((len(Column), len(student)), math.nan)
    # dz in the student's place, as the chunk loop has it
    divergence_rows(backend, student, teacher, objective, targets=targets, table=table, dz=student, row_scale=scale)
    return [value.double().cpu() for value in (*logprobs, dz, *table, student)]
