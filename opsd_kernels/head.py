"""The head of a transformers model with all that happens to its logits, so that no one forgets a softcap or a scale."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
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


_HEAD_CALL = re.compile(r"self\.(lm_head|embed_out|output|head)\((?P<hidden>\w+)(\[.*\])?\)(\.float\(\)|\.to\(.*\))?")
_LAST_HIDDEN = re.compile(
    r"(\w+\.last_hidden_state|\w+\[0\]|slice_logits_to_keep\(.*\)|hidden_states(\[.*\]|\.to\([^()]*\)))"
)
_NO_CHANGE = re.compile(r"logits\.(float\(\)|to\([\w.=]+\)|contiguous\(\))")
_SCALE = re.compile(r"logits (?P<op>[*/]) (?P<value>self\.(?:\w+\.)*(?:logit_scale|logits_scaling|output_multiplier))")
_CAP = r"(?P<cap>self\.(?:\w+\.)*final_logit_softcapping)"
_DIVIDE, _TANH = re.compile(r"logits / " + _CAP), re.compile(r"(torch|nn\.functional|F)\.tanh\(logits\)")
_TIMES = re.compile(r"logits \* " + _CAP)
_IF_CAPPED = re.compile(_CAP + r"( is not None)?")


def _post_processing(model: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) from the statements of `forward` that write `logits`; raises for any it does not know."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward)))
    tree = ast.parse(source.replace("lm_logits", "logits"))
    known: set[ast.AST] = set()  # the uses of `logits` that are understood
    steps: list[str] = []
    scale, cap, hidden = 1.0, None, ""
    for node, conditions in _statements(tree):
        text = ast.unparse(node.value) if isinstance(node, ast.Assign) else ""
        names = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
        if names != ["logits"] or text == "None":
            continue
        step, allowed = "", [] if not conditions else [c for c in conditions if not _IF_CAPPED.fullmatch(c)]
        if match := _HEAD_CALL.fullmatch(text):
            step, hidden = "head", match["hidden"]
        elif (match := _SCALE.fullmatch(text)) and not conditions:
            step, value = "scale", float(_attribute(model, match["value"]))
            scale = scale * value if match["op"] == "*" else scale / value
        elif (match := _DIVIDE.fullmatch(text)) and not allowed:
            step, cap = "/", _attribute(model, match["cap"])
        elif _TANH.fullmatch(text) and not allowed:
            step = "tanh"
        elif (match := _TIMES.fullmatch(text)) and not allowed and _attribute(model, match["cap"]) == cap:
            step = "*"
        elif not _NO_CHANGE.fullmatch(text):
            raise _unknown(model, ast.unparse(node))
        if step:
            steps.append(step)
        known |= set(ast.walk(node))
    if "".join(s for s in steps if s != "scale") not in ("head", "head/tanh*") or ("*" in steps and steps[-1] != "*"):
        raise _unknown(model, "how `logits` is computed could not be followed")
    _check_other_uses(model, tree, known, hidden)
    return scale, (float(cap) if cap else None)


def _statements(tree: ast.AST, conditions: tuple[str, ...] = ()) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """Every statement in order, with the conditions of the `if`s around it."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt):
            yield child, conditions
            inner = (*conditions, ast.unparse(child.test)) if isinstance(child, ast.If) else conditions
            yield from _statements(child, inner)


def _check_other_uses(model: Any, tree: ast.AST, known: set[ast.AST], hidden: str) -> None:
    """Nothing else changes the logits or the hidden states in front of the head: they are only handed on."""
    for node in ast.walk(tree):
        if node in known:
            continue
        changes = isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Attribute, ast.AugAssign))
        renames = isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id == "logits"
        operands = [n.id for n in ast.iter_child_nodes(node) if isinstance(n, ast.Name)]
        if renames or (changes and "logits" in operands and ast.unparse(node) not in ("logits.shape", "logits.device")):
            raise _unknown(model, ast.unparse(node))
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            written = any(ast.unparse(target) == hidden for target in targets)
            if written and not (isinstance(node, ast.Assign) and _LAST_HIDDEN.fullmatch(ast.unparse(node.value))):
                raise _unknown(model, ast.unparse(node))


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
