"""The row pass in Triton: float32 (or bfloat16) logits on an NVIDIA GPU, the same results as the torch backend's.

This is the host's side: what is launched, and how. `triton_lean` does nearly all rows, `triton_careful` the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..objective import LogitTransform, Objective
from ..triton_jit import INTERPRETED, triton
from . import LogprobColumn, torch_backend
from .triton_careful import (
    MAX_SPLITS,
    SUM_PARTIALS,
    SWEEP_PARTIALS,
    divergence_kernel,
    logprob_kernel,
    outside_kernel,
    split_gradient_kernel,
    split_normalisers_kernel,
    split_sums_kernel,
    tail_gradient_kernel,
)
from .triton_lean import lean_kernel
from .triton_mix import KINDS, mix_kernel, mix_sums_kernel

if TYPE_CHECKING:
    from ..mixture import Mixture

NO_TENSOR = -2  # in place of a part's bias


@dataclass(frozen=True)
class Configuration:
    """How a chunk is laid on the device: tile width, warps per program, programs per row."""

    block: int
    warps: int
    splits: int = 1

    def parts(self, columns: int) -> tuple[int, int]:
        """Tiles of each program of a row, and how many programs have any."""
        tiles = math.ceil(math.ceil(columns / self.block) / self.splits)
        return tiles, math.ceil(columns / (tiles * self.block))


# A tile gives every thread at least 4 float32: no element is loaded by two threads, which dz in the student's place
# relies on, and 4 is what one load instruction carries.
# Three programs of 256 threads share a multiprocessor's 65,536 registers; left alone, ptxas aims at four in the
# unclipped KLs and spills for it. A cap and an entry clip need a few more than that: two programs.
REGISTERS, REGISTERS_OF_CAPS = 80, 112
# Four programs of the lean kernel (WIDE); three from Blackwell on, whose compiler pairs operations and needs more.
LEAN_REGISTERS, LEAN_REGISTERS_OF_BLACKWELL = 64, 80
LEAN_BETA = 0.125  # nearer to 0 or 1, the JSD's y is the difference of two logarithms that nearly agree
WIDE = Configuration(1024, 8)
NARROW = Configuration(512, 4)
TINY = Configuration(256, 1)  # the interpreter's: several tiles even at the sizes that it can do


def configuration(tokens: int, vocab: int, device: torch.device) -> Configuration:
    """The layout for (tokens, vocab) logits: rows are split where there are too few to keep the device busy."""
    if device.type != "cuda":
        return TINY
    base = WIDE if vocab > NARROW.block * 2 else NARROW
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(MAX_SPLITS, 4 * processors // max(1, tokens), vocab // (2 * base.block))
    return Configuration(base.block, base.warps, splits if tokens < processors and splits > 1 else 1)


def capability_of(device: torch.device) -> int:
    """8, 9, … of a CUDA device; 0 of another."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def available(device: torch.device | str) -> tuple[bool, str]:
    """Whether this backend runs on `device`, and why not (an empty string where it does)."""
    device = torch.device(device)
    if triton is None:
        return False, "Triton is not installed"
    if INTERPRETED:
        return (True, "") if device.type == "cpu" else (False, "TRITON_INTERPRET=1 runs the kernels on the CPU only")
    if device.type != "cuda":
        return False, f"the device is {device.type}, not cuda"
    if torch.version.hip is not None:
        return False, "only NVIDIA devices are supported"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return False, f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return True, ""


@dataclass(frozen=True)
class Compilation:
    """A kernel as `divergence_rows` or `logprob_rows` would launch it: what a compiler ahead of time needs to know."""

    name: str
    kernel: Any
    signature: dict[str, Any]  # argument → Triton type, "constexpr" for constants and absent tensors
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # pointers and strides that are multiples of 16, as at V = 151,936
    options: dict[str, int]  # num_warps and the like


