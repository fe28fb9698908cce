"""Each context by itself: the teacher's rows without a gradient, then the student's with one. Serves every teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .attention import Pass
from .layout import Context
from .switches import attention_named, checkpoint_function
from .vet import Body, active_dropouts


def run_context(body: Body, side: Context, backend: str) -> Tensor:
    """(R, H) hidden states of one context, with a graph where gradients are on."""
    mlp = _last_mlp(body)  # once: what backward recomputes takes the same rows

    def make(former: Callable[..., Any] | None) -> Callable[..., Any]:
        assert former is not None  # transformers sets it together with the flag

        def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            def again(*inputs: Any) -> Any:  # also in backward, long after the model's own attention is back
                with attention_named(body.configs), _on_used_rows(mlp, side):
                    return function(*inputs)

            return former(again, *args)

        return checkpoint

    with (
        attention_named(body.configs),
        _on_used_rows(mlp, side),
        checkpoint_function(body.layers, make, always=False),
    ):
        hidden = body.run(Pass(side.layout, backend), input_ids=side.layout.ids[None])
    return hidden.index_select(0, side.rows)


def _last_mlp(body: Body) -> nn.Module | None:
    """The last layer's MLP. None where it draws dropout, whose masks are the rows' in order, where someone else has
    replaced or compiled it, and where layers run several times, so that the last one is not only the last: then it is
    left alone."""
    if len(body.layers) != getattr(body.text, "num_hidden_layers", None):
        return None
    mlp = getattr(body.layers[-1], "mlp", None) if body.layers else None
    if not isinstance(mlp, nn.Module) or "forward" in mlp.__dict__ or active_dropouts(mlp):
        return None
    compiled = any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in body.modules)
    return None if compiled else mlp


@contextmanager
def _on_used_rows(mlp: nn.Module | None, side: Context) -> Iterator[None]:
    """The MLP on the rows that predict something alone: no one reads what the last one gives the prompts' others, which
    in a teacher's context are most. Nothing for None, or within itself."""
    if mlp is None or "forward" in mlp.__dict__:
        yield
        return
    forward: Callable[..., Any] = mlp.forward

    def on_used_rows(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        out = forward(x.index_select(1, side.used)) if isinstance(x, Tensor) and x.dim() == 3 else None
        if x is None or not isinstance(out, Tensor):  # not the MLP that is meant here
            return forward(*args, **kwargs)
        return out.new_zeros(*x.shape[:2], out.shape[-1]).index_copy(1, side.used, out)

    mlp.forward = on_used_rows
    try:
        yield
    finally:
        del mlp.forward
