"""A causal language model of transformers, with or without peft: loading, its body, its modes."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from opsd import gguf_file
from opsd.errors import ConfigError, DataError, config_error, one_line
from opsd.model_path import check_path
from opsd.options import LoraConfig, ModelConfig
from opsd.quantized import in_4_bits, kept_for_training
from opsd.vocabulary import pad_id
from opsd.weights import check_finite, check_loaded, check_rank, damaged_file, report_held
from opsd_kernels.packing.vet import outside_adapter

ADAPTER = "adapter_config.json"
"""What makes a directory that of an adapter."""


def load_tokenizer(path: str | None, option: str = "model.path", *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `path`, which errors call `option`.

    Raises:
        ConfigError: there is none, or `path` is a run or a checkpoint, of which transformers would say odd things, or
            the path of nothing.
    """
    with _loading("tokenizer", path, option):
        if path:
            check_path(path, option)
        where, more = gguf_file.source(path)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **more)
        tokenizer("1")  # some settings load well and fail at any text
        return tokenizer


@contextmanager
def _loading(what: str, path: str | None, option: str) -> Iterator[None]:
    """Errors of transformers as a ConfigError of one line that `what` of `path`, called `option`, cannot be loaded.

    The files are a stranger's, and what their many readers raise at a damaged one varies.
    """
    here = not path or Path(path).exists()
    where = f"{option} {path!r}:" if here else f"{option}: there is no directory {path}, and from the hub"
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code=True" in (said := one_line(error)):
            said = "it comes with code of its own, which model.trust_remote_code true would run"
        raise ConfigError(f"{where} no {what} can be loaded: {damaged_file(path)}{said}") from error


def load_weights(options: ModelConfig, path: str | None, device: torch.device, option: str = "model.path") -> Any:
    """The causal language model of `path` on `device`, in the types of `options`; errors call the path `option`.

    Raises:
        ConfigError: no model can be loaded: a file is damaged, a tensor is missing or of another shape, say.
    """
    with report_held():
        with _loading("model", path, option):
            if (Path(path or "") / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(str(path))  # below, one that cannot be read would be passed over
            where, more = gguf_file.source(path, weights=True)
            more |= in_4_bits(options, path, device) if options.load_in_4bit else {}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,  # type: ignore[arg-type]
                dtype=getattr(torch, options.dtype),
                attn_implementation=options.attn_implementation,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be named below
                **more,
            )
        model, info = loaded
        check_loaded(info, f"{option} {path!r}")
    model = gguf_file.unpacked(model, path) if gguf_file.is_gguf(path) else model
    return kept_for_training(model) if options.load_in_4bit else model.to(device)


def load_model(options: ModelConfig, lora: LoraConfig, device: torch.device) -> nn.Module:
    """The model to train, on `device` and with adapters where asked for.

    Raises:
        ConfigError: no model can be loaded from `model.path`, its weights are not finite, it is an adapter, or the
            adapters do not fit it.
    """
    path = options.path
    if options.load_in_4bit and not lora.enabled:
        raise ConfigError("model.load_in_4bit is true; accepted: with lora.enabled, as 4 bits cannot be trained")
    _refuse_adapter(path, (Path(path or "") / ADAPTER).is_file())
    model: Any = load_weights(options, path, device)
    _refuse_adapter(path, bool(getattr(model, "peft_config", None)))  # of a hub id it only shows now
    check_finite(model, f"model.path {path!r}")
    if lora.enabled:
        model = _add_adapters(model, lora)
    if options.gradient_checkpointing:
        with _renamed():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def _ignoring(message: str, category: type[Warning]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, category)
        yield


