"""Several processes on one run, as torchrun and `accelerate launch` start them.

Every process goes through the whole loop. Rollouts and micro-batches are divided among them; rollouts, statistics and
gradients are put together again, so that all take the same step with the same weights. The first one writes and prints.
The model is whole in each of them, or divided too (`opsd.sharding`).
Alone, a process finds here that it is the only one, and nothing is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from opsd.errors import ConfigError, RunError, one_line
from opsd.rollouts import derive_seed

T = TypeVar("T")

_group: Any = None  # of gloo: objects stay on the host, and it alone can say which process is missing
_timeout = timedelta(minutes=30)
closers: list[Callable[[], object]] = []  #: called when the processes part, for what has groups of its own


def size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size(_group) if _group is not None else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank(_group) if _group is not None else 0


def launched_first() -> bool:
    """Whether this process is the one to print, as those that launched it have it; also before and after `joined`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str, minutes: float) -> Iterator[None]:
    """While open, this process is one of those that were launched together, if there are more.

    Args:
        device: `run.device`. With GPUs each process of a machine gets the one of its number.
        minutes: how long a process waits for another.

    Raises:
        ConfigError: they do not find each other, or there are fewer GPUs than processes.
    """
    global _group, _timeout
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _group is not None:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    local, _timeout = int(os.environ.get("LOCAL_RANK", "0")), timedelta(minutes=minutes)
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own: torch finds {torch.cuda.device_count()}; "
                "start one process per GPU"
            )
        torch.cuda.set_device(local)
    began = not dist.is_initialized()
    try:
        if began:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_timeout)
        _group = dist.new_group(backend="gloo", timeout=_timeout)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the processes that were launched together do not meet: {one_line(error)}") from error
    try:
        yield
        for close in closers:
            close()
        if began and dist.is_initialized():  # not after an error: it might wait for a process that is gone
            dist.destroy_process_group()
    finally:
        closers.clear()
        _group = None


def own(items: Sequence[T]) -> list[T]:
    """The share of this process: every `size()`-th one, so that a sorted order gives all processes alike."""
    return list(items[rank() :: size()])


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order.

    Raises:
        RunError: a process is gone, or did not come to this point in the time of `joined`; the message has its number.
    """
    if size() == 1:
        return [value]
    with told(""):
        dist.monitored_barrier(_group, _timeout, wait_all_ranks=rank() == 0)
        found: list[Any] = [None] * size()
        dist.all_gather_object(found, value, group=_group)
    return found


def merged(found: dict[int, T]) -> list[T]:
    """All that the processes found, each its share, in the order of the places 0, 1, …"""
    every: dict[int, T] = {}
    for some in gathered(found):
        every |= some
    return [every[place] for place in range(len(every))]


def of_first(make: Callable[[], T]) -> T:
    """What `make` returns, or raises, in the first process, where alone it is called."""
    if size() == 1:
        return make()
    outcome: Any = None, None
    if rank() == 0:
        try:
            outcome = make(), None
        except Exception as raised:  # all are to end with it, whatever it is
            outcome = None, raised
    value, error = gathered(outcome)[0]
    if error is not None:
        error.said = rank() > 0  # once is enough
        raise error
    return value


def seed_apart(seed: int, step: int) -> None:
    """Gives each process dropout of its own in `step`, the same ones again where a run is resumed."""
    if size() > 1:
        torch.manual_seed(derive_seed(seed, "process", rank(), step))


def sum_gradients(model: nn.Module) -> None:
    """Adds up what the processes' micro-batches left in `grad`; a parameter without one has a zero there."""
    if size() == 1:
        return
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds.setdefault(parameter.dtype, []).append(parameter)
    with told(""):
        for parameters in kinds.values():
            for some in _buckets(parameters):
                for p in some:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                flat = torch.cat([p.grad.flatten() for p in some if p.grad is not None])
                dist.all_reduce(flat)
                for p, summed in zip(some, flat.split([p.numel() for p in some]), strict=True):
                    p.grad = summed.view_as(p)


def _buckets(parameters: Iterable[nn.Parameter], most: int = 2**25) -> Iterator[list[nn.Parameter]]:
    """Groups of about `most` elements, sent together."""
    some: list[nn.Parameter] = []
    for parameter in parameters:
        some.append(parameter)
        if sum(p.numel() for p in some) >= most:
            yield some
            some = []
    if some:
        yield some


def full(tensor: Tensor) -> Tensor:
    """`tensor`, whole and without a gradient. To be called by all processes."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def to_first(state: Any) -> Any:
    """`state` with its divided tensors whole and on the CPU in the first process, and None in the others."""
    if size() == 1:
        return state
    known: dict[int, Any] = {}  # names of one tensor stay so

    def one(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        at = value.to_local().data_ptr()
        if at not in known:
            gathered = full(value)
            known[at] = gathered.cpu() if rank() == 0 else None
        return known[at]

    return tree_map(one, state)


def like(value: Tensor, own: Tensor) -> Tensor:
    """`value`, whole in all processes, divided as `own` is; as it is where `own` is whole or has another shape."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The `state` of an optimiser of whole tensors, for one whose parameters may be divided."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def of(number: int, values: dict[str, Any]) -> dict[str, Any]:
        own = parameters[number]
        return {name: like(value, own) if isinstance(value, Tensor) else value for name, value in values.items()}

    return {**state, "state": {number: of(number, values) for number, values in state["state"].items()}}


def check_same(described: Mapping[str, Any]) -> None:
    """That all processes were given the same.

    Raises:
        ConfigError: one was not; the message has its number and the names of what differs.
    """
    first, *others = gathered(dict(described))
    for number, other in enumerate(others, start=1):
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            raise ConfigError(f"process {number} has another {', '.join(names)} than process 0; accepted: the same")


@contextmanager
def told(sign: str = r"gloo|NCCL|ProcessGroup|Connection (?:closed|reset) by peer") -> Iterator[None]:
    """Around what sends somewhere within: an error of it, which has `sign`, as one that says who is missing."""
    try:
        yield
    except RuntimeError as error:  # of gloo; that of NCCL is derived from it
        if size() == 1 or not re.search(sign, str(error)):
            raise
        raise RunError(
            f"process {rank()} of {size()} goes on no further, since another has ended, or did not answer in "
            f"run.process_minutes: {one_line(error)}"
        ) from error
