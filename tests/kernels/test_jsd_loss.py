"""jsd_loss against the dense float64 definitions: values, gradients, infinities, reductions, numerics."""

import dataclasses
import inspect
import itertools
import math

import pytest
import torch
from _helpers import leaf, problem, relative, row_rms
from torch.autograd import forward_ad

import opsd_kernels
from opsd_kernels import reference
from opsd_kernels.objective import Objective

SMALL = 150_000  # workspace bytes that force several chunks on the shapes below
SUPPORTS = [
    {},
    {"top_k": 7},
    {"top_k": 7, "top_k_from": "student"},
    {"top_k": 7, "tail_bucket": True},
    {"top_k": 7, "top_k_from": "student", "tail_bucket": True},
]
LOGITS = [
    {},
    {"softcap": 5.0, "logit_scale": 0.7},
    {"softcap": 6.0, "teacher_softcap": math.inf, "teacher_logit_scale": 1.2},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.thinned(2)
def test_values_and_gradients_match_the_reference(beta, support, dtype):
    student, teacher, weight = problem(23, 16, 301)
    bias = torch.randn(301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias[5] = -math.inf  # a masked column
    upstream = torch.linspace(-1, 1, 23, dtype=torch.float64)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-5
    for clips, logits, temperature in itertools.product(
        [{}, {"entry_clip": 0.01}, {"token_clip": 0.02}, {"entry_clip": 0.01, "token_clip": 0.02}], LOGITS, [1.0, 1.3]
    ):
        options = {"beta": beta, "temperature": temperature, **clips, **support, **logits}
        exact = [leaf(t) for t in (student, weight, bias)]
        expected = reference.jsd_loss(
            exact[0], teacher, exact[1], Objective.checked(**options), bias=exact[2], teacher_bias=bias
        )
        expected_grads = torch.autograd.grad(expected @ upstream, exact)

        inputs = [leaf(t.to(dtype)) for t in (student, weight, bias)]
        losses = opsd_kernels.jsd_loss(
            inputs[0], teacher.to(dtype), inputs[1], bias=inputs[2], reduction="none", workspace_bytes=SMALL, **options
        )
        grads = torch.autograd.grad(losses @ upstream.to(dtype), inputs)
        assert losses.dtype == dtype
        assert relative(losses, expected) < tolerance, options
        for got, want in zip(grads, expected_grads, strict=True):
            assert relative(got, want) < tolerance, options

        logits_in = leaf((student @ weight.T + bias).to(dtype))
        from_logits = opsd_kernels.jsd_loss_from_logits(
            logits_in, (teacher @ weight.T + bias).to(dtype), reduction="none", workspace_bytes=SMALL, **options
        )
        (dz,) = torch.autograd.grad(from_logits @ upstream.to(dtype), logits_in)
        assert relative(from_logits, expected) < tolerance
        assert relative(dz @ weight.to(dtype), expected_grads[0]) < tolerance


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean", "none"])
def test_separate_heads_masks_weights_and_reductions(reduction, frozen):
    g = torch.Generator().manual_seed(1)
    b, t, vocab = 3, 5, 97
    student, _, weight = problem(b * t, 12, vocab)
    teacher, _, teacher_weight = problem(b * t, 20, vocab, seed=2)  # another width
    teacher_bias = torch.randn(vocab, generator=g, dtype=torch.float64)
    mask = torch.rand(b, t, generator=g) < 0.6
    mask[1] = False  # a sequence without a counted token
    token_weight = torch.rand(b, t, generator=g, dtype=torch.float64)
    token_weight[0, 0] = 0.0
    objective = Objective.checked(beta=0.5)

    exact = [leaf(student.view(b, t, -1)), leaf(weight)]
    losses = reference.jsd_loss(
        exact[0], teacher.view(b, t, -1), exact[1], objective, teacher_weight=teacher_weight, teacher_bias=teacher_bias
    )
    losses = losses * mask * token_weight
    expected = {
        "none": lambda: losses,
        "sum": lambda: losses.sum(),
        "mean": lambda: losses.sum() / mask.sum(),
        "sequence_mean": lambda: torch.stack([losses[i].sum() / mask[i].sum() for i in (0, 2)]).mean(),
    }[reduction]()
    upstream = torch.rand(expected.shape, generator=g, dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), exact)

    inputs = [leaf(student.view(b, t, -1)), leaf(weight).requires_grad_(not frozen)]
    options = {"teacher_weight": teacher_weight, "teacher_bias": teacher_bias, "mask": mask}
    got = opsd_kernels.jsd_loss(
        inputs[0], teacher.view(b, t, -1), inputs[1], token_weight=token_weight, reduction=reduction,
        workspace_bytes=SMALL, **options,
    )  # fmt: skip
    grads = torch.autograd.grad((got * upstream).sum(), inputs[: 1 if frozen else 2])
    assert relative(got, expected) < 1e-12
    for mine, want in zip(grads, expected_grads, strict=False):
        assert relative(mine, want) < 1e-12


def test_sequence_ids_may_be_any_integers():
    student, teacher, weight = problem(7, 8, 50)
    ids = torch.tensor([9, -4, 9, 9, 700, -4, 9])
    losses = opsd_kernels.jsd_loss(student, teacher, weight, reduction="none")
    got = opsd_kernels.jsd_loss(student, teacher, weight, reduction="sequence_mean", sequence_ids=ids)
    assert got.item() == pytest.approx(
        torch.stack([losses[ids == i].mean() for i in (9, -4, 700)]).mean().item(), rel=1e-12
    )


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_denominator_makes_micro_batches_add_up(reduction, as_tensor):
    student, teacher, weight = problem(12, 8, 50)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    whole, parts = [leaf(student), leaf(weight)], [leaf(student), leaf(weight)]
    opsd_kernels.jsd_loss(whole[0], teacher, whole[1], reduction=reduction, sequence_ids=ids).backward()
    count = 12 if reduction == "mean" else 4
    for rows in (slice(0, 5), slice(5, 12)):
        opsd_kernels.jsd_loss(
            parts[0][rows], teacher[rows], parts[1], reduction=reduction, sequence_ids=ids[rows],
            denominator=torch.tensor(count) if as_tensor else count,
        ).backward()  # fmt: skip
    for one, many in zip(whole, parts, strict=True):
        assert relative(many.grad, one.grad) < 1e-12


def test_weights_from_the_calls_own_statistics_need_no_second_pass():
    student, teacher, weight = problem(30, 8, 60)
    mine = leaf(student)
    losses, stats = opsd_kernels.jsd_loss(mine, teacher, weight, reduction="none", return_stats=True)
    chosen = (stats.divergence >= stats.divergence.quantile(0.8)).double()
    (losses * chosen).sum().backward()
    exact = leaf(student)
    (reference.jsd_loss(exact, teacher, weight, Objective()) * chosen).sum().backward()
    assert relative(mine.grad, exact.grad) < 1e-12


def test_gradcheck():
    student, teacher, weight = problem(4, 5, 11, gap=1.0)
    bias = torch.randn(11, dtype=torch.float64)
    inputs = [leaf(t) for t in (student, weight, bias)]
    for options in (
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 1.4},
        {"beta": 0.4, "softcap": 4.0, "reduction": "none"},
        {"beta": 0.5, "top_k": 3, "tail_bucket": True},
    ):
        assert torch.autograd.gradcheck(
            # a head of its own for the teacher: moving a shared one moves the teacher too, which is no gradient
            lambda x, w, b, options=options: opsd_kernels.jsd_loss(
                x, teacher, w, bias=b, teacher_weight=weight, teacher_bias=bias, **options
            ),
            inputs,
        )


