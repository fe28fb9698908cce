"""Rows in which the student gives nearly all of the probability to one token, in every backend that works here.

There, g − p_S·Σg is the difference of nearly equal numbers wherever the clip or the divergence leaves g of that token
large, and the rest of the row, on which everything depends, is a millionth of it. Triton's runs where
TRITON_INTERPRET=1; test_triton.py starts such a process.
"""

from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from _helpers import close_divergence, leaf, row_rms
from torch import Tensor

from opsd_kernels import backends, reference
from opsd_kernels.objective import Objective

CPU = torch.device("cpu")
BACKENDS = [n for n in ("torch", "native", "triton") if not backends.unfit(n, CPU, torch.float32, check=False)]
TOKENS, VOCAB = 4, 515
SURE = (14.0, 22.0)  # the top's logit, which leaves 3e-3 and 1e-6 for the rest
# numpy, in the interpreter, warns of infinities that the kernels select away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rows(top: float, other: float | None, gap: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The student's top has the logit `top`, and `other` is the teacher's of another token."""
    g = torch.Generator().manual_seed(1)
    student = 2 * torch.randn(TOKENS, VOCAB, generator=g)
    first, second = torch.randperm(VOCAB, generator=g)[: 2 * TOKENS].view(2, TOKENS)
    each = torch.arange(TOKENS)
    student[each, first] = top
    teacher = student + gap * torch.randn(TOKENS, VOCAB, generator=g)
    if other is not None:
        student[each, second], teacher[each, second] = top - 10, other
    return student + offset, teacher + offset


def check(name: str, student: Tensor, teacher: Tensor, objective: Objective, want: Tensor | None = None) -> None:
    """`want`: the losses, where they are too small for the definition's sum even in float64."""
    exact = leaf(student.double())
    loss = reference.divergence(exact, teacher.double(), objective)
    (want_dz,) = torch.autograd.grad(loss.sum(), exact)
    for layout in layouts(name):
        dz, table = student.clone(), torch.empty(1, TOKENS)  # dz takes the student's place
        with layout:
            backends.divergence_rows(
                backends.module(name), dz, teacher, objective, targets=None, table=table, dz=dz, row_scale=None
            )
        assert row_rms(dz, want_dz) < 1e-5
        assert row_rms(table.T, (loss.detach() if want is None else want).unsqueeze(-1)) < 1e-4


def layouts(name: str) -> list[AbstractContextManager]:
    """Triton takes a program for a row, or several."""
    if name != "triton":
        return [nullcontext()]
    module = backends.module(name)
    return [
        mock.patch.object(module, "configuration", return_value=module.Configuration(block, 1, splits))
        for block, splits in ((256, 1), (128, 3))
    ]


every_backend = pytest.mark.parametrize("name", BACKENDS)
every_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
clipped_or_not = pytest.mark.parametrize("options", [{}, {"entry_clip": 0.05}], ids=["plain", "clipped"])


@every_backend
@every_beta
@clipped_or_not
@pytest.mark.parametrize("top", SURE)
@pytest.mark.thinned(2)
def test_a_teacher_that_prefers_another_token(top, options, beta, name):
    for nearer in (1.0, -8.0, -12.0):  # a little less likely than the student's top, or far likelier
        student, teacher = rows(top, top - nearer, 0.3)
        check(name, student, teacher, Objective.checked(beta=beta, **options))


@every_backend
def test_a_teacher_that_is_sure_of_what_the_clip_takes_from_an_unsure_student(name):
    """What is left of Σp_T, on which the gradient depends, is a millionth of the Σp_S beside it."""
    for top in (4.0, 6.5):  # 3 % and 25 % of the student's probability
        student, teacher = rows(top, top + 12, 0.3)
        check(name, student, teacher, Objective.checked(beta=0.0, entry_clip=0.05))


@every_backend
@every_beta
@clipped_or_not
@pytest.mark.parametrize("top", SURE)
@pytest.mark.thinned(2)
def test_a_teacher_that_agrees(top, options, beta, name):
    student, teacher = rows(top, None, 1e-3)
    want = close_divergence(student, teacher, beta)  # nothing is clipped
    check(name, student, teacher, Objective.checked(beta=beta, **options), want)


@every_backend
@every_beta
@clipped_or_not
@pytest.mark.thinned(2)
def test_under_a_temperature_a_cap_and_a_constant(options, beta, name):
    student, teacher = rows(17.0, 16.0, 0.3, offset=16.0)
    check(name, student, teacher, Objective.checked(beta=beta, temperature=0.9, **options))
    student, teacher = rows(17.0, 16.0, 0.3)
    capped = {"softcap": 40.0, "teacher_softcap": 40.0}
    check(name, student, teacher, Objective.checked(beta=beta, temperature=0.8, **capped, **options))


@every_backend
@clipped_or_not
def test_a_teacher_without_the_top(options, name):
    student, teacher = rows(17.0, 16.0, 0.3)
    teacher[torch.arange(TOKENS), student.argmax(-1)] = -torch.inf
    for beta in (0.0, 0.3, *([1.0] if options else [])):  # without a clip the reverse KL is infinite
        check(name, student, teacher, Objective.checked(beta=beta, **options))
