"""Weights of 4 bits, as bitsandbytes has them: a large frozen base under adapters, in a quarter of the memory."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from opsd import gguf_file
from opsd.errors import ConfigError
from opsd.options import ModelConfig

# Where it is installed, peft imports it for any adapter; it then tells a CPU of a kernel for passes without a gradient.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def in_4_bits(options: ModelConfig, path: str | None, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to make the linear layers but the head NF4, doubly quantised (arXiv 2305.14314).

    Such a model is put on its device as it is loaded.

    Raises:
        ConfigError: `path` is a GGUF file, or bitsandbytes is not installed.
    """
    if gguf_file.is_gguf(path):
        raise ConfigError(f"model.load_in_4bit is true and {path!r} a GGUF file; accepted: a directory or a hub id")
    if find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in_4bit is true, which needs bitsandbytes: pip install 'opsd[quant]'")
    half = "bfloat16" in (options.autocast, options.dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def kept_for_training(model: nn.Module) -> nn.Module:
    """`model`, whose 4 bits stay as they are on a CPU: its first pass without a gradient would lay them out anew, for a
    kernel that has no backward, and gradients would be wrong from then on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model