def _renamed() -> AbstractContextManager:
    """Silences that transformers renames gradient checkpointing: peft and older versions have the old names only."""
    return _ignoring("`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated", FutureWarning)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Unless `shown`, transformers and the hub show no bars of theirs; afterwards they do as before."""
    hidden = not shown and logging.is_progress_bar_enabled()
    forbidden = "Cannot (dis|en)able progress bars"  # the hub tells where a variable of the environment says how
    if hidden:
        with _ignoring(forbidden, UserWarning):
            logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            with _ignoring(forbidden, UserWarning):
                logging.enable_progress_bar()


def _refuse_adapter(path: str | None, adapter: bool) -> None:
    """transformers loads an adapter on its base; peft would then start it anew, or nothing would be trained."""
    if adapter:
        raise ConfigError(
            f"model.path {path!r} is an adapter, which cannot be trained further: train from the base model that its "
            f"{ADAPTER} names, or merge it first (PeftModel.merge_and_unload, then save_pretrained)"
        )


def load_trained(options: ModelConfig, path: str | None, device: torch.device, option: str = "model.path") -> nn.Module:
    """The model in `path` as it is, on `device`: one of transformers, or an adapter on the base that it names; errors
    call the path `option`.

    Raises:
        ConfigError: no model can be loaded from there, or not the base of the adapter, the weights are not finite, or
            the adapter acts outside the model's layers.
    """
    where, adapter = f"{option} {path!r}", Path(path or "") / ADAPTER
    if adapter.is_file():
        model = _load_adapted(options, path or "", adapter, device, option)
    else:
        model = load_weights(options, path, device, option)
    check_finite(model, where)
    with config_error(where, ConfigError):
        causal_lm(model)
    return model


def _load_adapted(options: ModelConfig, path: str, adapter: Path, device: torch.device, option: str) -> nn.Module:
    """The base model that the file `adapter` names, with the adapter of `path` on it."""
    with config_error(f"{adapter}: cannot be read", OSError, ValueError, AttributeError):
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{adapter} does not name its base model (base_model_name_or_path)")
    with config_error(f"{adapter} names a base model that cannot be loaded", ConfigError):
        model = load_weights(options, base, device, "base_model_name_or_path")
    peft = _peft(f"{option} {path!r} is an adapter, which")
    with _loading(f"adapter onto {base!r}", path, option), _renamed(), warnings.catch_warnings():
        # peft only warns of tensors that the file lacks, and goes on with those of an untrained adapter.
        warnings.filterwarnings("error", ".*Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, path).to(device)


def pick_device(device: str) -> torch.device:
    """The device that `run.device` names.

    Raises:
        ConfigError: it is cuda and there is none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def _peft(who: str) -> Any:
    """The package peft, which `who` needs: imported here alone, since it takes seconds and few runs have adapters."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{who} needs the package peft") from error
    return peft


def _add_adapters(model: nn.Module, options: LoraConfig) -> nn.Module:
    check_rank(model, options.r)
    peft, targets = _peft("lora.enabled"), options.target_modules
    adapters = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )
    within = causal_lm(model).base_model.named_modules()
    layers = {name.rpartition(".")[2] for name, module in within if isinstance(module, nn.Linear | Conv1D)}
    where = f"lora.r {options.r}, lora.target_modules {','.join(targets)}"
    with config_error(where, ValueError, RuntimeError, MemoryError), _renamed():
        adapted = peft.get_peft_model(model, adapters)
    found = [f".{name}" for name in adapted.base_model.targeted_module_names]
    lost = [t for t in targets if t != "all-linear" and not any(name.endswith(f".{t}") for name in found)]
    if lost:  # peft is content with one that matches
        raise ConfigError(
            f"lora.target_modules: {', '.join(lost)} match no layer of {type(model).__name__}; accepted: all-linear, "
            f"or names among {', '.join(sorted(layers))}"
        )
    return adapted


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, adapters within its layers, out of a peft wrapper.

    Raises:
        ConfigError: an adapter acts in the wrapper, so that what is below it would be the bare model.
    """
    if not is_adapted(model):
        return model
    outside = outside_adapter(model)
    if outside:
        raise ConfigError(f"{outside}; accepted: adapters within the layers, LoRA for one")
    return model.get_base_model()  # type: ignore[operator]


def is_adapted(model: nn.Module) -> bool:
    """Whether `model` is a peft wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def body(model: nn.Module) -> nn.Module:
    """The part of `model` that ends with the final norm: everything but the lm_head."""
    lm = causal_lm(model)
    if lm.base_model is lm:
        raise ConfigError(f"{type(lm).__name__} has no separate body below its lm_head")
    return lm.base_model


def autocast(options: ModelConfig, device: torch.device) -> AbstractContextManager:
    """The context of `model.autocast`. Enter it anew for each phase: weights it has cast without a gradient stay so."""
    if options.autocast == "none":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def save_model(
    model: nn.Module, tokenizer: Any, ends: Sequence[int], directory: Path, state: dict[str, Any] | None = None
) -> None:
    """Writes the model, or its adapter, and the tokenizer to `directory`, for `from_pretrained`; `state` is in place of
    the model's own."""
    lm = causal_lm(model)
    try:
        lm.generation_config.validate(strict=True)
    except Exception:  # a ValueError, or whatever an entry of another type makes of a comparison
        # Some published models carry generation settings that load and then refuse to be saved.
        lm.generation_config = GenerationConfig(
            eos_token_id=list(ends) or None, pad_token_id=pad_id(lm, tokenizer, ends)
        )
    model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
    tokenizer.save_pretrained(directory)


def positions(lm: Any) -> int | None:
    """How many tokens the transformers model `lm` says it can read; None where it has no bound."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def check_positions(model: nn.Module, prompts: Iterable[Sequence[int]], added: Mapping[str, int]) -> int:
    """The most tokens that a context of the run can have.

    A model run beyond its positions degrades without a word, or fails in the middle of a run.

    Args:
        added: the most tokens that may follow a prompt, by the options that say so.

    Raises:
        DataError: the longest of `prompts` and what is added exceed the positions that `model` says it has.
    """
    limit = positions(causal_lm(model))
    longest = max(map(len, prompts))
    if limit is not None and longest + sum(added.values()) > limit:
        more = ", ".join(f"{name} adds {count}" for name, count in added.items())
        raise DataError(
            f"the longest prompt has {longest} tokens and {more}, but the model has {limit} positions; lower "
            f"data.max_prompt_tokens (with data.too_long drop) or {' or '.join(added)}"
        )
    return longest + sum(added.values())
