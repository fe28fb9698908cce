"""What the loss benchmarks compare: the cells, their inputs, and every contender behind one signature.

A contender is built for a cell and then called with the cell's inputs; it returns the mean loss over the tokens, whose
`backward()` is part of what is timed, or None where there is nothing to differentiate (the floor). Whatever a contender
cannot do on the device at hand is an `Unavailable` with the reason.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import opsd_kernels
from opsd_kernels import backends, fused_linear, native
from opsd_kernels.gemm import Products
from opsd_kernels.workspace import budget_bytes

GAP = 0.2  # standard deviation of z_student - z_teacher, small beside that of the logits themselves
SPREAD = 4.0  # standard deviation of the logits: peaked rows, as language models have
SEED = 20260118
# In the cells of confident rows: the teacher's likeliest token has a probability between these, even in log-odds, as
# most tokens of a rollout have; the other logits' standard deviation is smaller, to leave room for it.
LIKELIEST, CONFIDENT_SPREAD = (0.5, 0.999), 1.0


class Unavailable(Exception):
    """The contender cannot run this cell on this device; the message says why."""


@dataclass(frozen=True)
class Cell:
    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    trainable: bool = False  # whether the head gets a gradient too
    beta: float = 0.5
    confident: bool = False  # rows with one likely token, instead of many that share the probability

    @property
    def key(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        rows = "-confident" * self.confident
        return f"{self.tokens}x{self.hidden}x{self.vocab}-{self.dtype}-{head}-beta{self.beta:g}{rows}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def memory_bound(self, device: torch.device, workspace: int | None = None) -> int:
        """What the project promises to stay within, in bytes above inputs and returned gradients."""
        gradients = self.tokens * self.hidden + (self.vocab * self.hidden if self.trainable else 0)
        return budget_bytes(device, workspace) + 4 * gradients


@dataclass
class Inputs:
    """Hidden states (N, H) of student and teacher, and the head (V, H) they share."""

    student: Tensor
    teacher: Tensor
    weight: Tensor

    def clear(self) -> None:
        self.student.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        return sum(t.grad.nbytes for t in (self.student, self.weight) if t.grad is not None)


def make_inputs(cell: Cell, device: torch.device, copies: int = 1) -> list[Inputs]:
    """`copies` sets of different hidden states over one head."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(cell.vocab, cell.hidden).to(cell.torch_dtype).requires_grad_(cell.trainable)
    sets = []
    for _ in range(copies):
        if cell.confident:
            teacher = _confident(cell, weight.detach(), generator)
        else:
            teacher = normal(cell.tokens, cell.hidden) * SPREAD / cell.hidden**0.5
        student = teacher + normal(cell.tokens, cell.hidden) * GAP / cell.hidden**0.5
        student, teacher = student.to(cell.torch_dtype), teacher.to(cell.torch_dtype)
        sets.append(Inputs(student.requires_grad_(), teacher, weight))
    return sets


