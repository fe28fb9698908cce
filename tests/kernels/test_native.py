"""The native CPU row pass against the float64 definitions; it is built once, by the machine's compiler."""

import ctypes
import itertools
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _helpers import check_product, close_divergence, close_pair, operands, relative, row_rms
from torch import Tensor

from opsd_kernels import backends, reference
from opsd_kernels import native as library
from opsd_kernels.objective import LogitTransform, Objective
from opsd_kernels.rows import Column, LogprobColumn, native_backend, torch_backend

NO_COMPILER = not native_backend.available()[0]
needs_library = pytest.mark.skipif(NO_COMPILER, reason=f"no native backend: {native_backend.available()[1]}")
INF, NAN = math.inf, math.nan
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.9, "logit_scale": 0.3, "entry_clip": 0.02},
    {"entry_clip": 0.05},
    {"token_clip": 0.05},
    {"entry_clip": 0.03, "token_clip": 0.06},
    {"softcap": 8.0},
    {"softcap": 6.0, "teacher_softcap": INF, "temperature": 1.3, "entry_clip": 0.05},
    {"logit_scale": 0.8, "teacher_logit_scale": 0.9, "teacher_softcap": 12.0},
]


def logits(n: int, vocab: int, gap: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32, peaked; the student's are the teacher's plus `gap` of noise."""
    g = torch.Generator().manual_seed(seed)
    teacher = 4 * torch.randn(n, vocab, generator=g)
    return teacher + gap * torch.randn(n, vocab, generator=g), teacher


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def native(
    student: Tensor,
    teacher: Tensor,
    objective: Objective,
    *,
    columns: int = len(Column),
    targets: Tensor | None = None,
    dz_dtype: torch.dtype | None = torch.float32,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The table and dz, both of which held NaN before."""
    n, vocab = student.shape
    table = poisoned(columns, n)
    dz = None if dz_dtype is None else poisoned(n, vocab, dtype=dz_dtype)
    native_backend.divergence_rows(
        student, teacher, objective, targets=targets, table=table, dz=dz, row_scale=row_scale
    )
    return table, dz


def expected(student: Tensor, teacher: Tensor, objective: Objective, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in float64 from the definitions; the gradient of an infinite or clipped token is 0."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    loss = reference.divergence(student, teacher, objective)
    finite = loss.isfinite()
    (grad,) = torch.autograd.grad(loss[finite].sum(), student)
    student = student.detach()

    y_s = reference.transformed(student, objective.student, objective.temperature)
    y_t = reference.transformed(teacher, objective.teacher, objective.temperature)
    log_s, log_t = reference.log_softmax(y_s), reference.log_softmax(y_t)
    live = ~((y_s == -INF).all(-1) | (y_t == -INF).all(-1))
    terms, infinite = reference.entries(log_s, log_t, objective.beta)
    terms = torch.where(infinite, INF, terms)
    table = torch.zeros(len(Column), student.shape[0], dtype=torch.float64)
    table[Column.LOSS] = loss.detach()
    table[Column.DIVERGENCE] = torch.where(live, terms.sum(-1), 0.0)
    tau, cap = objective.entry_clip or INF, objective.token_clip or INF
    before_cap = reference.divergence(student, teacher, Objective(**{**vars(objective), "token_clip": None}))
    if tau < INF:
        table[Column.ENTRY_CLIPPED] = (terms > tau).any(-1) & live
        table[Column.CLIPPED_AMOUNT] = torch.where(live, (terms - tau).clamp(min=0).sum(-1), 0.0)
    table[Column.TOKEN_CLIPPED] = live & (before_cap > cap)
    if cap < INF:
        table[Column.CLIPPED_AMOUNT] += (before_cap - cap).clamp(min=0)
    for log_p, entropy, logprob in (
        (log_s, Column.STUDENT_ENTROPY, Column.STUDENT_LOGPROB),
        (log_t, Column.TEACHER_ENTROPY, Column.TEACHER_LOGPROB),
    ):
        table[entropy] = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)
        if targets is not None:
            table[logprob] = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return table, grad


def check(student: Tensor, teacher: Tensor, objective: Objective, tolerance: float = 3e-6) -> None:
    targets = torch.arange(student.shape[0]) % student.shape[1]
    want_table, want_dz = expected(student, teacher, objective, targets)
    table, dz = native(student, teacher, objective, targets=targets)
    for column in Column:
        torch.testing.assert_close(
            table[column].double(), want_table[column], rtol=1e-5, atol=3e-6, msg=lambda m, c=column: f"{c.name}: {m}"
        )
    assert dz is not None
    assert dz.isfinite().all()
    assert relative(dz, want_dz) < tolerance
    alone, _ = native(student, teacher, objective, columns=1, dz_dtype=None)
    torch.testing.assert_close(alone[0], table[0], rtol=1e-6, atol=1e-7)


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.thinned(3)
def test_every_column_and_the_gradient_match_the_definitions(beta, options):
    check(*logits(5, 501, gap=0.5), Objective.checked(beta=beta, **options), tolerance=1e-5)


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0}], ids=str)
@pytest.mark.thinned(2)
def test_minus_infinity_in_every_pattern(beta, clip, options):
    student, teacher = logits(9, 83)
    student[0, 3:9] = -INF
    teacher[1, 3:9] = -INF
    student[2, ::3] = teacher[2, ::3] = -INF
    student[3] = -INF
    teacher[4] = -INF
    student[5] = teacher[5] = -INF
    student[6, :80] = -INF
    teacher[6, 3:] = -INF
    student[7, 16:] = teacher[7, 16:] = -INF  # whole vectors of nothing
    student[8, 0] = teacher[8, 7] = -INF
    check(student, teacher, Objective.checked(beta=beta, entry_clip=clip, **options), tolerance=1e-5)


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clips", [{}, {"entry_clip": 0.05}, {"token_clip": 0.05}], ids=str)
@pytest.mark.parametrize("where", [0, 50, 52])
@pytest.mark.thinned(3)
def test_nan_stays_visible(beta, clips, where):
    for which in (0, 1):
        pair = logits(3, 53)
        pair[which][1, where] = NAN
        pair[which][2] = -INF
        pair[which][2, where] = NAN  # beside nothing else
        table, dz = native(*pair, Objective.checked(beta=beta, **clips))
        assert dz is not None
        assert table[Column.LOSS].isnan().tolist() == [False, True, True]
        assert dz.isnan().any(-1).tolist() == [False, True, True]


