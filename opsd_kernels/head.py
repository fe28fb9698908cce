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
    """Reads the head of a transformers causal language model (also one wrapped by peft or torch.compile).

    What the model does to its logits is read from the source of its `forward`; softcap (Gemma, nanochat) and constant
    scales (Cohere, Granite, Falcon-H1) are understood.

    Raises:
        TypeError: `model` is no causal language model with an output embedding.
        ValueError: the head is not a plain linear layer (adapters or forward hooks on it, say), or the model does
            something else to its logits; the message quotes it.
    """
    wrapper: Any = _uncompiled(model)
    base = _uncompiled(wrapper.get_base_model()) if hasattr(wrapper, "get_base_model") else wrapper
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers model with an output embedding, got {type(base).__name__}")
    linear = _uncompiled(base.get_output_embeddings())
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"model's output embedding must be a plain torch.nn.Linear, got {type(linear).__name__}: "
            "merge or drop adapters on the head"
        )
    _check_forward(linear)
    logit_scale, softcap = _post_processing(base, linear)
    rows, vocab = linear.weight.shape[0], getattr(base.config.get_text_config(), "vocab_size", None)
    return Head(
        linear.weight,
        linear.bias,
        logit_scale=logit_scale,
        softcap=softcap,
        valid_vocab=vocab if vocab is not None and vocab < rows else None,
    )


def _uncompiled(module: Any) -> Any:
    """The module itself of what torch.compile made of it."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)


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


_LAST_HIDDEN = re.compile(
    r"(\w+\.last_hidden_state|\w+\[0\]|slice_logits_to_keep\([\w.]+, \w+\)"
    r"|hidden_states(\[[^\[\]]*\]|\.to\([^()]*\)))"
)
_CONVERSIONS = ("float", "to", "contiguous")
_TANH = ("torch.tanh", "nn.functional.tanh", "F.tanh")
_SCALE = re.compile(r"self\.(?:\w+\.)*(?:logit_scale|logits_scaling|output_multiplier|lm_head_multiplier)")
_CAP = re.compile(r"self\.(?:\w+\.)*final_logit_softcapping")
_IF_CAPPED = re.compile(_CAP.pattern + r"( is not None)?")


def _post_processing(model: Any, linear: nn.Linear) -> tuple[float, float | None]:
    """(logit_scale, softcap) from the statements of `forward` that write `logits`; raises for any it does not know."""
    tree = _source_of_forward(model)
    known: set[ast.AST] = set()  # the uses of `logits` that are understood
    steps: list[str] = []
    scale, cap, hidden = 1.0, None, ""
    for node, conditions in _statements(tree):
        names = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
        if names != ["logits"] or not isinstance(node, ast.Assign) or ast.unparse(node.value) == "None":
            continue
        capping = all(_IF_CAPPED.fullmatch(c) for c in conditions)
        for step, name in _operations(model, linear, node.value):
            value: Any = _attribute(model, name) if step in ("*", "/") else None
            if step == "head":
                hidden = name
            elif _SCALE.fullmatch(name) and not conditions and type(value) in (int, float):
                scale = scale * value if step == "*" else scale / value
                step = "scale"
            elif _CAP.fullmatch(name) and capping and (step == "/" or value == cap):
                cap = value
            elif step != "tanh" or not capping:
                raise _unknown(model, ast.unparse(node))
            steps.append(step)
        known |= set(ast.walk(node))
    if "".join(s for s in steps if s != "scale") not in ("head", "head/tanh*") or ("*" in steps and steps[-1] != "*"):
        raise _unknown(model, "how `logits` is computed could not be followed")
    _check_other_uses(model, tree, known, hidden)
    return scale, (float(cap) if cap else None)


def _source_of_forward(model: Any) -> ast.AST:
    """Of the one that runs, which may be this instance's own."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(model.forward)))
        return ast.parse(source.replace("lm_logits", "logits"))
    except (OSError, TypeError, SyntaxError) as error:
        raise _unknown(model, f"the source of its forward cannot be read: {error}") from None


def _operations(model: Any, linear: nn.Linear, node: ast.expr) -> Iterator[tuple[str, str]]:
    """What leads from the hidden states, or from `logits`, to the value of `node`, the first first.

    ("head", the name of the hidden states), ("tanh", ""), ("*", the factor) or ("/", the divisor).
    """
    node = _converted(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        yield from _operations(model, linear, node.left)
        yield "*" if isinstance(node.op, ast.Mult) else "/", ast.unparse(node.right)
    elif isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        name = ast.unparse(node.func)
        hidden = _converted(node.args[0])
        hidden = hidden.value if isinstance(hidden, ast.Subscript) else hidden  # some of the positions
        if name in _TANH:
            yield from _operations(model, linear, node.args[0])
            yield "tanh", ""
        elif _uncompiled(_attribute(model, name)) is linear and isinstance(hidden, ast.Name):
            yield "head", hidden.id
        else:
            raise _unknown(model, ast.unparse(node))
    elif not isinstance(node, ast.Name) or node.id != "logits":
        raise _unknown(model, ast.unparse(node))


def _converted(node: ast.expr) -> ast.expr:
    """What `node` is a conversion of: to another dtype or layout, not to other values."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CONVERSIONS:
        node = node.func.value
    return node


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
    """The value of `self.….…`, None if it is anything else."""
    if not re.fullmatch(r"self(\.\w+)+", dotted):
        return None
    value = model
    for name in dotted.split(".")[1:]:
        value = getattr(value, name, None)
    return value


def _unknown(model: Any, what: str) -> ValueError:
    return ValueError(
        f"model does something to its logits that is not understood ({type(model).__name__}: {what}); "
        "build opsd_kernels.Head by hand"
    )
