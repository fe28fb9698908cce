"""What a cached teacher stores, and the loss against it."""

import math

import pytest
import torch
from _helpers import leaf, problem, relative

import opsd_kernels
from opsd_kernels import reference
from opsd_kernels.objective import Objective


def test_top_k_logprobs_are_the_models_own():
    hidden, _, weight = problem(21, 8, 90)
    bias = torch.linspace(-1, 1, 90, dtype=torch.float64)
    logprobs, ids, log_z = opsd_kernels.top_k_logprobs(
        hidden, weight, 6, bias=bias, temperature=1.3, softcap=9.0, workspace_bytes=60_000
    )
    z = 9 * torch.tanh((hidden @ weight.T + bias) / 9) / 1.3
    best = z.log_softmax(-1).topk(6)
    assert torch.equal(ids, best.indices)
    assert torch.allclose(logprobs, best.values)
    assert torch.allclose(log_z, z.logsumexp(-1))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_top_k_logprobs_in_float32_with_padding(backend):
    hidden, _, weight = (t.float() for t in problem(50, 8, 3001))
    weight[2900:] = 100.0  # padding that would win
    logprobs, ids, log_z = opsd_kernels.top_k_logprobs(
        hidden, weight, 128, valid_vocab=2900, backend=backend, workspace_bytes=1 << 20
    )
    z = hidden.double() @ weight[:2900].double().T
    assert torch.equal(ids, z.topk(128).indices)
    assert torch.allclose(log_z.double(), z.logsumexp(-1), rtol=1e-5)
    assert torch.allclose(logprobs.double(), z.log_softmax(-1).gather(-1, ids), rtol=1e-5, atol=1e-5)


def test_top_k_logprobs_with_a_mask_and_a_batch():
    hidden, _, weight = problem(6, 8, 90)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    logprobs, ids, log_z = opsd_kernels.top_k_logprobs(hidden.view(2, 3, 8), weight, 4, mask=mask)
    assert logprobs.shape == ids.shape == (2, 3, 4)
    assert ids[~mask].eq(0).all()
    assert log_z[~mask].eq(0).all()
    assert torch.equal(ids[mask], (hidden.view(2, 3, 8) @ weight.T)[mask].topk(4).indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_cached_teacher_gives_the_loss_of_the_live_one(beta, tail, dtype):
    student, teacher, weight = problem(25, 8, 90, gap=1.0)
    options = {"beta": beta, "temperature": 1.2, "entry_clip": 0.1, "tail_bucket": tail}
    exact = [leaf(student), leaf(weight)]
    expected = reference.jsd_loss(exact[0], teacher, exact[1], Objective.checked(**options, top_k=7))
    upstream = torch.linspace(0.5, 1, 25, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected @ upstream, exact)
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight, 7, temperature=1.2)
    inputs = [leaf(student.to(dtype)), leaf(weight.to(dtype))]
    got = opsd_kernels.jsd_loss_from_top_k(*inputs, ids, logprobs.to(dtype), reduction="none", **options)
    grads = torch.autograd.grad(got @ upstream.to(dtype), inputs)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4  # the tail is 1 − Σp of what was stored
    assert relative(got, expected) < tolerance
    assert all(relative(a, b) < tolerance for a, b in zip(grads, expected_grads, strict=True))


def test_statistics_speak_of_the_support():
    student, teacher, weight = problem(5, 8, 30)
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight, 3)
    targets = ids[:, 1].clone()
    targets[0] = next(i for i in range(30) if i not in ids[0])
    loss, stats = opsd_kernels.jsd_loss_from_top_k(
        student, weight, ids, logprobs, reduction="none", return_stats=True, target_ids=targets
    )
    assert torch.allclose(stats.divergence, loss)
    log_s = (student @ weight.T).log_softmax(-1)
    assert torch.allclose(stats.student_entropy, -(log_s.exp() * log_s).sum(-1))
    assert torch.allclose(stats.student_logprob, log_s.gather(-1, targets[:, None])[:, 0])
    assert stats.teacher_logprob[0].isnan()
    assert torch.allclose(stats.teacher_logprob[1:], logprobs[1:, 1])
    tail = torch.log1p(-logprobs.exp().sum(-1))
    assert torch.allclose(stats.teacher_entropy, -(logprobs.exp() * logprobs).sum(-1) - tail.exp() * tail)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("vocab", "k", "dtype"), [(12, 12, torch.float32), (5000, 8, torch.float32), (5000, 8, torch.bfloat16)]
)
def test_rounding_of_the_stored_mass_is_no_infinity(beta, vocab, k, dtype):
    student, teacher, weight = (t.float() * 1.7 for t in problem(64, 8, vocab))
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight, k)
    x = leaf(student)
    got = opsd_kernels.jsd_loss_from_top_k(x, weight, ids, logprobs.to(dtype), beta=beta, reduction="none")
    want = opsd_kernels.jsd_loss(student, teacher, weight, beta=beta, top_k=k, tail_bucket=True, reduction="none")
    got.sum().backward()
    assert got.isfinite().all()
    assert x.grad.isfinite().all()
    if dtype == torch.float32:  # bfloat16 keeps too little of a log-probability for more than this
        assert torch.allclose(got, want, rtol=2e-3, atol=2e-3)