_POINTERS = dict.fromkeys(
    (
        "student", "teacher", "logits", "table", "row_scale", "sweep", "sums", "log_sums", "shifts", "weights",
        "parts", "biases", "constants",
    ),
    "*fp32",
)  # fmt: skip
_TYPES: dict[str, Any] = {
    **_POINTERS,
    "dz": "*bf16",
    "targets": "*i64",
    "absent": "*i32",
    "declined": "*i32",
    "wanted": None,
    **dict.fromkeys(("columns", "tiles", "splits", "stride"), "i32"),
    **{f"{name}_stride": "i32" for name in ("student", "teacher", "dz", "table", "token")},
    "transform": ("fp32",) * 6,
    "clips": ("fp32",) * 5,
    **dict.fromkeys(("scale", "bound", "temperature"), "fp32"),
    **dict.fromkeys(("part_stride", "row_stride"), "i32"),
    "mixture": ("fp32",) * 2,
    **dict.fromkeys(("y_series", "f_series"), ("fp32",) * 5),
    **dict.fromkeys(("token_clip", "slope", "grad_factor"), "fp32"),
}
_STRIDES = ("stride", *(f"{name}_stride" for name in ("student", "teacher", "dz", "part", "row")))
_ALIGNED = (*_POINTERS, "dz", "targets", "absent", *_STRIDES)


def _compilation(
    name: str,
    kernel: Any,
    plan: Configuration,
    constants: dict[str, Any],
    limits: dict[str, int] | None = None,
    **types: Any,
) -> Compilation:
    """`types` replaces an argument's usual type; None is an absent tensor."""
    sizes = {"ITEMS": SWEEP_PARTIALS, "SUM_ITEMS": SUM_PARTIALS, "MAX": MAX_SPLITS, "BLOCK": plan.block}
    constants = {**sizes, **constants}
    signature: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for argument in kernel.arg_names:
        kind = None if argument in constants else {**_TYPES, **types}[argument]
        signature[argument] = "constexpr" if kind is None else kind
        if kind is None:
            chosen[argument] = constants.get(argument)
    aligned = tuple(argument for argument in _ALIGNED if signature.get(argument, "constexpr") != "constexpr")
    return Compilation(name, kernel, signature, chosen, aligned, {"num_warps": plan.warps, **(limits or {})})


def compilations(capability: int = 9) -> list[Compilation]:
    """What is shipped for compute capability 8, 9, …, one of each shape: every divergence in its common form and the
    most demanding of each kernel."""
    capped = Objective.checked(softcap=30.0, teacher_softcap=50.0, entry_clip=0.05)
    same_cap = Objective.checked(softcap=30.0, entry_clip=0.05)
    jsd, forward, reverse = (Objective.checked(beta=beta) for beta in (0.5, 0.0, 1.0))
    loss_only = {"targets": None, "row_scale": None}

    def constants(objective: Objective, stats: bool = True) -> dict[str, Any]:
        return _Meaning.of(objective, stats=stats).constants

    def lean(name: str, objective: Objective, plan: Configuration = WIDE, stats: bool = True, **types: Any):
        chosen = {name: constants(objective, stats)[name] for name in ("KIND", "STATS")}
        return _compilation(name, lean_kernel, plan, chosen, _lean_limits(plan, capability), **types)

    def careful(name: str, objective: Objective, plan: Configuration = WIDE, stats: bool = True, **types: Any):
        chosen = constants(objective, stats)
        return _compilation(name, divergence_kernel, plan, chosen, _limits(plan, chosen), **types)

    def mix(name: str, linear: int, parts: int, kind: str, smooth: bool, bits: int = 0) -> list[Compilation]:
        chosen = {"PARTS": parts, "LINEAR": linear, "KIND": KINDS.index(kind), "CAPS": bits, "BIASES": bits}
        mixed = _compilation(f"mix: {name}", mix_kernel, WIDE, {**chosen, "SMOOTH": smooth})
        sums = _compilation(f"mix: sums of {name}", mix_sums_kernel, WIDE, chosen)
        return [mixed] if kind == "none" else [sums, mixed]

    return [
        *mix("a power", 1, 1, "none", False),
        *mix("a sum", 3, 3, "none", False, 0b111),
        *mix("a centred residual", 1, 2, "centred", True),
        *mix("a centred residual, capped", 2, 4, "centred", True, 0b1111),
        *mix("a difference", 1, 2, "difference", False),
        *mix("a residual", 1, 3, "residual", False),
        *mix("probabilities", 0, 2, "arithmetic", False),
        *mix("probabilities, capped", 0, 4, "arithmetic", False, 0b1111),
        lean("jsd", jsd),
        lean("jsd, narrow, loss only", jsd, NARROW, False, **loss_only),
        lean("jsd, loss only", jsd, WIDE, False),
        lean("jsd, float32 dz", jsd, dz="*fp32"),
        lean("jsd, no gradient", jsd, dz=None, row_scale=None),
        lean("forward KL", forward),
        lean("reverse KL", reverse),
        careful("careful: jsd", jsd, wanted="*i32"),
        careful("careful: jsd, narrow, loss only", jsd, NARROW, False, **loss_only),
        careful("careful: jsd, no gradient", jsd, dz=None, row_scale=None),
        careful("careful: jsd, one cap, clipped", same_cap),
        careful("careful: jsd, two caps, clipped", capped),
        careful("careful: forward KL", forward, wanted="*i32"),
        careful("careful: forward KL, clipped", Objective.checked(beta=0.0, entry_clip=0.05)),
        careful("careful: reverse KL", reverse, wanted="*i32"),
        careful("careful: reverse KL, float32 dz", reverse, WIDE, False, dz="*fp32", **loss_only),
        _compilation("split: normalisers", split_normalisers_kernel, WIDE, {**constants(jsd), "absent": None}),
        _compilation("split: sums", split_sums_kernel, WIDE, constants(same_cap)),
        _compilation("split: gradient", split_gradient_kernel, WIDE, constants(same_cap)),
        _compilation("outside of a support", split_normalisers_kernel, WIDE, constants(capped)),
        _compilation("outside of a support, joined", outside_kernel, Configuration(0, 1), {}),
        _compilation("a tail's gradient", tail_gradient_kernel, WIDE, {"CAP": False}, transform=("fp32",) * 2),
        _compilation("a tail's gradient, capped", tail_gradient_kernel, WIDE, {"CAP": True}, transform=("fp32",) * 2),
        _compilation("log-probability", logprob_kernel, WIDE, {"ENTROPY": True, "CAP": True}, transform=("fp32",) * 3),
    ]


