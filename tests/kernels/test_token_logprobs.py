"""token_logprobs against dense log-softmax in float64."""

import math

import pytest
import torch
from _helpers import leaf, problem, relative

import opsd_kernels
from opsd_kernels import reference
from opsd_kernels.objective import LogitTransform


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype, trainable):
    hidden, _, weight = problem(29, 8, 203)
    bias = torch.linspace(-1, 1, 203, dtype=torch.float64)
    bias[11] = -math.inf
    targets, mask = (torch.arange(29) * 7 + 12) % 200, torch.arange(29) % 4 > 0
    for cap, scale, temperature in ((None, 1.0, 1.0), (5.0, 0.8, 1.7)):
        exact = [leaf(t) for t in (hidden, weight, bias)]
        logits = torch.nn.functional.linear(exact[0], exact[1], exact[2])
        expected = reference.token_logprobs(logits, targets, temperature, LogitTransform(scale, cap))
        expected = torch.where(mask, expected, 0.0)
        inputs = [leaf(t.to(dtype)).requires_grad_(trainable or i == 0) for i, t in enumerate((hidden, weight, bias))]
        got, entropy = opsd_kernels.token_logprobs(
            inputs[0], inputs[1], targets, bias=inputs[2], temperature=temperature, logit_scale=scale, softcap=cap,
            mask=mask, return_entropy=True, workspace_bytes=50_000,
        )  # fmt: skip
        wanted = 3 if trainable else 1
        upstream = torch.linspace(-1, 1, 29, dtype=torch.float64)
        grads = torch.autograd.grad(got @ upstream.to(dtype), inputs[:wanted])
        expected_grads = torch.autograd.grad(expected @ upstream, exact[:wanted])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert relative(got, expected) < tolerance
        assert not entropy.requires_grad
        log_p = reference.log_softmax(reference.transformed(logits, LogitTransform(scale, cap), temperature))
        true_entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
        assert relative(entropy, torch.where(mask, true_entropy, 0.0)) < tolerance
        for a, b in zip(grads, expected_grads, strict=True):
            assert relative(a, b) < tolerance


def test_gradcheck():
    hidden, _, weight = problem(4, 5, 11)
    targets = torch.tensor([0, 10, 3, 3])
    assert torch.autograd.gradcheck(
        lambda x, w: opsd_kernels.token_logprobs(x, w, targets, temperature=1.3), [leaf(hidden), leaf(weight)]
    )


def test_a_target_without_probability_is_minus_infinity_with_no_gradient():
    hidden, _, weight = problem(2, 5, 11)
    bias = torch.zeros(11, dtype=torch.float64)
    bias[4] = -math.inf
    x = leaf(hidden)
    got = opsd_kernels.token_logprobs(x, weight, torch.tensor([4, 5]), bias=bias)
    got.sum().backward()
    assert (got == -math.inf).tolist() == [True, False]
    assert x.grad[0].eq(0).all()
    assert x.grad[1].ne(0).any()


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_token(count):
    hidden, _, weight = problem(count, 5, 11)
    x = leaf(hidden)
    got = opsd_kernels.token_logprobs(x, weight, torch.zeros(count, dtype=torch.int64))
    got.sum().backward()
    assert got.shape == (count,)
    assert x.grad.shape == x.shape


def test_masked_targets_may_be_anything():
    hidden, _, weight = problem(3, 5, 11)
    mask = torch.tensor([True, False, True])
    got = opsd_kernels.token_logprobs(hidden, weight, torch.tensor([1, -100, 2]), mask=mask)
    assert got[1] == 0
    with pytest.raises(ValueError, match=r"target_ids must be in \[0, 11\).*-100"):
        opsd_kernels.token_logprobs(hidden, weight, torch.tensor([1, -100, 2]))


def test_a_single_token_needs_no_leading_dimension():
    hidden, _, weight = problem(1, 5, 11)
    results = []
    for lead in ((), (1,)):
        x, w, target = leaf(hidden.reshape(*lead, 5)), leaf(weight), torch.full(lead, 4)
        got, entropy = opsd_kernels.token_logprobs(
            x, w, target, mask=torch.ones(lead, dtype=torch.bool), return_entropy=True
        )
        assert got.shape == entropy.shape == lead
        results.append([got, entropy, *torch.autograd.grad(got.sum(), [x, w])])
    for mine, batched in zip(*results, strict=True):
        assert torch.equal(mine.reshape(-1), batched.reshape(-1))
