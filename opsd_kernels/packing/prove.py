"""Whether packed rows do give what plain passes of a model give: tried on a few tokens, once per model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..probe import as_computed, no_trial, tolerance, undisturbed, warn_unproven
from .attention import Pass, register
from .joint import run_joint
from .layout import DualContextBatch, pack_dual_context
from .switches import adapters_off, attention_named
from .vet import Body, trial_length


class Trial(NamedTuple):
    """What came of a trial: nothing, if it went well."""

    refusal: str | None = None  #: what disagrees, with the numbers
    untried: str | None = None  #: why the model could not be run


_found: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Any, int, Trial]]] = weakref.WeakKeyDictionary()
_SHORT = 18  # tokens of a trial's contexts, unless a window is longer


def try_rows(body: Body, longest: int = 0) -> Trial:
    """Whether the packed rows of either context give the hidden states of separate plain passes; with one context
    beyond each of the model's windows that contexts of `longest` tokens reach the end of."""
    length = trial_length(body.text, longest, _SHORT)
    return _once(body, "rows", lambda batch: _rows(body, batch), length)


def try_joint(body: Body, *, base_teacher: bool) -> Trial:
    """Whether the joint pass does, and the student's recomputed rows give the gradients of plain passes."""
    return _once(body, "joint, base" if base_teacher else "joint", lambda batch: _joint(body, batch, base_teacher))


def _once(body: Body, name: str, attempt: Any, length: int = _SHORT) -> Trial:
    """`attempt` on a small batch, or what came of it before, if the model still has the same settings and no context
    was shorter than `length`."""
    known = _found.setdefault(body.lm, {})
    key = body.settings
    if name not in known or known[name][0] != key or known[name][1] < length:
        untried = no_trial(body.lm)
        if untried:
            warn_unproven("whether packed rows serve the attention", body.lm, untried)
            trial = Trial(untried=untried)
        else:
            register()
            with undisturbed(body.model, body.device):
                trial = _tried(body, attempt, length)
        known[name] = (key, length, trial)
    return known[name][2]


def _tried(body: Body, attempt: Any, length: int) -> Trial:
    refusal = _attempt(attempt, _small_batch(body, _SHORT))
    if refusal or length == _SHORT:
        return Trial(refusal)
    try:
        return Trial(_attempt(attempt, _small_batch(body, length)))
    except torch.OutOfMemoryError:
        return Trial(untried=f"there is no memory for a plain pass over {length} tokens, beyond its windows")