@pytest.mark.parametrize("vocab", [32_003, 50_257])
@pytest.mark.parametrize("gap", [1.0, 0.05, 1e-3])
def test_row_pass_is_accurate_on_peaked_logits_and_small_gaps(vocab, gap):
    g = torch.Generator().manual_seed(3)
    teacher = 4 * torch.randn(32, vocab, generator=g)
    student = teacher + gap * torch.randn(32, vocab, generator=g)
    teacher[:, :7] = -math.inf
    student[:, 3:9] = -math.inf
    for beta, clip in itertools.product([0.0, 0.5, 1.0], [None, 0.05]):
        finite = slice(9, None) if beta != 0.5 and clip is None else slice(None)
        exact = leaf(student[:, finite].double())
        expected = reference.divergence(
            exact, teacher[:, finite].double(), Objective.checked(beta=beta, entry_clip=clip)
        )
        (dz,) = torch.autograd.grad(expected.sum(), exact)
        mine = leaf(student[:, finite])
        got = opsd_kernels.jsd_loss_from_logits(mine, teacher[:, finite], beta=beta, entry_clip=clip, reduction="none")
        (got_dz,) = torch.autograd.grad(got.sum(), mine)
        assert row_rms(got_dz, dz) < 1e-5
        assert row_rms(got.unsqueeze(-1), expected.unsqueeze(-1)) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    "transform",
    [{"temperature": 0.7}, {"softcap": 30.0, "temperature": 1.1}, {"logit_scale": 1.3, "teacher_logit_scale": 1.2999}],
    ids=str,
)
def test_row_pass_is_accurate_through_scale_cap_and_temperature(transform, backend):
    g = torch.Generator().manual_seed(4)
    teacher = 4 * torch.randn(32, 5003, generator=g)
    student = teacher + 1e-3 * torch.randn(32, 5003, generator=g)
    for beta, support in itertools.product([0.0, 0.5, 1.0], [{}, {"top_k": 50, "tail_bucket": True}]):
        options = {"beta": beta, **transform, **support}
        exact, mine = leaf(student.double()), leaf(student)
        expected = reference.divergence(exact, teacher.double(), Objective.checked(**options))
        got = opsd_kernels.jsd_loss_from_logits(mine, teacher, reduction="none", backend=backend, **options)
        (want_dz,), (dz,) = (torch.autograd.grad(v.sum(), x) for v, x in ((expected, exact), (got, mine)))
        assert row_rms(dz, want_dz) < 1e-5
        assert row_rms(got.unsqueeze(-1), expected.unsqueeze(-1)) < 1e-4


