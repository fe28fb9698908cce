"""Divergences to targets made of several contexts on a device, against the dense formulas in float64."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from opsd_kernels import Stream, Target, backends, divergence

if torch.cuda.is_available():
    why = backends.unfit("triton", torch.device("cuda"), torch.float32)
else:
    why = "needs a CUDA device"
pytestmark = pytest.mark.skipif(bool(why), reason=why)

HIDDEN = 256
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2}  # of the gradient; bfloat16's own rounding of dz is 4e-3


def contexts(tokens: int, vocab: int, dtype: torch.dtype) -> list[Stream]:
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda")

    weight = (4 * normal(vocab, HIDDEN) / HIDDEN**0.5).to(dtype)
    base = normal(tokens, HIDDEN)
    return [Stream((base + 0.3 * normal(tokens, HIDDEN)).to(dtype), weight) for _ in range(4)]


def log_p(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.double() @ weight.double().t()).log_softmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("tokens", "vocab"), [(300, 32003), (40, 151936)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["one", "extrapolated", "clipped", "tanh, centred", "arithmetic"])
def test_a_target_of_several_contexts_is_its_formula(
    kind: str, beta: float, tokens: int, vocab: int, dtype: torch.dtype
) -> None:
    student, t, r, b = contexts(tokens, vocab, dtype)
    p_t, p_r, p_b = (log_p(stream.hidden, stream.weight) for stream in (t, r, b))
    if kind == "one":
        target, wanted = Target(linear=[(1.0, t)]), p_t
    elif kind == "extrapolated":
        target, wanted = Target(linear=[(1.8, t), (-0.8, r)]), 1.8 * p_t - 0.8 * p_r
    elif kind == "clipped":
        target = Target(linear=[(1.0, b)], residual=[(1.0, t), (-1.0, r)], clip=0.8, scale=0.6)
        wanted = p_b + 0.6 * (p_t - p_r).clamp(-0.8, 0.8)
    elif kind == "tanh, centred":
        target = Target(linear=[(1.0, b)], residual=[(1.0, t), (-1.0, r)], tanh=1.5, centre=True)
        gap = p_t - p_r
        wanted = p_b + 1.5 * torch.tanh((gap - gap.mean(-1, keepdim=True)) / 1.5)
    else:
        target, wanted = Target(arithmetic=[(0.3, t), (0.7, r)]), (0.3 * p_t.exp() + 0.7 * p_r.exp()).log()
    wanted = wanted.log_softmax(-1)
    leaf = student.hidden.detach().double().requires_grad_()
    log_s = log_p(leaf, student.weight)
    if beta in (0.0, 1.0):
        first, second = (wanted, log_s) if beta == 0.0 else (log_s, wanted)
        expected = (first.exp() * (first - second)).sum(-1)
    else:
        middle = (0.5 * log_s.exp() + 0.5 * wanted.exp()).log()
        expected = 0.5 * (log_s.exp() * (log_s - middle) + wanted.exp() * (wanted - middle)).sum(-1)
    (gradient,) = torch.autograd.grad(expected.mean(), leaf)

    hidden = student.hidden.detach().requires_grad_()
    chosen, choose = [], backends.mix_rows
    with mock.patch.object(backends, "mix_rows", lambda *given: chosen.append(choose(*given)) or chosen[-1]):
        losses, stats = divergence(Stream(hidden, student.weight), target, beta=beta, backend="triton")
    assert all(chosen), "torch has mixed"
    assert chosen or kind == "one"
    losses.mean().backward()
    assert hidden.grad is not None
    difference = (hidden.grad.double() - gradient).norm(dim=-1) / gradient.norm(dim=-1)
    assert difference.square().mean().sqrt() < TOLERANCES[dtype]
    assert ((losses - expected).abs() / expected.abs()).square().mean().sqrt() < TOLERANCES[dtype]
    entropy = -(wanted.exp() * wanted).sum(-1)
    assert (stats.teacher_entropy - entropy).abs().max() < 50 * TOLERANCES[dtype] * entropy.abs().max()
