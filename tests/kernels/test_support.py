"""The divergence on a top-k support, in every backend that works here, against the float64 definitions.

Triton's runs where TRITON_INTERPRET=1; test_triton.py starts such a process.
"""

import math

import pytest
import torch
from _helpers import close_divergence, close_pair, leaf, problem, relative, row_rms
from torch import Tensor

import opsd_kernels
from opsd_kernels import backends, reference
from opsd_kernels.objective import Objective
from opsd_kernels.rows import Column, torch_backend

CPU = torch.device("cpu")
BACKENDS = [n for n in ("torch", "native", "triton") if not backends.unfit(n, CPU, torch.float32, check=False)]
INF, NAN = math.inf, math.nan
OPTIONS = [
    {},
    {"temperature": 1.7},
    {"entry_clip": 0.02},
    {"entry_clip": 0.03, "token_clip": 0.06, "temperature": 0.8},
    {"logit_scale": 1.1, "teacher_logit_scale": 0.8},
    {"softcap": 15.0, "entry_clip": 0.03},
    {"softcap": 15.0, "teacher_softcap": INF, "temperature": 1.2},
]
SUPPORTS = [
    {"top_k": 9},
    {"top_k": 9, "tail_bucket": True},
    {"top_k": 9, "top_k_from": "student"},
    {"top_k": 9, "top_k_from": "student", "tail_bucket": True},
]
# numpy, in the interpreter, warns of infinities that the kernels select away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_beta = pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])


@pytest.fixture(autouse=True)
def _on_its_own(request, monkeypatch):
    """No backend gets by with another one's work."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("name", "torch") == "torch":
        return

    def not_its_own(*_, **__):
        raise AssertionError("the torch backend did it")

    for function in ("divergence_rows", "logprob_rows", "top_k_ids", "outside_rows", "tail_gradient_rows"):
        monkeypatch.setattr(torch_backend, function, not_its_own)


def logits(n: int, vocab: int, gap: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32, peaked; the student's are the teacher's plus `gap` of noise."""
    g = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(n, vocab, generator=g)
    return teacher + gap * torch.randn(n, vocab, generator=g), teacher


def run(
    name: str,
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    columns: int = len(Column),
    targets: Tensor | None = None,
    dz_dtype: torch.dtype = torch.float32,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The table and dz: parts of poisoned buffers, of which nothing else may be written; the logits neither."""
    n, vocab = student.shape
    tables = torch.full((columns, n + 2), NAN, dtype=student.dtype)
    buffer = torch.full((n + 1, vocab + 3), NAN, dtype=dz_dtype)
    table, dz = tables[:, 1:-1], buffer[:n, :vocab]
    before = student.clone(), teacher.clone()
    versions = student._version, teacher._version
    backend = backends.module(name)
    backends.divergence_rows(
        backend, student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale
    )
    assert tables[:, [0, -1]].isnan().all()
    assert buffer[:, vocab:].isnan().all()
    assert buffer[n:].isnan().all()
    for now, then in zip((student, teacher), before, strict=True):
        assert torch.equal(now.nan_to_num(nan=7.0), then.nan_to_num(nan=7.0))
    assert (student._version, teacher._version) == versions
    return table, dz


def expected(student: Tensor, teacher: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Losses and dz in float64 from the definitions; the gradient of an infinite or clipped token is 0."""
    student = leaf(student.double())
    loss = reference.divergence(student, teacher.double(), objective)
    (grad,) = torch.autograd.grad(loss[loss.isfinite()].sum(), student)
    return loss.detach(), grad


def statistics(student: Tensor, teacher: Tensor, objective: Objective, targets: Tensor) -> Tensor:
    """The table's other columns, which are of the whole vocabulary but for the clips'."""
    y_s, y_t = (
        reference.transformed(z.double(), transform, objective.temperature)
        for z, transform in ((student, objective.student), (teacher, objective.teacher))
    )
    log_s, log_t = reference.log_softmax(y_s), reference.log_softmax(y_t)
    terms, infinite = reference.entries(log_s, log_t, objective.beta)
    live = ~((y_s == -INF).all(-1) | (y_t == -INF).all(-1))
    table = torch.zeros(len(Column), len(student), dtype=torch.float64)
    table[Column.DIVERGENCE] = torch.where(live, torch.where(infinite, INF, terms).sum(-1), 0.0)
    for log_p, entropy, logprob in (
        (log_s, Column.STUDENT_ENTROPY, Column.STUDENT_LOGPROB),
        (log_t, Column.TEACHER_ENTROPY, Column.TEACHER_LOGPROB),
    ):
        table[entropy] = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)
        table[logprob] = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    y_s, y_t = reference.restricted(y_s, y_t, objective)
    terms, infinite = reference.entries(reference.log_softmax(y_s), reference.log_softmax(y_t), objective.beta)
    live = ~((y_s == -INF).all(-1) | (y_t == -INF).all(-1))
    tau, cap = objective.entry_clip or INF, objective.token_clip or INF
    over = torch.where(infinite, INF, terms) > tau
    amount = torch.where(infinite, INF, terms - tau).clamp(min=0).sum(-1) if tau < INF else torch.zeros(len(student))
    before_cap = torch.where(infinite, INF if tau == INF else tau, terms).clamp(max=tau).sum(-1)
    table[Column.ENTRY_CLIPPED] = over.any(-1) & live
    table[Column.TOKEN_CLIPPED] = (before_cap > cap) & live
    table[Column.CLIPPED_AMOUNT] = torch.where(live, amount + torch.where(before_cap > cap, before_cap - cap, 0.0), 0.0)
    return table


