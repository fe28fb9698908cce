"""Packed rows through a transformers model: as two passes, or both contexts in one with nothing saved for the teacher.

Two passes: the teacher's rows without a gradient, then the student's with one. They serve every teacher.

Joint: one pass over [student rows | teacher rows] wherever both run on the same base weights. Each decoder layer runs
on all rows without a graph and keeps only the student's rows of its input; backward recomputes just those, which never
see a teacher row. Under gradient checkpointing that is what would be recomputed anyway; without it, it costs a second
student forward pass and saves what checkpointing saves.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import BACKENDS, KEYWORD, NAME, LayoutMissing, Pass, backend_obstacle, choose_backend, register
from .layout import Context, DualContextBatch, Joint


class DualHidden(NamedTuple):
    """The head's inputs, after the final norm; row r of each predicts `batch.target_ids[r]`."""

    student: Tensor  #: (R, H), with a gradient where gradients are on
    teacher: Tensor  #: (R, H of the teacher), never with one


@dataclass(frozen=True)
class Plan:
    """What `dual_hidden_states` will do; `reason` is for people to read."""

    passes: Literal["two", "joint"]
    share_contexts: bool  #: teacher rows use the student's rows of the common beginning of both prompts
    backend: str
    reason: str


def dual_hidden_states(
    model: nn.Module,
    batch: DualContextBatch,
    *,
    teacher: str | nn.Module = "live",
    passes: str = "auto",
    backend: str = "auto",
) -> DualHidden:
    """The hidden states that predict the rollout tokens of `batch` in both contexts.

    Args:
        model: a causal language model of transformers, with or without peft, in the mode (train or eval) that the
            student is to run in. The teacher always runs with dropout off and without a gradient.
        teacher: "live", the weights of `model`; "base", `model` with its LoRA adapters off; or another such model.
        passes: "two", "joint", or "auto": joint if the model checkpoints its layers anyway and the teacher runs on the
            same base weights.
        backend: of the attention: "auto", "sdpa", "varlen", "flash", "triton" or "eager"; see
            `packing.attention`.

    Returns:
        Two tensors, (R, H) and (R, H of the teacher), on the device of the models.

    Raises:
        TypeError, ValueError: an argument is not of this form, or the model does something that packed rows cannot
            give it; the message names it and says why.
    """
    if not isinstance(batch, DualContextBatch):
        raise TypeError(f"batch must be a DualContextBatch from pack_dual_context, got {type(batch).__name__}")
    plan = plan_passes(model, teacher=teacher, passes=passes, backend=backend)
    student = _Body(model, "model")
    other = student if isinstance(teacher, str) else _Body(teacher, "teacher")
    for name, body, side in (("model", student, batch.student), ("teacher", other, batch.teacher)):
        body.check(name, batch.largest_id, side.layout.longest)
    if not batch.student.layout.rows:
        empty = [b.embedding.weight.new_zeros(0, b.width) for b in (student, other)]
        return DualHidden(empty[0].requires_grad_(torch.is_grad_enabled()), empty[1])
    register()
    if plan.passes == "joint":
        joint = batch.to(student.device).joint(share_contexts=plan.share_contexts)
        return _joint(student, joint, backend, adapters_off=teacher == "base")
    with (
        torch.no_grad(),
        _evaluating(other.model),
        _adapters_off(other.model, teacher == "base"),
        _no_weight_cache(other),
    ):
        side = batch.teacher.to(other.device)
        teacher_hidden = _run(other, side, backend)
    return DualHidden(_run(student, batch.student.to(student.device), backend), teacher_hidden)


