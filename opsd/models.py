"""A causal language model of transformers, with or without peft: loading, its body, its modes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsd.config import Config, ConfigError


def load_tokenizer(path: str | None, option: str = "model.path") -> Any:
    """The tokenizer of `path`, which errors call `option`.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{option} {path!r}: no tokenizer can be loaded: {error}") from error


def load_weights(config: Config, path: str | None, option: str = "model.path") -> Any:
    """The causal language model of `path`, in the types of `config.model`; errors call the path `option`.

    Raises:
        ConfigError: no model can be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path,  # type: ignore[arg-type]
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attn_implementation,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{option} {path!r}: no model can be loaded: {error}") from error


def load_model(config: Config, device: torch.device) -> nn.Module:
    """The model to train, on `device` and with adapters where asked for.

    Raises:
        ConfigError: no model can be loaded from `model.path`, or the adapters do not fit it.
    """
    model: Any = load_weights(config, config.model.path)
    model.to(device)
    if config.lora.enabled:
        model = _add_adapters(model, config)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_trained(config: Config, device: torch.device) -> nn.Module:
    """The model in `model.path` as it is, on `device`: one of transformers, or an adapter on the base that it names.

    Raises:
        ConfigError: no model can be loaded from there, or not the base of the adapter.
    """
    path = config.model.path or ""
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        plain = replace(config.model, gradient_checkpointing=False)
        return load_model(replace(config, model=plain, lora=replace(config.lora, enabled=False)), device)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"model.path {path!r} is an adapter, which needs the package peft") from error
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{adapter}: cannot be read: {error}") from error
    if not base:
        raise ConfigError(f"{adapter} does not name its base model (base_model_name_or_path)")
    of_base = replace(config.model, path=base, gradient_checkpointing=False)
    try:
        model = load_model(replace(config, model=of_base, lora=replace(config.lora, enabled=False)), device)
    except ConfigError as error:
        raise ConfigError(f"{adapter} names a base model that cannot be loaded: {error}") from error
    try:
        return PeftModel.from_pretrained(model, path).to(device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model.path {path!r}: the adapter cannot be loaded onto {base!r}: {error}") from error


def pick_device(config: Config) -> torch.device:
    """The device of `run.device`.

    Raises:
        ConfigError: it is cuda and there is none.
    """
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; accepted here: auto, cpu")
    use_cuda = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _add_adapters(model: nn.Module, config: Config) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora.enabled needs the package peft") from error
    targets = config.lora.target_modules
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.dropout,
                target_modules="all-linear" if targets == ("all-linear",) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ConfigError(f"lora.target_modules {','.join(targets)}: {error}") from error


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, adapters within its layers, out of a peft wrapper."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a peft wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def body(model: nn.Module) -> nn.Module:
    """The part of `model` that ends with the final norm: everything but the lm_head."""
    lm = causal_lm(model)
    if lm.base_model is lm:
        raise ConfigError(f"{type(lm).__name__} has no separate body below its lm_head")
    return lm.base_model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, then every module back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The context of `model.autocast`. Enter it anew for each phase: weights it has cast without a gradient stay so."""
    if config.model.autocast == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: those of the model's generation config and the tokenizer's."""
    configured = getattr(causal_lm(model).generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list | tuple) else [configured]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def decoder_limit(model: nn.Module) -> int | None:
    """The longest context `model` has positions for, or None if it does not say."""
    text = causal_lm(model).config.get_text_config()
    return getattr(text, "max_position_embeddings", None)