@needs_library
@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 501, 1024, 1025, 32003])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.thinned(3)
def test_every_length_of_row(vocab, beta):
    student, teacher = logits(2, vocab)
    if vocab == 1:  # one token has all the mass
        table, dz = native(student, teacher, Objective.checked(beta=beta))
        assert dz is not None
        assert table[0].abs().max() < 1e-6
        assert dz.abs().max() < 1e-6
    else:
        check(student, teacher, Objective.checked(beta=beta))


@needs_library
def test_no_rows_and_one_row():
    objective = Objective.checked()
    table, dz = native(torch.empty(0, 11), torch.empty(0, 11), objective)
    assert table.shape == (len(Column), 0)
    assert dz is not None
    assert dz.shape == (0, 11)
    check(*logits(1, 11), objective)


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("vocab", [32003, 50257])
@pytest.mark.thinned(2)
def test_accuracy_does_not_depend_on_the_gap(beta, clip, vocab):
    objective = Objective.checked(beta=beta, entry_clip=clip)
    for gap in (1.0, 1e-3):
        student, teacher = logits(4, vocab, gap)
        want, want_dz = poisoned(1, 4, dtype=torch.float64), poisoned(4, vocab, dtype=torch.float64)
        torch_backend.divergence_rows(  # as the definitions, but right in float64 down to small gaps
            student.double(), teacher.double(), objective, targets=None, table=want, dz=want_dz, row_scale=None
        )
        table, dz = native(student, teacher, objective, columns=1)
        assert dz is not None
        assert row_rms(dz, want_dz) < 1e-6
        assert ((table[0] - want[0]) / want[0]).square().mean().sqrt() < 3e-6


@needs_library
@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"softcap": 30.0}, {"softcap": 9.0, "logit_scale": 0.3}], ids=str
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_nor_does_it_under_a_temperature_or_a_cap(beta, options):
    student, teacher = logits(4, 8000, 1e-3)
    objective = Objective.checked(beta=beta, **options)
    want, want_dz = poisoned(1, 4, dtype=torch.float64), poisoned(4, 8000, dtype=torch.float64)
    torch_backend.divergence_rows(
        student.double(), teacher.double(), objective, targets=None, table=want, dz=want_dz, row_scale=None
    )
    table, dz = native(student, teacher, objective, columns=1)
    assert dz is not None
    assert row_rms(dz, want_dz) < 5e-6
    assert ((table[0] - want[0]) / want[0]).square().mean().sqrt() < 5e-6