def plan_passes(
    model: nn.Module, *, teacher: str | nn.Module = "live", passes: str = "auto", backend: str = "auto"
) -> Plan:
    """What `dual_hidden_states` does with these arguments, which are its own, and raises as it does."""
    if isinstance(teacher, str):
        if teacher not in ("live", "base"):
            raise ValueError(f"teacher must be 'live', 'base' or a torch.nn.Module, got {teacher!r}")
    elif not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be 'live', 'base' or a torch.nn.Module, got {type(teacher).__name__}")
    if passes not in ("auto", "two", "joint"):
        raise ValueError(f"passes must be 'auto', 'two' or 'joint', got {passes!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    body = _Body(model, "model")
    other = _Body(teacher, "teacher") if isinstance(teacher, nn.Module) else body
    if other.device != body.device:
        raise ValueError(f"teacher is on device {other.device}, model on {body.device}; accepted: one device for both")
    if body.device.type == "meta":
        raise ValueError(f"model {type(body.lm).__name__} is on device meta; accepted: one that holds data")
    if teacher == "base":
        _check_base(model)
    for one in (body, other):
        obstacle = backend_obstacle(backend, *one.attention)
        if obstacle:
            there = [repr(name) for name in BACKENDS if name == "auto" or not backend_obstacle(name, *one.attention)]
            raise ValueError(
                f"packing backend {backend!r} {obstacle} ({one.argument} {type(one.lm).__name__}); "
                f"accepted here: {', '.join(there)}"
            )
    obstacle = _joint_obstacle(body, teacher)
    if passes == "joint" and obstacle:
        raise ValueError(f"passes='joint' is not possible: {obstacle}; accepted here: 'two'")
    if obstacle:
        chosen, reason = "two", obstacle
    elif passes != "auto":
        chosen, reason = passes, "as asked"
    elif body.checkpoints:
        chosen, reason = "joint", "the layers are checkpointed, so nothing is computed twice that was not before"
    else:
        chosen, reason = "two", "without checkpointing the joint pass would compute the student's forward pass twice"
    share = chosen == "joint" and teacher == "live" and not _active_dropouts(body.inner)
    if backend == "auto":
        backend, why = choose_backend(*body.attention)
        reason += f"; attention {backend}: {why}"
    return Plan("joint" if chosen == "joint" else "two", share, backend, reason)


# The model: its parts, and what it must not be.


class _Body:
    """A causal language model's parts, after a check that packed rows can serve it."""

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
        if refusal or (refusal := _stray_layout(self.inner)):
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
        dtype = torch.get_autocast_dtype(self.device.type) if _autocasting(self) else self.embedding.weight.dtype
        head_size = getattr(self.text, "head_dim", None) or self.width // self.text.num_attention_heads
        return self.device, dtype, head_size, getattr(self.text, "attn_logit_softcapping", None)

    @property
    def layers(self) -> list[Any]:
        """The decoder layers that have a replaceable checkpoint function."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [m for m in self.inner.modules() if isinstance(m, GradientCheckpointingLayer)]

    @property
    def checkpoints(self) -> bool:
        return any(layer.gradient_checkpointing and layer.training for layer in self.layers)

    def check(self, argument: str, largest_id: int, longest: int) -> None:
        """That the ids and positions of a batch exist in this model."""
        if largest_id >= self.vocabulary:
            raise ValueError(
                f"batch has token id {largest_id}, the embedding of {argument} accepts 0 to {self.vocabulary - 1}"
            )
        for rope in _rope_settings(self.text):
            kind = rope.get("rope_type", "default")
            limit = rope.get("original_max_position_embeddings") or getattr(self.text, "max_position_embeddings", 0)
            if kind in ("dynamic", "longrope") and longest > (limit or 0):
                raise self.refused(
                    f"its rotary embedding ({kind}) changes for every row once one context is longer than {limit}, "
                    f"and one has {longest} tokens"
                )


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


# What a module's code does with its arguments. Read from the code, since a trial would cost a pass through the model.


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _code(module: nn.Module) -> CodeType | None:
    """Of the `forward` of a module's class, below its decorators; None where it has none of its own."""
    return _code_below(type(module).forward)


@functools.cache
def _code_below(forward: Callable[..., Any]) -> CodeType | None:
    forward = inspect.unwrap(forward)
    return None if forward is nn.Module.forward else getattr(forward, "__code__", None)


@functools.cache
def _reads(code: CodeType, name: str) -> int:
    """How often `code` reads the variable, attribute or global `name`."""
    loads = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    return sum(name in found if isinstance(found, tuple) else name == found for found in loads)


def _hands_on_keywords(code: CodeType | None) -> bool:
    """Whether arguments by names that are not its own have anywhere to go from this `forward`."""
    if code is None:  # a container, or not Python
        return True
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return _reads(code, code.co_varnames[named]) > 0


def _stray_layout(inner: nn.Module) -> str | None:
    """Why the layout, a keyword of the model, reaches no attention, or None where it reaches one (or none is known)."""
    modules, culprit = dict(inner.named_modules()), None
    for name, module in modules.items():
        code = _code(module)
        if code is None or not _reads(code, "ALL_ATTENTION_FUNCTIONS"):
            continue
        parts = name.split(".")
        path = [inner, *(modules[".".join(parts[: i + 1])] for i in range(len(parts)))]
        blocking = [m for m in path if not _hands_on_keywords(_code(m))]
        if not blocking:
            return None
        culprit = culprit or type(blocking[0]).__name__
    if culprit is None:
        return None
    return f"{culprit} does not hand further keywords on, so its attention would not learn which rows see which"


# What a decoder layer of transformers may be given. Anything else might differ by row, and be none of the student's.
_LAYER_INPUTS = {
    "self",
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
    code = _code(layer)
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
    return [name for name in named if name not in _LAYER_INPUTS]


def _check_base(model: nn.Module) -> None:
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
    for name, module in lm.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ValueError(
                f"teacher='base': adapters {', '.join(map(repr, module.merged_adapters))} are merged into {name}, so "
                "it is not the base model's; accepted: adapters beside it, call model.unmerge_adapter() first"
            )
        if module.disable_adapters:
            raise ValueError(
                f"teacher='base': the adapters of {name} are disabled, so the student would be the base model too; "
                "accepted: enabled ones, call model.enable_adapter_layers() first"
            )
        if id(module) in ends or id(module.get_base_layer()) in ends:
            place = ends.get(id(module)) or ends[id(module.get_base_layer())]
            raise ValueError(
                f"teacher='base': LoRA on the {place} ({name}) is not supported; accepted: on linear layers"
            )
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            raise ValueError(
                f"teacher='base': {name} is trained too, so without its adapters this is not the base model"
            )


def _joint_obstacle(body: _Body, teacher: str | nn.Module) -> str | None:
    """Why both contexts cannot go through `model` at once, or None."""
    if not isinstance(teacher, str):
        return "the teacher is a model of its own"
    if not isinstance(getattr(body.inner, "norm", None), nn.Module):
        return f"{type(body.inner).__name__} has no final norm called `norm`"
    inner = _unwrapped(body.inner)
    code = _code(inner)
    uses = _reads(code, "norm") if code else 0
    if uses != 1:
        return f"{type(inner).__name__} uses its final norm {uses} times, not once after the last layer"
    if not body.layers:
        return f"the layers of {type(inner).__name__} have no replaceable checkpoint function"
    for layer in body.layers:
        others = _other_inputs(layer)
        if others:
            return f"{type(layer).__name__} takes {', '.join(others)} beside the hidden states"
    adapters = _adapters(body.inner)
    inside = {id(m) for layer in adapters for m in layer.modules()}
    loose = [m for m in _active_dropouts(body.inner) if id(m) not in inside]
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


def _active_dropouts(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]


def _adapters(module: nn.Module) -> list[Any]:
    """The peft layers within `module`."""
    found = [m for m in module.modules() if hasattr(m, "get_base_layer") and hasattr(m, "lora_A")]
    return found


# Contexts in which a model runs.


@contextmanager
def _packed_attention(inner: nn.Module) -> Iterator[None]:
    """Attention by `NAME`. The configs are restored, so that the model generates as ever in between."""
    configs: list[Any] = list({id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}.values())
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _adapters_off(model: Any, off: bool) -> Iterator[None]:
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


def _autocasting(body: _Body) -> bool:
    return torch.is_autocast_enabled(body.device.type)


def _no_weight_cache(body: _Body) -> AbstractContextManager:
    """Autocast as it is, but without its cache: a weight cast under no_grad would be cached without its gradient."""
    kind = body.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


@contextmanager
def _checkpoint_function(
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


def _call(body: _Body, packed: Pass, **inputs: Any) -> Tensor:
    """(rows, H): the body's output; raises if any layer never saw the layout."""
    try:
        out = body.inner(
            **inputs, position_ids=packed.layout.positions[None], use_cache=False, **{KEYWORD: packed}
        ).last_hidden_state
    except LayoutMissing as error:
        raise body.refused("its attention gets no keyword of the model's, so not which rows see which") from error
    expected = getattr(body.text, "num_hidden_layers", packed.calls)
    if packed.calls != expected:
        raise body.refused(
            f"{packed.calls} of its {expected} layers use the attention interface, and what the others mix is unknown"
        )
    return out[0]


def _last_mlp(body: _Body) -> nn.Module | None:
    """The last layer's MLP. None where it draws dropout, whose masks are the rows' in order, where someone else has
    replaced or compiled it, and where layers run several times, so that the last one is not only the last: then it is
    left alone."""
    if len(body.layers) != getattr(body.text, "num_hidden_layers", None):
        return None
    mlp = getattr(body.layers[-1], "mlp", None) if body.layers else None
    if not isinstance(mlp, nn.Module) or "forward" in mlp.__dict__ or _active_dropouts(mlp):
        return None
    compiled = any(
        m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in body.inner.modules()
    )
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


def _run(body: _Body, side: Context, backend: str) -> Tensor:
    """(R, H) hidden states of one context, with a graph where gradients are on."""
    mlp = _last_mlp(body)  # once: what backward recomputes takes the same rows

    def make(former: Callable[..., Any] | None) -> Callable[..., Any]:
        assert former is not None  # transformers sets it together with the flag

        def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            def again(*inputs: Any) -> Any:  # also in backward, long after the model's own attention is back
                with _packed_attention(body.inner), _on_used_rows(mlp, side):
                    return function(*inputs)

            return former(again, *args)

        return checkpoint

    with (
        _packed_attention(body.inner),
        _on_used_rows(mlp, side),
        _checkpoint_function(body.layers, make, always=False),
    ):
        hidden = _call(body, Pass(side.layout, backend), input_ids=side.layout.ids[None])
    return hidden.index_select(0, side.rows)


# The joint pass.


def _joint(body: _Body, joint: Joint, backend: str, *, adapters_off: bool) -> DualHidden:
    n, norm = joint.student.rows, body.inner.norm
    with torch.no_grad(), _evaluating(body.embedding), _adapters_off(body.model, adapters_off):
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
            _packed_attention(body.inner),
            _checkpoint_function(body.layers, lambda _: rows.checkpoint, always=True),
            _row_wise_adapters(body.inner, n, joint.layout.rows, off=adapters_off),
        ):
            student = _call(body, packed, inputs_embeds=embeds)
    finally:
        handle.remove()
        rows.forget()
    with torch.no_grad():
        teacher = norm(kept[0])
    return DualHidden(student, teacher)


@contextmanager
def _row_wise_adapters(inner: nn.Module, n: int, total: int, *, off: bool) -> Iterator[None]:
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
                with _evaluating(layer):
                    teacher = forward(x[:, n:], *args, **kwargs)
            return torch.cat([forward(x[:, :n], *args, **kwargs), teacher], dim=1)

        return rowwise

    adapters = [layer for layer in _adapters(inner) if off or _active_dropouts(layer)]
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

    def __init__(self, body: _Body, joint: Joint):
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
        with _no_weight_cache(rows.body):
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
            stack.enter_context(_packed_attention(ctx.rows.body.inner))  # long after the model's own is back
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
