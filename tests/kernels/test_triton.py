"""The Triton row pass under Triton's interpreter, against the dense definitions in float64.

The interpreter has to be chosen before Triton is first imported, and other tests need the compiler: without
TRITON_INTERPRET=1 this file therefore runs itself in a fresh process that has it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from _helpers import close_divergence, close_pair
from torch import Tensor

from opsd_kernels import Stream, Target, backends, divergence, reference
from opsd_kernels.objective import LogitTransform, Objective
from opsd_kernels.rows import Column, torch_backend, triton_backend, triton_lean
from opsd_kernels.triton_jit import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

inner = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
# numpy warns of infinities that the kernels select away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GROUPS = ("options", "accuracy", "not options and not accuracy")
RUNS = [
    *((group, "test_triton.py") for group in GROUPS),
    ("triton", "test_support.py"),
    ("triton", "test_confident.py"),
    ("triton", "test_mix.py"),
]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize(("group", "file"), RUNS)
def test_under_the_interpreter(group: str, file: str, request: pytest.FixtureRequest) -> None:
    root, path = Path(__file__).resolve().parents[2], str(Path(__file__).with_name(file))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", group, path]
    command += ["--all"] * request.config.getoption("--all")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def logits(tokens: int, vocab: int, gap: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Peaked rows (tokens, vocab), the student's `gap` away from the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(tokens, vocab, generator=generator)
    return teacher + gap * torch.randn(tokens, vocab, generator=generator), teacher


def expected(student: Tensor, teacher: Tensor, objective: Objective, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses (n,) and dz (n, V) by autograd in float64."""
    z = student.double().requires_grad_()
    loss = reference.divergence(z, teacher.double(), objective)
    weight = torch.ones_like(loss) if scale is None else scale.double()
    (dz,) = torch.autograd.grad(torch.where(loss.isfinite(), loss, 0.0), z, weight)
    return loss.detach(), dz


def layout(monkeypatch: pytest.MonkeyPatch, splits: int = 1, block: int = 256) -> None:
    plan = triton_backend.Configuration(block, 1, splits)
    monkeypatch.setattr(triton_backend, "configuration", lambda *_: plan)


