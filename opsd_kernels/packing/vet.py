"""Whether packed rows can serve a model, as far as its config and its modules tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_dtensor
from ..probe import modules_of, settings, uncompiled
from .attention import KEYWORD, LayoutMissing, Pass


class Body:
    """A causal language model's parts, after a check that packed rows can serve it.

    Made for one call: with adapters a model has thousands of modules, and what is looked for among them is kept.
    """

    def __init__(self, model: nn.Module, argument: str):
        wrapper: Any = model
        self.model, self.argument = model, argument
        self.lm: Any = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
        if not hasattr(self.lm, "get_input_embeddings") or not hasattr(self.lm, "config"):
            raise TypeError(f"{argument} must be a causal language model of transformers, got {type(model).__name__}")
        self.inner: Any = self.lm.base_model
        if self.inner is self.lm:
            raise TypeError(f"{argument} must have a body below its lm_head, {type(self.lm).__name__} has none")
        self.text = self.lm.config.get_text_config()
        training = argument == "model" and self.lm.training
        refusal = outside_adapter(model) or _refusal(self.lm, self.text, training=training)
        if refusal:
            raise self.refused(refusal)
        self.embedding: Any = self.lm.get_input_embeddings()
        self.vocabulary = self.embedding.weight.shape[0]
        self.width = self.text.hidden_size
        self.device = self.embedding.weight.device

    def refused(self, reason: str) -> ValueError:
        """The error that names this model and says why."""
        return ValueError(f"{self.argument} {type(self.lm).__name__} cannot run on packed rows: {reason}")

    @property
    def attention(self) -> tuple[torch.device, torch.dtype, int, float | None]:
        """What the choice of an attention backend depends on: device, type, head size, softcap."""
        dtype = (
            torch.get_autocast_dtype(self.device.type)
            if torch.is_autocast_enabled(self.device.type)
            else self.embedding.weight.dtype
        )
        head_size = getattr(self.text, "head_dim", None) or self.width // self.text.num_attention_heads
        return self.device, dtype, head_size, getattr(self.text, "attn_logit_softcapping", None)

    @cached_property
    def modules(self) -> list[nn.Module]:
        return modules_of(self.inner)

    @cached_property
    def configs(self) -> list[Any]:
        """Those that name the attention of any module."""
        having: list[Any] = [m for m in self.modules if "config" in vars(m) or hasattr(type(m), "config")]
        return list({id(m.config): m.config for m in having}.values())

    @cached_property
    def settings(self) -> tuple[Any, ...]:
        return settings(self.lm)

    @cached_property
    def adapters(self) -> list[Any]:
        return adapters_among(self.modules)

    @cached_property
    def layers(self) -> list[Any]:
        """The decoder layers that have a replaceable checkpoint function."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [m for m in self.modules if isinstance(m, GradientCheckpointingLayer)]

    @property
    def checkpoints(self) -> bool:
        return any(layer.gradient_checkpointing and layer.training for layer in self.layers)

    def check(self, argument: str, largest_id: int, longest: int) -> None:
        """That the ids and positions of a batch exist in this model."""
        if largest_id >= self.vocabulary:
            raise ValueError(
                f"batch has token id {largest_id}, the embedding of {argument} accepts 0 to {self.vocabulary - 1}"
            )
        border = crossed_border(self.text, longest)
        if border:
            raise self.refused(border)

    def run(self, packed: Pass, **inputs: Any) -> Tensor:
        """(rows, H): the hidden states of packed rows; raises if any layer never saw the layout."""
        try:
            out = self.inner(
                **inputs, position_ids=packed.layout.positions[None], use_cache=False, **{KEYWORD: packed}
            ).last_hidden_state
        except LayoutMissing as error:
            raise self.refused("its attention gets no keyword of the model's, so not which rows see which") from error
        expected = getattr(self.text, "num_hidden_layers", packed.calls)
        if packed.calls != expected:
            raise self.refused(
                f"{packed.calls} of its {expected} layers use the attention interface, and what the others mix is "
                "unknown"
            )
        return out[0]