def test_float32_call_is_as_accurate_as_the_dense_computation():
    student, teacher, weight = problem(32, 64, 4001, gap=0.05)
    for beta in (0.0, 0.5, 1.0):
        grads = []
        for dtype in (torch.float64, torch.float32):
            x = leaf(student.to(dtype))
            reference.jsd_loss(x, teacher.to(dtype), weight.to(dtype), Objective(beta=beta)).sum().backward()
            grads.append(x.grad)
        mine = leaf(student.float())
        opsd_kernels.jsd_loss(mine, teacher.float(), weight.float(), beta=beta, reduction="sum").backward()
        assert row_rms(mine.grad, grads[0]) <= 2 * row_rms(grads[1], grads[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_rounding_of_dz(dtype, autocast):
    student, teacher, weight = (t.to(dtype) for t in problem(48, 64, 4001, gap=0.2))
    logits = leaf(student.double() @ weight.double().T)
    losses = reference.divergence(logits, teacher.double() @ weight.double().T, Objective())
    (dz,) = torch.autograd.grad(losses.sum(), logits)
    exact, rounded = dz @ weight.double(), dz.to(dtype).double() @ weight.double()
    inputs = [leaf(t.float() if autocast else t) for t in (student, weight)]
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = opsd_kernels.jsd_loss(inputs[0], teacher, inputs[1], reduction="none")
        loss.sum().backward()  # backward under autocast must not change the accumulation
    assert loss.dtype == torch.float32
    assert all(t.grad.dtype == t.dtype for t in inputs)
    rounding = row_rms(rounded, exact)
    output = row_rms(exact.to(inputs[0].dtype), exact)
    assert row_rms(inputs[0].grad, exact) <= 2 * (rounding + output)
    weight_gradient = dz.to(dtype).double().T @ student.double()
    assert relative(inputs[1].grad, dz.T @ student.double()) <= 2 * relative(
        weight_gradient.to(inputs[1].dtype), dz.T @ student.double()
    )


NO, YES = -math.inf, 0.0


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.thinned(2)
def test_every_infinite_case(beta, clip):
    """Rows: mass missing in the student, in the teacher, in both, everywhere in one or both; and a plain row."""
    base_s, base_t = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([0.1, -0.5, 1.0, 0.9])
    holes = torch.tensor([
        [[NO, YES, YES, YES], [YES] * 4],
        [[YES] * 4, [NO, YES, YES, YES]],
        [[NO, YES, YES, YES], [NO, YES, YES, YES]],
        [[NO, YES, YES, NO], [YES, NO, YES, NO]],
        [[NO] * 4, [YES] * 4],
        [[YES] * 4, [NO] * 4],
        [[NO] * 4, [NO] * 4],
        [[YES] * 4, [YES] * 4],
    ])  # fmt: skip
    student, teacher = leaf(base_s + holes[:, 0]), base_t + holes[:, 1]
    losses, stats = opsd_kernels.jsd_loss_from_logits(
        student, teacher, beta=beta, entry_clip=clip, reduction="none", return_stats=True
    )
    (dz,) = torch.autograd.grad(losses.sum(), student)
    exact = leaf(student.double())
    expected = reference.divergence(exact, teacher.double(), Objective.checked(beta=beta, entry_clip=clip))
    (expected_dz,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.allclose(losses.double(), expected, atol=1e-6)
    assert torch.allclose(dz.double(), expected_dz, atol=1e-6)
    assert not any(getattr(stats, f).isnan().any() for f in ("divergence", "student_entropy", "teacher_entropy"))
    infinite = {0.0: [0, 3], 0.5: [], 1.0: [1, 3]}[beta]
    assert (stats.divergence == math.inf).nonzero().flatten().tolist() == infinite
    assert losses[4:7].eq(0).all()
    assert dz[4:7].eq(0).all()
    if clip is None:
        assert (losses == math.inf).nonzero().flatten().tolist() == infinite
        assert dz[infinite].eq(0).all()
    else:
        assert losses.isfinite().all()
        assert stats.entry_clipped[infinite].all()


def test_underflowing_probabilities_are_no_infinity():
    student, teacher = leaf(torch.tensor([[0.0, -400.0, -1.0]])), torch.tensor([[-400.0, 0.0, -1.0]])
    for beta in (0.0, 0.5, 1.0):
        exact = leaf(student.double())
        expected = reference.divergence(exact, teacher.double(), Objective(beta=beta))
        got = opsd_kernels.jsd_loss_from_logits(student, teacher, beta=beta)
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)
        (mine,), (want,) = torch.autograd.grad(got, student), torch.autograd.grad(expected.sum(), exact)
        assert torch.allclose(mine.double(), want, rtol=1e-4, atol=1e-30)


def test_a_nan_logit_is_not_hidden():
    student, teacher, weight = problem(3, 4, 9)
    student[1, 0] = math.nan
    losses = opsd_kernels.jsd_loss(student, teacher, weight, reduction="none", entry_clip=0.05, token_clip=1.0)
    assert losses.isnan().tolist() == [False, True, False]


def test_a_zero_weight_silences_an_infinite_token():
    student = torch.tensor([[-math.inf, 0.0], [0.5, 0.0]], requires_grad=True)
    loss = opsd_kernels.jsd_loss_from_logits(
        student, torch.zeros(2, 2), beta=0.0, token_weight=torch.tensor([0.0, 1.0]), reduction="sum"
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_token(count, reduction, trainable):
    student, teacher, weight = problem(count, 6, 1 + 10 * count)
    inputs = [leaf(student), leaf(weight).requires_grad_(trainable)]
    loss = opsd_kernels.jsd_loss(
        inputs[0], teacher, inputs[1], reduction=reduction, sequence_ids=torch.zeros(count, dtype=torch.int64)
    )
    loss.sum().backward()
    assert loss.shape == ((count,) if reduction == "none" else ())
    assert loss.isfinite().all()
    assert all(t.grad.isfinite().all() and t.grad.shape == t.shape for t in inputs[: 1 + trainable])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
def test_everything_masked_is_zero_with_zero_gradients(reduction, trainable):
    student, teacher, weight = problem(6, 4, 9)
    student[0] = math.nan  # what is not counted is not looked at
    inputs = [leaf(student.view(2, 3, 4)), leaf(weight).requires_grad_(trainable)]
    loss, stats = opsd_kernels.jsd_loss(
        inputs[0], teacher.view(2, 3, 4), inputs[1], mask=torch.zeros(2, 3, dtype=torch.bool), reduction=reduction,
        return_stats=True,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.eq(0).all()
    assert all(t.grad.eq(0).all() for t in inputs[: 1 + trainable])
    assert stats.divergence.eq(0).all()
    assert stats.divergence.shape == (2, 3)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_agrees(reduction, trainable):
    student, teacher, weight = problem(9, 4, 33)
    inputs = [leaf(student), leaf(weight).requires_grad_(trainable)]
    loss = opsd_kernels.jsd_loss(inputs[0], teacher, inputs[1], reduction=reduction).sum()
    wanted = inputs[: 1 + trainable]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # what the caller does to a gradient must not reach the saved one
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


def test_valid_vocab_leaves_the_padding_out():
    student, teacher, weight = problem(5, 4, 20)
    _, _, teacher_weight = problem(5, 4, 24, seed=5)
    weight[17:] = 1e4  # would dominate
    inputs = [leaf(student), leaf(weight)]
    got = opsd_kernels.jsd_loss(inputs[0], teacher, inputs[1], teacher_weight=teacher_weight, valid_vocab=17)
    got.backward()
    want = opsd_kernels.jsd_loss(student, teacher, weight[:17], teacher_weight=teacher_weight[:17])
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert inputs[1].grad[17:].eq(0).all()
    assert inputs[1].grad[:17].ne(0).any()


def test_the_teacher_receives_no_gradient():
    student, teacher, weight = problem(5, 4, 20)
    inputs = [leaf(student), leaf(teacher), leaf(weight)]
    opsd_kernels.jsd_loss(*inputs, teacher_weight=leaf(weight)).backward()
    assert inputs[1].grad is None
    assert inputs[2].grad is not None


def test_no_gradient_is_computed_under_no_grad():
    student, teacher, weight = problem(5, 4, 20)
    with torch.no_grad():
        loss = opsd_kernels.jsd_loss(leaf(student), teacher, leaf(weight))
    assert not loss.requires_grad


def test_torch_func_is_refused():
    student, teacher, weight = problem(5, 4, 20)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not supported"):
        torch.func.grad(lambda x: opsd_kernels.jsd_loss(x, teacher, weight))(student)


def test_second_derivatives_are_refused():
    student, teacher, weight = problem(5, 4, 20)
    x = leaf(student)
    loss = opsd_kernels.jsd_loss(x, teacher, weight) ** 2  # its upstream gradient depends on x
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported: the losses differentiate once"):
        g.sum().backward()


@pytest.mark.parametrize("trainable", [False, True])
def test_second_derivatives_of_unreduced_losses_are_refused(trainable):
    student, teacher, weight = problem(5, 4, 20)
    x, z = leaf(student), leaf(student @ weight.T)
    for losses, wanted in [
        (opsd_kernels.jsd_loss(x, teacher, leaf(weight).requires_grad_(trainable), reduction="none"), x),
        (opsd_kernels.jsd_loss_from_logits(z, teacher @ weight.T, reduction="none"), z),
    ]:
        (g,) = torch.autograd.grad(losses.sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate once"):
            torch.autograd.grad(g.sum(), wanted)


def test_forward_mode_derivatives_are_refused():
    student, teacher, weight = problem(5, 4, 20)
    ids = torch.arange(15).view(5, 3)
    calls = [
        lambda x, w, b: opsd_kernels.jsd_loss(x, teacher, w, bias=b),
        lambda x, w, b: opsd_kernels.token_logprobs(x, w, ids[:, 0], bias=b),
        lambda x, w, b: opsd_kernels.jsd_loss_from_top_k(x, w, ids, -1.0 - ids.double(), bias=b),
        lambda x, w, b: opsd_kernels.jsd_loss_from_logits(x @ w.T + b, teacher @ weight.T),
    ]
    with forward_ad.dual_level():
        for call, dual in itertools.product(calls, range(3)):
            inputs = [student, weight, torch.zeros(20, dtype=torch.float64)]
            call(*inputs)  # a level alone is no derivative
            inputs[dual] = forward_ad.make_dual(inputs[dual], inputs[dual] + 1)
            with pytest.raises(RuntimeError, match=r"forward-mode derivatives .* are not supported"):
                call(*inputs)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "sum", "none"])
def test_a_single_token_needs_no_leading_dimension(reduction, trainable):
    student, teacher, weight = problem(1, 8, 30, dtype=torch.float32)
    per_token = {"target_ids": torch.tensor([7]), "token_weight": torch.tensor([0.7])}
    if reduction == "sequence_mean":
        per_token["sequence_ids"] = torch.tensor([3])
    for mask in (None, torch.tensor([True]), torch.tensor([False])):
        per_token["mask"] = mask
        results = []
        for lead in ((), (1,)):
            given = {name: None if value is None else value.reshape(lead) for name, value in per_token.items()}
            options = {"reduction": reduction, "return_stats": True, "top_k": 4, "tail_bucket": True, **given}
            x, w = leaf(student.reshape(*lead, 8)), leaf(weight).requires_grad_(trainable)
            z = leaf(student.reshape(*lead, 8) @ weight.T)
            loss, stats = opsd_kernels.jsd_loss(x, teacher.reshape(*lead, 8), w, **options)
            from_logits, same = opsd_kernels.jsd_loss_from_logits(z, teacher.reshape(*lead, 8) @ weight.T, **options)
            expected = lead if reduction == "none" else ()
            assert loss.shape == from_logits.shape == expected
            both = [value for s in (stats, same) for value in vars(s).values() if value is not None]
            assert all(value.shape == lead for value in both)
            grads = torch.autograd.grad(loss.sum(), [x, w] if trainable else [x])
            assert grads[0].shape == x.shape
            (dz,) = torch.autograd.grad(from_logits.sum(), z)
            results.append([loss, from_logits, *both, *grads, dz])
        for mine, batched in zip(*results, strict=True):
            assert torch.equal(mine.reshape(-1), batched.reshape(-1))


@pytest.mark.parametrize("support", [{}, {"top_k": 5}, {"top_k": 5, "tail_bucket": True}], ids=str)
def test_statistics(support):
    student, teacher, weight = problem(40, 8, 70, gap=2.0)
    targets, mask = torch.randint(70, (40,)), torch.arange(40) % 3 > 0
    options = {"beta": 0.0, "temperature": 1.2, "entry_clip": 0.1, "token_clip": 0.2, **support}
    loss, stats = opsd_kernels.jsd_loss(
        student, teacher, weight, mask=mask, target_ids=targets, reduction="none", return_stats=True,
        workspace_bytes=SMALL, **options,
    )  # fmt: skip
    log_s, log_t = ((h @ weight.T / 1.2).log_softmax(-1) for h in (student, teacher))

    def check(got, want):
        assert torch.allclose(got, torch.where(mask, want, 0.0), rtol=1e-10, atol=1e-12)

    check(stats.divergence, (log_t.exp() * (log_t - log_s)).sum(-1))
    check(stats.student_entropy, -(log_s.exp() * log_s).sum(-1))
    check(stats.teacher_entropy, -(log_t.exp() * log_t).sum(-1))
    check(stats.student_logprob, log_s.gather(-1, targets[:, None])[:, 0])
    check(stats.teacher_logprob, log_t.gather(-1, targets[:, None])[:, 0])

    def with_clips(**clips):
        exact = {**options, "entry_clip": None, "token_clip": None, **clips}
        return reference.jsd_loss(student, teacher, weight, Objective.checked(**exact))

    plain, entry, both = with_clips(), with_clips(entry_clip=0.1), with_clips(entry_clip=0.1, token_clip=0.2)
    check(loss, both)
    check(stats.clipped_amount, plain - both)
    assert torch.equal(stats.token_clipped, mask & (entry > 0.2))
    assert torch.equal(stats.entry_clipped, mask & (plain - entry > 1e-12))
    assert stats.token_clipped.any()
    assert stats.entry_clipped.any()
    assert not stats.entry_clipped.all()


def test_logits_need_not_be_contiguous():
    student, teacher, weight = problem(10, 8, 30)
    wide = torch.zeros(10, 16, dtype=torch.float64)
    wide[:, ::2] = student
    got = opsd_kernels.jsd_loss(wide[:, ::2], teacher.T.contiguous().T, weight.T.contiguous().T)
    assert got.item() == pytest.approx(opsd_kernels.jsd_loss(student, teacher, weight).item(), rel=1e-12)


def test_what_stands_in_token_weight_where_nothing_counts_does_not_matter():
    student, teacher, weight = problem(4, 4, 20)
    mask = torch.tensor([True, False, True, True])
    odd = torch.tensor([1.0, math.nan, 0.5, 2.0], dtype=torch.float64)
    plain = odd.nan_to_num(7.0)
    for reduction in ("mean", "none"):
        for trainable in (False, True):
            results = []
            for token_weight in (odd, plain):
                inputs = [leaf(student), leaf(weight).requires_grad_(trainable)]
                loss = opsd_kernels.jsd_loss(
                    inputs[0], teacher, inputs[1], mask=mask, token_weight=token_weight, reduction=reduction
                )
                results.append([loss, *torch.autograd.grad(loss.sum(), inputs[: 1 + trainable])])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("weight_size", [1 / 4096, 1e5])
def test_float16_gradients_survive_small_and_large_weights(weight_size):
    student, teacher, weight = (t.half() for t in problem(32, 32, 2001, gap=0.2))
    inputs = [leaf(student), leaf(weight)]
    token_weight = torch.full((32,), weight_size)
    loss = opsd_kernels.jsd_loss(inputs[0], teacher, inputs[1], token_weight=token_weight, reduction="sum")
    (loss / weight_size).backward()  # as a gradient scaler would; it comes too late for a dz that did not fit
    exact = [leaf(student.double()), leaf(weight.double())]
    reference.jsd_loss(exact[0], teacher.double(), exact[1], Objective()).sum().backward()
    for mine, want in zip(inputs, exact, strict=True):
        assert relative(mine.grad, want.grad) < 2e-3


def test_the_divergence_statistic_is_that_of_the_vocabulary_even_where_the_support_is_empty():
    student = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0]])
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    _, whole = opsd_kernels.jsd_loss_from_logits(student, teacher, return_stats=True)
    loss, stats = opsd_kernels.jsd_loss_from_logits(student, teacher, top_k=2, return_stats=True)
    assert loss == 0
    assert stats.divergence.item() == pytest.approx(whole.divergence.item())
    assert stats.divergence > 0.5