@pytest.mark.parametrize("backend", [pytest.param(native_backend, marks=needs_library), torch_backend])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_where_one_token_is_nearly_certain(beta, backend):
    for gap, peak in itertools.product((1e-2, 1e-3), (12.0, 16.0, 20.0)):
        student, teacher = close_pair(32, 1027, gap, peak)
        table = poisoned(1, 32)
        backend.divergence_rows(
            student, teacher, Objective.checked(beta=beta), targets=None, table=table, dz=None, row_scale=None
        )
        want = close_divergence(student, teacher, beta)
        assert ((table[0] - want) / want).square().mean().sqrt() < 1e-5


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_constant_between_the_models_changes_nothing(beta):
    student, teacher = logits(4, 5000, gap=2e-2)
    teacher = (teacher * 256).round() / 256  # so that the constant is added exactly
    student = (student * 256).round() / 256
    one, dz_one = native(student, teacher, Objective.checked(beta=beta), columns=1)
    two, dz_two = native(student + 100.0, teacher, Objective.checked(beta=beta), columns=1)
    assert dz_one is not None
    assert dz_two is not None
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
    assert relative(dz_two, dz_one) < 1e-6


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distributions_with_nothing_in_common(beta):
    student, teacher = torch.full((3, 40), -300.0), torch.full((3, 40), -300.0)
    student[0, 3], teacher[0, 30] = 300.0, 300.0
    student[1], teacher[1, 17] = 5.0, 80.0  # flat and a spike
    student[2, 0], student[2, 39], teacher[2, 0] = 30.0, 29.0, 30.0
    check(student, teacher, Objective.checked(beta=beta), tolerance=1e-5)


