"""Which backend runs the row pass: the fastest one that is there and has shown to be right on this device."""

from __future__ import annotations

import importlib
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from . import native
from .mixture import Mixer, Mixture
from .objective import LogitTransform, Objective
from .rows import Column, LogprobColumn, support

logger = logging.getLogger(__name__)

NAMES = ("auto", "torch", "triton", "native", "cluster")
FASTEST = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}  # by device, most wanted first
BY_NAME_ONLY = {"cluster": "it is no faster than Triton's"}  # those that "auto" never takes, and why
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


def mix_rows(name: str, device: torch.device, mixture: Mixture) -> Callable | None:
    """The backend's, where it has one that is right on this device for such mixtures."""
    return getattr(module(name), "mix_rows", None) if mix_error(name, device, mixture.form) <= TOLERANCE else None


@cache
def mix_error(name: str, device: torch.device, form: Mixture) -> float:
    """The largest error of the backend's target for a mixture of this form, as in `self_check`; infinite without."""
    fused = getattr(module(name), "mix_rows", None)
    if fused is None:
        return math.inf
    cuda = device.type == "cuda"
    worst = 0.0
    for rows in problems(torch.cuda.get_device_properties(device).multi_processor_count if cuda else None):
        expected = rows.mixed(None, torch.device("cpu"), form, torch.float64)
        try:
            worst = max(worst, rows.error(rows.mixed(fused, device, form), expected))
        except Exception as error:
            logger.warning("opsd_kernels: backend %s cannot mix on %s (%s); torch does it", name, device, error)
            return math.inf
    return worst


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


@dataclass(frozen=True)
class _Rows:
    """A problem of the self-check: logits (tokens, vocab), and the dtype of dz (None: in the student's place)."""

    tokens: int
    vocab: int
    dz: torch.dtype | None

    def row_pass(
        self, name: str, device: torch.device, objective: Objective, accumulate: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """What the backend's row passes fill: the rows of both tables, then both gradients."""
        generator = torch.Generator().manual_seed(0)
        teacher = 4 * torch.randn(self.tokens, self.vocab, generator=generator)
        student = teacher + 0.5 * torch.randn(self.tokens, self.vocab, generator=generator)
        teacher[1, :9], student[2, :9] = -math.inf, -math.inf
        student[3, 11] = teacher[3, 11] = 25.0  # sure of a token
        targets = (torch.arange(self.tokens) * 200 + 10).remainder(self.vocab).to(device)
        student, teacher = student.to(device, accumulate), teacher.to(device, accumulate)
        scale = torch.linspace(0.5, 1.0, self.tokens, device=device, dtype=accumulate)
        backend, narrow = module(name), accumulate if self.dz is None else self.dz
        logprobs = student.new_full((len(LogprobColumn), self.tokens), math.nan)
        dz_of_logprob = torch.full_like(student, math.nan, dtype=narrow)
        transform, temperature = objective.student, objective.temperature
        backend.logprob_rows(
            student, targets, transform, temperature, table=logprobs, dz=dz_of_logprob, row_scale=scale
        )
        table = student.new_full((len(Column), self.tokens), math.nan)
        dz = student if self.dz is None else torch.full_like(student, math.nan, dtype=narrow)
        divergence_rows(backend, student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=scale)
        return [value.double().cpu() for value in (*logprobs, *table, dz_of_logprob, dz)]

    def mixed(
        self, fused: Callable | None, device: torch.device, form: Mixture, accumulate: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """The logits of a target of this form, as `fused` or torch makes them."""
        generator = torch.Generator().manual_seed(0)
        given = [4 * torch.randn(self.tokens, self.vocab, generator=generator) for _ in form.parts]
        given += [torch.rand(self.tokens, generator=generator) + 0.1 for _ in range(2)]
        bias = torch.randn(self.vocab, generator=generator)
        bias[3:7] = -math.inf
        given = [tensor.to(device, accumulate) for tensor in given]
        bias = bias.to(device, accumulate)
        head = bias.unsqueeze(-1), bias
        mixer = Mixer(form, given, lambda weight, bias: (weight, bias), head, fused)
        buffers = given[0].new_full((1 + mixer.buffers, *given[0].shape), math.nan)
        mixer.fill(buffers, lambda tensor: tensor, cast(Any, _Given()), 0.8)
        return list(buffers[0].double().cpu())  # a table's, for there are infinities

    def error(self, got: list[Tensor], expected: list[Tensor]) -> float:
        """The largest difference: of a table's values, relative to the largest of their column or 1; of a gradient,
        relative to the largest of its row, and beyond its own rounding."""
        worst = 0.0
        for mine, want in zip(got, expected, strict=True):
            finite = want.isfinite()
            if not torch.equal(finite, mine.isfinite()):
                return math.inf
            if want.ndim == 2:
                rounding = 0.0 if self.dz is None else torch.finfo(self.dz).eps
                size = want.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            else:
                rounding, mine, want = 0.0, mine[finite], want[finite]
                size = want.abs().max().clamp(min=1.0)
            difference = ((mine - want).abs() - rounding * want.abs()).clamp(min=0.0)
            worst = max(worst, float((difference / size).max()))
        return worst


class _Given:
    """In place of products with a head: their results."""

    def project(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        out.copy_(x)


def problems(processors: int | None) -> list[_Rows]:
    """What ships: rows of any length and of 16-byte loads, dz in place and narrow; on a GPU of so many processors also
    as many rows as leave none to be split."""
    tokens = [5] if processors is None else [5, processors + 1]
    return [_Rows(n, vocab, dz) for n in tokens for vocab, dz in ((1031, None), (4112, torch.bfloat16))]


_THROUGH = LogitTransform(0.9, 20.0)
CHECKED = (
    Objective(beta=0.5),
    Objective(beta=0.0),
    Objective(beta=0.0, entry_clip=0.05),
    Objective(beta=1.0, token_clip=0.1),
    Objective(beta=1.0, entry_clip=0.05, temperature=1.3, student=_THROUGH, teacher=_THROUGH),
    Objective(beta=0.5, top_k=16, tail_bucket=True),
)
"""The objectives of the self-check."""


@cache
def self_check(name: str, device: torch.device) -> float:
    """The largest error of the backend's loss, statistics and gradient against float64, on a few small rows.

    Relative to the largest value of each; infinite if the backend fails. Of its products too, where it has its own.
    """
    worst = 0.0
    cuda = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else None
    for rows, objective in itertools.product(problems(processors), CHECKED):
        expected = rows.row_pass("torch", torch.device("cpu"), objective, torch.float64)
        try:
            worst = max(worst, rows.error(rows.row_pass(name, device, objective), expected))
        except Exception as error:  # whatever goes wrong in a compiler or a driver, there is another backend
            logger.warning("opsd_kernels: backend %s fails on %s (%s); using the next one", name, device, error)
            return math.inf
    if name == "native" and native.outruns_torch()[0]:
        worst = max(worst, _product_error(torch.Generator().manual_seed(0)))
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
