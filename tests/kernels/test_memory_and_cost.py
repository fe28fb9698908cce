"""What the fused loss allocates and computes: the reason for it to exist."""

import itertools
import threading
from unittest import mock

import pytest
import torch
from _helpers import allocations, leaf, peak, problem, product_flops

import opsd_kernels
from opsd_kernels import backends, fused_linear, native, workspace
from opsd_kernels.workspace import budget_bytes, plan_chunks

N, H, V = 512, 32, 4096
BUDGET = 2 << 20  # a quarter of one (N, V) float32 matrix


def run(
    *, dtype=torch.float32, trainable=False, reduction="mean", call=opsd_kernels.jsd_loss, budget=BUDGET, **options
):
    student, teacher, weight = problem(N, H, V, dtype=dtype)
    inputs = [leaf(student), teacher, leaf(weight).requires_grad_(trainable)]
    upstream = torch.ones(N) if reduction == "none" else torch.tensor(1.0)

    def step():
        loss = call(*inputs, reduction=reduction, workspace_bytes=budget, **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward(upstream)
        inputs[0].grad = inputs[2].grad = None

    return step


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0}, {"beta": 1.0, "entry_clip": 0.05}, {"reduction": "none"}, {"return_stats": True, "softcap": 9.0},
        {"top_k": 8, "tail_bucket": True, "return_stats": True},
        {"top_k": 600, "tail_bucket": True, "backend": "torch"}, {"top_k": 600, "entry_clip": 0.05},
        {"dtype": torch.bfloat16, "entry_clip": 0.05}, {"dtype": torch.bfloat16, "top_k": 8, "tail_bucket": True},
        {"gradient_filter": 1e-30, "return_stats": True}, {"gradient_filter": 1e-5, "dtype": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_of_the_size_of_the_logits_ever_exists(options, trainable):
    sizes = allocations(run(trainable=trainable, **options))
    assert max(sizes) < N * V * 2  # bytes of the logits even in half precision
    assert max(sizes) >= N * H * 4  # the recorder sees what there is: dX at least
    weight_gradient = 2 * V * H * 4 if trainable else 0
    assert peak(sizes) <= BUDGET + weight_gradient + 2 * N * H * 4 + 64 * N  # 64: the table and per-token vectors


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_mixture_of_streams_keeps_within_the_budget_and_costs_a_product_for_each_sum(backend):
    student, teacher, weight = problem(N, H, V, dtype=torch.float32)
    other, base = problem(N, H, V, dtype=torch.float32, seed=1)[:2]
    x = leaf(student)
    streams = [opsd_kernels.Stream(hidden, weight) for hidden in (teacher, other, base)]
    full, part, base = streams
    targets = (
        opsd_kernels.Target(linear=[(1, base)], residual=[(1, full), (-1, part)], tanh=10.0, centre=True),
        opsd_kernels.Target(linear=[(1, part)], residual=[(1, full), (-1, part)], clip=5.0, scale=0.6),
    )
    for target in targets:

        def step(target=target):
            losses, _ = opsd_kernels.divergence(
                opsd_kernels.Stream(x, weight), target, backend=backend, workspace_bytes=BUDGET
            )
            losses.sum().backward()
            x.grad = None

        workspace.release()
        sizes = allocations(step)
        assert max(sizes) < N * V * 2
        assert peak(sizes) <= BUDGET + 4 * N * H * 4 + 128 * N  # dX, its copy, and the two rows of the mixture
        with mock.patch.object(native, "outruns_torch", return_value=(False, "")):
            assert product_flops(step) == 4 * (2 * N * H * V)  # the student, two sums, dX


@pytest.mark.skipif(not native.available()[0], reason="no native library")
@pytest.mark.parametrize("trainable", [False, True])
def test_the_memory_of_native_products_is_within_the_budget(monkeypatch, trainable):
    monkeypatch.setattr(native, "outruns_torch", lambda: (True, ""))
    n, h, v, budget = 900, 64, 32_000, 100 << 20
    student, teacher, weight = problem(n, h, v, dtype=torch.float32)
    x, head = leaf(student), weight.requires_grad_(trainable)

    def step():
        opsd_kernels.jsd_loss(x, teacher, head, workspace_bytes=budget, backend="native").backward()
        x.grad = head.grad = None

    products = mock.Mock(wraps=native.multiply)
    monkeypatch.setattr(native, "multiply", products)
    workspace.release()
    assert peak(allocations(step)) <= budget + (2 * v * h * 4 if trainable else 0) + 2 * n * h * 4 + 64 * n
    assert products.called
    assert all(call.kwargs["scratch"] is not None for call in products.call_args_list)  # none of their own


@pytest.mark.parametrize("k", [8, 600])
def test_nor_with_a_cached_teacher(k):
    student, teacher, weight = problem(N, H, V, dtype=torch.float32)
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight, k)
    x = leaf(student)

    def step():
        loss, _ = opsd_kernels.jsd_loss_from_top_k(
            x, weight, ids, logprobs, workspace_bytes=BUDGET, return_stats=True, target_ids=ids[:, 0]
        )
        loss.backward()
        x.grad = None

    sizes = allocations(step)
    assert max(sizes) < N * V * 2
    assert peak(sizes) <= BUDGET + 2 * N * H * 4 + 64 * N