def check(name: str, student: Tensor, teacher: Tensor, objective: Objective) -> None:
    n, vocab = student.shape
    targets, scale = torch.arange(n) * 17 % vocab, torch.linspace(-0.5, 2.0, n)
    loss, want = expected(student, teacher, objective)
    table, dz = run(name, student, teacher, objective, targets=targets, row_scale=scale)
    want_table = statistics(student, teacher, objective, targets)
    want_table[Column.LOSS] = loss
    for column in Column:
        torch.testing.assert_close(
            table[column].double(), want_table[column], rtol=1e-5, atol=4e-6, msg=lambda m, c=column: f"{c.name}: {m}"
        )
    assert dz.isfinite().all()
    assert relative(dz, want * scale.unsqueeze(-1)) < 1e-5

    place, alone = student.clone(), torch.full((1, n), NAN)
    out = {"targets": None, "table": alone, "dz": place, "row_scale": scale}
    backends.divergence_rows(backends.module(name), place, teacher, objective, **out)
    assert torch.equal(place, dz)
    assert torch.equal(alone[0], table[Column.LOSS])


@every_backend
@every_beta
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.thinned(3)
def test_options(beta, support, name):
    for options in OPTIONS:
        check(name, *logits(3, 301), Objective.checked(beta=beta, **support, **options))


@every_backend
@every_beta
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.thinned(3)
def test_minus_infinity_in_every_pattern(beta, support, name):
    student, teacher = logits(10, 301)
    order = teacher.argsort(descending=True)
    student[0].scatter_(0, order[0, 2:5], -INF)  # within the teacher's support
    teacher[1].scatter_(0, student[1].topk(3).indices, -INF)
    student[2, ::3] = teacher[2, ::3] = -INF
    student[3], teacher[4] = -INF, -INF
    student[5] = teacher[5] = -INF
    student[6, 4:] = teacher[6, 4:] = -INF  # fewer than k anywhere
    student[7].scatter_(0, order[7, 9:], -INF)  # no tail in the student
    teacher[8].scatter_(0, order[8, 9:], -INF)  # nor in the teacher
    for row in (student[9], teacher[9]):  # nor in either
        row.scatter_(0, order[9, 9:], -INF)
    for options in ({}, {"entry_clip": 0.03}, {"token_clip": 0.1}, {"softcap": 15.0}):
        check(name, student, teacher, Objective.checked(beta=beta, **support, **options))


@every_backend
@every_beta
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (2, 1), (7, 7), (17, 16), (33, 32), (300, 1), (301, 301)])
@pytest.mark.thinned(3)
def test_sizes(vocab, k, tail, beta, name):
    student, teacher = logits(3, vocab)
    objective = Objective.checked(beta=beta, top_k=k, tail_bucket=tail)
    loss, want = expected(student, teacher, objective)
    table, dz = run(name, student, teacher, objective, columns=1)
    torch.testing.assert_close(table[0].double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dz.double(), want, rtol=1e-4, atol=1e-6)
    table, dz = run(name, student[:0], teacher[:0], objective)
    assert table.shape == (len(Column), 0)