def crossed_border(config: Any, longest: int) -> str | None:
    """What a context of `longest` tokens changes for those it is run with, or None."""
    for rope in _rope_settings(config):
        kind = rope.get("rope_type", "default")
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
        if kind in ("dynamic", "longrope") and longest > (limit or 0):
            return (
                f"its rotary embedding ({kind}) changes for every row once one context is longer than {limit}, "
                f"and one has {longest} tokens"
            )
    return None


def trial_length(config: Any, longest: int, least: int = 18) -> int:
    """How many tokens a trial needs to show what no shorter context would: a little more than each window, or chunk,
    that contexts of at most `longest` tokens reach the end of; at least `least`."""
    spans = [value for name, value in vars(config).items() if any(word in name for word in ("window", "chunk"))]
    spans = [n for one in spans for n in (one if isinstance(one, list | tuple) else [one]) if type(n) is int]
    return max([least, *(min(longest, n + 8) for n in spans if 0 < n < longest)])


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [r for r in rope.values() if isinstance(r, dict)]
    return nested or [rope]


def _refusal(lm: Any, config: Any, *, training: bool) -> str | None:
    """Why packed rows cannot serve this model, or None."""
    if config is not lm.config:
        return f"{lm.config.model_type} is multimodal; pass its language model alone"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(lm, "_is_stateful", False):
        return "its layers are recurrent, so a state would run from one context into the next"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} (hybrid or recurrent); accepted: full and sliding attention"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits is set, but its router loss over packed rows would count teacher and shared rows"
    if any("mrope_section" in rope for rope in _rope_settings(config)):
        return "its rotary positions are three-dimensional (mrope_section)"
    if getattr(config, "hidden_size_per_layer_input", None):
        return "it feeds per-layer inputs (hidden_size_per_layer_input) beside the hidden states"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional (use_bidirectional_attention)"
    if not getattr(lm, "_supports_attention_backend", False):
        return "its attention cannot be replaced (no attention interface of transformers)"
    for name in ("attention_dropout", "attn_pdrop"):  # as the older models call it
        if getattr(config, name, 0) and training:
            return f"{name} is {getattr(config, name):g} in training; accepted: 0, to be set in the model's config.json"
    return None


