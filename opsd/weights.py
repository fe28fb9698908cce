"""What makes the weights of a model unfit for use: damaged files, tensors that are missing, misshapen or not finite."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from opsd.errors import ConfigError, config_error

_SHOWN = 3
"""So many names of tensors are in a message, which else would be one of pages."""


@contextmanager
def report_held() -> Iterator[None]:
    """transformers' table of what it loaded is held back until the loading has been accepted: an error says it all."""
    logger, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in record.getMessage():
            held.append(record)
            return False
        return True

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


def damaged_file(path: str | None) -> str:
    """The first safetensors file in the directory `path` that cannot be opened, with ": " after it; empty if none."""
    for file in sorted(Path(path).glob("*.safetensors")) if path else ():
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{file.name}: "
    return ""


def check_loaded(loaded: Mapping[str, Any], where: str) -> None:
    """transformers fills what a checkpoint lacks with random numbers.

    Args:
        loaded: its "loading info".
        where: what the message begins with: the option and its path.

    Raises:
        ConfigError: a tensor of the model is missing in the checkpoint, or has another shape there.
    """
    for name, found, wanted in sorted(loaded["mismatched_keys"]):
        raise ConfigError(
            f"{where}: its weights have {name} of shape {tuple(found)}; accepted by its config.json: {tuple(wanted)}"
        )
    if missing := sorted(loaded["missing_keys"]):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ConfigError(
            f"{where}: its weights lack {', '.join(missing[:_SHOWN])}{more}; accepted: every tensor of the model that "
            "its config.json describes"
        )


def check_finite(model: nn.Module, where: str) -> None:
    """Refuses weights that make every answer and every loss worthless.

    Raises:
        ConfigError: naming the first parameter or persistent buffer of `model` that holds an infinity or a NaN.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ConfigError(
                f"{where}: {name} holds {count} of {tensor.numel()} values that are infinite or not a number; "
                "accepted: finite weights"
            )


def check_rank(model: nn.Module, rank: int) -> None:
    """Refuses adapters that are larger than the layers they would adapt, before there is no memory for them.

    Raises:
        ConfigError: `rank` is beyond every dimension of every matrix of `model`.
    """
    widest = max((size for p in model.parameters() if p.ndim > 1 for size in p.shape), default=rank)
    if rank > widest:
        raise ConfigError(f"lora.r is {rank}; accepted: 1 to {widest}, the largest dimension of the model's matrices")


def check_savable(config: Any, where: str) -> None:
    """Some configs load well and are refused when they are written, which would be after the training.

    Raises:
        ConfigError: `config`, that of a transformers model, is one of them.
    """
    # What raises here is a validator of a library's, or one that came with the model.
    with config_error(f"{where}: its config.json can be loaded, but not be saved with what is trained", Exception):
        if hasattr(config, "validate"):
            config.validate()
        config.to_json_string()
