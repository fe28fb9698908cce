"""Two gloo processes against one: a vocabulary split over ranks, and a sharded weight."""

import os
import tempfile
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _helpers import leaf, problem, relative

import opsd_kernels

OPTIONS = [
    {"beta": 0.5},
    {"beta": 0.0, "entry_clip": 0.02, "token_clip": 0.05},
    {"beta": 1.0, "softcap": 6.0, "temperature": 1.3, "reduction": "none"},
    {"beta": 0.3, "valid_vocab": 55, "reduction": "sequence_mean"},
    {"beta": 0.5, "valid_vocab": 20},  # nothing left for the second rank
    {"beta": 0.5, "top_k": 5, "softcap": 6.0},
    {"beta": 0.0, "top_k": 30, "top_k_from": "student", "tail_bucket": True, "token_clip": 0.05},  # wider than a rank
    {"beta": 1.0, "top_k": 7, "tail_bucket": True, "entry_clip": 0.02, "temperature": 1.3, "reduction": "none"},
    {"beta": 0.5, "top_k": 20, "tail_bucket": True, "valid_vocab": 20},  # no tail
    {"beta": 0.5, "gradient_filter": 1e-12},  # drops nothing, so that the order of summing is all that differs
]


def run(rank, world, path, check):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    check(rank)
    dist.barrier()  # neither leaves while the other may still be connecting
    os._exit(0)  # gloo's threads can abort an interpreter that is shutting down; a failed check has raised by here


def in_two_processes(check):
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(run, (2, f"{directory}/rendezvous", check), nprocs=2)


def check_vocab_parallel(rank):
    student, teacher, weight = problem(14, 8, 61)
    bias = torch.linspace(-1, 1, 61, dtype=torch.float64)
    ids, mask = torch.arange(14) // 5, torch.arange(14) % 4 > 0
    targets = torch.arange(14)
    split = slice(0, 40) if rank == 0 else slice(40, 61)  # uneven
    for options in OPTIONS:
        for trainable in (False, True):
            results = []
            for rows, group in ((slice(None), None), (split, dist.group.WORLD)):
                x = leaf(student)
                head = [leaf(weight[rows]).requires_grad_(trainable), leaf(bias[rows]).requires_grad_(trainable)]
                budget = None if group is None else 40_000 + rank * 10_000  # several chunks; ranks must agree on them
                loss, stats = opsd_kernels.jsd_loss(
                    x, teacher, head[0], bias=head[1], process_group=group, sequence_ids=ids, mask=mask,
                    target_ids=targets, return_stats=True, workspace_bytes=budget, **options,
                )  # fmt: skip
                upstream = torch.linspace(1, 2, 14, dtype=torch.float64) if loss.ndim else torch.tensor(2.0)
                grads = torch.autograd.grad((loss * upstream).sum(), [x, *(head if trainable else [])])
                logprobs, entropy = opsd_kernels.token_logprobs(
                    x, head[0], targets, bias=head[1], process_group=group, return_entropy=True, mask=mask,
                    valid_vocab=options.get("valid_vocab"),
                )  # fmt: skip
                logprob_grads = torch.autograd.grad(logprobs.sum(), [x, *(head if trainable else [])])
                table = [value.double() for value in vars(stats).values() if value is not None]
                results.append(([loss, logprobs, entropy, *table], grads, logprob_grads))
            (values, *whole), (split_values, *part) = results
            for got, want in zip(split_values, values, strict=True):
                assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), options
            for got, want in zip(part, whole, strict=True):
                assert relative(got[0], want[0]) < 1e-10, options  # dX is complete on every rank
                for mine, all_rows in zip(got[1:], want[1:], strict=True):
                    assert torch.allclose(mine, all_rows[split], rtol=1e-9, atol=1e-13), options


def check_stored_top_k(rank):
    """What a split teacher stores, and a split student's loss against it."""
    student, teacher, weight = problem(14, 8, 61, gap=1.0)
    mask, targets = torch.arange(14) % 4 > 0, torch.arange(14)
    for k, valid in ((3, 61), (30, 61), (8, 20)):
        options = {"mask": mask, "temperature": 1.2, "valid_vocab": valid}
        results = []
        for rows, group in ((slice(None), None), (slice(0, 40) if rank == 0 else slice(40, 61), dist.group.WORLD)):
            options["process_group"] = group
            logprobs, ids, log_z = opsd_kernels.top_k_logprobs(teacher, weight[rows], k, **options)
            x, head = leaf(student), leaf(weight[rows])
            loss, stats = opsd_kernels.jsd_loss_from_top_k(
                x, head, ids, logprobs, entry_clip=0.1, target_ids=targets, return_stats=True, **options
            )
            dx, dw = torch.autograd.grad(loss, [x, head])
            table = [torch.nan_to_num(value.double()) for value in vars(stats).values() if value is not None]
            results.append(([logprobs, ids, log_z, loss, dx, *table], dw, rows))
        (values, dw, _), (split_values, part, rows) = results
        for got, want in zip(split_values, values, strict=True):
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), (k, valid)
        assert torch.allclose(part, dw[rows], rtol=1e-9, atol=1e-13), (k, valid)