@needs_library
@pytest.mark.parametrize("options", [{}, {"entry_clip": 0.05}, {"softcap": 8.0}, {"token_clip": 0.05}], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_dz_in_place_and_in_half_precision(beta, options):
    student, teacher = logits(4, 517)
    student[3, 5] = teacher[3, 8] = -INF
    objective = Objective.checked(beta=beta, **options)
    scale = torch.tensor([1.0, -0.5, 3.0, 2.0])
    table, dz = native(student, teacher, objective, row_scale=scale)
    assert dz is not None
    for half in (torch.bfloat16, torch.float16):
        _, narrow = native(student, teacher, objective, dz_dtype=half, row_scale=scale)
        assert narrow is not None
        assert torch.equal(narrow, dz.to(half))
    kept, again = teacher.clone(), poisoned(*table.shape)
    native_backend.divergence_rows(student, teacher, objective, targets=None, table=again, dz=student, row_scale=scale)
    assert torch.equal(student, dz)
    assert torch.equal(teacher, kept)
    assert torch.equal(again[: Column.STUDENT_LOGPROB], table[: Column.STUDENT_LOGPROB])


@needs_library
def test_half_precision_rounds_as_torch_does():
    special = torch.tensor([0.0, -0.0, 1e-8, 3e-8, 6.1e-5, -6.0e-5, 65504.0, 65519.0, 65520.0, 1e30, 1.00048828125])
    values = torch.cat([special, torch.randn(5000) * 10 ** torch.empty(5000).uniform_(-9, 6)])
    one = torch.zeros(values.numel(), 2)
    table = poisoned(1, values.numel())
    exact = poisoned(*one.shape)  # ±scale/2: any value can be had by the weight
    arguments = {"targets": torch.zeros(values.numel(), dtype=torch.int64), "transform": LogitTransform()}
    native_backend.logprob_rows(one, **arguments, temperature=1.0, table=table, dz=exact, row_scale=values)
    for half in (torch.bfloat16, torch.float16):
        dz = poisoned(*one.shape, dtype=half)
        native_backend.logprob_rows(one, **arguments, temperature=1.0, table=table, dz=dz, row_scale=values)
        assert torch.equal(dz, exact.to(half))


@needs_library
def test_row_scale_and_strides():
    wide_s, wide_t = logits(6, 128)
    student, teacher = wide_s[::2, 3:120], wide_t[1::2, :117]
    objective, scale = Objective.checked(beta=0.5), torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    table, dz = poisoned(len(Column), 10), poisoned(3, 200)
    native_backend.divergence_rows(
        student, teacher, objective, targets=None, table=table[:, 4:7], dz=dz[:, :117], row_scale=scale
    )
    plain, unit = native(student.contiguous(), teacher.contiguous(), objective)
    assert unit is not None
    torch.testing.assert_close(dz[:, :117], unit * scale.float().unsqueeze(-1), rtol=1e-6, atol=0)
    assert dz[:, 117:].isnan().all()
    assert torch.equal(table[:7, 4:7], plain[:7])
    assert table[:, :4].isnan().all()
    assert table[:, 7:].isnan().all()
    assert plain[Column.STUDENT_LOGPROB].isnan().all()  # no targets: not touched


@needs_library
def test_results_do_not_depend_on_the_number_of_threads():
    student, teacher = logits(13, 3001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native(student, teacher, Objective.checked(beta=0.5, entry_clip=0.05)))
    finally:
        torch.set_num_threads(before)
    for table, dz in results[1:]:
        assert torch.equal(table[:7], results[0][0][:7])
        assert torch.equal(dz, results[0][1])


@needs_library
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 7.0)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities(transform, temperature):
    x, _ = logits(6, 1003)
    x[1, 40:90] = -INF
    targets = torch.tensor([0, 50, 1002, 16, 7, 3])
    x[2] = -INF
    wide = x.double().requires_grad_()
    want = reference.token_logprobs(wide, targets, temperature, transform)
    (want_dz,) = torch.autograd.grad(want[want.isfinite()].sum(), wide)
    log_p = reference.log_softmax(reference.transformed(wide, transform, temperature)).detach()
    want_entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1)
    table, dz = poisoned(len(LogprobColumn), 6), poisoned(6, 1003)
    native_backend.logprob_rows(x, targets, transform, temperature, table=table, dz=dz, row_scale=None)
    torch.testing.assert_close(table[LogprobColumn.LOGPROB].double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table[LogprobColumn.ENTROPY].double(), want_entropy, rtol=1e-6, atol=1e-6)
    assert relative(dz, want_dz) < 3e-6

    first = poisoned(1, 6)
    native_backend.logprob_rows(x, targets, transform, temperature, table=first, dz=x, row_scale=torch.ones(6))
    assert torch.equal(first, table[:1])
    assert torch.equal(x, dz)
    x[4, 9] = NAN
    native_backend.logprob_rows(x, targets, transform, temperature, table=first, dz=dz, row_scale=None)
    assert first[0].isnan().tolist() == [False, False, False, False, True, False]