@dataclass(frozen=True)
class _Meaning:
    """An objective as the kernels take it: float arguments and compile-time choices."""

    transform: tuple[float, float, float, float, float, float]
    clips: tuple[float, float, float, float, float]
    grad_factor: float
    constants: dict[str, int]

    @property
    def links(self) -> dict[str, int]:
        """Those of the constants that tell how a pair of logits is read."""
        return {name: self.constants[name] for name in ("LINK", "CAP_S", "CAP_T")}

    @classmethod
    def of(cls, objective: Objective, *, stats: bool) -> _Meaning:
        s, t, temperature = objective.student, objective.teacher, objective.temperature
        factor = s.logit_scale / temperature
        shared = s == t and s.softcap is None
        nats = factor if shared else 1.0
        beta, tau = objective.beta, objective.entry_clip
        return cls(
            (*s.inner_outer(temperature), *t.inner_outer(temperature), nats, nats * math.log2(math.e)),
            (
                beta,
                1.0 - beta,
                math.inf if tau is None else tau,
                math.inf if objective.token_clip is None else objective.token_clip,
                nats * math.log2(math.e),
            ),
            factor,
            {
                "KIND": 0 if beta == 0.0 else 1 if beta == 1.0 else 2,
                "CLIP": tau is not None,
                "STATS": stats,
                "LINK": 0 if shared else 2 if s == t else 1,
                "CAP_S": s.softcap is not None,
                "CAP_T": t.softcap is not None,
            },
        )


@dataclass(frozen=True)
class _LeanMeaning:
    """An objective as `lean_kernel` takes it."""

    scale: float
    mixture: tuple[float, float]
    y_series: tuple[float, ...]
    f_series: tuple[float, ...]
    token_clip: float
    slope: float

    @classmethod
    def of(cls, objective: Objective) -> _LeanMeaning | None:
        """None where the lean kernel does not serve."""
        transform, beta = objective.student, objective.beta
        if transform != objective.teacher or transform.softcap is not None or objective.entry_clip is not None:
            return None
        if beta not in (0.0, 1.0) and not LEAN_BETA <= beta <= 1.0 - LEAN_BETA:
            return None
        return cls(
            transform.logit_scale / objective.temperature * math.log2(math.e),
            (beta, 1.0 - beta),
            *_series(beta),
            math.inf if objective.token_clip is None else objective.token_clip,
            1.0 if beta == 0.0 else math.log(2.0) * (1.0 if beta == 1.0 else beta - 1.0),
        )


