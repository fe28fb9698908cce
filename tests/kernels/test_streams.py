"""Divergences to targets made of several contexts, and statistics of streams, against the dense float64 formulas."""

import functools
import math
import re
from dataclasses import replace

import dense
import pytest
import torch
from _helpers import leaf, relative

import opsd_kernels
from opsd_kernels import Stream, Target
from opsd_kernels.rows import native_backend

N, V, H, VALID = 11, 53, 8, 47
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native_backend.available()[0], reason="no native backend"))
BACKENDS = ["torch", NATIVE]
PRECISION = {"torch": (torch.float64, 1e-9), "native": (torch.float32, 3e-5)}  # the latter computes in float32


@functools.cache
def parts():
    """Rows of five contexts, peaked; three heads, two biases; coefficients of each token; ids."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    rows = normal(N, H)
    hidden = [rows + 0.4 * normal(N, H) for _ in range(5)]
    heads = [normal(V, H), normal(V, H), normal(V, H + 3)]
    ids = torch.randint(VALID, (N,), generator=g)
    return hidden, normal(N, H + 3), heads, [normal(V), normal(V)], normal(N), torch.rand(N, generator=g).double(), ids


def streams(case, dtype=torch.float64):
    """The student and three contexts: with one plain head, with one of every option, and with different heads."""
    hidden, wide, heads, biases, *_ = parts()
    hidden, heads, biases = ([x.to(dtype) for x in some] for some in (hidden, heads, biases))
    if case == "plain":
        return [Stream(h, heads[0]) for h in hidden[:4]]
    if case == "bias":
        return [Stream(h, heads[0], bias=biases[0], logit_scale=0.7, temperature=1.4) for h in hidden[:4]]
    if case == "softcap":
        common = {"bias": biases[0], "softcap": 5.0, "valid_vocab": VALID}
        return [
            Stream(h, heads[0], temperature=t, **common) for h, t in zip(hidden, (0.8, 0.8, 1.3, 0.9), strict=False)
        ]
    return [
        Stream(hidden[0], heads[0], bias=biases[0], valid_vocab=VALID, temperature=1.2),
        Stream(hidden[1], heads[1], logit_scale=0.8, valid_vocab=VALID),
        Stream(wide.to(dtype), heads[2], bias=biases[1], softcap=7.0, valid_vocab=VALID),
        Stream(hidden[3], heads[0], temperature=0.7, valid_vocab=VALID),
    ]


def targets(contexts, some=lambda x: x):
    """Every kind of target, by name, as the arguments of `Target` and of `dense.mixture`."""
    t, r, b = map(some, contexts)
    _, _, _, _, a, w, _ = parts()
    return {
        "one": {"linear": [(1.0, t)]},
        "power": {"linear": [(0.7, t)]},
        "geometric": {"linear": [(0.4, t), (0.6, r)]},
        "extrapolated": {"linear": [(1.8, t), (-0.8, r)]},
        "geometric, per token": {"linear": [(w, t), (1 - w, r)]},
        "shifted": {"linear": [(1.0, b)], "residual": [(1.0, t), (-1.0, r)], "scale": 0.6},
        "clipped": {"linear": [(1.0, r)], "residual": [(1.0, t), (-1.0, r)], "scale": 0.6, "clip": 0.8},
        "clipped, centred": {"linear": [(1.0, b)], "residual": [(1.0, t), (-1.0, r)], "clip": 0.8, "centre": True},
        "tanh": {"linear": [(1.0, b)], "residual": [(1.0, t), (-1.0, r)], "scale": 0.9, "tanh": 1.5},
        "tanh, centred": {"linear": [(1.0, b)], "residual": [(1.0, t), (-1.0, r)], "tanh": 1.5, "centre": True},
        "residual, per token": {"linear": [(1.0, b)], "residual": [(a, t), (-w, r)], "clip": 1.1},
        "residual, per token, centred": {
            "linear": [(w, b)],
            "residual": [(a, t), (-w, r)],
            "tanh": 1.1,
            "centre": True,
        },
        "residual alone": {"residual": [(1.0, t), (-0.5, r)], "tanh": 2.0},
        "arithmetic": {"arithmetic": [(0.3, t), (0.5, r), (0.2, b)]},
        "arithmetic, per token": {"arithmetic": [(w, t), (1 - w, b)]},
    }


KINDS = list(targets((None, None, None)))


def ours(student, target, weights, **options):
    """Losses, and the gradients of the student's rows, head and bias for the losses' weighted sum."""
    leaves = {"hidden": leaf(student.hidden), "weight": leaf(student.weight)}
    if student.bias is not None:
        leaves["bias"] = leaf(student.bias)
    losses, stats = opsd_kernels.divergence(replace(student, **leaves), target, **options)
    return losses.detach(), torch.autograd.grad((losses * weights.to(losses)).sum(), list(leaves.values())), stats


def expected(student, target, weights, **options):
    leaves = {"hidden": leaf(student.hidden.double()), "weight": leaf(student.weight.double())}
    if student.bias is not None:
        leaves["bias"] = leaf(student.bias.double())
    losses = dense.div(dense.log_p(replace(student, **leaves)), target, **options)
    return losses.detach(), torch.autograd.grad((losses * weights).sum(), list(leaves.values()))


def check(got, wanted, tolerance=1e-9):
    assert relative(got[0], wanted[0]) < tolerance
    for gradient, reference in zip(got[1], wanted[1], strict=True):
        assert relative(gradient, reference) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "bias", "softcap", "different heads"])
def test_a_target_of_several_contexts_is_its_formula(case, kind, backend):
    dtype, tolerance = PRECISION[backend]
    student, *contexts = streams(case, dtype)
    weights = parts()[4]
    target = Target(**targets(contexts)[kind])
    mixed = dense.mixture(**targets(contexts, dense.log_p)[kind])
    for beta in (0.0, 0.3, 1.0):
        got = ours(student, target, weights, beta=beta, backend=backend)
        assert got[0].dtype == dtype
        check(got, expected(student, mixed, weights, beta=beta), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"entry_clip": 0.005},
        {"token_clip": 0.1},
        {"entry_clip": 0.01, "token_clip": 0.05},
        {"top_k": 7},
        {"top_k": 7, "top_k_from": "student", "tail_bucket": True},
        {"top_k": 5, "tail_bucket": True, "entry_clip": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["one", "geometric", "clipped", "tanh, centred", "arithmetic"])
def test_clips_and_supports_apply_to_the_whole_target(kind, options, backend):
    dtype, tolerance = PRECISION[backend]
    student, *contexts = streams("softcap", dtype)
    weights = parts()[4]
    renamed = {{"top_k_from": "by", "tail_bucket": "tail"}.get(name, name): value for name, value in options.items()}
    mixed = dense.mixture(**targets(contexts, dense.log_p)[kind])
    wanted = expected(student, mixed, weights, beta=0.5, **renamed)
    plain = expected(student, mixed, weights, beta=0.5)
    assert relative(plain[0], wanted[0]) > 1e-3  # the option does something here
    got = ours(student, Target(**targets(contexts)[kind]), weights, beta=0.5, backend=backend, **options)
    check(got, wanted, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_the_result(kind):
    student, *contexts = streams("different heads")
    weights = parts()[4]
    target = Target(**targets(contexts)[kind])
    with pytest.raises(ValueError, match="workspace_bytes") as caught:
        ours(student, target, weights, beta=0.3, workspace_bytes=1)
    one_token = int(re.search(r"at least (\d+) for one token", str(caught.value))[1])
    whole = ours(student, target, weights, beta=0.3)
    check(ours(student, target, weights, beta=0.3, workspace_bytes=one_token), whole, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close(kind):
    student, *contexts = streams("softcap", torch.float32)
    weights = parts()[4]
    wanted = expected(student, dense.mixture(**targets(contexts, dense.log_p)[kind]), weights, beta=0.5)
    check(ours(student, Target(**targets(contexts)[kind]), weights, beta=0.5, backend="torch"), wanted, 3e-5)


def test_a_stream_is_the_target_of_itself_alone():
    student, teacher, *_ = streams("bias")
    weights = parts()[4]
    for beta in (0.0, 0.5, 1.0):
        check(
            ours(student, teacher, weights, beta=beta),
            ours(student, Target(linear=[(1.0, teacher)]), weights, beta=beta),
        )
        losses, gradients, _ = ours(student, student, weights, beta=beta)
        assert losses.abs().max() < 1e-14
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_cross_entropy_differs_from_forward_kl_by_the_targets_entropy():
    student, *contexts = streams("softcap")
    weights = parts()[4]
    for kind in ("one", "tanh, centred", "arithmetic"):
        target = Target(**targets(contexts)[kind])
        kl, ce = (ours(student, target, weights, beta=0.0, value=value) for value in ("kl", "ce"))
        entropy = dense.entropy(dense.mixture(**targets(contexts, dense.log_p)[kind]))
        check((ce[0] - kl[0], ce[1]), (entropy, kl[1]))


def test_statistics_of_a_divergence_are_those_of_the_mixed_target():
    student, *contexts = streams("softcap")
    ids = parts()[-1]
    s, t = dense.log_p(student), dense.mixture(**targets(contexts, dense.log_p)["tanh, centred"])
    target = Target(**targets(contexts)["tanh, centred"])
    _, _, stats = ours(student, target, parts()[4], beta=1.0, entry_clip=0.01, target_ids=ids)
    assert relative(stats.divergence, dense.div(s, t, 1)) < 1e-9
    assert relative(stats.student_entropy, dense.entropy(s)) < 1e-9
    assert relative(stats.teacher_entropy, dense.entropy(t)) < 1e-9
    assert relative(stats.student_logprob, dense.at(s, ids)) < 1e-9
    assert relative(stats.teacher_logprob, dense.at(t, ids)) < 1e-9


@pytest.mark.parametrize("gap", [1.0, 0.2, 0.05])
def test_a_mixture_of_bf16_rows_keeps_more_than_bf16(gap):
    """Mixing the rows and rounding the mix to bf16 loses up to a tenth of what the contexts differ by."""
    g = torch.Generator().manual_seed(1)
    n, h, v = 48, 256, 331
    weight = torch.randn(v, h, generator=g).bfloat16()
    rows = torch.randn(n, h, generator=g) * 4.2 / h**0.5
    first, second, student = ((rows + gap / h**0.5 * torch.randn(n, h, generator=g)).bfloat16() for _ in range(3))

    def logp(hidden):
        return torch.log_softmax(hidden.double() @ weight.double().T, -1)

    def off(losses, gradient):
        return relative(losses, wanted[0]), relative(gradient, wanted[1])

    def reference(target):
        x = leaf(student.double())
        losses = dense.div(logp(x), target, 0)
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    wanted = reference(dense.mixture([(0.4, logp(first)), (0.6, logp(second))]))
    rounded = off(*reference(logp((0.4 * first.float() + 0.6 * second.float()).bfloat16())))
    x = leaf(student)
    target = Target(linear=[(0.4, Stream(first, weight)), (0.6, Stream(second, weight))])
    losses, _ = opsd_kernels.divergence(Stream(x, weight), target, beta=0.0)
    exact = off(losses, torch.autograd.grad(losses.sum(), x)[0])
    bounds = 5e-4, 4e-3  # the gradient comes back in bf16
    assert exact[0] < bounds[0]
    assert exact[1] < bounds[1]
    assert rounded[0] > 4 * bounds[0] or rounded[1] > 4 * bounds[1]


@pytest.mark.parametrize("case", ["plain", "softcap", "different heads"])
def test_logprob_is_its_formula_with_its_gradient(case):
    ids, weights = parts()[-1], parts()[4]
    for stream in streams(case):
        x, y = leaf(stream.hidden), leaf(stream.hidden)
        got = opsd_kernels.logprob(replace(stream, hidden=x), ids)
        wanted = dense.at(dense.log_p(replace(stream, hidden=y)), ids)
        gradients = [torch.autograd.grad((out * weights).sum(), hidden)[0] for out, hidden in ((got, x), (wanted, y))]
        check((got, gradients[:1]), (wanted, gradients[1:]))


@pytest.mark.parametrize("case", ["plain", "softcap", "different heads"])
def test_top_k_statistics_of_two_streams_are_their_formulas(case):
    student, teacher, *_ = streams(case)
    s, t = dense.log_p(student), dense.log_p(teacher)
    for k in (1, 5, 16):
        assert relative(opsd_kernels.union_kl(teacher, student, k), dense.union_kl(t, s, k)) < 1e-9
        assert relative(opsd_kernels.top_k_mass(teacher, student, k), dense.mass(t, s, k)) < 1e-9
    assert not torch.allclose(dense.union_kl(t, s, 5), dense.div(s, t, 0), rtol=1e-2)


def test_a_softcap_gives_no_logit_to_a_token_of_bias_minus_infinity():
    stream, *_ = streams("softcap")
    columns = stream.weight.shape[0]
    bias = torch.zeros(columns, dtype=stream.weight.dtype).index_fill(0, torch.arange(1, columns, 2), -math.inf)
    stream = replace(stream, bias=bias, valid_vocab=None)
    ids = torch.arange(columns).expand(len(stream.hidden), columns)
    assert opsd_kernels.logits_at(stream, ids)[:, 1::2].eq(-math.inf).all()
    assert relative(opsd_kernels.top_k_mass(stream, stream, columns), torch.ones(len(stream.hidden))) < 1e-9


def test_layer_mse_is_the_weighted_mean_square_of_each_row():
    g = torch.Generator().manual_seed(2)
    a, b, c, d = (torch.randn(N, size, generator=g, dtype=torch.float64) for size in (6, 6, 9, 9))
    x, z = leaf(a), leaf(c)
    losses = opsd_kernels.layer_mse([(x, b, 1.0), (z, d, 0.5)])
    wanted = ((a - b).square().mean(-1) + 0.5 * (c - d).square().mean(-1)) / 2
    assert relative(losses, wanted) < 1e-12
    gradients = torch.autograd.grad(losses.sum(), [x, z])
    assert relative(gradients[0], (a - b) / 6) < 1e-12
    assert relative(gradients[1], 0.5 * (c - d) / 9) < 1e-12
    assert opsd_kernels.layer_mse([(x, x, 1.0)]).abs().max() == 0


def blamed():
    student, t, r, _ = streams("plain")
    short = replace(t, hidden=t.hidden[:-1])
    ids = parts()[-1]
    call = opsd_kernels.divergence
    return {
        "linear": lambda: call(student, Target()),
        "arithmetic": lambda: call(student, Target(linear=[(1.0, t)], arithmetic=[(1.0, r)])),
        "tanh": lambda: call(student, Target(linear=[(1.0, t)], residual=[(1.0, r)], clip=1.0, tanh=1.0)),
        "clip": lambda: call(student, Target(linear=[(1.0, t)], residual=[(1.0, r)], clip=-1.0)),
        "hidden": lambda: call(student, short),
        "weight": lambda: call(student, replace(t, weight=t.weight[:-1])),
        "temperature": lambda: call(student, replace(t, temperature=0.0)),
        "beta": lambda: call(student, t, beta=1.5),
        "value": lambda: call(student, t, value="nats"),
        "top_k": lambda: call(student, t, top_k=0),
        "entry_clip": lambda: call(student, t, entry_clip=-0.1),
        "backend": lambda: call(student, t, backend="numpy"),
        "target_ids": lambda: opsd_kernels.logprob(student, ids[:-1]),
        r"\bk\b": lambda: opsd_kernels.union_kl(t, student, 0),
        r"k\b": lambda: opsd_kernels.top_k_mass(t, student, 0),
    }


@pytest.mark.parametrize("name", list(blamed()))
def test_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=name):
        blamed()[name]()


def test_a_weight_of_the_wrong_length_is_an_error():
    student, t, r, _ = streams("plain")
    with pytest.raises(ValueError, match="linear"):
        opsd_kernels.divergence(student, Target(linear=[(torch.ones(N - 1), t), (0.5, r)]))


def test_only_forward_kl_has_a_cross_entropy():
    student, t, *_ = streams("plain")
    with pytest.raises(ValueError, match="value"):
        opsd_kernels.divergence(student, t, beta=0.5, value="ce")


def test_a_context_gets_no_gradient():
    student, t, r, _ = streams("plain")
    x, y = leaf(student.hidden), leaf(t.hidden)
    target = Target(linear=[(0.5, replace(t, hidden=y)), (0.5, r)])
    losses, _ = opsd_kernels.divergence(replace(student, hidden=x), target)
    assert torch.autograd.grad(losses.sum(), [x, y], allow_unused=True)[1] is None
    assert math.isfinite(losses.detach().sum())