def test_the_recorder_sees_dense_logits():
    student, _, weight = problem(N, H, V, dtype=torch.float32)
    assert max(allocations(lambda: (student @ weight.T).softmax(-1))) >= N * V * 4


def test_masked_tokens_cost_nothing():
    few, all_of_them = torch.arange(N) < N // 4, torch.ones(N, dtype=torch.bool)
    assert product_flops(run(mask=few)) * 4 == product_flops(run(mask=all_of_them)) > 0


@pytest.mark.parametrize(
    ("trainable", "reduction", "units"), [(False, "mean", 3), (False, "none", 3), (True, "mean", 4), (True, "none", 6)]
)
def test_flops_in_units_of_one_product(trainable, reduction, units):
    """2 + 1 with a frozen head; one more for dW; only unreduced losses with a trainable head pay the logits twice."""
    assert product_flops(run(trainable=trainable, reduction=reduction)) == units * 2 * N * H * V


def test_token_logprobs_holds_no_logits():
    student, _, weight = problem(N, H, V, dtype=torch.float32)
    x, targets = leaf(student), torch.randint(V, (N,))

    def step():
        opsd_kernels.token_logprobs(x, weight, targets, workspace_bytes=BUDGET, return_entropy=True)[0].sum().backward()
        x.grad = None

    sizes = allocations(step)
    assert max(sizes) < N * V * 2
    assert product_flops(step) == 2 * 2 * N * H * V


def test_any_workspace_gives_the_same_result():
    student, teacher, weight = problem(37, 8, 101)
    results = []
    for budget in (1 << 15, 1 << 17, 1 << 30):
        x = leaf(student)
        loss = opsd_kernels.jsd_loss(x, teacher, weight, workspace_bytes=budget)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for a, b in itertools.combinations(results, 2):
        assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-15) for x, y in zip(a, b, strict=True))


def test_chunks_are_even_and_within_the_budget():
    for tokens, rows in itertools.product([1, 7, 100, 1000], [1, 3, 64, 999]):
        plan = plan_chunks(tokens, 1 << 20, torch.device("cpu"), 4, 1 << 20, (rows << 20) + (80 << 20))
        sizes = [c.stop - c.start for c in plan]
        assert sum(sizes) == tokens
        assert max(sizes) <= rows
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == plan.rows
        assert len(sizes) == plan.count


def test_a_workspace_too_small_for_one_token_is_an_error():
    student, teacher, weight = problem(3, 4, 1000)
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        opsd_kernels.jsd_loss(student, teacher, weight, workspace_bytes=1000)


