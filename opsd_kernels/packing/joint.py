"""Both contexts in one pass, with nothing saved for the teacher.

One pass over [student rows | teacher rows] wherever both run on the same base weights. Each decoder layer runs on all
rows without a graph and keeps only the student's rows of its input; backward recomputes just those, which never see a
teacher row. Under gradient checkpointing that is what would be recomputed anyway; without it, it costs a second student
forward pass and saves what checkpointing saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..probe import evaluating
from .attention import Pass
from .layout import Joint
from .switches import adapters_off, attention_named, checkpoint_function, no_weight_cache
from .vet import Body, active_dropouts


class DualHidden(NamedTuple):
    """The head's inputs, after the final norm; row r of each predicts `batch.target_ids[r]`."""

    student: Tensor  #: (R, H), with a gradient where gradients are on
    teacher: Tensor  #: (K·R, H of the teacher), never with one; K contexts one after the other, usually one


def run_joint(body: Body, joint: Joint, backend: str, *, base_teacher: bool) -> DualHidden:
    n, norm = joint.student.rows, body.inner.norm
    # Switching goes through all modules, and of the embedding peft has a wrapper if anything (no LoRA: check_base).
    wrapped = type(body.embedding).__module__.startswith("peft.")
    with torch.no_grad(), evaluating(body.embedding), adapters_off(body.model, base_teacher and wrapped):
        teacher_embeds = body.embedding(joint.layout.ids[None, n:]).detach()  # a hook may have asked for a gradient
    embeds = torch.cat([body.embedding(joint.student.ids[None]), teacher_embeds], dim=1)
    kept: list[Tensor] = []
    packed = Pass(joint.layout, backend)

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Only the rows that predict something reach the norm, which would else save all of them."""
        if kept or not packed.calls:
            raise ValueError(
                f"passes='joint' needs the final norm once, after the last layer, and {type(body.inner).__name__} uses "
                "it elsewhere; use passes='two'"
            )
        kept.append(args[0][0].detach().index_select(0, joint.teacher_rows))
        return (args[0].index_select(1, joint.student_rows), *args[1:])

    rows = _StudentRows(body, joint)
    handle = norm.register_forward_pre_hook(select)
    try:
        with (
            attention_named(body.configs),
            checkpoint_function(body.layers, lambda _: rows.checkpoint, always=True),
            _row_wise_adapters(body.adapters, n, joint.layout.rows, off=base_teacher),
        ):
            student = body.run(packed, inputs_embeds=embeds)
    finally:
        handle.remove()
        rows.forget()
    with torch.no_grad():
        teacher = norm(kept[0])
    return DualHidden(student, teacher)


@contextmanager
def _row_wise_adapters(adapters: list[Any], n: int, total: int, *, off: bool) -> Iterator[None]:
    """The adapters as the student runs them on the first `n` of `total` rows; on the others without dropout, or not at
    all. The student's rows alone (the recompute) need none of it."""

    def split(layer: Any, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def rowwise(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.dim() != 3 or x.shape[:2] != (1, total):
                raise ValueError(
                    f"passes='joint': an adapter on {type(layer.get_base_layer()).__name__} gets rows of shape "
                    f"{tuple(x.shape)}, not {(1, total)}, and cannot tell the teacher's from the student's; "
                    "accepted here: passes='two'"
                )
            if off:
                teacher = layer.get_base_layer()(x[:, n:], *args, **kwargs)
            else:
                with evaluating(layer):
                    teacher = forward(x[:, n:], *args, **kwargs)
            return torch.cat([forward(x[:, :n], *args, **kwargs), teacher], dim=1)

        return rowwise

    adapters = [layer for layer in adapters if off or active_dropouts(layer)]
    before = [layer.__dict__.get("forward") for layer in adapters]
    for layer in adapters:
        layer.forward = split(layer, layer.forward)
    try:
        yield
    finally:
        for layer, former in zip(adapters, before, strict=True):
            if former is None:
                del layer.forward
            else:
                layer.forward = former


class _StudentRows:
    """The checkpoint function of the joint pass and what one trip through the model shares between its layers."""

    def __init__(self, body: Body, joint: Joint):
        self.body, self.joint = body, joint
        self._sliced: dict[int, tuple[Tensor, Tensor]] = {}

    def checkpoint(self, function: Any, hidden: Tensor, *args: Any) -> Tensor:
        if args or not isinstance(function, partial):
            raise ValueError("passes='joint' needs layers that take hidden states alone by position; use passes='two'")
        if not torch.is_grad_enabled():  # transformers before 5.24 checkpoints then, too
            return function(hidden)
        # The layer is the partial's first argument, or what its bound method belongs to: that depends on the version.
        called: Any = function.func
        layer = function.args[0] if function.args else called.__self__
        recompute = partial(called, *function.args, **self._student(function.keywords))
        parameters = [p for p in layer.parameters() if p.requires_grad]
        # As inputs of the function the parameters get their gradients from it, and a frozen embedding breaks nothing.
        return _StudentRowsOnly.apply(self, function, recompute, parameters, hidden, *parameters)

    def forget(self) -> None:
        """Lets go of what belongs to all rows."""
        self._sliced.clear()

    def _student(self, value: Any) -> Any:
        """`value`, an argument of a layer for all rows, for the student's rows alone."""
        n, total = self.joint.student.rows, self.joint.layout.rows
        if isinstance(value, Tensor) and value.requires_grad:  # the recompute would return none to it
            raise ValueError(
                "passes='joint' needs layers that get a gradient through their hidden states alone; use passes='two'"
            )
        if isinstance(value, Pass):
            return Pass(self.joint.student, value.backend)
        if isinstance(value, dict):
            return {k: self._student(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._student(v) for v in value)
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == total:
            # Once for all layers, and a copy: a view would keep the teacher's part alive.
            if id(value) not in self._sliced:
                self._sliced[id(value)] = (value, value[:, :n].clone())
            return self._sliced[id(value)][1]
        return value


class _StudentRowsOnly(torch.autograd.Function):
    """A layer on all rows without a graph; backward recomputes and differentiates its first n rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: _StudentRows,
        function: Any,
        recompute: Any,
        parameters: list[Tensor],
        hidden: Tensor,
        *_: Tensor,
    ) -> Tensor:
        device = hidden.device
        ctx.device_type = device.type
        ctx.cpu_state = torch.get_rng_state()
        ctx.device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        ctx.autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        with no_weight_cache(rows.body.device):
            out = function(hidden)
        if not isinstance(out, Tensor):
            raise ValueError(f"passes='joint' needs layers that return a tensor, got {type(out).__name__}")
        ctx.save_for_backward(hidden[:, : rows.joint.student.rows].clone())
        ctx.rows, ctx.recompute, ctx.parameters, ctx.total = rows, recompute, parameters, hidden.shape[1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (saved,) = ctx.saved_tensors
        n = saved.shape[1]
        hidden = saved.detach().requires_grad_()
        with ExitStack() as stack:
            devices = [hidden.device] if ctx.device_state is not None else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.set_rng_state(ctx.cpu_state)
            if devices:
                torch.cuda.set_rng_state(ctx.device_state, hidden.device)
            stack.enter_context(attention_named(ctx.rows.body.configs))  # long after the model's own is back
            stack.enter_context(torch.enable_grad())
            enabled = ctx.autocast is not None
            stack.enter_context(
                torch.autocast(ctx.device_type, dtype=ctx.autocast, enabled=enabled, cache_enabled=not enabled)
                if enabled
                else torch.autocast(ctx.device_type, enabled=False)
            )
            out = ctx.recompute(hidden)
        into = [hidden, *ctx.parameters]
        found = torch.autograd.grad(out, into, grad[:, :n], allow_unused=True)
        dx = None
        if ctx.needs_input_grad[4] and found[0] is not None:
            # No row of the student depends on a teacher's.
            dx = found[0].new_zeros(1, ctx.total, found[0].shape[2])
            dx[:, :n] = found[0]
        return (None, None, None, None, dx, *found[1:])
