"""The cluster row pass on a Hopper device, at vocabularies of real models, against the torch backend in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_triton_gpu import expected, logits, rms
from torch import Tensor

import opsd_kernels
from opsd_kernels import backends
from opsd_kernels.objective import Objective
from opsd_kernels.rows import Column, cluster_backend

if torch.cuda.is_available():
    fine, why = cluster_backend.available("cuda")
else:
    fine, why = False, "needs a CUDA device"
pytestmark = pytest.mark.skipif(not fine, reason=why)

# one block, and several; two blocks a multiprocessor, and one; rows at multiples of 16 bytes, and not
VOCABULARIES = [5, 1031, 4112, 32003, 50257, 151936, 262144]
BETAS = [0.0, 0.5, 1.0]
OPTIONS = [
    {},
    {"temperature": 1.7},
    {"entry_clip": 0.002},
    {"token_clip": 0.5},
    {"entry_clip": 0.003, "token_clip": 0.06},
    {"softcap": 30.0, "entry_clip": 0.002},
    {"softcap": 30.0, "teacher_softcap": 50.0},
    {"logit_scale": 1.2, "teacher_logit_scale": 0.9},
    {"top_k": 64, "tail_bucket": True},
]


def run(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    targets: Tensor | None,
    dz: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    table = torch.full((len(Column), student.shape[0]), math.nan, device="cuda")
    dz = torch.full_like(student, math.nan) if dz is None else dz
    backends.divergence_rows(
        cluster_backend, student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale
    )
    return table, dz


def check(student: Tensor, teacher: Tensor, objective: Objective, tolerance: float = 1e-5) -> None:
    targets = torch.arange(student.shape[0], device="cuda") * 97 % student.shape[1]
    want, want_dz = expected(student, teacher, objective, targets)
    table, dz = run(student, teacher, objective, targets)
    assert rms((dz - want_dz).norm(dim=-1) / want_dz.norm(dim=-1)) <= tolerance
    assert rms((table[0] - want[0]).abs() / want[0].abs()) <= 1e-4
    torch.testing.assert_close(table[1:].double(), want[1:], rtol=2e-5, atol=2e-5)


def test_the_self_check() -> None:
    assert backends.self_check("cluster", torch.device("cuda", torch.cuda.current_device())) <= backends.TOLERANCE


@pytest.mark.parametrize("gap", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_accuracy(vocab: int, beta: float, gap: float) -> None:
    for tokens in (1, 32, 300):  # larger clusters than needed, and several rows for each
        check(*logits(tokens, vocab, gap), Objective.checked(beta=beta), 1e-4 if vocab < 100 else 1e-5)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top", [14.0, 17.0, 22.0])
def test_a_student_that_is_sure_of_a_token(top: float, beta: float, clip: float | None) -> None:
    """And a teacher that agrees, leans to another token, or is sure of that."""
    for vocab, other in itertools.product((32003, 151936), (None, top - 1, top + 12)):
        _, teacher = logits(300, vocab, 0.0)
        teacher /= 2
        noise = torch.randn(teacher.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        student = teacher + (1e-3 if other is None else 0.3) * noise
        each = torch.arange(300, device="cuda")
        student[each, 7 * each], teacher[each, 7 * each] = top, top + 1e-3
        if other is not None:
            student[each, 7 * each + 1], teacher[each, 7 * each + 1] = top - 10, other
        # The gradient of such a row is a thousandth of a gap, and a gap's last bit 4e-8 of it; where the top has less
        # than half of the probability (14), the JSD's y is ln 2 for nearly all tokens but for 1e-4 of it.
        check(student, teacher, Objective.checked(beta=beta, entry_clip=clip), 1e-3 if top == 14.0 else 1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_options(beta: float, options: dict, tokens: int) -> None:
    student, teacher = logits(tokens, 50257, 0.5)
    student[0, ::3] = teacher[0, ::3] = -math.inf
    if tokens > 4:
        student[1, 5:9] = -math.inf
        teacher[2, 5:9] = -math.inf
        student[3] = -math.inf
        teacher[4] = -math.inf
    targets = torch.arange(tokens, device="cuda") * 3 + 1
    objective = Objective.checked(beta=beta, **options)
    want, want_dz = expected(student, teacher, objective, targets)
    table, dz = run(student, teacher, objective, targets)
    torch.testing.assert_close(table.double(), want, rtol=5e-5, atol=2e-5)
    torch.testing.assert_close(dz.double(), want_dz, rtol=1e-3, atol=1e-5 * want_dz.abs().max().item())


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("beta", BETAS)
def test_dz_buffers(beta: float, vocab: int, tokens: int) -> None:
    """The same bits in the student's place, run after run, and rounded alike in narrower types."""
    student, teacher = logits(tokens, vocab, 0.5)
    targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    for options in ({}, {"token_clip": 0.05}):
        objective = Objective.checked(beta=beta, **options)
        want, want_dz = run(student, teacher, objective, targets)
        for _ in range(5):
            place = student.clone()
            table, _ = run(place, teacher, objective, targets, dz=place)
            torch.testing.assert_close(place, want_dz, rtol=0, atol=0)
            torch.testing.assert_close(table, want, rtol=0, atol=0)
        for dtype in (torch.bfloat16, torch.float16):
            _, dz = run(student, teacher, objective, targets, dz=torch.full_like(student, math.nan, dtype=dtype))
            torch.testing.assert_close(dz, want_dz.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [4112, 50257, 151936])
