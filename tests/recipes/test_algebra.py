"""Identities between targets, and expectations over every outcome of a small vocabulary or a small decision process."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from _helpers import leaf, relative

import opsd_kernels
from opsd.recipes import TokenBatch, make
from opsd_kernels import Stream, Target

N, V, H = 7, 30, 6


def random_streams(count, *, different_heads=False, **options):
    g = torch.Generator().manual_seed(3)
    heads = [torch.randn(V, H, generator=g, dtype=torch.float64) for _ in range(count)]
    rows = torch.randn(N, H, generator=g, dtype=torch.float64)
    hidden = [rows + 0.5 * torch.randn(N, H, generator=g, dtype=torch.float64) for _ in range(count)]
    return [Stream(h, heads[i if different_heads else 0], **options) for i, h in enumerate(hidden)]


def value_and_gradient(student, target, beta, factors=1.0, **options):
    x = leaf(student.hidden)
    losses, _ = opsd_kernels.divergence(replace(student, hidden=x), target, beta=beta, **options)
    return losses.detach(), torch.autograd.grad((losses * factors).sum(), x)[0]


@pytest.mark.parametrize("factors", [(0.4, 0.6), (1.7, -0.9), (0.5, 1.2)])
def test_a_mix_of_hidden_states_is_the_geometric_mix_of_distributions(factors):
    student, first, second = random_streams(3)
    mixed = replace(first, hidden=factors[0] * first.hidden + factors[1] * second.hidden)
    target = Target(linear=list(zip(factors, (first, second), strict=True)))
    for beta in (0.0, 0.5, 1.0):
        for one, other in zip(
            value_and_gradient(student, mixed, beta), value_and_gradient(student, target, beta), strict=True
        ):
            assert relative(one, other) < 1e-11


def test_a_bias_enters_a_mix_of_hidden_states_times_the_sum_of_the_factors():
    bias = torch.linspace(-2, 2, V, dtype=torch.float64)
    student, first, second = random_streams(3, bias=bias)
    mixed = replace(first, hidden=0.5 * first.hidden + 1.2 * second.hidden, bias=1.7 * bias)
    target = Target(linear=[(0.5, first), (1.2, second)])
    assert relative(value_and_gradient(student, target, 0.0)[1], value_and_gradient(student, mixed, 0.0)[1]) < 1e-11
    unscaled = value_and_gradient(student, replace(mixed, bias=bias), 0.0)
    assert relative(unscaled[1], value_and_gradient(student, mixed, 0.0)[1]) > 0.1


def test_a_centred_residual_with_a_far_limit_is_a_sum_of_hidden_states():
    student, base, teacher, reference = random_streams(4)
    summed = replace(base, hidden=base.hidden + teacher.hidden - reference.hidden)
    wanted = value_and_gradient(student, summed, 0.5)
    for limit in ({"tanh": 1e6}, {"clip": 1e6}, {}):
        parts = {"linear": [(1.0, base)], "residual": [(1.0, teacher), (-1.0, reference)]}
        got = value_and_gradient(student, Target(**parts, centre=True, **limit), 0.5)
        assert relative(got[1], wanted[1]) < 1e-9


@pytest.mark.parametrize("different_heads", [False, True])
@pytest.mark.parametrize("total", [1.0, 0.7])
def test_summed_kls_have_the_gradient_of_the_kl_to_a_mix(total, different_heads):
    """Reverse KLs that of the geometric mix, forward ones that of the arithmetic mix; values differ by constants."""
    student, *teachers = random_streams(4, different_heads=different_heads)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pairs = list(zip(weights.tolist(), teachers, strict=True))
    for beta, kind in ((1.0, "linear"), (0.0, "arithmetic")):
        alone = [value_and_gradient(student, teacher, beta) for teacher in teachers]
        values, gradient = (sum(total * w * one[i] for w, one in zip(weights, alone, strict=True)) for i in (0, 1))
        mixed = value_and_gradient(student, Target(**{kind: pairs}), beta, total)
        assert relative(mixed[1], gradient) < 1e-10
        assert (values - total * mixed[0]).min() > 1e-4  # Jensen: the mix is closer than the mean


def test_summed_jsds_or_clipped_kls_are_not_the_divergence_to_a_mix():
    student, *teachers = random_streams(3)
    for kind, options in itertools.product(
        ("linear", "arithmetic"), ({"beta": 0.5}, {"beta": 1.0, "entry_clip": 0.02})
    ):
        alone = [value_and_gradient(student, teacher, **options)[1] for teacher in teachers]
        mixed = value_and_gradient(student, Target(**{kind: [(0.5, t) for t in teachers]}), **options)[1]
        assert relative(mixed, (alone[0] + alone[1]) / 2) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.2])
def test_sampled_token_weights_have_the_divergences_gradient_in_expectation(beta):
    """Every token of the vocabulary in the place of the sampled one, times the student's probability of it."""
    student, teacher = (replace(s, hidden=s.hidden[:1]) for s in random_streams(2))
    wanted = value_and_gradient(student, teacher, beta)[1]
    x = leaf(student.hidden)
    batch = TokenBatch(target_ids=torch.arange(V), sequence_ids=torch.arange(V))
    everywhere = [replace(s, hidden=hidden.expand(V, H)) for s, hidden in ((student, x), (teacher, teacher.hidden))]
    losses, _ = make("opd_plus", beta=beta).token_loss(everywhere[0], {"teacher": everywhere[1]}, batch)
    p = torch.softmax(student.hidden @ student.weight.T, -1)[0]
    assert relative(torch.autograd.grad((losses * p).sum(), x)[0], wanted) < 1e-9


def test_distil_is_the_gradient_of_the_expected_cost_of_a_rollout():
    """A decision process of three tokens and three steps: every rollout, times its probability under the student."""
    tokens, steps = 3, 3
    prefixes = [p for length in range(steps) for p in itertools.product(range(tokens), repeat=length)]
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    rollouts = list(itertools.product(range(tokens), repeat=steps))
    g = torch.Generator().manual_seed(4)
    table, other = (torch.randn(len(prefixes), H, generator=g, dtype=torch.float64) for _ in range(2))
    head = torch.randn(tokens, H, generator=g, dtype=torch.float64)
    x = leaf(table)
    log_s, log_t = torch.log_softmax(x @ head.T, -1), torch.log_softmax(other @ head.T, -1)
    ce = -(log_t.exp() * log_s).sum(-1)

    def log_probability(rollout):
        return sum(log_s[row[rollout[:t]], rollout[t]] for t in range(steps))

    expected_cost = sum(log_probability(y).exp() * sum(ce[row[y[:t]]] for t in range(steps)) for y in rollouts)
    wanted = torch.autograd.grad(expected_cost, x, retain_graph=True)[0]
    rows = torch.tensor([row[y[:t]] for y in rollouts for t in range(steps)])
    batch = TokenBatch(
        target_ids=torch.tensor([y[t] for y in rollouts for t in range(steps)]),
        sequence_ids=torch.arange(len(rollouts)).repeat_interleave(steps),
    )
    p = torch.stack([log_probability(y).exp() for y in rollouts]).detach().repeat_interleave(steps)
    assert math.isclose(p.sum().item(), steps)
    for coefficient, near in ((1.0, True), (0.0, False)):
        z = leaf(table)
        losses, _ = make("distil", coefficient=coefficient).token_loss(
            Stream(z[rows], head), {"teacher": Stream(other[rows], head)}, batch
        )
        off = relative(torch.autograd.grad((losses * p).sum(), z)[0], wanted)
        assert off < 1e-9 if near else off > 0.02
