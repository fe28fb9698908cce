"""Rows of mixed targets in one fused pass, against the dense formulas in float64.

Triton's runs where TRITON_INTERPRET=1; test_triton.py starts such a process.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import dense
import pytest
import torch
from _helpers import leaf, relative
from test_streams import KINDS, targets
from torch import Tensor

from opsd_kernels import Stream, Target, backends, divergence
from opsd_kernels.gemm import Products
from opsd_kernels.mixture import Mixer
from opsd_kernels.rows import triton_backend
from opsd_kernels.streams import _checked, _Gather, _planned

CPU = torch.device("cpu")
FUSED = [name for name in ("triton",) if not backends.unfit(name, CPU, torch.float32, check=False)]
# numpy warns of infinities that the kernels select away
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not FUSED, reason="runs in the process with TRITON_INTERPRET=1"),
]
N, H, V = 5, 12, 1031
BUDGET = 30 * V  # bytes: for two rows
ABSENT = 300  # a token whose bias is −inf


def layout(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    plan = triton_backend.Configuration(256, 1, splits)
    monkeypatch.setattr(triton_backend, "configuration", lambda *_: plan)


def contexts(case: str, dtype: torch.dtype = torch.float32, *, absent: bool = True) -> list[Stream]:
    """Like those of test_streams, of V tokens: several tiles, the last of which is not full; biases that are −inf for
    an `absent` token."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    base, heads, bias = normal(N, H), [4 * normal(V, H) / H**0.5 for _ in range(2)], normal(V)
    if absent:
        bias[ABSENT] = -math.inf
    rows = [(base + 0.4 * normal(N, H)).to(dtype) for _ in range(4)]
    heads, bias = [head.to(dtype) for head in heads], bias.to(dtype)
    if case == "plain":
        return [Stream(h, heads[0]) for h in rows]
    if case == "bias":
        return [Stream(h, heads[0], bias=bias, logit_scale=0.7, temperature=1.4) for h in rows]
    if case == "softcap":
        return [
            Stream(h, heads[0], bias=bias, softcap=5.0, temperature=t)
            for h, t in zip(rows, (0.8, 0.8, 1.3, 0.9), strict=True)
        ]
    return [
        Stream(rows[0], heads[0], temperature=1.2),
        Stream(rows[1], heads[1], logit_scale=0.8),
        Stream(rows[2], heads[1], softcap=7.0),
        Stream(rows[3], heads[0], temperature=0.7),
    ]


def log_p(stream: Stream) -> Tensor:
    """As `dense` has it, where no bias is −inf: that outlives a cap."""
    if stream.bias is None:
        return dense.log_p(stream)
    none = stream.bias == -math.inf
    finite = dense.log_p(replace(stream, bias=stream.bias.masked_fill(none, 0.0)))
    return finite.masked_fill(none, -math.inf).log_softmax(-1)


def of_tokens(kind: str, streams: list, some=lambda x: x) -> dict:
    """A target of test_streams, its coefficients of a token cut to N."""
    return {name: [(f[:N] if isinstance(f, Tensor) else f, s) for f, s in value] if isinstance(value, list) else value
           for name, value in targets(streams, some)[kind].items()}  # fmt: skip


def mixed(target: Target, student: Stream, fused: object) -> Tensor:
    """The target's logits (N, V), float32, as the chunk loop makes them."""
    mixture, tensors = _planned(_checked(target, student, _Gather()), student)
    mixer = Mixer(
        mixture.settled(student.bias is not None), [t.detach() for t in tensors], lambda weight, bias: (weight, bias),
        (student.weight, student.bias), fused,
    )  # fmt: skip
    buffers = torch.full((1 + mixer.buffers, N, V + 5), math.nan)
    mixer.fill(buffers[:, :, :V], lambda t: t, Products("torch", CPU, torch.float32, 1 << 20), student.temperature)
    assert buffers[:, :, V:].isnan().all()  # nothing is written beyond a row
    return buffers[0, :, :V]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "bias", "softcap", "different heads"])
@pytest.mark.thinned(2)
def test_rows_of_a_target_are_its_formula(case, kind, splits, name, monkeypatch):
    layout(monkeypatch, splits)
    student, *others = contexts(case, absent=kind != "residual alone")
    found = mixed(Target(**of_tokens(kind, others)), student, backends.module(name).mix_rows)
    wanted = dense.mixture(**of_tokens(kind, others, log_p))
    got = (found.double() / student.temperature).log_softmax(-1)
    there = wanted != -math.inf
    assert torch.equal(there, got != -math.inf)
    assert float((got - wanted)[there].abs().max()) < 2e-5
    assert float((got.exp() - wanted.exp()).abs().max()) < 2e-5


def ours(student: Stream, target: Target, weights: Tensor, **options) -> tuple:
    """Losses, gradients of the student's rows and head for their weighted sum, and statistics."""
    x, w = leaf(student.hidden), leaf(student.weight)
    losses, stats = divergence(replace(student, hidden=x, weight=w), target, **options)
    return losses.detach(), torch.autograd.grad((losses * weights.to(losses)).sum(), [x, w]), stats


