"""A model run on a few tokens to see what it does, and left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def uncompiled(module: Any) -> Any:
    """The module itself of what torch.compile made of it."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


def modules_of(module: nn.Module) -> list[nn.Module]:
    """`module` and all within it, each once and in the order of `modules()`, of which a call with thousands of modules
    takes several milliseconds."""
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        if (one := waiting.pop()) not in found:
            found[one] = None
            waiting += [child for child in reversed(one._modules.values()) if child is not None]
    return list(found)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode, then each of its modules in its own mode again."""
    training = [m for m in modules_of(module) if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """For a trial run: eval mode, random numbers as before afterwards, no autocast, nothing compiled for it."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if below := _below_mixed_precision(model):
            stack.callback(setattr, model, "forward", model.forward)
            model.forward = below
        if any(m._compiled_call_impl is not None or uncompiled(m) is not m for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # which takes seconds to import
        yield


def _below_mixed_precision(model: nn.Module) -> Any:
    """The forward around which accelerate has put its autocast; None where there is no such thing."""
    return vars(model).get("_original_forward") if "forward" in vars(model) else None


def replaced_forward(model: nn.Module) -> bool:
    """Whether `model` has another forward than its class, accelerate's autocast apart."""
    forward = _below_mixed_precision(model) or vars(model).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(model).forward


def no_trial(model: nn.Module) -> str | None:
    """Why `model` cannot be run on a few tokens by one process alone, or None."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} is on device meta"
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_tensor"):  # a DTensor, or DeepSpeed's
            return f"{name} is sharded over processes"
    if any("FullyShardedDataParallel" in type(m).__name__ for m in model.modules()):
        return "its weights are sharded over processes"
    return None


def warn_unproven(what: str, model: nn.Module, reason: str) -> None:
    """Says that `what` was read from the config of `model` alone."""
    warnings.warn(
        f"{what} of {type(model).__name__} is read from its config and could not be tried on tokens: {reason}",
        stacklevel=3,
    )


def as_computed(model: Any, rows: Tensor) -> Tensor:
    """`rows` that `model` gave, in 16 bits where its layers may compute in them whatever they return: of 4 bits."""
    return rows.bfloat16() if getattr(model, "is_quantized", False) else rows


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding explains where the same sums are added up in another order."""
    if dtype in (torch.float16, torch.bfloat16):
        return 4 * torch.finfo(dtype).eps
    # Models go through float32 in places whatever their type, and float32 products may run in TF32.
    return 1e-4 if torch.get_float32_matmul_precision() == "highest" else 4e-3


def _class(module: nn.Module) -> type:
    """Of `module`, also where `fully_shard` has made a class of its own of it, which computes the same."""
    kind = type(module)
    return next(c for c in kind.__mro__ if not c.__name__.startswith("FSDP")) if kind.__name__[:4] == "FSDP" else kind


def settings(model: Any) -> tuple[Any, ...]:
    """What a trial's result depends on beside the values of the weights, to tell whether it still holds."""
    config = model.config.get_text_config()
    plain = tuple((k, v) for k, v in sorted(vars(config).items()) if isinstance(v, (int, float, bool, str, type(None))))
    modules = tuple((_class(m), "forward" in vars(m)) for m in modules_of(model))
    weight: Tensor = model.get_input_embeddings().weight
    return plain, modules, type(model).forward, weight.dtype, weight.device
