"""The head of a transformers model with all that happens to its logits, so that no one forgets a softcap or a scale."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
    """Reads the head of a transformers causal language model (also one wrapped by peft).

    What the model does to its logits is read from the source of its `forward`; softcap (Gemma, nanochat) and constant
    scales (Cohere, Granite) are understood.

    Raises:
        TypeError: `model` is no causal language model with an output embedding.
        ValueError: the head is not a plain linear layer (adapters on it, say), or the model does something else to
            its logits; the message quotes it.
    """
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers model with an output embedding, got {type(base).__name__}")
    linear = base.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"model's output embedding must be a plain torch.nn.Linear, got {type(linear).__name__}: "
            "merge or drop adapters on the head"
        )
    logit_scale, softcap = _post_processing(base)
    rows, vocab = linear.weight.shape[0], getattr(base.config.get_text_config(), "vocab_size", None)
    return Head(
        linear.weight,
        linear.bias,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=vocab if vocab is not None and vocab < rows else None,
    )


_HEAD_CALL = re.compile(r"self\.(lm_head|embed_out|output|head)\([\w.]+(\[.*\])?\)(\.float\(\)|\.to\(.*\))?")
_NO_CHANGE = re.compile(r"logits\.(float\(\)|to\([\w.=]+\)|contiguous\(\))")
_SCALE = re.compile(r"logits (?P<op>[*/]) (?P<value>self\.(?:\w+\.)*(?:logit_scale|logits_scaling|output_multiplier))")
_CAP = r"(?:self\.(?:\w+\.)*)?(?P<cap{}>final_logit_softcapping|final_logit_softcap)"
_DIVIDE, _TIMES = re.compile("logits / " + _CAP.format("")), re.compile("logits \\* " + _CAP.format(""))
_TANH = re.compile(r"(torch|nn\.functional|F)\.tanh\(logits\)")
_LOCAL = re.compile(r"self\.(\w+\.)*(final_logit_softcapping|final_logit_softcap)")


def _post_processing(model: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) from the statements of `forward` that write `logits`; raises for any it does not know."""
    forward = inspect.unwrap(type(model).forward)
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    scale, cap_steps = 1.0, 0
    seen_head = False
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not any(ast.unparse(t).split("[")[0] in ("logits", "lm_logits") for t in targets):
            continue
        text = ast.unparse(node.value).replace("lm_logits", "logits")
        step = _SCALE.fullmatch(text)
        if isinstance(node, ast.AugAssign):
            raise _unknown(model, ast.unparse(node))
        if _HEAD_CALL.fullmatch(text):
            seen_head = True
        elif step:
            value = float(_attribute(model, step["value"]))
            scale = scale * value if step["op"] == "*" else scale / value
        elif _DIVIDE.fullmatch(text) or _TANH.fullmatch(text) or _TIMES.fullmatch(text):
            cap_steps += 1
        elif not _NO_CHANGE.fullmatch(text):
            raise _unknown(model, ast.unparse(node))
    if not seen_head or cap_steps not in (0, 3):
        raise _unknown(model, "how `logits` is computed could not be followed")
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) if cap_steps else None
    return scale, (float(cap) if cap else None)


def _attribute(model: Any, dotted: str) -> Any:
    value = model
    for name in dotted.split(".")[1:]:
        value = getattr(value, name)
    return value


def _unknown(model: Any, what: str) -> ValueError:
    return ValueError(
        f"model does something to its logits that is not understood ({type(model).__name__}: {what}); "
        "build opsd_kernels.Head by hand"
    )