def _attempt(attempt: Any, batch: DualContextBatch) -> str | None:
    try:
        return attempt(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, ValueError):  # a refusal of our own: once it has named the model
            return text.split(" cannot run on packed rows: ")[-1]
        return f"on a few tokens it raises {type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _small_batch(body: Body, length: int) -> DualContextBatch:
    """A shared prefix in each context, one that the contexts share, and a second prompt, all of ids that exist; and
    where `length` is more than those have, a third prompt with a context of so many tokens."""
    rows = min(body.vocabulary, getattr(body.text, "vocab_size", body.vocabulary))
    ids = [(i + 1) * rows // 20 for i in range(18)]
    students, teachers = [ids[:4], ids[4:6]], [[*ids[:3], *ids[6:10]], ids[10:13]]
    rollouts = [[ids[13:17], ids[15:18]], [ids[2:5]]]
    if length > _SHORT:
        long = [ids[i * i % 17] for i in range(length - 3)]
        students, teachers, rollouts = [*students, long], [*teachers, [*ids[3:8], *long[5:]]], [*rollouts, [ids[6:10]]]
    return pack_dual_context(students, teachers, rollouts).to(body.device)


def _plain(body: Body, batch: DualContextBatch, side: int) -> Tensor:
    """(R, H) by one pass of the model per rollout, with its own attention as its source states it."""
    found = []
    with attention_named(body.configs, "eager"):  # sdpa leaves a softcap out in silence
        for prompt, rollouts in zip(batch._prompts[side], batch._rollouts, strict=True):
            for rollout in rollouts:
                ids = torch.tensor([[*prompt, *rollout[:-1]]], device=body.device)
                out = body.inner(input_ids=ids, use_cache=False).last_hidden_state
                found.append(out[0, len(prompt) - 1 :])
    return as_computed(body.lm, torch.cat(found))


@torch.no_grad()
def _rows(body: Body, batch: DualContextBatch) -> str | None:
    plain = [_plain(body, batch, 0), _plain(body, batch, 1)]
    for want, side, name in zip(plain, (batch.student, batch.teacher), ("student", "teacher"), strict=True):
        packed = Pass(side.layout)
        with attention_named(body.configs):
            rows = body.run(packed, input_ids=side.layout.ids[None]).index_select(0, side.rows)
        got = as_computed(body.lm, rows)
        refusal = _hidden_difference(got, want, batch.sequence_ids, f"the {name}'s packed rows") or _lost_window(
            body, packed
        )
        if refusal:
            return refusal
    return None


def _lost_window(body: Body, packed: Pass) -> str | None:
    """Windows are longer than a trial, so what is seen of them is whether the attention was given them."""
    kinds = getattr(body.text, "layer_types", None)
    window = getattr(body.text, "sliding_window", None)
    expected = kinds.count("sliding_attention") if kinds else 1
    if not window or not getattr(body.text, "use_sliding_window", True) or packed.windows >= expected:
        return None
    return (
        f"its config has a sliding window of {window} in {expected if kinds else 'its'} layers, "
        f"and its attention was given one in {packed.windows}"
    )


@torch.enable_grad()
def _joint(body: Body, batch: DualContextBatch, base_teacher: bool) -> str | None:
    with _counted(body.inner.norm) as uses:
        student = _plain(body, batch, 0)
    passes = sum(len(r) for r in batch._rollouts)
    if len(uses) != passes:
        return (
            f"{type(body.inner).__name__} uses its final norm {len(uses) / passes:g} times, "
            "not once after the last layer"
        )
    with torch.no_grad(), adapters_off(body.model, base_teacher):
        teacher = _plain(body, batch, 1)
    joint = batch.joint(share_contexts=not base_teacher)
    got = [as_computed(body.lm, rows) for rows in run_joint(body, joint, "auto", base_teacher=base_teacher)]
    for have, want, name in zip(got, (student, teacher), ("student", "teacher"), strict=True):
        refusal = _hidden_difference(have.detach(), want.detach(), batch.sequence_ids, f"the {name}'s rows of one pass")
        if refusal:
            return refusal
    return _gradient_difference(body, got[0], student)


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[int]]:
    uses: list[int] = []
    with module.register_forward_pre_hook(lambda *_: uses.append(1)):
        yield uses


def _gradient_difference(body: Body, got: Tensor, want: Tensor) -> str | None:
    """Of a few small parameters of the first layer."""
    trained = sorted((p.numel(), n) for n, p in body.layers[0].named_parameters() if p.requires_grad)[:4]
    parameters: dict[str, Tensor] = dict(body.layers[0].named_parameters())
    chosen = [parameters[name] for _, name in trained]
    if not chosen or not got.requires_grad or not want.requires_grad:
        return None
    weights = torch.linspace(-1, 1, want.numel(), device=want.device).to(want.dtype).view_as(want)
    ours, plain = (
        torch.autograd.grad((h * weights).sum(), chosen, allow_unused=True, materialize_grads=True) for h in (got, want)
    )
    for (_, name), mine, theirs in zip(trained, ours, plain, strict=True):
        error, size = float((mine - theirs).double().norm()), float(theirs.double().norm())
        if not error <= 10 * rounding(want.dtype) * size + 1e-12:
            return (
                f"on a few tokens the gradient of {type(body.layers[0]).__name__}.{name} is off by {error:.3g} "
                f"of {size:.3g} in one pass over both contexts"
            )
    return None


def rounding(dtype: torch.dtype) -> float:
    """The relative error of a row that is rounding alone: several percent in a deep model of 16 bits."""
    return 0.1 if dtype in (torch.float16, torch.bfloat16) else tolerance(dtype)


def _hidden_difference(got: Tensor, want: Tensor, sequence_ids: Tensor, what: str) -> str | None:
    """Where `got` is not `want`, both (R, H). By rollouts: in 16 bits a router may send single rows elsewhere."""
    limit = rounding(want.dtype)
    errors = (got - want).double().norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)
    errors = errors.nan_to_num(torch.inf)
    for sequence in sequence_ids.unique().tolist():
        own = errors[sequence_ids == sequence]
        off = float(own.median() if limit == 0.1 else own.max())
        if off > limit:
            row = int((sequence_ids == sequence).nonzero()[int(own.argmax())])
            return (
                f"on a few tokens {what} are not those of a plain pass: row {row} (rollout {sequence}) is off by "
                f"{off:.3g} of its length, accepted: {limit:.3g} in {want.dtype}"
            )
    return None
