"""The weights of tokens, against values worked out by hand or by plain loops."""

import math

import pytest
import torch

from opsd.recipes import weights as w

IDS = torch.tensor([7, 7, 7, 2, 2, 9])


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_places_do_not_ask_for_sorted_or_adjacent_sequences():
    sequences = w.Sequences.of(torch.tensor([5, 3, 5, 3, 3]))
    assert sequences.position.tolist() == [0, 0, 1, 1, 2]
    assert sequences.length.tolist() == [2, 3, 2, 3, 3]
    assert sequences.mean(t(1, 3, 5, 6, 9)).tolist() == [3, 6, 3, 6, 6]


@pytest.mark.parametrize(("strict", "expected"), [
    (True, [5, 3, 0, 5, 0, 0]),
    (False, [6, 5, 3, 9, 5, 6]),
])  # fmt: skip
def test_suffix_sums_stay_in_their_sequence(strict, expected):
    assert w.suffix_sum(t(1, 2, 3, 4, 5, 6), IDS, strict).tolist() == expected


def test_an_infinite_value_spoils_no_other_sequence_and_nothing_after_it():
    got = w.suffix_sum(t(1, math.inf, 3, 4, 5, 6), IDS, True)
    assert got.tolist() == [math.inf, 3, 0, 5, 0, 0]


def test_window_min_looks_ahead_within_the_sequence():
    values = t(5, 1, 4, 2, 3, 0)
    assert w.window_min(values, 1, IDS).tolist() == values.tolist()
    assert w.window_min(values, 2, IDS).tolist() == [1, 1, 4, 2, 3, 0]
    assert w.window_min(values, 99, IDS).tolist() == [1, 1, 4, 2, 3, 0]


def test_top_fraction_rounds_up_prefers_the_earlier_and_leaves_no_sequence_out():
    scores = t(1, 3, 3, 3, 0, -1)
    assert w.top_fraction(scores, 2 / 6, IDS).tolist() == [False, True, True, True, False, True]
    assert w.top_fraction(scores, 0.2, IDS, t(0, 0, 0, 1, 2, 0)).tolist() == [False, True, True, False, True, True]
    assert w.top_fraction(torch.zeros(30), 0.1, torch.zeros(30, dtype=torch.int64)).nonzero().flatten().tolist() == [
        0, 1, 2,
    ]  # fmt: skip


def test_qnorm_clips_at_interpolated_quantiles():
    got = w.qnorm(t(0, 1, 2, 3, 4), 0.125, 0.75)
    torch.testing.assert_close(got, t(0, 0.2, 0.6, 1, 1))
    assert w.qnorm(t(2, 2, 2)).tolist() == [0, 0, 0]


def test_znorm_has_unit_variance_in_each_sequence_and_is_zero_in_flat_ones():
    got = w.per_sequence_znorm(t(1, 2, 6, 0.1, 0.1, 4), IDS)
    torch.testing.assert_close(got[:3].mean(), t(0).squeeze(), atol=1e-15, rtol=0)
    torch.testing.assert_close(got[:3].std(correction=0), t(1).squeeze())
    assert got[3:].tolist() == [0, 0, 0]
    assert w.per_sequence_znorm(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_hysteresis_keeps_its_state_between_the_limits():
    was = torch.tensor([True, False, True, False])
    assert w.hysteresis(was, t(1, 1, 0.5, 2), 0.9, 1.1).tolist() == [True, False, False, True]


def test_ratios_and_decay():
    assert w.ratio_clip(t(1e6, math.log(1.5)), 2.0).tolist() == pytest.approx([2, 1.5])
    assert w.clip1(t(0, 1.1, 9), 0.2).tolist() == [0.8, 1.1, 1.2]
    assert [float(w.linear_decay(0.5, step, 25)) for step in (0, 5, 25, 30)] == pytest.approx([0.5, 0.4, 0, 0])
    assert w.in_ids(torch.tensor([3, 1, 4]), (4, 3)).tolist() == [True, False, True]
    assert not w.in_ids(torch.tensor([3]), ()).any()
    assert w.threshold(t(0, 1, -1), 0).tolist() == [False, True, False]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_sampled_weight_is_the_divergence_gradient_in_expectation(beta):
    generator = torch.Generator().manual_seed(3)
    z, teacher = (torch.randn(11, dtype=torch.float64, generator=generator) for _ in range(2))
    z.requires_grad_()
    student, target = z.log_softmax(0), teacher.log_softmax(0)
    p, q = student.exp(), target.exp()
    mid = ((1 - beta) * p + beta * q).log()
    dense = {0.0: (q * (target - student)).sum(), 1.0: (p * (student - target)).sum()}.get(
        beta, (beta * q * (target - mid) + (1 - beta) * p * (student - mid)).sum()
    )
    expected = torch.autograd.grad(dense, z, retain_graph=True)[0]
    weight = w.jsd_weight((target - student).detach(), beta)
    got = torch.autograd.grad((-p.detach() * weight * student).sum(), z)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(w.jsd_weight(target - student, 0.5), w.phi(target - student))


def test_log1mexp_has_finite_gradients_at_both_ends():
    x = t(-800, -1e-12, 0).requires_grad_()
    got = w.log1mexp(x)
    torch.testing.assert_close(got[:2], t(0, math.log(1e-12)))
    got.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[2] == 0


def test_no_tokens_no_weights():
    empty, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert w.qnorm(empty).shape == w.window_min(empty, 3, ids).shape == w.suffix_sum(empty, ids, True).shape == (0,)
    assert w.top_fraction(empty, 0.5, ids).shape == w.per_sequence_znorm(empty, ids).shape == (0,)
