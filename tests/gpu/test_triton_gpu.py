"""The Triton row pass on a device, at vocabularies of real models, against the torch backend in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from opsd_kernels import backends
from opsd_kernels.objective import LogitTransform, Objective
from opsd_kernels.rows import Column, torch_backend, triton_backend

if torch.cuda.is_available():
    fine, why = triton_backend.available("cuda")
else:
    fine, why = False, "needs a CUDA device"
pytestmark = pytest.mark.skipif(not fine, reason=why)

VOCABULARIES = [32003, 50257, 151936, 262144]
# Of dz. The gradient of such a row is a thousandth of a gap, and a gap's last bit 4e-8 of it.
SURE_TOLERANCE = 1e-4
OPTIONS = [
    {},
    {"temperature": 1.7},
    {"entry_clip": 0.002},
    {"token_clip": 0.5},
    {"softcap": 30.0, "entry_clip": 0.002},
    {"logit_scale": 1.2, "teacher_logit_scale": 0.9},
    {"top_k": 64},
    {"top_k": 64, "tail_bucket": True, "entry_clip": 0.01},
    {"top_k": 64, "tail_bucket": True, "top_k_from": "student", "softcap": 30.0},
]


def logits(tokens: int, vocab: int, gap: float) -> tuple[Tensor, Tensor]:
    """Peaked rows (tokens, vocab), the student's `gap` away from the teacher's."""
    generator = torch.Generator("cuda").manual_seed(0)
    teacher = 4 * torch.randn(tokens, vocab, generator=generator, device="cuda")
    return teacher + gap * torch.randn(tokens, vocab, generator=generator, device="cuda"), teacher


def expected(student: Tensor, teacher: Tensor, objective: Objective, targets: Tensor) -> tuple[Tensor, Tensor]:
    """All columns of the table and dz, float64."""
    table = torch.zeros(len(Column), student.shape[0], dtype=torch.float64, device="cuda")
    dz = torch.empty_like(student, dtype=torch.float64)
    z_s, z_t = student.double(), teacher.double()
    backends.divergence_rows(torch_backend, z_s, z_t, objective, targets=targets, table=table, dz=dz, row_scale=None)
    return table, dz


def run(student: Tensor, teacher: Tensor, objective: Objective, targets: Tensor, dz: Tensor | None = None):
    table = torch.full((len(Column), student.shape[0]), math.nan, device="cuda")
    dz = torch.full_like(student, math.nan) if dz is None else dz
    backends.divergence_rows(
        triton_backend, student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=None
    )
    return table, dz


def rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top", [17.0, 22.0])
def test_a_student_that_is_sure_of_a_token(top: float, beta: float, clip: float | None) -> None:
    """And a teacher that agrees, leans to another token, or is sure of that."""
    for tokens, other in itertools.product((32, 300), (None, top - 1, top + 12)):  # split rows, and a program per row
        _, teacher = logits(tokens, 32003, 0.0)
        teacher /= 2
        noise = torch.randn(teacher.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        student = teacher + (1e-3 if other is None else 0.3) * noise
        each = torch.arange(tokens, device="cuda")
        student[each, 7 * each], teacher[each, 7 * each] = top, top + 1e-3
        if other is not None:
            student[each, 7 * each + 1], teacher[each, 7 * each + 1] = top - 10, other
        objective = Objective.checked(beta=beta, entry_clip=clip)
        want, want_dz = expected(student, teacher, objective, each)
        table, dz = run(student, teacher, objective, each)
        assert rms((dz - want_dz).norm(dim=-1) / want_dz.norm(dim=-1)) <= SURE_TOLERANCE
        assert rms((table[0] - want[0]).abs() / want[0].abs()) <= 1e-4


@pytest.mark.parametrize("gap", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_accuracy(vocab: int, beta: float, gap: float) -> None:
    # split rows, and a program per row
    for tokens, support in itertools.product((32, 300), ({}, {"top_k": 64}, {"top_k": 64, "tail_bucket": True})):
        student, teacher = logits(tokens, vocab, gap)
        targets = torch.arange(tokens, device="cuda") * 97
        objective = Objective.checked(beta=beta, **support)
        want, want_dz = expected(student, teacher, objective, targets)
        table, dz = run(student, teacher, objective, targets)
        assert rms((dz - want_dz).norm(dim=-1) / want_dz.norm(dim=-1)) <= 1e-5
        assert rms((table[0] - want[0]).abs() / want[0].abs()) <= 1e-4
        torch.testing.assert_close(table[1:].double(), want[1:], rtol=2e-5, atol=2e-5)


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
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_dz_buffers(beta: float, vocab: int, tokens: int) -> None:
    """The same bits in the student's place, run after run, and rounded alike in narrower types."""
    student, teacher = logits(tokens, vocab, 0.5)
    targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    for options in ({}, {"token_clip": 0.05}, {"top_k": 64, "tail_bucket": True}):
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


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_nan_stays_visible(beta: float) -> None:
    student, teacher = logits(300, 32003, 0.5)
    student[7, 20000], teacher[9, 3] = math.nan, math.nan
    table, dz = run(student, teacher, Objective.checked(beta=beta), torch.zeros(300, dtype=torch.int64, device="cuda"))
    assert table[0].isnan().nonzero().flatten().tolist() == [7, 9]
    assert dz.isnan().any(-1).nonzero().flatten().tolist() == [7, 9]


def test_no_compilation_per_length() -> None:
    targets = torch.zeros(300, dtype=torch.int64, device="cuda")
    kernels = (triton_backend.lean_kernel, triton_backend.divergence_kernel)

    def compilations() -> int:
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    for vocab in (5001, 5008):  # strides that are a multiple of 16, and not
        run(*logits(300, vocab, 0.5), Objective.checked(), targets)
    before = compilations()
    for vocab in (6007, 7001, 8016, 9024):
        run(*logits(300, vocab, 0.5), Objective.checked(), targets)
    assert compilations() == before


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.2, 20.0)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_logprobs(vocab: int, transform: LogitTransform) -> None:
    z, _ = logits(40, vocab, 0.5)
    targets = torch.arange(40, device="cuda") * 97
    want, want_dz = torch.empty(2, 40, dtype=torch.float64, device="cuda"), torch.empty_like(z, dtype=torch.float64)
    torch_backend.logprob_rows(z.double(), targets, transform, 0.8, table=want, dz=want_dz, row_scale=None)
    table, dz = torch.full((2, 40), math.nan, device="cuda"), torch.full_like(z, math.nan)
    triton_backend.logprob_rows(z, targets, transform, 0.8, table=table, dz=dz, row_scale=None)
    torch.testing.assert_close(table.double(), want, rtol=2e-5, atol=2e-5)
    assert rms((dz - want_dz).norm(dim=-1) / want_dz.norm(dim=-1)) <= 1e-5