@every_backend
@every_beta
def test_accuracy_does_not_depend_on_the_gap(beta, name):
    for gap, peak, tail in ((1.0, 0, True), (1e-3, 0, True), (1e-3, 0, False), (1e-3, 12.0, True), (1e-2, 16.0, True)):
        student, teacher = close_pair(32, 1027, gap, peak) if peak else logits(32, 1027, gap)
        objective = Objective.checked(beta=beta, top_k=20, tail_bucket=tail)
        loss, want = expected(student, teacher, objective)
        table, dz = run(name, student, teacher, objective, columns=1)
        assert row_rms(dz, want) < 1e-5
        if gap < 0.1:  # where the definitions' own sum cancels
            loss = close_divergence(*reference.restricted(student.double(), teacher.double(), objective), beta)
        assert row_rms(table[0].unsqueeze(-1), loss.unsqueeze(-1)) < 2e-5


@every_backend
@every_beta
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 30.0}], ids=str)
@pytest.mark.thinned(2)
def test_nor_does_it_under_a_temperature_or_a_cap(options, beta, name):
    student, teacher = logits(16, 1027, 1e-3)
    objective = Objective.checked(beta=beta, top_k=20, tail_bucket=True, **options)
    loss, want = expected(student, teacher, objective)
    table, dz = run(name, student + 0.0, teacher, objective, columns=1)
    assert row_rms(dz, want) < 1e-5
    assert row_rms(table[0].unsqueeze(-1), loss.unsqueeze(-1)) < 1e-4


@every_backend
@every_beta
def test_a_constant_between_the_models_changes_nothing(beta, name):
    student, teacher = ((z * 256).round() / 256 for z in logits(4, 501, gap=2e-2))  # so that it is added exactly
    objective = Objective.checked(beta=beta, top_k=20, tail_bucket=True)
    one, dz_one = run(name, student, teacher, objective, columns=1)
    two, dz_two = run(name, student + 100.0, teacher, objective, columns=1)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
    assert relative(dz_two, dz_one) < 1e-5


@every_backend
@pytest.mark.parametrize("tail", [False, True])
def test_narrow_dz(tail, name):
    student, teacher = logits(4, 517)
    student[3, 5] = teacher[3, 8] = -INF
    objective = Objective.checked(beta=0.5, top_k=9, tail_bucket=tail)
    _, dz = run(name, student, teacher, objective)
    for dtype in (torch.bfloat16, torch.float16):
        _, narrow = run(name, student, teacher, objective, dz_dtype=dtype)
        # one unit in the last place: Triton's interpreter does not round to bfloat16 as a device does
        within = torch.finfo(dtype).eps if name == "triton" else 0.0
        torch.testing.assert_close(narrow, dz.to(dtype), rtol=within, atol=0)


@every_backend
@every_beta
@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.thinned(2)
def test_nan_stays_visible(which, beta, name):
    for clips in ({}, {"entry_clip": 0.05}, {"token_clip": 0.05}):
        pair = dict(zip(("student", "teacher"), logits(4, 301), strict=True))
        pair[which][1, 40] = NAN
        pair[which][2] = -INF
        pair[which][2, 300] = NAN  # beside nothing else
        for tail, source in ((False, which), (True, "student"), (True, "teacher")):
            objective = Objective.checked(beta=beta, top_k=9, tail_bucket=tail, top_k_from=source, **clips)
            table, dz = run(name, pair["student"], pair["teacher"], objective)
            assert table[Column.LOSS].isnan().tolist() == [False, True, True, False]
            assert dz.isnan().any(-1).tolist() == [False, True, True, False]


@every_backend
def test_equal_logits_at_the_edge_of_the_support(name):
    teacher = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.0, -INF]).repeat(2, 50)
    student = teacher * 0.5
    for k in (20, 50, 90, 251, 310, 350):
        objective = Objective.checked(top_k=k, tail_bucket=True)
        loss, want = expected(student, teacher, objective)
        table, dz = run(name, student, teacher, objective, columns=1)
        torch.testing.assert_close(table[0].double(), loss, rtol=1e-5, atol=1e-7)
        # which of the equals are chosen is free
        torch.testing.assert_close(dz.sort().values.double(), want.sort().values, rtol=1e-4, atol=1e-8)