def run(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    targets: Tensor | None = None,
    scale: Tensor | None = None,
    columns: int = 1,
    dz_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """The table and dz. Both are parts of larger, poisoned buffers, of which nothing else may be written."""
    tokens, vocab = student.shape
    tables = torch.full((columns, tokens + 2), math.nan)
    buffer = None if dz_dtype is None else torch.full((tokens + 1, vocab + 3), math.nan, dtype=dz_dtype)
    before = student.clone(), teacher.clone()
    table, dz = tables[:, 1:-1], None if buffer is None else buffer[:tokens, :vocab]
    backends.divergence_rows(
        triton_backend, student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=scale
    )
    assert tables[:, [0, -1]].isnan().all()
    if buffer is not None:
        assert buffer[:, vocab:].isnan().all()
        assert buffer[tokens:].isnan().all()
    for now, then in zip((student, teacher), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return table, dz


OPTIONS = [
    {},
    {"temperature": 1.7},
    {"entry_clip": 0.002},
    {"token_clip": 0.3},
    {"entry_clip": 0.003, "token_clip": 0.2, "temperature": 0.8},
    {"logit_scale": 1.3, "teacher_logit_scale": 0.8},
    {"softcap": 15.0, "logit_scale": 1.1, "entry_clip": 0.004},
    {"softcap": 15.0, "teacher_softcap": math.inf, "temperature": 1.2},
]


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.thinned(3)
def test_options(beta: float, options: dict, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=256 if splits == 1 else 128)
    student, teacher = logits(3, 501)
    objective = Objective.checked(beta=beta, **options)
    targets, scale = torch.tensor([500, 0, 77]), torch.tensor([0.5, 2.0, -1.0])
    loss, want = expected(student, teacher, objective, scale)
    table, dz = run(student, teacher, objective, targets=targets, scale=scale, columns=len(Column))
    # exponentials and logarithms are as wrong here as a device's may be
    torch.testing.assert_close(table[Column.LOSS].double(), loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=3e-6 * want.abs().max().item())

    # the torch backend leaves the column of clipped tokens alone where there is no clip
    full = torch.zeros(len(Column), 3, dtype=torch.float64)
    torch_backend.divergence_rows(
        student.double(), teacher.double(), objective, targets=targets, table=full, dz=None, row_scale=None
    )
    torch.testing.assert_close(table.double(), full, rtol=5e-6, atol=2e-6)

    alone, none = run(student, teacher, objective, dz_dtype=None)
    assert none is None
    torch.testing.assert_close(alone[0].double(), loss, rtol=1e-5, atol=1e-7)


@inner
@pytest.mark.parametrize(
    ("options", "splits", "gaps"),
    [
        ({}, 1, (1.0, 0.05, 1e-3)),
        ({}, 2, (1.0, 1e-3)),
        ({"temperature": 0.7}, 1, (1e-3,)),
        ({"softcap": 30.0}, 1, (1e-3,)),
        ({"entry_clip": 0.05}, 1, (1.0, 1e-3)),
    ],
    ids=["plain", "split", "temperature", "cap", "clip"],
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.thinned(2)
def test_accuracy(
    beta: float, options: dict, splits: int, gaps: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(monkeypatch, splits, block=1024 // splits)
    for gap in gaps:
        student, teacher = logits(32, 1027, gap)
        objective = Objective.checked(beta=beta, **options)
        loss, want = expected(student, teacher, objective, None)
        table, dz = run(student, teacher, objective)
        assert rms((dz.double() - want).norm(dim=-1) / want.norm(dim=-1)) <= 1e-5
        assert rms((table[0] - loss).abs() / loss.abs()) <= 1e-4


@inner
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.thinned(2)
def test_accuracy_where_one_token_is_nearly_certain(beta: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=1024 // splits)
    for gap, peak in ((1e-2, 16.0), (1e-3, 12.0), (1e-3, 16.0), (1e-3, 20.0)):
        student, teacher = close_pair(32, 1027, gap, peak)
        want = close_divergence(student, teacher, beta)
        _, want_dz = expected(student, teacher, Objective.checked(beta=beta), None)
        table, dz = run(student, teacher, Objective.checked(beta=beta))
        assert rms((table[0] - want).abs() / want) <= 1e-5
        assert rms((dz.double() - want_dz).norm(dim=-1) / want_dz.norm(dim=-1)) <= 1e-5


def rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


@inner
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_accuracy_with_a_constant_between_the_models(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=1024)
    student, teacher = logits(32, 1027, 1e-2)
    student += 5.0
    objective = Objective.checked(beta=beta)
    loss, want = expected(student, teacher, objective, None)
    table, dz = run(student, teacher, objective)
    assert rms((dz.double() - want).norm(dim=-1) / want.norm(dim=-1)) <= 1e-5
    assert rms((table[0] - loss).abs() / loss.abs()) <= 1e-4


def declined(student: Tensor, teacher: Tensor, objective: Objective) -> list[bool] | None:
    """The rows that the lean kernel leaves to the careful one; None: all, as the objective is not for it."""
    seen = []

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                lean[grid](*arguments, **options)
                seen.append(arguments[6].bool().tolist())

            return launch

    lean = triton_backend.lean_kernel
    with mock.patch.object(triton_backend, "lean_kernel", Spy()):
        run(student, teacher, objective)
    return seen[0] if seen else None


@inner
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_which_rows_need_care(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch)
    student, teacher = logits(9, 501, 3.0)
    student[1] += 1000.0  # a constant between the models is no reason
    student[2, 7] = teacher[3, 7] = -math.inf
    student[4, 7] = teacher[4, 7] = -math.inf
    student[5, 7] = math.nan
    student[6, 7] = teacher[6, 7] + 60.0  # in nats: a gap too far
    student[7, 256:] -= 40.0  # all of the student's mass is in the first tile
    student[7, :256], teacher[7, :256] = -20.0, -20.0
    student[8, 400], teacher[8, 400] = 110.0, 110.0  # both far above what the first tile says
    plain = [False, False, True, True, True, True, True, True, True]
    assert declined(student, teacher, Objective.checked(beta=beta)) == plain
    for options in ({"entry_clip": 0.1}, {"softcap": 30.0}, {"logit_scale": 1.1, "teacher_logit_scale": 1.0}):
        assert declined(student[:2], teacher[:2], Objective.checked(beta=beta, **options)) is None
    assert declined(student[:2], teacher[:2], Objective.checked(beta=0.1)) is None


@inner
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_models_that_are_not_where_the_first_tile_says(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gap is measured anew from its mean; where the first tile was right, once is enough."""
    layout(monkeypatch)
    first = mock.Mock(wraps=triton_lean._first_sweep)
    monkeypatch.setattr(triton_lean, "_first_sweep", first)
    objective = Objective.checked(beta=beta)
    for gap, constant, sweeps in ((0.05, 0.0, 1), (1e-3, 0.0, 1), (1e-3, 0.3, 2), (1e-4, 0.4, 2), (1e-3, 3.0, 2)):
        student, teacher = logits(4, 1027, gap)
        teacher[:, :256] -= 20
        student[:, :256] += constant - 20
        student[:, :256] -= student[:, :256] - teacher[:, :256] - constant  # exactly so in the first tile
        first.reset_mock()
        table, dz = run(student, teacher, objective)
        assert first.call_count == 4 * sweeps
        loss, want = expected(student, teacher, objective, None)
        assert rms((dz.double() - want).norm(dim=-1) / want.norm(dim=-1)) <= 2e-6
        if gap >= 1e-3:
            assert rms((table[0] - loss).abs() / loss.abs()) <= 1e-5
        # a target is a better guess, and changes nothing
        first.reset_mock()
        _, dz = run(student, teacher, objective, targets=teacher.argmax(-1))
        assert first.call_count == 4
        assert rms((dz.double() - want).norm(dim=-1) / want.norm(dim=-1)) <= 2e-6


@inner
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_columns_masked_with_the_lowest_number(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch)
    student, teacher = logits(3, 501)
    student[:, 7] = teacher[:, 7] = torch.finfo(torch.float32).min
    objective, targets = Objective.checked(beta=beta), torch.tensor([1, 400, 7])
    assert declined(student, teacher, objective) == [False] * 3
    table, dz = run(student, teacher, objective, targets=targets, columns=len(Column))
    loss, want = expected(student, teacher, objective, None)
    entropies = [-(z.double().softmax(-1) * z.double().log_softmax(-1)).sum(-1) for z in (student, teacher)]
    torch.testing.assert_close(table[Column.LOSS].double(), loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(table[Column.STUDENT_ENTROPY].double(), entropies[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(table[Column.TEACHER_ENTROPY].double(), entropies[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=3e-6 * want.abs().max().item())


@inner
def test_series_of_the_lean_kernel() -> None:
    """Its polynomials in d (bits) against the functions they stand for, at the edge of where they are used."""
    edge, ln2 = triton_lean.NEAR.value, math.log(2.0)
    for beta in (0.0, 0.13, 0.5, 0.87, 1.0):
        y, f = map(np.array, triton_backend._series(beta))
        for d in (edge, -edge):
            x, q = d * ln2, 1.0 - beta
            m = beta + q * math.exp(x)
            exact = {0.0: math.expm1(x) - x, 1.0: math.exp(x) * x - math.expm1(x)}.get(
                beta, q * math.exp(x) * x - m * math.log(m)
            )
            assert f @ d ** np.arange(2, 7) == pytest.approx(exact, rel=2e-5)
            if beta not in (0.0, 1.0):
                assert y @ d ** np.arange(1, 6) == pytest.approx((math.log(m) - x) / ln2, rel=2e-6)


@inner
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_models_have_no_loss_and_no_gradient(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    student, _ = logits(2, 501)
    table, dz = run(student, student.clone(), Objective.checked(beta=beta))
    assert (table == 0).all()
    assert (dz == 0).all()


def masked(vocab: int) -> tuple[Tensor, Tensor]:
    """Rows with −inf: in both models, in the student, in the teacher, crosswise, everywhere in one, in both."""
    student, teacher = logits(8, vocab)
    student[0, ::3] = teacher[0, ::3] = -math.inf
    student[1, 5:9] = -math.inf
    teacher[2, 5:9] = -math.inf
    student[3, : vocab // 2], teacher[3, vocab // 2 :] = -math.inf, -math.inf
    student[4] = -math.inf
    teacher[5] = -math.inf
    student[6] = teacher[6] = -math.inf
    student[7, :300] = teacher[7, :300] = -math.inf  # more than the first tile
    return student, teacher


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entry_clip": 0.003},
        {"token_clip": 0.3},
        {"softcap": 20.0},
        {"logit_scale": 1.5, "teacher_logit_scale": 1.0},
    ],
    ids=["plain", "entry", "token", "cap", "scales"],
)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.thinned(3)
def test_infinities(beta: float, options: dict, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=256 if splits == 1 else 128)
    student, teacher = masked(501)
    objective = Objective.checked(beta=beta, **options)
    loss, want = expected(student, teacher, objective, None)
    targets = torch.tensor([0, 6, 6, 400, 3, 3, 3, 400])
    table, dz = run(student, teacher, objective, targets=targets, columns=len(Column))
    torch.testing.assert_close(table[0].double(), loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=3e-6 * want.abs().max().item())
    full = torch.zeros(len(Column), 8, dtype=torch.float64)
    torch_backend.divergence_rows(
        student.double(), teacher.double(), objective, targets=targets, table=full, dz=None, row_scale=None
    )
    torch.testing.assert_close(table.double(), full, rtol=5e-6, atol=3e-6)


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.thinned(3)
def test_nan_stays_visible(beta: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=128)
    for options in ({}, {"entry_clip": 0.01, "token_clip": 0.5}):
        student, teacher = logits(4, 501)
        student[1, 300], teacher[2, 3] = math.nan, math.nan
        table, dz = run(student, teacher, Objective.checked(beta=beta, **options))
        assert table[0].isnan().tolist() == [False, True, True, False]
        assert dz.isnan().any(-1).tolist() == [False, True, True, False]


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.thinned(3)
def test_levels_too_far_apart_for_one_maximum(beta: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=128)
    student, teacher = logits(4, 501)
    student[0] += 400.0
    teacher[1, 200] += 300.0  # p_S underflows where p_T is 1, and the other way round
    student[2, 490] += 300.0
    student[3] *= 40.0
    objective = Objective.checked(beta=beta)
    loss, want = expected(student, teacher, objective, None)
    table, dz = run(student, teacher, objective)
    torch.testing.assert_close(table[0].double(), loss, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(dz.double(), want, rtol=1e-3, atol=5e-5 * want.abs().max().item())


@inner
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("vocab", [1, 7, 256, 2053])
@pytest.mark.thinned(3)
def test_sizes(vocab: int, tokens: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits)
    student, teacher = logits(tokens, vocab)
    for beta in (0.0, 0.5, 1.0):
        objective = Objective.checked(beta=beta)
        loss, want = expected(student, teacher, objective, None)
        table, dz = run(student, teacher, objective)
        torch.testing.assert_close(table[0].double(), loss, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=1e-6)


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.thinned(2)
def test_dz_in_the_students_place(beta: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, splits, block=128)
    student, teacher = logits(3, 501)
    for options in ({}, {"token_clip": 0.3}):
        objective = Objective.checked(beta=beta, **options)
        targets = torch.tensor([1, 2, 500])
        want, want_dz = run(student, teacher, objective, targets=targets, columns=len(Column))
        table, place = torch.full((len(Column), 3), math.nan), student.clone()
        triton_backend.divergence_rows(
            place, teacher, objective, targets=targets, table=table, dz=place, row_scale=None
        )
        torch.testing.assert_close(place, want_dz, rtol=0, atol=0)
        torch.testing.assert_close(table, want, rtol=0, atol=0)


@inner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dz(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    student, teacher = logits(3, 501)
    _, want = run(student, teacher, Objective.checked())
    _, dz = run(student, teacher, Objective.checked(), dz_dtype=dtype)
    # one unit in the last place: the interpreter does not round to bfloat16 as a device does
    torch.testing.assert_close(dz.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


@inner
def test_bfloat16_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    student, teacher = (z.bfloat16() for z in logits(3, 501))
    loss, want = expected(student.float(), teacher.float(), Objective.checked(), None)
    table, dz = run(student, teacher, Objective.checked())
    torch.testing.assert_close(table[0].double(), loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=1e-6)


@inner
def test_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    student, teacher = logits(3, 300)
    scale = torch.tensor(2.0).expand(3)
    want, want_dz = run(student, teacher, Objective.checked(), scale=scale.clone())
    spread = torch.full((3, 400), math.nan)
    spread[:, :300] = student
    table, dz = run(spread[:, :300], teacher.T.contiguous().T, Objective.checked(), scale=scale)
    torch.testing.assert_close(table, want, rtol=0, atol=0)
    torch.testing.assert_close(dz, want_dz, rtol=0, atol=0)


@inner
def test_refusals() -> None:
    student, teacher = logits(4, 40)
    table = torch.empty(1, 4)

    def call(s: Tensor, t: Tensor, dz: Tensor | None) -> None:
        triton_backend.divergence_rows(s, t, Objective.checked(), targets=None, table=table, dz=dz, row_scale=None)

    with pytest.raises(TypeError, match="student must be float32"):
        call(student.double(), teacher, None)
    with pytest.raises(TypeError, match="dz must be"):
        call(student, teacher, torch.empty(4, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="overlap"):
        call(student, teacher, teacher)
    with pytest.raises(ValueError, match="overlap"):
        call(student, teacher, student.view(torch.bfloat16)[:, :40])
    both = torch.empty(5, 40)
    with pytest.raises(ValueError, match="overlap"):
        call(both[1:], teacher, both[:-1])
    with pytest.raises(ValueError, match="unit stride"):
        call(student, teacher, torch.empty(40, 4).T)


@inner
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tail", [False, True])
def test_supports(tail: bool, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are split, too; the rest is in test_support.py."""
    layout(monkeypatch, splits, block=128)
    for pair in (logits(3, 501), masked(501), logits(3, 501, gap=1e-3)):
        for options in ({}, {"softcap": 15.0}, {"logit_scale": 1.2, "teacher_logit_scale": 0.9}):
            objective = Objective.checked(beta=0.4, top_k=140, tail_bucket=tail, **options)
            loss, want = expected(*pair, objective, None)
            table, dz = run(*pair, objective)
            torch.testing.assert_close(table[0].double(), loss, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=3e-6 * want.abs().max().item())


@inner
def test_bits() -> None:
    ids = torch.tensor([[0, 31, 32, 95, 99], [1, 2, 3, 63, 64]])
    bits = triton_backend._bits(ids, 100)
    assert bits.shape == (2, 4)
    for row, chosen in zip(bits, ids.tolist(), strict=True):
        assert [i for i in range(128) if int(row[i // 32]) >> (i % 32) & 1] == chosen


@inner
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.3), LogitTransform(1.2, 20.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.thinned(2)
def test_logprobs(transform: LogitTransform, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    z, _ = logits(5, 501)
    z[1, 7] = z[2, :200] = -math.inf
    z[3] = -math.inf
    z[4, 9] = math.nan
    targets, scale = torch.tensor([500, 7, 300, 3, 0]), torch.tensor([1.0, 2.0, -0.5, 1.0, 1.0])
    wide = z.double().requires_grad_()
    want = reference.token_logprobs(wide, targets, temperature, transform)
    finite = want.isfinite()
    (want_dz,) = torch.autograd.grad(want[finite], wide, scale[finite].double())
    full = torch.empty(2, 5, dtype=torch.float64)
    torch_backend.logprob_rows(z.double(), targets, transform, temperature, table=full, dz=None, row_scale=None)

    table, place = torch.full((2, 5), math.nan), z.clone()
    triton_backend.logprob_rows(z, targets, transform, temperature, table=table, dz=place, row_scale=scale)
    torch.testing.assert_close(table.double(), full, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert table[0, 4].isnan()
    torch.testing.assert_close(place[:4].double(), want_dz[:4], rtol=1e-4, atol=1e-6)
    assert place[4].isnan().any()
    alone = torch.full((1, 5), math.nan)
    triton_backend.logprob_rows(z, targets, transform, temperature, table=alone, dz=None, row_scale=None)
    torch.testing.assert_close(alone, table[:1], rtol=0, atol=0, equal_nan=True)


@inner
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.2, 20.0)])
def test_top_k_rows(transform: LogitTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    layout(monkeypatch, block=128)
    z, _ = logits(5, 501)
    z[1, 3:490] = z[2] = -math.inf
    z[3, 77] = math.nan
    for k in (1, 9, 501):
        logprobs, ids, log_z = triton_backend.top_k_rows(z, k, transform, 0.7)
        want, want_ids, want_log_z = torch_backend.top_k_rows(z.double(), k, transform, 0.7)
        torch.testing.assert_close(log_z.double(), want_log_z, rtol=2e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(logprobs.double(), want, rtol=2e-6, atol=5e-6, equal_nan=True)
        assert torch.equal(ids[[0, 4]], want_ids[[0, 4]])
        assert all(len(row.unique()) == k for row in ids)


@inner
def test_a_mixed_target() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(501, 16, generator=generator), torch.randn(501, generator=generator)
    rows = [torch.randn(6, 16, generator=generator) for _ in range(4)]
    found = {}
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        base, full, part = (Stream(hidden.to(dtype), weight.to(dtype), bias.to(dtype)) for hidden in rows[1:])
        target = Target(linear=[(1, base)], residual=[(1, full), (-1, part)], tanh=10.0, centre=True)
        student = rows[0].clone().to(dtype).detach().requires_grad_()
        losses, _ = divergence(Stream(student, weight.to(dtype), bias.to(dtype)), target, backend=backend)
        losses.sum().backward()
        found[backend] = losses.detach().double(), student.grad.double()
    for got, want in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_availability() -> None:
    fine, why = triton_backend.available("cpu")
    assert fine == INTERPRETED
    assert fine == (why == "")