@pytest.mark.parametrize(("padding", "start"), [(0, 0), (1, 0), (3, 0), (4, 0), (7, 0), (4, 1), (4, 2)])
def test_rows_of_any_stride_and_place(vocab: int, padding: int, start: int) -> None:
    """Bulk copies and those of single words give the same bits, and nothing between the rows is written."""
    student, teacher = logits(40, vocab, 0.5)
    objective = Objective.checked()
    want, want_dz = run(student, teacher, objective, None)
    wide = torch.full((40, vocab + padding + start), 7.0, device="cuda")
    place = wide[:, start : start + vocab]
    place.copy_(student)
    table, _ = run(place, teacher, objective, None, dz=place)
    torch.testing.assert_close(place, want_dz, rtol=0, atol=0)
    torch.testing.assert_close(table[:7], want[:7], rtol=0, atol=0)
    assert (wide[:, :start] == 7).all()
    assert (wide[:, start + vocab :] == 7).all()


def test_many_rows_in_one_launch() -> None:
    """More than the clusters that run at once, of which some get a row more than others."""
    student, teacher = logits(1003, 8208, 0.5)
    scale = torch.linspace(-1, 1, 1003, device="cuda")
    _, together = run(student, teacher, Objective.checked(), None, row_scale=scale)
    for row in (0, 1, 501, 1002):
        one = slice(row, row + 1)
        _, alone = run(student[one], teacher[one], Objective.checked(), None, row_scale=scale[one])
        assert (together[one] - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_visible(beta: float) -> None:
    student, teacher = logits(300, 32003, 0.5)
    student[7, 20000], teacher[9, 3] = math.nan, math.nan
    table, dz = run(student, teacher, Objective.checked(beta=beta), None)
    assert table[0].isnan().nonzero().flatten().tolist() == [7, 9]
    assert dz.isnan().any(-1).nonzero().flatten().tolist() == [7, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_loss(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(151936, 64, generator=generator, device="cuda").to(dtype)
    teacher = torch.randn(70, 64, generator=generator, device="cuda") / 2
    student = teacher + 0.05 * torch.randn(70, 64, generator=generator, device="cuda")
    results = []
    for backend in ("cluster", "torch"):
        leaf = student.to(dtype).requires_grad_()
        loss = opsd_kernels.jsd_loss(leaf, teacher.to(dtype), weight, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    assert (results[0][1] - results[1][1]).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * results[1][1].norm()
