"""The head of a transformers model with all that happens to its logits, so that no one forgets a softcap or a scale."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .probe import no_trial, replaced_forward, settings, tolerance, uncompiled, undisturbed, warn_unproven


@dataclass(frozen=True)
class Head:
    """z = softcap·tanh(logit_scale·(h·weightᵀ + bias) / softcap), columns from valid_vocab on being padding."""

    weight: Tensor  #: (V, H)
    bias: Tensor | None = None  #: (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments for `jsd_loss` and `token_logprobs`, which take `weight` by position."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "valid_vocab": self.valid_vocab,
        }


def lm_head_of(model: nn.Module) -> Head:
    """Reads the head of a transformers causal language model (also one wrapped by peft or torch.compile).

    Softcaps (Gemma, nanochat) and constant scales (Cohere, Granite, Falcon-H1) are read from fields of the config, then
    proven: the model runs on a few tokens in eval mode, and its logits must equal those of the head on its last hidden
    states, as they are and enlarged, where a softcap shows. The result is kept for the model until its settings change.
    Weights on device meta or sharded over processes cannot be run so: then what the config says is taken, with a
    `UserWarning`. The same goes for a model whose layers below the head raise an exception on token ids alone.

    Raises:
        TypeError: `model` is no causal language model with an output embedding.
        ValueError: the head is not a plain linear layer (adapters or forward hooks on it, say), or the model does
            something else to its logits; the message has the numbers that disagree.
    """
    wrapper: Any = uncompiled(model)
    base = uncompiled(wrapper.get_base_model()) if hasattr(wrapper, "get_base_model") else wrapper
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers model with an output embedding, got {type(base).__name__}")
    linear = uncompiled(base.get_output_embeddings())
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"model's output embedding must be a plain torch.nn.Linear, got {type(linear).__name__}: "
            "merge or drop adapters on the head"
        )
    _check_forward(linear)
    rows, vocab = linear.weight.shape[0], getattr(base.config.get_text_config(), "vocab_size", None)
    plain = Head(linear.weight, linear.bias, valid_vocab=vocab if vocab is not None and vocab < rows else None)
    return _proven(base, plain)


def _check_forward(linear: nn.Linear) -> None:
    """The layer computes what its class says: nothing has been hung onto this one."""
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    names = [f"the hook {getattr(hook, '__qualname__', type(hook).__name__)}" for hook in hooks]
    forward = vars(linear).get("forward", linear.forward)
    if "_hf_hook" in vars(linear) and getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks":
        # accelerate's own move tensors and change no value; removing them leaves the bound method on the instance
        forward = inspect.unwrap(forward)
        names += [f"the hook {type(h).__qualname__}" for h in _flat(linear._hf_hook) if not _is_accelerates(h)]
    if getattr(forward, "__func__", None) is not nn.Linear.forward:
        names.append(f"a forward of its own, {getattr(forward, '__qualname__', type(forward).__name__)}")
    if names:
        raise ValueError(
            f"model's output embedding must be a plain torch.nn.Linear without forward hooks, got one with {names[0]}, "
            "which may change the logits: remove it or build opsd_kernels.Head by hand"
        )


def _flat(hook: Any) -> list[Any]:
    return [inner for part in hook.hooks for inner in _flat(part)] if hasattr(hook, "hooks") else [hook]


def _is_accelerates(hook: Any) -> bool:
    return type(hook).__module__ == "accelerate.hooks"


# What transformers' configs call what happens to logits.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")


def _readings(base: Any, plain: Head) -> Iterator[Head]:
    """What the fields may mean, the likeliest first: all of them apply, a divisor multiplies (HyperCLOVAX), or some
    have no effect."""

    def value(name: str) -> float | None:
        for owner in (base, base.config.get_text_config()):  # the model may have taken its own copy
            found = getattr(owner, name, None)
            if isinstance(found, (int, float)) and not isinstance(found, bool) and found != 0:
                return float(found)
        return None

    factors = [[v, 1.0] for name in _FACTORS if (v := value(name)) not in (None, 1.0)]
    divisors = [[1 / v, v, 1.0] for name in _DIVISORS if (v := value(name)) not in (None, 1.0)]
    caps = [*(v for name in _CAPS if (v := value(name)) is not None), None]
    for cap in caps:
        for scales in itertools.product(*factors, *divisors):
            scale = 1.0
            for each in scales:
                scale *= each
            yield replace(plain, logit_scale=scale, softcap=cap)


_found: weakref.WeakKeyDictionary[nn.Module, tuple[Any, float, float | None, int | None]] = weakref.WeakKeyDictionary()


def _proven(base: Any, plain: Head) -> Head:
    """The reading of the config under which the head gives the model's own logits."""
    learnt = [name for name in (*_FACTORS, *_DIVISORS) if isinstance(getattr(base, name, None), Tensor)]
    if learnt:
        raise _unknown(base, f"{learnt[0]} is a tensor, which may change; accepted: a number")
    readings = list(_readings(base, plain))
    hooks = (*base._forward_hooks, *base._forward_pre_hooks)
    key = (settings(base), hooks, plain.weight.shape, [(r.logit_scale, r.softcap, r.valid_vocab) for r in readings])
    if base in _found and _found[base][0] == key and not replaced_forward(base):
        _, scale, cap, valid = _found[base]
        return replace(plain, logit_scale=scale, softcap=cap, valid_vocab=valid)
    trial = no_trial(base) or _try(base, plain)
    if isinstance(trial, str):
        warn_unproven("the head", base, trial)
        return readings[0]
    found = _matching(base, readings, *trial)
    _found[base] = (key, found.logit_scale, found.softcap, found.valid_vocab)
    return found