@needs_library
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 7.0)], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 501, 5003])
def test_likeliest_tokens(vocab, transform, monkeypatch):
    monkeypatch.setattr(native_backend.torch_backend, "top_k_rows", None)  # its own work, all of it
    wide, _ = logits(12, vocab + 40)
    x = wide[::2, 3 : vocab + 3]  # rows with gaps between them
    x[1] = x[1].sort().values  # the worst order
    x[2, vocab // 2 :] = -INF
    x[3] = -INF
    for k in sorted({1, min(vocab, 128), vocab - vocab // 4, vocab}):
        logprobs, ids, log_z = native_backend.top_k_rows(x, k, transform, 1.3)
        y = reference.transformed(x.double(), transform, 1.3)
        best = y.topk(k)
        torch.testing.assert_close(log_z.double(), y.logsumexp(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logprobs.double(), reference.log_softmax(y).gather(-1, ids), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(y.gather(-1, ids), best.values, rtol=0, atol=0)
        assert all(len(row.unique()) == k for row in ids)
        assert torch.equal(ids[[0, 1, 4, 5]], best.indices[[0, 1, 4, 5]])


@needs_library
def test_equally_likely_tokens_come_by_their_ids():
    x = torch.zeros(2, 1000)
    x[0, 500:] = 1.0
    x[1, ::3] = -INF
    _, ids, _ = native_backend.top_k_rows(x, 200, LogitTransform(), 1.0)
    assert ids[0].tolist() == list(range(500, 700))
    assert ids[1].tolist() == [i for i in range(1000) if i % 3][:200]
    x[1, 7] = NAN
    logprobs, ids, log_z = native_backend.top_k_rows(x, 900, LogitTransform(), 1.0)
    assert logprobs[1].isnan().all()
    assert log_z.isnan().tolist() == [False, True]
    assert len(ids[1].unique()) == 900


@needs_library
def test_what_it_does_not_serve_goes_to_the_torch_backend():
    student, teacher = logits(4, 64)
    cpu = torch.device("cpu")
    assert native_backend.supports(torch.float32, cpu)
    assert not native_backend.supports(torch.float64, cpu)
    assert not native_backend.supports(torch.float32, torch.device("cuda"))
    transposed = student.t().contiguous().t()  # columns far apart
    top_k = Objective.checked(top_k=5, tail_bucket=True, temperature=1.1)
    for objective, x in itertools.product((Objective.checked(), top_k), (transposed, student.double())):
        tables = [poisoned(1, 4, dtype=x.dtype) for _ in range(2)]
        dzs = [poisoned(4, 64, dtype=x.dtype) for _ in range(2)]
        for backend, table, dz in zip((native_backend, torch_backend), tables, dzs, strict=True):
            backends.divergence_rows(
                backend, x, teacher.to(x.dtype), objective, targets=None, table=table, dz=dz, row_scale=None
            )
        assert torch.equal(*tables)
        assert torch.equal(*dzs)
    for x in (transposed, student.double()):
        results = [b.top_k_rows(x, 3, LogitTransform(), 1.0) for b in (native_backend, torch_backend)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert torch.equal(native_backend.top_k_ids(x, 3), results[0][1])
    for choose in (
        lambda k: native_backend.top_k_rows(student, k, LogitTransform(), 1.0),
        lambda k: native_backend.top_k_ids(student, k),
    ):
        with pytest.raises(ValueError, match="k must be in"):
            choose(65)
    apart, dense = (native(s, teacher, Objective.checked(), columns=1)[0] for s in (transposed, student))
    torch.testing.assert_close(apart, dense, rtol=1e-5, atol=1e-8)


@needs_library
def test_nothing_out_of_bounds_reaches_the_library():
    student, teacher = logits(3, 20)
    with pytest.raises(IndexError, match="targets"):
        native(student, teacher, Objective.checked(), targets=torch.tensor([0, 20, 1]))
    with pytest.raises(IndexError, match="targets"):
        native(student, teacher, Objective.checked(), targets=torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match="row_scale"):
        native(student, teacher, Objective.checked(), row_scale=torch.ones(2))
    for ids in (torch.tensor([[3], [20], [1]]), torch.tensor([[3], [-1], [1]]), torch.tensor([[3]])):
        with pytest.raises(IndexError, match="support ids"):
            native_backend.outside_rows(student, teacher, ids, Objective.checked())
    with pytest.raises(ValueError, match="weight"):
        native_backend.tail_gradient_rows(
            student, LogitTransform(), 1.0, shift=torch.ones(3), weight=torch.ones(2), dz=teacher
        )
    with pytest.raises(ValueError, match="shape"):
        native(student, teacher[:2], Objective.checked())


def _cpu_flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {word for line in text.splitlines() if line.startswith("flags") for word in line.split()}


@needs_library
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instruction sets")
@pytest.mark.parametrize(("target", "lanes"), [((), 4), (("-mavx2", "-mfma"), 8)])
@pytest.mark.exhaustive
def test_other_instruction_sets_give_the_same(tmp_path, monkeypatch, target, lanes):
    monkeypatch.setattr(library, "TARGETS", (target,))
    path = tmp_path / "rows.so"
    library._compile(library._compiler(), library.source_directory(), path)
    if not {flag[2:] for flag in target} <= _cpu_flags():
        pytest.skip("compiles, but does not run here")
    monkeypatch.setattr(library, "_loaded", (ctypes.CDLL(str(path)), ""))
    assert library.loaded().opsd_vector_lanes() == lanes
    student, teacher = logits(3, 501)
    student[1, 4:8] = -INF
    for beta in (0.0, 0.5, 1.0):
        for options in ({}, {"entry_clip": 0.05}, {"softcap": 8.0}):
            check(student, teacher, Objective.checked(beta=beta, **options), tolerance=1e-5)
    for a, b in operands(70, 90, 530):
        check_product(a, b)
    assert torch.equal(native_backend.top_k_ids(teacher, 40), teacher.topk(40).indices)
    objective = Objective.checked(top_k=40, tail_bucket=True, softcap=8.0)
    table, dz = poisoned(1, 3), poisoned(3, 501)
    backends.divergence_rows(
        native_backend, student, teacher, objective, targets=None, table=table, dz=dz, row_scale=None
    )
    wide = student.double().requires_grad_()
    loss = reference.divergence(wide, teacher.double(), objective)
    torch.testing.assert_close(table[0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert relative(dz, torch.autograd.grad(loss.sum(), wide)[0]) < 1e-5


SCALAR = """
#include "row_math.h"
extern "C" void entries(int n, const float* d, const float* big, float beta, float* out) {
    const opsd::Weights w{beta, 1 - beta};
    for (int i = 0; i < n; ++i) {
        const auto e = beta == 0 ? opsd::entry<opsd::FORWARD, true, float>(d[i], big[i], w)
                     : beta == 1 ? opsd::entry<opsd::REVERSE, true, float>(d[i], big[i], w)
                                 : opsd::entry<opsd::MIXTURE, true, float>(d[i], big[i], w);
        out[2 * i] = e.term;
        out[2 * i + 1] = e.g;
    }
}
"""


@needs_library
@pytest.mark.parametrize("beta", [0.0, 0.02, 0.5, 1.0])
def test_the_mathematics_of_one_entry_serves_scalars_too(tmp_path, beta):
    source = tmp_path / "scalar.cpp"
    source.write_text(SCALAR)
    compiler = library._compiler()
    include = f"-I{library.source_directory()}"
    subprocess.run(
        [*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", include, source, "-o", tmp_path / "s.so"], check=True
    )
    run = ctypes.CDLL(str(tmp_path / "s.so")).entries
    d = torch.cat([torch.logspace(-6, 2, 300), -torch.logspace(-6, 2, 300), torch.zeros(1)])
    big, out = torch.rand(d.numel()), poisoned(d.numel(), 2)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (d, big, out)]
    run(d.numel(), pointers[0], pointers[1], ctypes.c_float(beta), pointers[2])

    d, big = d.double(), big.double()
    small = big * (-d.abs()).exp()
    p_s, p_t = torch.where(d > 0, big, small), torch.where(d > 0, small, big)
    if beta == 0.0:
        term, g = p_t * (d.expm1() - d), p_s - p_t
    elif beta == 1.0:
        term, g = p_s * ((-d).expm1() + d), p_s * d
    else:
        log_m_over_t = torch.log1p((1 - beta) * d.expm1())
        log_m_over_s = torch.log1p(beta * (-d).expm1())
        term = beta * p_t * (log_m_over_t.expm1() - log_m_over_t)
        term += (1 - beta) * p_s * (log_m_over_s.expm1() - log_m_over_s)
        g = -(1 - beta) * p_s * log_m_over_s
    sure = d.abs() > 1e-3 if beta not in (0.0, 1.0) else d.abs() > 1e-4  # float64's own cancellation below
    torch.testing.assert_close(out[sure, 0].double(), term[sure], rtol=1e-4 if 0 < beta < 1 else 3e-6, atol=1e-30)
    torch.testing.assert_close(out[:, 1].double(), g, rtol=3e-5 if 0 < beta < 1 else 2e-6, atol=1e-30)


@needs_library
def test_too_little_memory_is_an_error_and_not_the_end():
    """With no room for a thread's intermediates: 4 times 8 MiB of them, where 4 MiB are left."""
    subprocess.run([sys.executable, "-c", TOO_LITTLE], check=True, timeout=120)


TOO_LITTLE = """
import resource, torch
from opsd_kernels import native
from opsd_kernels.objective import LogitTransform, Objective
from opsd_kernels.rows import native_backend
capped = LogitTransform(1.0, 20.0)
objective = Objective(student=capped, teacher=capped)
rows = torch.randn(2, 4, 1 << 21)
table = torch.zeros(1, 4)
torch.set_num_threads(1)

def divergence(rows=rows):
    native_backend.divergence_rows(*rows, objective, targets=None, table=table, dz=None, row_scale=None)

divergence(rows[:, :, :100])
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 20), resource.RLIM_INFINITY))
try:
    divergence()
except MemoryError as error:
    assert "opsd_divergence_rows" in str(error), error
else:
    raise SystemExit("no error")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
divergence()
assert table.isfinite().all()
"""
