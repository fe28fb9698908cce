"""Inputs and measures that the kernel tests share."""

import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from opsd_kernels import native, workspace


def problem(
    n: int, hidden: int, vocab: int, *, gap: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher hidden states and a head, with peaked logits (std about 4) that differ by about `gap`."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=g, dtype=torch.float64)
    teacher = torch.randn(n, hidden, generator=g, dtype=torch.float64) * 4 / hidden**0.5
    student = teacher + gap / hidden**0.5 * torch.randn(n, hidden, generator=g, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), weight.to(dtype)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64 (absolute where nothing is expected)."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30 if expected.any() else 1.0))


def close_pair(tokens: int, vocab: int, gap: float, peak: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 rows in which one token, `peak` above the rest, has nearly all of both models' probability."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, vocab, generator=g)
    teacher[torch.arange(tokens), torch.randint(vocab, (tokens,), generator=g)] += peak
    return teacher + gap * torch.randn(tokens, vocab, generator=g), teacher


def close_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence of rows that differ by less than 0.1, in float64: there, the dense definition's sum cancels."""

    def phi(x: Tensor) -> Tensor:
        return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))

    gap, p_t = student.double() - teacher.double(), teacher.double().softmax(-1)
    d = gap - torch.log1p((p_t * gap.expm1()).sum(-1, keepdim=True))
    p_s = p_t * d.exp()
    if beta in (0.0, 1.0):
        return (p_s * phi(-d) if beta else p_t * phi(d)).sum(-1)
    log_m_over_t, log_m_over_s = torch.log1p((1 - beta) * d.expm1()), torch.log1p(beta * (-d).expm1())
    return (beta * p_t * phi(log_m_over_t) + (1 - beta) * p_s * phi(log_m_over_s)).sum(-1)


def row_rms(got: Tensor, expected: Tensor) -> float:
    """RMS over rows of ‖got − expected‖ / ‖expected‖."""
    got, expected = got.detach().double(), expected.detach().double()
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).square().mean().sqrt())


def allocations(run: Callable[[], object]) -> list[int]:
    """The sizes in bytes of every CPU allocation (positive) and release (negative) while `run` runs, in order."""
    run()  # what is set up once is not what is measured
    workspace.release()  # the workspace is
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]


def peak(sizes: list[int]) -> int:
    """The most bytes alive at once."""
    alive = most = 0
    for size in sizes:
        alive += size
        most = max(most, alive)
    return most


def product_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that really happen while `run` runs: torch's and native ones."""
    own, multiply = 0, native.multiply

    def counted(out: Tensor, a: Tensor, b: Tensor, **options: bool) -> None:
        nonlocal own
        own += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        multiply(out, a, b, **options)

    with (
        mock.patch.object(native, "multiply", counted),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True, record_shapes=True
        ) as profile,
    ):
        run()
    return own + sum(e.flops for e in profile.events() if e.name in ("aten::mm", "aten::addmm") and e.flops)


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """(m, k) and (k, n) to multiply, each dense along either dimension."""
    g = torch.Generator().manual_seed(m + n + k)
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)
    return [(x, y) for x in (a, a.t().contiguous().t()) for y in (b, b.t().contiguous().t())]


def check_product(a: Tensor, b: Tensor) -> None:
    """The native product of a and b, alone and added to something, against float64."""
    exact = a.double() @ b.double()
    start = torch.randn(exact.shape)
    new, added = torch.full(exact.shape, math.nan), start.clone()
    native.multiply(new, a, b)
    native.multiply(added, a, b, add=True)
    size = a.shape[1] ** 0.5
    torch.testing.assert_close(new.double(), exact, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(added.double() - start, exact, rtol=1e-5, atol=1e-6 * size)