def test_bad_arguments_are_named():
    student, teacher, weight = problem(5, 8, 30)
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight, 3)
    for name, error, arguments in [
        ("teacher_ids", TypeError, (ids.int(), logprobs)),
        ("teacher_ids", ValueError, (ids[:3], logprobs)),
        ("teacher_ids", ValueError, (ids + 30, logprobs)),
        ("teacher_logprobs", ValueError, (ids, logprobs[:, :2])),
        ("teacher_logprobs", TypeError, (ids, ids)),
    ]:
        with pytest.raises(error, match=name):
            opsd_kernels.jsd_loss_from_top_k(student, weight, *arguments)
    for k in (0, 31, 2.0):
        with pytest.raises((TypeError, ValueError), match="k must be"):
            opsd_kernels.top_k_logprobs(teacher, weight, k)


def test_an_empty_tail_of_the_student_is_infinite_only_where_it_should_be():
    logprobs, ids = torch.log(torch.tensor([[0.5, 0.3]])), torch.tensor([[0, 1]])
    student, weight = torch.zeros(1, 1), torch.zeros(4, 1)
    bias = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    forward = opsd_kernels.jsd_loss_from_top_k(student, weight, ids, logprobs, bias=bias, beta=0.0)
    reverse = opsd_kernels.jsd_loss_from_top_k(student, weight, ids, logprobs, bias=bias, beta=1.0)
    assert forward == math.inf  # the teacher has mass in the tail, the student none
    assert reverse.item() == pytest.approx(0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.3), rel=1e-6)


def test_a_single_token_needs_no_leading_dimension():
    student, teacher, weight = problem(1, 8, 30)
    results = []
    for lead in ((), (1,)):
        x = leaf(student.reshape(*lead, 8))
        logprobs, ids, log_z = opsd_kernels.top_k_logprobs(teacher.reshape(*lead, 8), weight, 4)
        assert logprobs.shape == ids.shape == (*lead, 4)
        assert log_z.shape == lead
        options = {"reduction": "none", "return_stats": True, "target_ids": torch.full(lead, 2)}
        loss, stats = opsd_kernels.jsd_loss_from_top_k(x, weight, ids, logprobs, **options)
        assert loss.shape == stats.divergence.shape == stats.teacher_logprob.shape == lead
        results.append([logprobs, ids, log_z, loss, stats.divergence, *torch.autograd.grad(loss.sum(), x)])
    for mine, batched in zip(*results, strict=True):
        assert torch.equal(mine.reshape(-1), batched.reshape(-1))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("tokens", [6, 4000])  # as one block, and in several
def test_what_is_no_stored_top_k_is_refused_where_the_token_counts(tokens, trainable):
    student, _, weight = problem(tokens, 2, 12, dtype=torch.float32)
    ids = torch.tensor([8, 3, 5, 0, 9, 11, 1]).repeat(tokens, 1)
    logprobs = torch.linspace(-4, -2, 7).repeat(tokens, 1)
    head, last = leaf(weight).requires_grad_(trainable), tokens - 1
    others = torch.arange(tokens) != last

    def changed(tensor, value):
        tensor = tensor.clone()
        tensor[last, 4] = value
        return tensor

    expected = opsd_kernels.jsd_loss_from_top_k(student, head, ids, logprobs, mask=others)
    for name, arguments, said in [
        ("teacher_ids", (changed(ids, 3), logprobs), "got 3 twice"),
        ("teacher_logprobs", (ids, changed(logprobs, math.nan)), "got nan"),
        ("teacher_logprobs", (ids, changed(logprobs, 0.25)), "got 0.25"),  # a probability, perhaps
    ]:
        for mask in (None, ~others):
            with pytest.raises(ValueError, match=f"{name} must .*{said}"):
                opsd_kernels.jsd_loss_from_top_k(student, head, *arguments, mask=mask)
        assert opsd_kernels.jsd_loss_from_top_k(student, head, *arguments, mask=others) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_may_take_a_stored_log_probability_above_zero(dtype):
    student, _, weight = problem(3, 8, 12, dtype=torch.float32)
    ids = torch.tensor([[4, 2]] * 3)
    stored = torch.tensor([4 * torch.finfo(dtype).eps, -20.0], dtype=dtype).repeat(3, 1)
    assert opsd_kernels.jsd_loss_from_top_k(student, weight, ids, stored).isfinite()
    with pytest.raises(ValueError, match="teacher_logprobs must be at most 0"):
        opsd_kernels.jsd_loss_from_top_k(student, weight, ids, stored + 0.1)
