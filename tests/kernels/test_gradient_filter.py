"""The opt-in filter of dz's columns: within the bound it reports, and cheap because it drops them."""

import pytest
import torch
from _helpers import leaf, problem, product_flops, relative

import opsd_kernels


def gradients(eps, trainable=True, reduction="sum"):
    student, teacher, weight = problem(64, 16, 3000, gap=0.5)
    inputs = [leaf(student), leaf(weight).requires_grad_(trainable), leaf(torch.zeros(3000, dtype=torch.float64))]
    inputs[2].requires_grad_(trainable)
    loss, stats = opsd_kernels.jsd_loss(
        inputs[0], teacher, inputs[1], bias=inputs[2], gradient_filter=eps, reduction=reduction, return_stats=True
    )
    return torch.autograd.grad(loss.sum(), inputs[: 3 if trainable else 1]), stats


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-9])
def test_the_error_is_within_the_reported_bound(eps, reduction, trainable):
    exact, plain = gradients(None, trainable, reduction)
    filtered, stats = gradients(eps, trainable, reduction)
    assert plain.gradient_dropped is None
    if reduction == "none" and trainable:
        assert stats.gradient_dropped.isnan().all()  # known in backward only
    else:
        error = (filtered[0] - exact[0]).norm(dim=-1)
        assert (error <= stats.gradient_dropped * (1 + 1e-9)).all()
        assert (stats.gradient_dropped > 0).any() == (eps > 1e-9)
    if eps == 1e-3:
        assert relative(filtered[0], exact[0]) > 1e-12  # something was dropped
    if eps == 1e-9:
        assert all(relative(a, b) < 1e-6 for a, b in zip(filtered, exact, strict=True))


def test_dropped_columns_cost_nothing():
    student, teacher, weight = (t.float() for t in problem(64, 16, 3000, gap=0.5))
    flops = {}
    for eps in (None, 1e-30, 1e-3):
        x = leaf(student)

        def step(x=x, eps=eps):
            opsd_kernels.jsd_loss(x, teacher, weight, gradient_filter=eps).backward()

        flops[eps] = product_flops(step)
    assert flops[1e-30] <= flops[None]
    assert flops[1e-3] < 0.8 * flops[None]


@pytest.mark.parametrize("trainable", [False, True])
def test_eps_and_the_bound_are_for_the_tokens_own_loss_whatever_its_weight(trainable):
    student, teacher, weight = problem(64, 16, 3000, gap=0.5)
    results = {}
    for size in (1.0, 50.0, 1e-3):
        inputs = [leaf(student), leaf(weight).requires_grad_(trainable)]
        loss, stats = opsd_kernels.jsd_loss(
            inputs[0], teacher, inputs[1], gradient_filter=1e-4, reduction="sum", return_stats=True,
            token_weight=torch.full((64,), size, dtype=torch.float64),
        )  # fmt: skip
        results[size] = torch.autograd.grad(loss, inputs[0])[0] / size, stats.gradient_dropped
    for gradient, dropped in results.values():
        assert relative(gradient, results[1.0][0]) < 1e-9
        assert torch.allclose(dropped, results[1.0][1], rtol=1e-9)