def _series(beta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What `lean_kernel` needs near d = 0, d in bits: y's coefficients of d to d⁵ (0 for the KLs), and f's of d² to d⁶.

    log(m / p_T) = log(β + (1 − β) e^x) is the cumulant generating function of a Bernoulli variable of mean 1 − β,
    and f = (1 − β) e^x x − (m / p_T) log(m / p_T), with x = d·ln 2.
    """
    n, ln2 = range(7), math.log(2.0)
    power = [1.0 / math.factorial(k) for k in n]
    y = [0.0] * 7
    if beta == 0.0:
        f = power
    elif beta == 1.0:
        f = [(k - 1) * power[k] for k in n]
    else:
        q = 1.0 - beta
        v, skew = beta * q, 1.0 - 2.0 * q
        cumulants = [0.0, q, v, v * skew, v * (1 - 6 * v), v * skew * (1 - 12 * v), v * (1 - 30 * v + 120 * v * v)]
        log_m = [cumulants[k] * power[k] for k in n]
        m = [1.0, *(q * power[k] for k in n[1:])]
        f = [q * k * power[k] - sum(m[i] * log_m[k - i] for i in range(k + 1)) for k in n]
        y = [log_m[k] * ln2 ** (k - 1) for k in n]
        y[1] = -beta
    return tuple(y[1:6]), tuple(f[k] * ln2**k for k in n[2:])


def _lean_limits(plan: Configuration, capability: int) -> dict[str, int]:
    """Further compiler options of `lean_kernel`."""
    if plan.warps == TINY.warps:
        return {}
    return {"maxnreg": LEAN_REGISTERS if capability < 10 else LEAN_REGISTERS_OF_BLACKWELL}


def _limits(plan: Configuration, constants: dict[str, Any]) -> dict[str, int]:
    """Further compiler options of `divergence_kernel`."""
    if plan.warps != 8:
        return {}
    if constants["CLIP"]:
        return {"maxnreg": REGISTERS_OF_CAPS} if constants["LINK"] != 0 else {}
    return {"maxnreg": REGISTERS} if constants["KIND"] != 2 else {}


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
    """See the package's docstring; float32 or bfloat16 logits, a float32 table.

    dz may be `student` itself only in the logits' own dtype.
    """
    assert objective.top_k is None
    tokens, vocab = student.shape
    _check_logits("student", student)
    _check_logits("teacher", teacher)
    check_dz(dz, student, may_alias=student)
    check_dz(dz, teacher, may_alias=None)
    stats = table.shape[0] > 1
    targets, row_scale = _vector(targets), _vector(row_scale)
    written = targets if stats else None  # whose log-probabilities are
    if tokens == 0:
        return
    student, teacher = row_major(student), row_major(teacher)
    meaning = _Meaning.of(objective, stats=stats)
    plan = configuration(tokens, vocab, student.device)
    strides = (student.stride(0), teacher.stride(0))
    dz_stride = 0 if dz is None else dz.stride(0)
    table_strides = table.stride()
    with _on(student.device):
        if plan.splits == 1:
            lean, declined = _LeanMeaning.of(objective), None
            launch = {"BLOCK": plan.block, "num_warps": plan.warps}
            limits = _lean_limits(plan, capability_of(student.device))
            shape = (vocab, *strides, dz_stride, *table_strides)
            if lean is not None:
                declined = torch.empty(tokens, dtype=torch.int32, device=student.device)
                lean_kernel[(tokens,)](
                    student, teacher, dz, table, targets, row_scale, declined, *shape,
                    *dataclasses.astuple(lean), meaning.grad_factor,
                    KIND=meaning.constants["KIND"], STATS=stats, **launch, **limits,
                )  # fmt: skip
            divergence_kernel[(tokens,)](
                student, teacher, dz, table, written, row_scale, declined, *shape,
                meaning.transform, meaning.clips, meaning.grad_factor,
                **meaning.constants, **launch, **_limits(plan, meaning.constants),
            )  # fmt: skip
            return
        tiles, splits = plan.parts(vocab)
        sweep = student.new_empty(tokens, splits, SWEEP_PARTIALS, dtype=torch.float32)
        sums = student.new_empty(tokens, splits, SUM_PARTIALS, dtype=torch.float32)
        links = meaning.links
        last = {"SUM_ITEMS": SUM_PARTIALS, "MAX": MAX_SPLITS}
        layout = {"ITEMS": SWEEP_PARTIALS, "BLOCK": plan.block, "num_warps": plan.warps}
        split_normalisers_kernel[(tokens, splits)](
            student, teacher, None, sweep, vocab, tiles, splits, *strides, meaning.transform, **links, **layout
        )
        split_sums_kernel[(tokens, splits)](
            student, teacher, table, written, sweep, sums, vocab, tiles, splits, *strides, *table_strides,
            meaning.transform, meaning.clips, **meaning.constants, **last, **layout,
        )  # fmt: skip
        split_gradient_kernel[(tokens, 1 if dz is None else splits)](
            student, teacher, dz, table, row_scale, sweep, sums, vocab, tiles, splits, *strides, dz_stride,
            *table_strides, meaning.transform, meaning.clips, meaning.grad_factor,
            **meaning.constants, **last, **layout,
        )  # fmt: skip


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
    tokens, vocab = logits.shape
    _check_logits("logits", logits)
    check_dz(dz, logits, may_alias=logits)
    target, scale = _vector(targets), _vector(row_scale)
    if tokens == 0:
        return
    logits = row_major(logits)
    plan = configuration(tokens, vocab, logits.device)
    inner, outer = transform.inner_outer(temperature)
    # without a cap u is the raw logit and the factor is in the exponent's constant alone
    nats = inner if transform.softcap is None else 1.0
    with _on(logits.device):
        logprob_kernel[(tokens,)](
            logits, dz, table, target, scale, vocab, logits.stride(0), 0 if dz is None else dz.stride(0),
            *table.stride(), (1.0 if transform.softcap is None else inner, outer, nats * math.log2(math.e)),
            transform.logit_scale / temperature,
            ENTROPY=table.shape[0] > LogprobColumn.ENTROPY, CAP=transform.softcap is not None,
            BLOCK=plan.block, num_warps=plan.warps,
        )  # fmt: skip


def top_k_rows(logits: Tensor, k: int, transform: LogitTransform, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring. torch.topk selects, from the raw logits, for scale and cap keep their order; the
    likeliest token's log-probability, from one fused pass, then gives all the others'.
    """
    values, ids = logits.topk(k, dim=-1)
    table = values.new_empty(1, len(values), dtype=torch.float32)
    logprob_rows(logits, ids[:, 0], transform, temperature, table=table, dz=None, row_scale=None)
    y = torch_backend.transformed(values.float(), transform, temperature)
    likeliest, logprob = y[:, :1], table.T
    dead = likeliest == -math.inf
    logprobs = torch.where(dead, -math.inf, y - likeliest + logprob)
    return logprobs, ids, torch.where(dead, -math.inf, likeliest - logprob).squeeze(-1)


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """See the package's docstring."""
    return logits.topk(k, dim=-1).indices


def outside_rows(
    student: Tensor, teacher: Tensor | None, ids: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's docstring."""
    if teacher is None:  # its second read of each tile comes from the cache
        teacher, objective = student, dataclasses.replace(objective, teacher=objective.student)
    _check_logits("student", student)
    _check_logits("teacher", teacher)
    tokens, vocab = student.shape
    log_sums = student.new_empty(tokens, 4, dtype=torch.float32)
    if tokens:
        student, teacher = row_major(student), row_major(teacher)
        meaning, plan = _Meaning.of(objective, stats=False), configuration(tokens, vocab, student.device)
        tiles, splits = plan.parts(vocab)
        sweep = student.new_empty(tokens, splits, SWEEP_PARTIALS, dtype=torch.float32)
        with _on(student.device):
            split_normalisers_kernel[(tokens, splits)](
                student, teacher, _bits(ids, vocab), sweep, vocab, tiles, splits, student.stride(0), teacher.stride(0),
                meaning.transform, **meaning.links, ITEMS=SWEEP_PARTIALS, BLOCK=plan.block, num_warps=plan.warps,
            )  # fmt: skip
            outside_kernel[(tokens,)](
                sweep, log_sums, splits, meaning.transform, ITEMS=SWEEP_PARTIALS, MAX=MAX_SPLITS, num_warps=1
            )
    log_s, log_t, drift, offset = log_sums.unbind(1)
    return log_s, log_t, drift.double() + offset.double()


def tail_gradient_rows(
    logits: Tensor, transform: LogitTransform, temperature: float, *, shift: Tensor, weight: Tensor, dz: Tensor
) -> None:
    """See the package's docstring."""
    _check_logits("logits", logits)
    check_dz(dz, logits, may_alias=logits)
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    logits = row_major(logits)
    plan = configuration(tokens, vocab, logits.device)
    tiles, splits = plan.parts(vocab)
    with _on(logits.device):
        tail_gradient_kernel[(tokens, splits)](
            logits, dz, _vector(shift), _vector(weight), vocab, tiles, logits.stride(0), dz.stride(0),
            transform.inner_outer(temperature), transform.logit_scale / temperature,
            CAP=transform.softcap is not None, BLOCK=plan.block, num_warps=plan.warps,
        )  # fmt: skip


def mix_rows(parts: Tensor, mixture: Mixture, temperature: float, *, constants: Tensor, biases: Tensor | None) -> None:
    """See the package's docstring; float32 logits."""
    count, tokens, vocab = parts.shape
    if parts.dtype != torch.float32 or (parts.stride(2) != 1 and vocab > 1):
        raise ValueError(f"parts must be dense rows of float32, got {parts.dtype} with strides {parts.stride()}")
    if tokens == 0:
        return
    plan, meaning = configuration(tokens, vocab, parts.device), _mix_constants(mixture)
    tiles, splits = plan.parts(vocab)
    sums = parts.new_empty(tokens, splits, count, 2)
    given = parts, constants if biases is None else biases, constants, sums, vocab, tiles
    strides, launch = parts.stride()[:2], {"BLOCK": plan.block, "num_warps": plan.warps}
    with _on(parts.device):
        if KINDS[meaning["KIND"]] != "none":
            chosen = {name: value for name, value in meaning.items() if name != "SMOOTH"}
            mix_sums_kernel[(tokens, splits)](*given, *strides, **chosen, **launch)
        numbers = float(mixture.scale), float(mixture.bound or 1.0), float(temperature)
        mix_kernel[(tokens, splits)](*given, splits, *strides, *numbers, **meaning, MAX=MAX_SPLITS, **launch)


def _mix_constants(mixture: Mixture) -> dict[str, int]:
    """The compile-time choices of the kernels that mix."""
    roles = [part.role for part in mixture.parts]
    last = "none" if roles[-1] == "linear" else "centred" if mixture.centre else roles[-1]

    def bits(flags: list[bool]) -> int:
        return sum(flag << i for i, flag in enumerate(flags))

    return {
        "PARTS": len(roles),
        "LINEAR": roles.count("linear"),
        "KIND": KINDS.index(last),
        "SMOOTH": mixture.smooth,
        "CAPS": bits([part.softcap is not None for part in mixture.parts]),
        "BIASES": bits([part.bias != NO_TENSOR for part in mixture.parts]),
    }


def _bits(ids: Tensor, vocab: int) -> Tensor:
    """(n, ⌈V / 32⌉) int32 with the bits set of the columns `ids` (n, k), no id twice in a row."""
    bits = torch.ones_like(ids, dtype=torch.int32) << (ids % 32).int()
    return bits.new_zeros(ids.shape[0], math.ceil(vocab / 32)).scatter_add_(-1, ids // 32, bits)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _vector(values: Tensor | None) -> Tensor | None:
    """(n,) with unit stride: an upstream gradient may be an expanded scalar."""
    return None if values is None else values.contiguous()


def row_major(logits: Tensor) -> Tensor:
    """With unit stride along the vocabulary: a copy, if need be."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{name} must be float32 or bfloat16 for the Triton row pass, got {logits.dtype}")


def check_dz(dz: Tensor | None, logits: Tensor, *, may_alias: Tensor | None) -> None:
    """Refuses a dz that the kernels cannot fill: another program would read what one has overwritten."""
    if dz is None or dz.numel() == 0:
        return
    if dz.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dz must be float32, bfloat16 or float16 for the Triton row pass, got {dz.dtype}")
    if dz.stride(1) != 1 and dz.shape[1] > 1:
        raise ValueError("dz must have unit stride along the vocabulary")
    first, last = _span(dz)
    other_first, other_last = _span(logits)
    if first >= other_last or other_first >= last:
        return
    same = dz.data_ptr() == logits.data_ptr() and dz.dtype == logits.dtype and dz.stride() == logits.stride()
    if may_alias is None or not same:
        raise ValueError("dz may only overlap the student's logits, and then be the same elements in the same dtype")


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes [first, last) between which the tensor's elements lie."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
