"""Inputs and measures that the kernel tests share."""

from collections.abc import Callable

import torch
from torch import Tensor

from opsd_kernels import workspace


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
    """Floating-point operations of the matrix products that really happen while `run` runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True, record_shapes=True
    ) as profile:
        run()
    return sum(e.flops for e in profile.events() if e.name in ("aten::mm", "aten::addmm") and e.flops)
