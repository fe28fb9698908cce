"""Weights that are divided among the processes of a run, with their gradients and the optimiser's state: FSDP2.

The set-up reads and tries the whole model in each process. Then torch's `fully_shard` keeps a share of every tensor in
each, and a layer is whole only while it runs. Every pass through the model is then one that all processes take, but for
those within `whole`. The head stays a plain linear layer of a divided weight, which the loss gathers itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from opsd import distributed
from opsd.models import body, causal_lm
from opsd_kernels import Head


def shard(model: nn.Module) -> None:
    """Divides `model`; to be called by all processes, and before an optimiser takes up the parameters."""
    lm = causal_lm(model)
    inner, head, embedding = body(lm), lm.get_output_embeddings(), lm.get_input_embeddings()
    tied = head.weight is embedding.weight
    mesh = init_device_mesh(lm.device.type, (distributed.size(),))
    names = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [module for module in inner.modules() if type(module).__name__ in names]
    for module in [*reversed(layers), inner]:  # inner ones first
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name, parameter in list(head.named_parameters(recurse=False)):
        if tied and name == "weight":
            head.weight = embedding.weight
        else:
            divided = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(head, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))


def reread(head: Head, model: nn.Module) -> Head:
    """`head` with the weights that `model`, divided since, has now."""
    linear: Any = causal_lm(model).get_output_embeddings()
    return replace(head, weight=linear.weight, bias=linear.bias)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While open, each process has all weights of `model` and runs it as often as it likes, without a gradient."""
    lm = causal_lm(model)
    parts = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    tied, divided = head.weight is embedding.weight, dict(head.named_parameters(recurse=False))
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        for name, parameter in divided.items():
            own = tied and name == "weight"
            setattr(head, name, embedding.weight if own else nn.Parameter(distributed.full(parameter), False))
        yield
    finally:
        for name, parameter in divided.items():
            setattr(head, name, parameter)
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
