"""What is switched in a model while packed rows go through it, and switched back after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .attention import NAME


@contextmanager
def attention_named(configs: list[Any], name: str = NAME) -> Iterator[None]:
    """Attention by `name`. The configs are restored, so that the model generates as ever in between."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, former in zip(configs, before, strict=True):
            config._attn_implementation_internal = former


@contextmanager
def adapters_off(model: Any, off: bool) -> Iterator[None]:
    if not off:
        yield
        return
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trained:  # peft has unfrozen all active adapters
            parameter.requires_grad_(flag)


def no_weight_cache(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, but without its cache: a weight cast under no_grad would be cached without its gradient."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


@contextmanager
def checkpoint_function(
    layers: list[Any], make: Callable[[Callable[..., Any] | None], Callable[..., Any]], *, always: bool
) -> Iterator[None]:
    """`make(former function)` as the checkpoint function of each layer that checkpoints, or of all of them."""
    before = [
        (
            layer,
            layer.__dict__.get("gradient_checkpointing"),
            layer.__dict__.get("_gradient_checkpointing_func"),
            layer.training,
        )
        for layer in layers
    ]
    try:
        for layer, _, former, _ in before:
            if always:
                # The layer's own flag only: it asks for both before it checkpoints, what is inside keeps its mode.
                layer.gradient_checkpointing = layer.training = True
            if layer.gradient_checkpointing:
                layer._gradient_checkpointing_func = make(former)
        yield
    finally:
        for layer, flag, former, training in before:
            layer.training = training
            for name, value in (("gradient_checkpointing", flag), ("_gradient_checkpointing_func", former)):
                if value is not None:
                    setattr(layer, name, value)
                else:
                    layer.__dict__.pop(name, None)
