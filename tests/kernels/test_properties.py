"""Random shapes, options and patterns of −inf: every backend that works here against the definitions in float64."""

import math

import pytest
import torch
from _helpers import leaf, row_rms
from hypothesis import given, settings
from hypothesis import strategies as st

import opsd_kernels
from opsd_kernels import backends, reference
from opsd_kernels.objective import Objective

CPU = torch.device("cpu")
BACKENDS = [name for name in ("torch", "native") if not backends.unfit(name, CPU, torch.float32)]

options = st.fixed_dictionaries(
    {
        "beta": st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.05, 0.95)),
        "temperature": st.floats(0.5, 2.0),
        "entry_clip": st.one_of(st.none(), st.floats(0.01, 0.3)),
        "token_clip": st.one_of(st.none(), st.floats(0.05, 1.0)),
        "logit_scale": st.sampled_from([1.0, 0.5]),
        "softcap": st.sampled_from([None, 5.0, 30.0]),
        "tail_bucket": st.booleans(),
        "top_k": st.one_of(st.none(), st.integers(1, 6)),
        "top_k_from": st.sampled_from(["teacher", "student"]),
    }
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5),
    vocab=st.integers(1, 70),
    gap=st.sampled_from([3.0, 0.3, 1e-2]),
    holes=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    seed=st.integers(0, 2**20),
    options=options,
)
def test_any_options_on_any_rows(backend, n, vocab, gap, holes, seed, options):
    g = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(n, vocab, generator=g)
    student = teacher + gap * torch.randn(n, vocab, generator=g)
    for logits, share in zip((student, teacher), holes, strict=True):
        logits[torch.rand(n, vocab, generator=g) < share * torch.randint(2, (n, 1), generator=g)] = -math.inf
    if options["top_k"] is None:
        options = {**options, "tail_bucket": False}
    else:
        options = {**options, "top_k": min(options["top_k"], vocab)}
    objective = Objective.checked(**options)

    exact = leaf(student.double())
    expected = reference.divergence(exact, teacher.double(), objective)
    (expected_dz,) = torch.autograd.grad(expected.sum(), exact)
    mine = leaf(student)
    losses, stats = opsd_kernels.jsd_loss_from_logits(
        mine, teacher, backend=backend, reduction="none", return_stats=True, **options
    )
    (dz,) = torch.autograd.grad(losses.sum(), mine)

    assert not losses.isnan().any()
    assert torch.equal(losses.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert torch.allclose(losses[finite].double(), expected[finite], rtol=1e-4, atol=2e-6)
    # an entry or token exactly at its clip may fall on either side of it
    edge = torch.zeros(n, dtype=torch.bool)
    for clip in (options["entry_clip"], options["token_clip"]):
        if clip is not None:
            y_s, y_t = (
                reference.transformed(z.double(), objective.student, objective.temperature) for z in (student, teacher)
            )
            if objective.top_k is not None:
                y_s, y_t = reference.restricted(y_s, y_t, objective)
            terms, _ = reference.entries(reference.log_softmax(y_s), reference.log_softmax(y_t), objective.beta)
            edge |= ((terms - clip).abs() < 1e-5).any(-1)
            edge |= (expected - clip).abs() < 1e-5
    assert torch.allclose(dz[~edge].double(), expected_dz[~edge], rtol=1e-3, atol=2e-6)
    assert (stats.clipped_amount >= -1e-6).all()
    assert (dz[losses.isinf()] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vocab", "rows"), [(32_003, 32), (50_257, 32), (151_936, 6), (262_144, 4)])
@pytest.mark.parametrize("gap", [1.0, 1e-3])
def test_accuracy_at_real_vocabularies(vocab, rows, gap, backend):
    g = torch.Generator().manual_seed(5)
    teacher = 4 * torch.randn(rows, vocab, generator=g)
    student = teacher + gap * torch.randn(rows, vocab, generator=g)
    supported = {"beta": 0.5, "top_k": 64, "tail_bucket": True}
    for options in ({"beta": 0.0}, {"beta": 0.5, "entry_clip": 0.05}, {"beta": 1.0, "entry_clip": 0.05}, supported):
        exact, mine = leaf(student.double()), leaf(student)
        expected = reference.divergence(exact, teacher.double(), Objective.checked(**options))
        got = opsd_kernels.jsd_loss_from_logits(mine, teacher, reduction="none", backend=backend, **options)
        (want_dz,), (dz,) = (torch.autograd.grad(v.sum(), x) for v, x in ((expected, exact), (got, mine)))
        assert row_rms(dz, want_dz) < 1e-5
        assert row_rms(got.unsqueeze(-1), expected.unsqueeze(-1)) < 1e-4