def _confident(cell: Cell, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Hidden states (N, H) that favour one random token each: along its row of the head, as far as its probability
    asks for.

    A step of c along w/‖w‖² lifts that logit by c and the others' variance by c²/H, and Σ exp of V normal logits is
    about V·exp(variance/2); c solves log-odds = c − log V − variance/2, which narrow hidden states cannot reach.
    """
    low, high = (math.log(p / (1 - p)) for p in LIKELIEST)
    device = weight.device
    odds = low + (high - low) * torch.rand(cell.tokens, generator=generator, device=device)
    least = odds + math.log(cell.vocab) + CONFIDENT_SPREAD**2 / 2
    if cell.hidden < 2 * float(least.max()):
        raise ValueError(f"hidden must be at least {2 * float(least.max()):.0f} for confident rows, got {cell.hidden}")
    lift = cell.hidden * (1 - (1 - 2 * least / cell.hidden).sqrt())
    tokens = torch.randint(cell.vocab, (cell.tokens,), generator=generator, device=device)
    rows = weight[tokens].float()
    rows /= rows.square().sum(-1, keepdim=True)
    base = torch.randn(cell.tokens, cell.hidden, generator=generator, device=device)
    base *= CONFIDENT_SPREAD / cell.hidden**0.5
    base -= (base * weight[tokens].float()).sum(-1, keepdim=True) * rows  # the token's own logit is the lift alone
    return base + lift.unsqueeze(-1) * rows


Call = Callable[[Inputs], "Tensor | None"]
FLOOR, OWN_FLOOR = FLOORS = "floor", "floor-native"  # by torch; as the project computes them, where that differs
BORROWED = "native-torch"  # the native row pass with torch's products, as on a CPU where these are the faster ones
COMPILED = ("dense-compiled", "liger-chunked")  # slow to start: each shape is compiled
LABELS = {
    FLOOR: "bare GEMMs",
    OWN_FLOOR: "bare GEMMs, opsd's own",
    "native": "opsd, native",
    BORROWED: "opsd, native, torch's products",
    "triton": "opsd, Triton",
    "cluster": "opsd, cluster",
    "torch": "opsd, torch",
    "auto": "opsd",
    "trl": "TRL chunked divergence",
    "liger": "Liger fused linear JSD",
    "liger-chunked": "Liger chunked JSD",
    "liger-chunked-eager": "Liger chunked JSD, not compiled",
    "dense": "dense, eager",
    "dense-compiled": "dense, torch.compile",
}
# The project's backends, in the order of the labels.
PROJECT = tuple(sorted(set(backends.NAMES) - {"auto"}, key=lambda n: list(LABELS).index(n) if n in LABELS else -1))


def build(name: str, cell: Cell, inputs: Inputs) -> Call:
    """The contender `name` for a cell; raises Unavailable.

    Names of the project's backends may carry a workspace: "native@300MiB".
    """
    backend, workspace = split(name)
    if backend in (*PROJECT, "auto"):
        call = _project(backend, cell, inputs, workspace)
        return _with_torchs_products(call) if name == BORROWED else call
    if name in FLOORS:
        device, dtype = inputs.student.device, cell.torch_dtype
        products = Products("torch" if name == FLOOR else "native", device, dtype, budget_bytes(device, None))
        if name != FLOOR and not products.native:
            raise Unavailable("the project takes torch's products here")
        return _Floor(cell, inputs, products)
    return _BUILDERS[name](cell, inputs)


def split(name: str) -> tuple[str, int | None]:
    """ "native@300MiB" → ("native", 300 << 20)."""
    backend, _, size = name.partition("@")
    return "native" if backend == BORROWED else backend, (int(size.removesuffix("MiB")) << 20) if size else None


def is_project(name: str) -> bool:
    return split(name)[0] in (*PROJECT, "auto")


def usual(device: torch.device) -> str:
    """The backend that a user gets, without its self-check: on a GPU the check runs kernels, which are to fail as
    contenders and not as part of the floor."""
    if device.type == "cpu":
        return "auto"
    return next(
        name for name in backends.candidates(device) if not backends.unfit(name, device, torch.float32, check=False)
    )


def chunks(cell: Cell, inputs: Inputs, workspace: int | None = None, backend: str | None = None) -> list[int]:
    """The numbers of tokens of the chunks that the project takes for this cell, from its own plan."""

    class Planned(Exception):
        pass

    plan_chunks = fused_linear.plan_chunks

    def stop(*args: Any, **options: Any) -> Any:
        raise Planned(plan_chunks(*args, **options))

    try:
        with mock.patch.object(fused_linear, "plan_chunks", stop):
            opsd_kernels.jsd_loss(
                inputs.student, inputs.teacher, inputs.weight, beta=cell.beta,
                backend=backend or usual(inputs.student.device), workspace_bytes=workspace,
            )  # fmt: skip
    except Planned as planned:
        return [part.stop - part.start for part in planned.args[0]]
    raise AssertionError("the loss was computed without a plan of its chunks")


def _project(backend: str, cell: Cell, inputs: Inputs, workspace: int | None) -> Call:
    def call(given: Inputs) -> Tensor:
        loss = opsd_kernels.jsd_loss(
            given.student, given.teacher, given.weight, beta=cell.beta, backend=backend, workspace_bytes=workspace
        )
        assert isinstance(loss, Tensor)
        return loss

    if backend != "auto":
        reason = backends.unfit(backend, inputs.student.device, cell.torch_dtype, check=False)
        if reason:
            raise Unavailable(reason)
    return call


def _with_torchs_products(call: Call) -> Call:
    if not native.outruns_torch()[0]:
        raise Unavailable("the project takes torch's products here anyway")

    def borrowing(given: Inputs) -> Tensor | None:
        with mock.patch.object(native, "outruns_torch", return_value=(False, "not to be used")):
            return call(given)

    return borrowing


class _Floor:
    """The products of the project's plan and nothing else: the same shapes, chunks, order and dtypes.

    Per chunk: both contexts in one product into a workspace, dX, and dW with a trainable head. Buffers are made once.
    """

    def __init__(self, cell: Cell, inputs: Inputs, products: Products):
        device, dtype = inputs.student.device, cell.torch_dtype
        self.products, self.sizes = products, chunks(cell, inputs)
        if dtype != torch.float32 and device.type == "cpu":
            raise Unavailable(f"a CPU has no product of {dtype} operands with a float32 result")
        rows = max(self.sizes)
        self.logits = torch.empty(2 * rows, cell.vocab, device=device)
        self.dz = self.logits
        if dtype != torch.float32:
            # not zeros: the power that a product takes, and so its clock, depends on the numbers
            self.dz = torch.empty(rows, cell.vocab, device=device, dtype=dtype).normal_(std=1e-3)
        self.dx = torch.empty(cell.tokens, cell.hidden, device=device)
        self.dw = torch.empty(cell.vocab, cell.hidden, device=device) if cell.trainable else None

    def __call__(self, given: Inputs) -> None:
        with torch.no_grad():
            start = 0
            for part in self._stacked(given):
                n = part.shape[0] // 2
                self.products.project(self.logits[: 2 * n], part, given.weight, None)
                self.products.back_project(self.dx[start : start + n], self.dz[:n], given.weight)
                if self.dw is not None:
                    self.products.accumulate_weight_gradient(self.dw, self.dz[:n], part[:n], first=start == 0)
                start += n

    def _stacked(self, given: Inputs) -> list[Tensor]:
        """[student; teacher] of each chunk; made when first seen, which is not timed."""
        if not hasattr(given, "stacked"):
            pairs = zip(given.student.detach().split(self.sizes), given.teacher.split(self.sizes), strict=True)
            given.stacked = [torch.cat(pair) for pair in pairs]  # type: ignore[attr-defined]
        return given.stacked  # type: ignore[attr-defined]


def _dense_loss(student: Tensor, teacher: Tensor, weight: Tensor, beta: float) -> Tensor:
    """As trainers write it: every logit at once, the softmax in float32."""
    log_s = torch.log_softmax((student @ weight.t()).float(), -1)
    with torch.no_grad():
        log_t = torch.log_softmax((teacher @ weight.t()).float(), -1)
    kl_div = torch.nn.functional.kl_div
    if beta == 0.0:
        return kl_div(log_s, log_t, reduction="sum", log_target=True) / student.shape[0]
    if beta == 1.0:
        return kl_div(log_t, log_s, reduction="sum", log_target=True) / student.shape[0]
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    of_student = kl_div(log_m, log_s, reduction="sum", log_target=True)
    of_teacher = kl_div(log_m, log_t, reduction="sum", log_target=True)
    return ((1 - beta) * of_student + beta * of_teacher) / student.shape[0]


def _dense(cell: Cell, _: Inputs) -> Call:
    return lambda given: _dense_loss(given.student, given.teacher, given.weight, cell.beta)


def _dense_compiled(cell: Cell, _: Inputs) -> Call:
    compiled = torch.compile(_dense_loss, dynamic=False)
    return lambda given: compiled(given.student, given.teacher, given.weight, cell.beta)


def _trl(cell: Cell, _: Inputs) -> Call:
    function = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def call(given: Inputs) -> Tensor:
        weight = given.weight
        divergence, _ = function.apply(
            given.student, weight, None, given.teacher, weight.detach(), None, cell.beta, 1.0
        )  # fmt: skip
        return divergence.mean()

    return call


def _liger(cell: Cell, inputs: Inputs) -> Call:
    function = peer("liger_kernel.ops.fused_linear_jsd", "LigerFusedLinearJSDFunction")
    if inputs.student.device.type == "cpu":
        raise Unavailable("its row kernel is Triton's alone: it needs a GPU")
    accumulate = torch.float32 if cell.trainable else None  # of dW; the default is the head's dtype

    def call(given: Inputs) -> Tensor:
        return function.apply(
            given.student, given.weight, given.teacher, given.weight.detach(), None, cell.beta, -100, 1.0, accumulate
        )

    return call


def _liger_chunked(cell: Cell, inputs: Inputs, compiled: bool = True) -> Call:
    module = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    # its default is half cross-entropy; without it and with soft weight 1 it is the mean divergence over the tokens
    loss = module(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=cell.beta, compiled=compiled)
    labels = torch.zeros(cell.tokens, dtype=torch.int64, device=inputs.student.device)  # none ignored
    return lambda given: loss(given.student, given.weight, given.teacher, given.weight.detach(), labels)


_BUILDERS: dict[str, Callable[[Cell, Inputs], Call]] = {
    "dense": _dense,
    "dense-compiled": _dense_compiled,
    "trl": _trl,
    "liger": _liger,
    "liger-chunked": _liger_chunked,
    "liger-chunked-eager": lambda cell, inputs: _liger_chunked(cell, inputs, compiled=False),
}


def peer(module: str, name: str) -> Any:
    """An attribute of a package that is not the project's; Unavailable where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer's import may fail in any way
        raise Unavailable(f"{module} cannot be imported: {type(error).__name__}: {error}") from None


def contenders(*, compiled: bool = True, workspaces: Iterable[str] = ()) -> list[str]:
    """Every contender's name; those that cannot run are left out when they are built."""
    peers = ("trl", "liger", "liger-chunked", "dense", "dense-compiled")
    names = [*FLOORS, *PROJECT, BORROWED, *workspaces, *peers]
    return [name for name in names if compiled or name not in COMPILED]