def test_the_environment_sets_the_default_budget(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("OPSD_WORKSPACE_BYTES", "12345")
    assert budget_bytes(cpu, None) == 12345
    assert budget_bytes(cpu, 99) == 99
    monkeypatch.setenv("OPSD_WORKSPACE_BYTES", "lots")
    with pytest.raises(ValueError, match=r"OPSD_WORKSPACE_BYTES must be .* got 'lots'"):
        budget_bytes(cpu, None)


CPU = torch.device("cpu")
keeps = pytest.mark.skipif(workspace._madvise() is None, reason="the system cannot take memory back")
TWO = [((100, 999), torch.float32), ((100, 999), torch.bfloat16)]


def addresses(budget=BUDGET, buffers=TWO):
    with workspace.workspace(CPU, buffers, budget) as tensors:
        return [tensor.data_ptr() for tensor in tensors]


def test_a_workspace_is_what_was_asked_for():
    with workspace.workspace(CPU, TWO, BUDGET) as tensors:
        for value, (tensor, (shape, dtype)) in enumerate(zip(tensors, TWO, strict=True)):
            assert (tensor.shape, tensor.dtype) == (shape, dtype)
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0
            tensor.fill_(value)
        assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1]]  # apart


@keeps
def test_the_next_call_has_the_last_ones_memory_where_it_fits():
    workspace.release()
    assert addresses() == addresses()
    (kept,) = workspace._kept
    assert addresses(buffers=TWO[:1])[0] == kept.data_ptr()
    with workspace.workspace(CPU, TWO, BUDGET) as mine:
        assert not workspace._kept
        thread = threading.Thread(target=addresses)
        thread.start()
        thread.join()
        assert workspace._kept[0].data_ptr() != mine[0].data_ptr()
    addresses(budget=1000, buffers=[((10, 10), torch.float32)])  # what is kept counts: it is too much for this call
    assert workspace._kept[0].nbytes <= 1000
    with pytest.raises(KeyError), workspace.workspace(CPU, TWO, BUDGET):
        raise KeyError
    assert not workspace._kept


@keeps
def test_a_second_call_allocates_no_workspace():
    step = run()
    first = allocations(step)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    again = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(first) > BUDGET // 2 > max(again)


@keeps
def test_memory_kept_from_inference_mode_serves_training():
    workspace.release()
    student, teacher, weight = problem(N, H, V, dtype=torch.float32)
    with torch.inference_mode():
        expected = opsd_kernels.jsd_loss(student, teacher, weight)
    x = leaf(student)
    loss = opsd_kernels.jsd_loss(x, teacher, weight)
    loss.backward()
    assert loss == expected
    assert x.grad.isfinite().all()


def test_given_logits_have_one_gradient_saved_and_one_returned():
    student, teacher, weight = problem(N, H, V, dtype=torch.float32)
    z_s, z_t = leaf(student @ weight.T), teacher @ weight.T

    def step():
        opsd_kernels.jsd_loss_from_logits(z_s, z_t, workspace_bytes=BUDGET).backward()
        z_s.grad = None

    assert sum(size >= N * V * 4 for size in allocations(step)) == 2


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_at_whole_loads_change_nothing(monkeypatch, backend, dtype):
    """As they do on a GPU, where the vocabulary is no multiple of 8."""
    if backend == "native" and not native.available()[0]:
        pytest.skip("no native library")
    student, teacher, weight = problem(40, 16, 1003, dtype=dtype)

    def run():
        x, head = leaf(student), leaf(weight)
        loss = opsd_kernels.jsd_loss(x, teacher, head, backend=backend, workspace_bytes=200_000)
        loss.backward()
        return loss.detach(), x.grad, head.grad

    want = run()
    strides = set()
    monkeypatch.setattr(fused_linear, "row_stride", lambda width, device: -(-width // 8) * 8)
    row_pass = backends.divergence_rows
    monkeypatch.setattr(
        backends, "divergence_rows", lambda b, s, t, o, **out: (strides.add(s.stride(0)), row_pass(b, s, t, o, **out))
    )
    for mine, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert strides == {1008}
    assert workspace.row_stride(1003, torch.device("cuda")) == 1008
    assert workspace.row_stride(1003, torch.device("cpu")) == 1003