def test_a_denominator_of_another_dtype_does_not_change_the_losses():
    student, teacher, weight = (t.float() for t in problem(4, 4, 20))
    loss = opsd_kernels.jsd_loss(student, teacher, weight, denominator=torch.tensor(7.0, dtype=torch.float64))
    assert loss.dtype == torch.float32


def test_a_nan_is_not_silenced_by_a_zero_weight():
    student, teacher, weight = problem(3, 4, 9)
    student[1] = math.nan
    loss = opsd_kernels.jsd_loss(student, teacher, weight, token_weight=torch.tensor([1.0, 0.0, 1.0]).double())
    assert loss.isnan()  # its gradient is NaN too: a check of the loss must see it


@pytest.mark.parametrize("beta", [1e-9, 1e-6, 1 - 1e-6])
def test_the_jsd_is_finite_next_to_its_ends(beta):
    student, teacher = torch.tensor([[0.0, 40.0, -1.0]]), torch.tensor([[40.0, 0.0, -1.0]])
    for backend in ("torch", "auto"):
        got = opsd_kernels.jsd_loss_from_logits(student, teacher, beta=beta, backend=backend)
        want = reference.divergence(student.double(), teacher.double(), Objective(beta=beta))
        assert got.item() == pytest.approx(want.item(), rel=2e-2, abs=1e-7)


def test_naming_the_same_head_twice_still_projects_it_once():
    student, teacher, weight = problem(20, 8, 50)
    bias = torch.linspace(-1, 1, 50, dtype=torch.float64)
    got = opsd_kernels.jsd_loss(student, teacher, weight, bias=bias, teacher_weight=weight)
    want = opsd_kernels.jsd_loss(student, teacher, weight, bias=bias, teacher_weight=weight.clone())
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_a_teacher_from_inference_mode_will_do():
    student, teacher, weight = problem(5, 4, 20)
    with torch.inference_mode():
        constant = teacher * 1.0
    for reduction in ("mean", "none"):
        inputs = [leaf(student), leaf(weight)]
        opsd_kernels.jsd_loss(inputs[0], constant, inputs[1], reduction=reduction).sum().backward()
        assert all(t.grad.ne(0).any() for t in inputs)


def test_help_explains_every_statistic():
    lines = inspect.getdoc(opsd_kernels.TokenStats).partition("Attributes:\n")[2].splitlines()
    explained = [line.split(":")[0].strip() for line in lines if line.startswith("    ") and line[4] != " "]
    assert explained == [field.name for field in dataclasses.fields(opsd_kernels.TokenStats)]
