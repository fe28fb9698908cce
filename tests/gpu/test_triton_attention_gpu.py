"""The Triton attention on a device, at the sizes of real models, against the eager backend in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opsd_kernels.packing import attention, pack_dual_context, triton_attention
from opsd_kernels.packing.layout import Layout

if torch.cuda.is_available():
    fine, why = triton_attention.available("cuda")
else:
    fine, why = False, "needs a CUDA device"
pytestmark = pytest.mark.skipif(not fine, reason=why)

NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    for name in ("_new_rows", "_new_sums"):
        new = getattr(triton_attention, name)
        monkeypatch.setattr(triton_attention, name, lambda like, new=new: new(like).fill_(math.nan))


def make_layout(generations: int, seed: int = 0, *, joint: bool = False, longest: int = 500) -> Layout:
    """Prompts up to 300 and rollouts up to `longest` tokens, the teacher's prompts 700 tokens longer."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        n = int(torch.randint(1, most + 1, (), generator=draw))
        return torch.randint(3, 1000, (n,), generator=draw).tolist()

    students = [tokens(300) for _ in range(3)]
    rollouts = [[[1, 2], *(tokens(longest) for _ in range(generations))] for _ in students]
    batch = pack_dual_context(students, [[*s[:-1], *tokens(700)] for s in students], rollouts)
    return (batch.joint(share_contexts=True) if joint else batch.student).layout.to("cuda")


def tensors(layout: Layout, heads: tuple[int, int], size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(1)
    shapes = [(1, layout.rows, n, size) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, g = (torch.randn(*s, generator=draw, device="cuda").transpose(1, 2).to(dtype) for s in shapes)
    return 2 * q, k, v, g


def run(
    attend: Any, layout: Layout, given: tuple[Tensor, ...], window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, ...]:
    """Output, dQ, dK, dV."""
    *inputs, grad = (t.detach().requires_grad_(i < 3) for i, t in enumerate(given))
    out = attend(*inputs, layout, given[0].shape[-1] ** -0.5, window, softcap)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, float]:
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(NAMES, got, want, strict=True)}


BOTH = {"softcap": 20.0, "window": 200}
KINDS = [
    *((torch.bfloat16, size, options) for size in (40, 64, 96, 128, 256) for options in ({}, BOTH)),
    (torch.bfloat16, 128, {"softcap": 20.0}),
    (torch.bfloat16, 128, {"window": 1000}),
    (torch.float16, 128, {}),
    *((torch.float32, size, options) for size in (64, 128) for options in ({}, BOTH)),
]


@pytest.mark.parametrize(
    ("dtype", "size", "options"), KINDS, ids=["-".join([str(t)[6:], str(d), *o]) for t, d, o in KINDS]
)
@pytest.mark.parametrize("generations", [1, 4])
def test_accuracy(dtype: torch.dtype, generations: int, size: int, options: dict[str, Any]) -> None:
    layout = make_layout(generations, joint=generations > 1)
    given = tensors(layout, (4, 2), size, dtype)
    want = run(attention._eager, layout, tuple(t.double() for t in given), **options)
    ours = errors(run(attention._triton, layout, given, **options), want)
    if dtype == torch.float32:
        assert max(ours.values()) < 1e-5, ours
    else:
        torchs = errors(run(attention._eager, layout, given, **options), want)
        assert all(ours[n] <= 2 * torchs[n] for n in NAMES), (ours, torchs)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2)])
def test_heads_and_same_bits_every_time(heads: tuple[int, int]) -> None:
    layout = make_layout(8, longest=100)
    given = tensors(layout, heads, 128, torch.bfloat16)
    want = run(attention._eager, layout, tuple(t.double() for t in given))
    first = run(attention._triton, layout, given)
    assert max(errors(first, want).values()) < 0.02
    for _ in range(5):
        for a, b in zip(run(attention._triton, layout, given), first, strict=True):
            assert torch.equal(a, b)
    heads_first = tuple(t.contiguous() for t in given)
    for a, b in zip(run(attention._triton, layout, heads_first), first, strict=True):
        assert torch.equal(a, b)


def test_no_compilation_per_layout() -> None:
    kernels = (
        triton_attention.forward_kernel,
        triton_attention.query_gradient_kernel,
        triton_attention.key_gradient_kernel,
    )

    def compiled() -> int:
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    def once(seed: int, window: int) -> None:
        layout = make_layout(seed % 3 + 1, seed)
        run(attention._triton, layout, tensors(layout, (4, 2), 64, torch.bfloat16), window=window)

    once(0, 64)
    before = compiled()
    for seed, window in ((1, 100), (2, 16), (3, 333), (4, 1), (5, 128)):
        once(seed, window)
    assert compiled() == before


def test_agrees_with_varlen() -> None:
    layout = make_layout(4)
    given = tensors(layout, (8, 2), 128, torch.bfloat16)
    want = run(attention._eager, layout, tuple(t.double() for t in given))
    theirs, ours = (errors(run(f, layout, given), want) for f in (attention._varlen, attention._triton))
    assert all(ours[n] <= 2 * theirs[n] for n in NAMES), (ours, theirs)


@pytest.mark.parametrize("backend", ["varlen", "triton"])
def test_self_check(backend: str) -> None:
    assert attention.self_check(backend, torch.device("cuda"), torch.bfloat16, 128, capped=False, exact=True) is None


def test_choice() -> None:
    assert attention.choose_backend(torch.device("cuda"), torch.bfloat16, 128)[0] == "varlen"
    assert attention.choose_backend(torch.device("cuda"), torch.float32, 128)[0] == "triton"
