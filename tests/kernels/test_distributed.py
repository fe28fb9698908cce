"""Two gloo processes against one: a vocabulary split over ranks, and a sharded weight."""

import os
import tempfile

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


def check_refusals(rank):
    student, teacher, weight = problem(4, 8, 10)
    for options, word in [({"top_k": 3}, "top_k"), ({"gradient_filter": 1e-3}, "gradient_filter"),
                          ({"backend": "native"}, "backend"), ({"valid_vocab": 21}, "valid_vocab")]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            opsd_kernels.jsd_loss(student.float(), teacher, weight, process_group=dist.group.WORLD, **options)


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


@pytest.mark.parametrize("check", [check_vocab_parallel, check_refusals, check_sharded_weight])
def test_in_two_processes(check):
    in_two_processes(check)
