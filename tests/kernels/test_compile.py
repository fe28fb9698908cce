"""torch.compile: the losses are opaque operators, so that nothing breaks the graph and nothing is recomputed."""

import pytest
import torch
from _helpers import leaf, problem, relative
from functorch.compile import make_boxed_func
from torch import library
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node

import opsd_kernels
from opsd_kernels.fused_linear import Inputs, Spec
from opsd_kernels.objective import Objective

STUDENT, TEACHER, WEIGHT = problem(12, 8, 50, dtype=torch.float32)
MASK = torch.arange(12).view(2, 6) % 3 > 0
IDS = torch.arange(12).view(2, 6) * 4
TAUGHT, OTHER = (opsd_kernels.Stream(hidden, WEIGHT) for hidden in (TEACHER, STUDENT))


def jsd(x, w, **options):
    return opsd_kernels.jsd_loss(x, TEACHER.view(2, 6, 8), w, **options)


CALLS = {
    "mean": lambda x, w: jsd(x, w),
    "masked": lambda x, w: jsd(x, w, mask=MASK, beta=0.0, entry_clip=0.05),
    "sequence_mean": lambda x, w: jsd(x, w, mask=MASK, reduction="sequence_mean"),
    "weighted by its own statistics": lambda x, w: (lambda loss, stats: (loss * (stats.student_entropy > 0.5)).sum())(
        *jsd(x, w, reduction="none", return_stats=True, target_ids=IDS)
    ),
    "denominator": lambda x, w: jsd(x, w, denominator=torch.tensor(7.0)),
    "top_k": lambda x, w: jsd(x, w, top_k=5, tail_bucket=True),
    "logprobs": lambda x, w: opsd_kernels.token_logprobs(x, w, IDS, mask=MASK).sum(),
    "logits": lambda x, w: opsd_kernels.jsd_loss_from_logits(x @ w.T, TEACHER.view(2, 6, 8) @ WEIGHT.T, mask=MASK),
    "mixture": lambda x, w: opsd_kernels.divergence(
        opsd_kernels.Stream(x.flatten(0, 1), w),
        opsd_kernels.Target(linear=[(0.4, TAUGHT), (0.6, OTHER)], residual=[(1.0, TAUGHT), (-1.0, OTHER)], clip=1.0),
    )[0].sum(),
    "cached": lambda x, w: opsd_kernels.jsd_loss_from_top_k(
        x, w, *(t for t in opsd_kernels.top_k_logprobs(TEACHER.view(2, 6, 8), WEIGHT, 4)[1::-1])
    ),
}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.thinned(2)
def test_compiled_equals_eager_without_a_graph_break(name, trainable):
    torch._dynamo.reset()

    def step(x, w):
        return CALLS[name](x * 1.5, w) * 2  # something on both sides to compile

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [leaf(STUDENT.view(2, 6, 8)), leaf(WEIGHT).requires_grad_(trainable)]
        loss = run(*inputs)
        results.append([loss, *torch.autograd.grad(loss, inputs[: 1 + trainable])])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < 1e-6


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.thinned(3)
def test_no_cuda_graph_holds_the_loss(name):
    """By the question that Inductor asks of a graph: a capture would freeze how many tokens the mask has."""
    torch._dynamo.reset()
    found = []

    def forward(graph, _):
        found.append(get_first_incompatible_cudagraph_node(graph))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    torch.compile(CALLS[name], fullgraph=True, backend=backend)(leaf(STUDENT.view(2, 6, 8)), leaf(WEIGHT))
    (node,) = found
    assert node is not None
    assert node.target.namespace == "opsd"


def test_operators_are_well_formed():
    """torch's own checks: schema, fake implementations, autograd registration."""
    x, w = leaf(STUDENT), leaf(WEIGHT)
    spec = Spec("divergence", Objective(beta=0.4), 9, 50, torch.float32, 1 << 24, "torch")
    ops = torch.ops.opsd
    for targets in (IDS.view(-1), None):
        for wanted in ([True, False, False], [True, True, False]):
            inputs = Inputs(x, w, teacher=TEACHER, mask=MASK.view(-1), targets=targets)
            library.opcheck(ops.fused_linear.default, (*inputs.all(), spec.encoded(), wanted))
    logits = leaf(STUDENT @ WEIGHT.T)
    library.opcheck(ops.logits_loss.default, (logits, TEACHER @ WEIGHT.T, None, None, spec.encoded(), True))
    top = Spec("top_k", Objective(top_k=3), 1, 50, torch.float32, 1 << 24, "torch")
    library.opcheck(ops.top_k.default, (STUDENT, WEIGHT, None, None, top.encoded()))