def check_ties_and_masked_columns(rank):
    """Every rank takes the same tokens among equals, and none twice where fewer than k have any probability."""
    teacher, weight = torch.zeros(5, 4, dtype=torch.float64), torch.zeros(12, 4, dtype=torch.float64)
    bias = torch.full((12,), -torch.inf, dtype=torch.float64)
    bias[[2, 9]] = 0.0
    split = slice(0, 7) if rank == 0 else slice(7, 12)
    group = dist.group.WORLD
    logprobs, ids, _ = opsd_kernels.top_k_logprobs(teacher, weight[split], 6, bias=bias[split], process_group=group)
    assert (ids[:, :2].sort(-1).values == torch.tensor([2, 9])).all()
    assert (logprobs[:, 2:] == -torch.inf).all()
    assert all(len(set(row.tolist())) == 6 for row in ids)
    everyone = [torch.empty_like(ids) for _ in range(2)]
    dist.all_gather(everyone, opsd_kernels.top_k_logprobs(teacher, weight[split], 6, process_group=group)[1])
    assert torch.equal(*everyone)


def check_the_filters_bound(rank):
    """It holds, is the same on every rank, and something was dropped."""
    student, teacher, weight = problem(14, 8, 61)
    split = slice(0, 40) if rank == 0 else slice(40, 61)
    exact, x = leaf(student), leaf(student)
    opsd_kernels.jsd_loss(exact, teacher, weight, reduction="sum").backward()
    loss, stats = opsd_kernels.jsd_loss(
        x, teacher, weight[split], reduction="sum", gradient_filter=1e-2, return_stats=True,
        process_group=dist.group.WORLD,
    )  # fmt: skip
    loss.backward()
    lost = (x.grad - exact.grad).norm(dim=-1)
    assert lost.max() > 1e-6
    assert (lost <= stats.gradient_dropped * (1 + 1e-9)).all()
    everyone = [torch.empty_like(stats.gradient_dropped) for _ in range(2)]
    dist.all_gather(everyone, stats.gradient_dropped)
    assert torch.equal(*everyone)


def check_refusals(rank):
    student, teacher, weight = problem(4, 8, 10)
    for options, word in [({"top_k": 21}, "top_k"), ({"backend": "native"}, "backend"),
                          ({"valid_vocab": 21}, "valid_vocab")]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            opsd_kernels.jsd_loss(student.float(), teacher, weight, process_group=dist.group.WORLD, **options)
    with pytest.raises(ValueError, match="k must be at most the 20 tokens"):
        opsd_kernels.top_k_logprobs(student, weight, 21, process_group=dist.group.WORLD)


def check_sharded_weight(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = problem(6, 8, 33)[2]
    mesh = init_device_mesh("cpu", (2,))
    plain = leaf(weight)
    inputs = [problem(6, 8, 33, seed=seed)[:2] for seed in (10, 11)]  # other data on each rank
    torch.stack([opsd_kernels.jsd_loss(s, t, plain) for s, t in inputs]).mean().backward()
    x, sharded = leaf(inputs[rank][0]), distribute_tensor(weight.clone(), mesh, [Shard(0)]).requires_grad_()
    loss = opsd_kernels.jsd_loss(x, inputs[rank][1], sharded)
    loss.backward()
    assert relative(loss, opsd_kernels.jsd_loss(*inputs[rank], weight)) < 1e-12
    assert relative(sharded.grad.full_tensor(), plain.grad) < 1e-12  # the mean over ranks, as in data parallelism
    tokens = distribute_tensor(inputs[0][0].clone(), mesh, [Shard(0)])  # of which nobody knows what to gather
    with pytest.raises(TypeError, match="student_hidden must be a plain tensor, got a DTensor"):
        opsd_kernels.jsd_loss(tokens, inputs[0][1], weight)
    with pytest.raises(TypeError, match="teacher_hidden must be a plain tensor, got a DTensor"):
        opsd_kernels.jsd_loss(inputs[0][0], tokens, sharded)


def check_streams_share_one_gathering(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    student, teacher, weight = problem(6, 8, 33)
    other, base = problem(6, 8, 33, seed=1)[:2]
    sharded = distribute_tensor(weight.clone(), init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    found, gather = [], DTensor.full_tensor
    with mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=gather) as gathered:
        for head in (leaf(weight), sharded):
            full, part, start = (opsd_kernels.Stream(hidden, head) for hidden in (teacher, other, base))
            target = opsd_kernels.Target(linear=[(1, start)], residual=[(1, full), (-1, part)], tanh=1.0, centre=True)
            losses, _ = opsd_kernels.divergence(opsd_kernels.Stream(student, head), target)
            losses.sum().backward()
            found.append((losses, head.grad))
    assert gathered.call_count == 1
    assert relative(found[1][0], found[0][0]) < 1e-12
    assert relative(found[1][1].full_tensor(), found[0][1]) < 1e-12


@pytest.mark.parametrize(
    "check",
    [
        check_vocab_parallel,
        check_stored_top_k,
        check_ties_and_masked_columns,
        check_the_filters_bound,
        check_refusals,
        check_sharded_weight,
        check_streams_share_one_gathering,
    ],
)
def test_in_two_processes(check):
    in_two_processes(check)