def outside_adapter(model: nn.Module) -> str | None:
    """Why the model below a peft wrapper is not the adapted one: an adapter that acts in the wrapper's `forward`. None
    where its layers hold all of it."""
    adapters = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    for name, config in (adapters or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            return f"adapter {name!r} is {kind}, whose virtual tokens no layer holds (the peft wrapper adds them)"
        if getattr(config, "alora_invocation_tokens", None) or kind in ("XLORA", "SHADOW"):
            kind = "an activated LoRA" if kind == "LORA" else kind
            return f"adapter {name!r} is {kind}, which the peft wrapper steers from outside the layers"
    return None


def check_base(model: nn.Module) -> None:
    """That switching the adapters off gives the model as it was before training."""
    wrapper: Any = model
    if not hasattr(wrapper, "peft_config") or not hasattr(wrapper, "disable_adapter"):
        raise ValueError(
            "teacher='base' needs a model with LoRA adapters to switch off, got "
            f"{type(model).__name__} without; pass a frozen copy of the initial model as teacher instead"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    lm = wrapper.get_base_model()
    for name, config in wrapper.peft_config.items():
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            raise ValueError(f"teacher='base': adapter {name!r} is {config.peft_type}; accepted: LORA")
        if getattr(config, "use_dora", False):
            raise ValueError(f"teacher='base': adapter {name!r} uses DoRA (use_dora); accepted: plain LoRA")
        if getattr(config, "modules_to_save", None):
            raise ValueError(
                f"teacher='base': adapter {name!r} has modules_to_save={list(config.modules_to_save)}; accepted: none, "
                "whole trained modules are not the base model's"
            )
    ends = {id(lm.get_input_embeddings()): "embedding", id(lm.get_output_embeddings()): "head"}
    modules = modules_of(lm)
    trained = {p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
    for module in modules:
        if not isinstance(module, BaseTunerLayer):
            continue
        for part in module.adapter_layer_names:
            trained.difference_update(getattr(module, part).parameters())
        if module.merged:
            raise ValueError(
                f"teacher='base': adapters {', '.join(map(repr, module.merged_adapters))} are merged into "
                f"{_name_in(lm, module)}, so it is not the base model's; accepted: adapters beside it, call "
                "model.unmerge_adapter() first"
            )
        if module.disable_adapters:
            raise ValueError(
                f"teacher='base': the adapters of {_name_in(lm, module)} are disabled, so the student would be the "
                "base model too; accepted: enabled ones, call model.enable_adapter_layers() first"
            )
        if id(module) in ends or id(module.get_base_layer()) in ends:
            place = ends.get(id(module)) or ends[id(module.get_base_layer())]
            raise ValueError(
                f"teacher='base': LoRA on the {place} ({_name_in(lm, module)}) is not supported; accepted: on linear "
                "layers"
            )
    if trained:
        name = next(name for name, parameter in lm.named_parameters() if parameter in trained)
        raise ValueError(f"teacher='base': {name} is trained too, so without its adapters this is not the base model")


# What a decoder layer of transformers may be given. Anything else might differ by row, and be none of the student's.
_LAYER_INPUTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "past_key_values",
    "cache",  # as transformers calls it since 5.24
    "use_cache",
    "cache_position",
    "output_attentions",
}


def _other_inputs(layer: nn.Module) -> list[str]:
    """The named arguments of a layer beside those that every decoder layer has."""
    named = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    return [p.name for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in _LAYER_INPUTS]


def joint_obstacle(body: Body, teacher: str | nn.Module) -> str | None:
    """Why both contexts cannot go through `body` at once, as far as it shows without running it, or None."""
    if not isinstance(teacher, str):
        return "the teacher is a model of its own"
    if is_dtensor(body.embedding.weight):
        return "its weights are divided among processes and whole only where its modules are called as they stand"
    if not isinstance(getattr(body.inner, "norm", None), nn.Module):
        return f"{type(body.inner).__name__} has no final norm called `norm`"
    if not body.layers:
        return f"the layers of {type(uncompiled(body.inner)).__name__} have no replaceable checkpoint function"
    for layer in body.layers:
        others = _other_inputs(layer)
        if others:
            return f"{type(layer).__name__} takes {', '.join(others)} beside the hidden states"
    adapters = body.adapters
    loose = _active(body.modules)
    if loose:
        inside = {id(m) for layer in adapters for m in layer.modules()}
        loose = [m for m in loose if id(m) not in inside]
    if loose:
        return (
            f"{type(body.inner).__name__} has dropout {loose[0].p:g} outside its adapters, which a teacher must not see"
        )
    noise = _noise(body.text) if body.inner.training else None
    if noise:
        return f"{noise}, which a teacher must not see"
    if teacher == "base" and any(type(m.get_base_layer()) is not nn.Linear for m in adapters):
        return "adapters sit on something other than torch.nn.Linear, whose rows cannot be told apart"
    return None


def _noise(config: Any) -> str | None:
    """A random part of the layers in training that is no module, or None where there is none."""
    for name, value in vars(config).items():
        named = ("dropout" in name or "pdrop" in name or "jitter" in name) and not name.startswith("classifier")
        if named and isinstance(value, float) and value > 0:
            return f"{name} is {value:g} in training"
    return None


def active_dropouts(module: nn.Module) -> list[Any]:
    return _active(modules_of(module))


def _active(modules: Iterable[nn.Module]) -> list[Any]:
    return [m for m in modules if isinstance(m, nn.Dropout) and m.p > 0 and m.training]


def adapters_among(modules: Iterable[nn.Module]) -> list[Any]:
    """The LoRA layers of peft."""
    return [m for m in modules if "lora_A" in m._modules and hasattr(m, "get_base_layer")]


def _name_in(lm: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in lm.named_modules() if one is module)