@torch.no_grad()
def _matching(base: Any, readings: list[Head], hidden: Tensor, logits: Tensor) -> Head:
    """The first of `readings` that makes `logits`, (1, T, V), of `hidden`, (1, T, H)."""
    plain, columns = readings[0], logits.shape[-1]
    with torch.autocast(hidden.device.type, enabled=False):
        raw = F.linear(hidden, plain.weight, plain.bias).float()
    if logits.shape[:-1] != raw.shape[:-1] or columns > raw.shape[-1]:
        raise _unknown(base, f"its logits are of shape {tuple(logits.shape)}, its head gives {tuple(raw.shape)}")
    for reading in readings:
        if _agree(logits, _logits(reading, raw[..., :columns]), hidden.dtype):
            if columns == raw.shape[-1]:
                return reading
            # The model cuts the padding off.
            return replace(reading, valid_vocab=min(columns, reading.valid_vocab or columns))
    raise _unknown(base, _difference(logits, _logits(plain, raw[..., :columns]), plain))


_TOKENS = 8
_LARGE = 60.0  # logits that saturate any softcap in use


def _try(base: Any, plain: Head) -> tuple[Tensor, Tensor] | str:
    """(1, T, H) last hidden states and the (1, T, V) float32 logits made of them, or why the model did not run.

    The second half of the hidden states is enlarged on the way to the head.
    """
    embedding = base.get_input_embeddings()
    device, rows = embedding.weight.device, embedding.weight.shape[0]
    ids = torch.arange(1, _TOKENS + 1, device=device)[None] * rows // (_TOKENS + 2)
    seen: list[Tensor] = []
    widths: list[int] = []
    body = uncompiled(base.base_model)

    def enlarge(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if seen or not isinstance(hidden, Tensor):
            return None
        if hidden.shape[-1] != plain.weight.shape[1]:
            widths.append(hidden.shape[-1])
            return None
        output["last_hidden_state"] = _enlarged(hidden, plain)
        seen.append(output["last_hidden_state"])
        return output

    try:
        with torch.no_grad(), undisturbed(base, device):
            # Caches of some hybrid models cannot be made outside generation.
            arguments = inspect.signature(base.forward).parameters
            takes = "use_cache" in arguments or any(p.kind is p.VAR_KEYWORD for p in arguments.values())
            options = {"use_cache": False} if takes else {}
            # Some call what is below their body, or have none.
            for part in (*([] if body is base else [body]), *body.children()):
                with part.register_forward_hook(enlarge):
                    output = base(ids, **options)
                if seen:
                    break
            if seen and part is not body is not base and not _same(body(ids).last_hidden_state, seen[0]):
                seen.clear()
    except Exception as error:
        what = f"its forward raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not seen or seen[0].dtype != plain.weight.dtype:  # of two types only under autocast
            return what
        raise _unknown(base, what) from error
    logits = getattr(output, "logits", output)
    if widths and not seen:
        raise _unknown(
            base, f"its last hidden states have {widths[0]} features, its head takes {plain.weight.shape[1]}"
        )
    if not seen:
        return f"it does not make its logits of the last_hidden_state of its {type(body).__name__}"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise _unknown(base, f"its forward returns {type(logits).__name__} and no logits")
    return seen[0].to(plain.weight.device, plain.weight.dtype), logits.detach().to(plain.weight.device).float()


def _enlarged(hidden: Tensor, plain: Head) -> Tensor:
    """(1, T, H) with the second half of the rows at the size that gives large logits."""
    rows = hidden[:, _TOKENS // 2 :].to(plain.weight.device, plain.weight.dtype)
    largest = float(F.linear(rows, plain.weight, plain.bias).abs().max())
    factor = min(_LARGE / max(largest, 1e-30), 1e4 / max(float(rows.abs().max()), 1e-30))
    return torch.cat([hidden[:, : _TOKENS // 2], hidden[:, _TOKENS // 2 :] * max(factor, 1.0)], dim=1)


def _same(hidden: Tensor, enlarged: Tensor) -> bool:
    first, second = _halves(hidden)[0], _halves(enlarged)[0]
    return first.shape == second.shape and bool((first - second).norm() <= tolerance(first.dtype) * first.norm())


def _logits(head: Head, raw: Tensor) -> Tensor:
    scaled = raw * head.logit_scale
    return scaled if head.softcap is None else head.softcap * torch.tanh(scaled / head.softcap)


def _halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the hidden states as they were, and of the enlarged ones, which must not drown them."""
    return logits[:, : _TOKENS // 2], logits[:, _TOKENS // 2 :]


def _agree(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within rounding. On average over all logits, which tells a scale of 1.02 from 1 in bfloat16, too."""
    limit = tolerance(dtype) / 2
    return all(
        bool((got - want).norm() <= limit * want.norm() + 1e-30) and bool(got.isfinite().all())
        for got, want in zip(_halves(logits), _halves(expected), strict=True)
    )


def _difference(logits: Tensor, expected: Tensor, reading: Head) -> str:
    """Where the model's logits are not the head's, by how much, and which factor would explain it."""
    gap = (logits - expected).abs().nan_to_num(torch.inf)
    token, column = divmod(int(gap.argmax()), logits.shape[-1])
    own, ours = float(logits[0, token, column]), float(expected[0, token, column])
    enlarged = ", of an enlarged hidden state," if token >= _TOKENS // 2 else ""
    text = (
        f"with scale {reading.logit_scale:g} and softcap {reading.softcap} as its config says, logit {column} of token "
        f"{token}{enlarged} is {ours:.4g} and the model's own {own:.4g}"
    )
    got, want = _halves(logits)[0].double(), _halves(expected)[0].double()
    factor = float((got * want).sum() / want.square().sum().clamp_min(1e-300))
    left = float((got - factor * want).norm() / got.norm().clamp_min(1e-300))
    if left < 0.02:
        return f"{text}; the model's logits are {factor:.4g} times these, which no known field of its config says"
    return f"{text}; no constant factor explains it ({factor:.4g} leaves {left:.0%} of them)"


def _unknown(model: Any, what: str) -> ValueError:
    return ValueError(
        f"model does something to its logits that is not understood ({type(model).__name__}: {what}); "
        "build opsd_kernels.Head by hand"
    )