def expected(student: Stream, wanted: Tensor, weights: Tensor, **options) -> tuple:
    x, w = leaf(student.hidden.double()), leaf(student.weight.double())
    s = log_p(replace(student, hidden=x, weight=w))
    losses = dense.div(s, wanted, **options)
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), [x, w]), s.detach()


SOME = ["geometric, per token", "clipped", "tanh", "tanh, centred", "arithmetic"]
CALLS = [
    ("geometric, per token", "different heads", {"beta": 0.0}),
    ("tanh", "softcap", {"beta": 1.0}),
    ("clipped", "plain", {"beta": 0.0}),
    ("clipped", "bias", {"beta": 0.3, "entry_clip": 0.01}),
    ("tanh, centred", "bias", {"beta": 0.5}),
    ("tanh, centred", "plain", {"beta": 0.5, "top_k": 9, "tail_bucket": True}),
    ("arithmetic", "bias", {"beta": 1.0, "token_clip": 0.1}),
]


def target_of(kind: str, others: list[Stream]) -> tuple[Target, Tensor]:
    """A target and its log-probabilities."""
    return Target(**of_tokens(kind, others)), dense.mixture(**of_tokens(kind, others, log_p))


@pytest.fixture
def checked(monkeypatch):
    """Without the check of a few rows that comes before a form's first use."""
    monkeypatch.setattr(backends, "mix_error", lambda *_: 0.0)


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("kind", "case", "options"), CALLS, ids=str)
def test_losses_gradients_and_statistics(kind, case, options, name):
    """Several chunks, a mask and a trainable head; torch adds no part."""
    student, *others = contexts(case)
    target, wanted = target_of(kind, others)
    weights, ids = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1]).double(), torch.tensor([5, 1030, 7, 0, 512])
    mask = torch.tensor([True, True, False, True, True])
    renamed = {{"tail_bucket": "tail"}.get(key, key): value for key, value in options.items()}
    plain = {"beta": options["beta"]}
    losses, gradients, s = expected(student, wanted, weights * mask, **renamed)
    fills = mock.Mock(wraps=backends.module(name).mix_rows)
    with (
        mock.patch.object(backends.module(name), "mix_rows", fills),
        mock.patch.object(Mixer, "_add", side_effect=AssertionError("torch has mixed")),
    ):
        got = ours(student, target, weights, mask=mask, target_ids=ids, backend=name, workspace_bytes=BUDGET, **options)
    assert fills.call_count >= 4  # two chunks at least, once in forward and once in backward
    assert relative(got[0], losses * mask) < 3e-5
    for gradient, reference in zip(got[1], gradients, strict=True):
        assert relative(gradient, reference) < 1e-4
    stats = got[2]
    found = {
        "divergence": expected(student, wanted, weights, **plain)[0],
        "student_entropy": dense.entropy(s), "teacher_entropy": dense.entropy(wanted),
        "student_logprob": dense.at(s, ids), "teacher_logprob": dense.at(wanted, ids),
    }  # fmt: skip
    if "top_k" not in options:
        for key, value in found.items():
            assert relative(getattr(stats, key), value * mask) < 3e-5, key
    for value in (stats.token_clipped, stats.student_entropy):
        assert not value[~mask].any()


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", SOME)
def test_bf16_rows(kind, name):
    student, *others = contexts("plain", torch.bfloat16)
    target, wanted = target_of(kind, others)
    losses, gradients, _ = expected(student, wanted, torch.ones(N), beta=0.0)
    got = ours(student, target, torch.ones(N), beta=0.0, backend=name)
    # the difference of two streams is rounded to bf16 as a row of its own; dz is, in any case
    assert relative(got[0], losses) < (1e-5 if kind in ("arithmetic", "tanh") else 5e-3)
    assert relative(got[1][0], gradients[0]) < 8e-3


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", SOME)
def test_nan_stays_visible(kind, name):
    """In an entry of one context: clipping and the larger of two numbers would hide it."""
    student, *others = contexts("different heads")
    rows = others[0].hidden.clone()
    rows[2, 1] = math.nan
    others[0] = replace(others[0], hidden=rows)
    target, _ = target_of(kind, others)
    losses = ours(student, target, torch.ones(N), beta=0.0, backend=name)[0]
    assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", FUSED)
def test_a_backend_that_mixes_wrongly_leaves_it_to_torch(name, monkeypatch):
    student, *others = contexts("plain")
    target, wanted = target_of("arithmetic", others)
    module = backends.module(name)
    right = module.mix_rows

    def wrong(parts: Tensor, *arguments, **options) -> None:
        right(parts, *arguments, **options)
        parts[0][..., -1] += 0.1

    monkeypatch.setattr(module, "mix_rows", wrong)
    backends.mix_error.cache_clear()
    try:
        got = ours(student, target, torch.ones(N), beta=0.0, backend=name)
        assert relative(got[0], expected(student, wanted, torch.ones(N), beta=0.0)[0]) < 3e-5
    finally:
        backends.mix_error.cache_clear()