@every_backend
@pytest.mark.parametrize("tail", [False, True])
@every_beta
@pytest.mark.thinned(2)
def test_a_cached_teacher(beta, tail, name):
    student, teacher, weight = problem(9, 8, 301, gap=1.0)
    student[3] *= 30  # nearly certain
    bias = torch.linspace(-1, 1, 301, dtype=torch.float64)
    bias[::7] = -INF
    objective = Objective.checked(beta=beta, temperature=1.2, entry_clip=0.1, softcap=25.0, top_k=7, tail_bucket=tail)

    def tempered(hidden: Tensor) -> Tensor:
        return reference.transformed(hidden @ weight.T + bias, objective.student, objective.temperature)

    stored = reference.log_softmax(tempered(teacher)).topk(7)
    ids, logprobs = stored.indices, stored.values.float()
    exact, log_t = leaf(student), logprobs.double()
    y = tempered(exact)
    y_s, log_s = y.gather(-1, ids), reference.log_softmax(y).detach()
    if tail:
        least = math.log(7 * torch.finfo(torch.float32).eps)
        log_t = torch.cat([log_t, (-log_t.logsumexp(-1, keepdim=True).expm1()).log().clamp(min=least)], -1)
        y_s = torch.cat([y_s, y.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)], -1)
    log_t = reference.log_softmax(log_t) if not tail else log_t - log_t.logsumexp(-1, keepdim=True)
    terms, infinite = reference.entries(reference.log_softmax(y_s), log_t, beta)
    assert not infinite.any()
    want = terms.clamp(max=0.1).sum(-1)
    (want_dx,) = torch.autograd.grad(want.sum(), exact)

    x, targets = leaf(student.float()), torch.where(torch.arange(9) < 5, ids[:, 2], 3)
    loss, stats = opsd_kernels.jsd_loss_from_top_k(
        x, weight.float(), ids, logprobs, bias=bias.float(), target_ids=targets, reduction="none", return_stats=True,
        beta=beta, temperature=1.2, entry_clip=0.1, softcap=25.0, tail_bucket=tail, backend=name,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert relative(dx, want_dx) < 1e-4
    for got, value in (
        (loss, want),
        (stats.divergence, terms.sum(-1)),
        (stats.student_entropy, -(log_s.exp() * log_s.masked_fill(log_s == -INF, 0.0)).sum(-1)),
        (stats.teacher_entropy, -(log_t.exp() * log_t).sum(-1)),
        (stats.student_logprob, log_s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)),
    ):
        torch.testing.assert_close(got.double(), value.detach(), rtol=1e-4, atol=1e-5)
    hit = ids == targets.unsqueeze(-1)
    assert torch.equal(stats.teacher_logprob.isnan(), ~hit.any(-1))
    assert torch.equal(stats.teacher_logprob[:5], logprobs[:5, 2])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_call(dtype, name):
    student, teacher, weight = (t.to(dtype) for t in problem(23, 16, 501))
    options = {"beta": 0.5, "top_k": 12, "tail_bucket": True, "softcap": 20.0}
    exact = [leaf(student.double()), leaf(weight.double())]
    want = reference.jsd_loss(exact[0], teacher.double(), exact[1], Objective.checked(**options))
    mine = [leaf(student), leaf(weight)]
    got, stats = opsd_kernels.jsd_loss(
        mine[0], teacher, mine[1], reduction="none", return_stats=True, backend=name, workspace_bytes=200_000, **options
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert relative(got, want) < 1e-4  # the projection's result is float32, whatever its operands
    grads, wants = torch.autograd.grad(got.sum(), mine), torch.autograd.grad(want.sum(), exact)
    assert all(relative(g, w) < tolerance for g, w in zip(grads, wants, strict=True))
    assert stats.divergence.isfinite().all()


def test_float64_is_left_to_torch():
    student, teacher = (z.double() for z in logits(3, 301))
    objective = Objective.checked(top_k=9, tail_bucket=True, temperature=0.9)
    loss, want = expected(student, teacher, objective)
    for name in set(BACKENDS) - {"triton"}:
        table, dz = run(name, student, teacher, objective, dz_dtype=torch.float64, columns=1)
        torch.testing.assert_close(table[0], loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dz, want, rtol=1e-9, atol=1e-12)
