"""Primitives of the family around On-Policy Self-Distillation, over several constant streams: no logits are held.

A stream is one context's rows and the head that reads them. From streams come log-probabilities, statistics, and the
divergence of one with a gradient to a target mixed of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks
from .fused_linear import Inputs
from .losses import (
    TokenStats,
    compute_dtype,
    constant,
    loss_of,
    make_spec,
    token_logprobs,
    top_k_logprobs,
    whole,
)
from .mixture import Mixture, Part
from .objective import LogitTransform, Objective, number, positive
from .rows import Column
from .rows.torch_backend import transformed
from .tokens import Tokens

VALUES = ("kl", "ce")
LOOKED_UP = 1 << 24  # elements of the head that are gathered at a time


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows of one context and the head that reads them: p = softmax(z / temperature) over the columns below
    valid_vocab, with z = softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap)."""

    hidden: Tensor  #: (N, H) floating, the head's input
    weight: Tensor  #: (V, H)
    bias: Tensor | None = None  #: (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    valid_vocab: int | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `token_logprobs` and `top_k_logprobs`."""
        names = ("bias", "logit_scale", "softcap", "temperature", "valid_vocab")
        return {name: getattr(self, name) for name in names}

    def detach(self) -> Stream:
        """The same without a gradient."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=constant(self.bias))

    def same_head(self, other: Stream) -> bool:
        """Whether both read their rows alike, so that a mixture of logits is a mixture of rows."""
        same = self.weight is other.weight and self.bias is other.bias
        return same and (self.softcap, self.valid_vocab) == (other.softcap, other.valid_vocab)


@dataclass(frozen=True, eq=False)
class Target:
    """A distribution mixed of constant streams, over the whole vocabulary.

    log target = normalise(Σ a·log p + g(Σ b·log p)), or log Σ w·p, with `linear` [(a, stream)], `residual`
    [(b, stream)] and `arithmetic` [(w, stream)], the last alone. Each factor is a number or an (N,) tensor; w ≥ 0.
    g(x) = scale·x, scale·clip(x, −c, c) with `clip` c, or scale·c·tanh(x / c) with `tanh` c. `centre`: the residual
    loses its mean over the vocabulary first, so that normalisers cancel.
    """

    linear: Sequence[tuple[float | Tensor, Stream]] = ()
    residual: Sequence[tuple[float | Tensor, Stream]] = ()
    arithmetic: Sequence[tuple[float | Tensor, Stream]] = ()
    scale: float = 1.0
    clip: float | None = None
    tanh: float | None = None
    centre: bool = False

    @property
    def streams(self) -> list[Stream]:
        return [stream for _, stream in (*self.linear, *self.residual, *self.arithmetic)]


def divergence(
    student: Stream,
    target: Stream | Target,
    *,
    beta: float = 0.5,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    top_k: int | None = None,
    top_k_from: str = "teacher",
    tail_bucket: bool = False,
    value: str = "kl",
    target_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """The divergence of each token between a student with a gradient and a constant target, as in `jsd_loss`.

    Products with a head (one forward; the gradient's are the student's own): one for the student, one for each stream
    of the target, but one for all streams of a sum that share the head without a softcap. In bfloat16 and float16 such
    a sum of `linear` streams costs two, its rounding error being a row of its own: one rounded row would drown a small
    gap between contexts. A residual is a small difference and keeps one.

    Args:
        student: its hidden, weight and bias receive gradients where they require them.
        target: a stream or a `Target`, all of N rows and one vocabulary.
        value: "kl", or with beta 0 "ce": the cross-entropy KL(p_T‖p_S) + H(p_T), of the same gradient.
        target_ids: (N,) int64, for the statistics' log-probabilities.
        mask: (N,) bool, True where a token counts; others cost nothing.
        The rest as for `jsd_loss`.

    Returns:
        (losses (N,), TokenStats), float32 (float64 for float64 input); "teacher" in the statistics is the target.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is accepted, before any work is done.
    """
    gather = _Gather()
    student = gather("student", student)
    _check_stream("student", student)
    if value not in VALUES or (value == "ce" and beta != 0):
        raise ValueError(f"value must be 'kl', or 'ce' with beta 0, got {value!r} with beta {beta!r}")
    target = _checked(Target(linear=[(1.0, target)]) if isinstance(target, Stream) else target, student, gather)
    alone = target.streams[0] if len(target.streams) == 1 and not target.residual else None
    if alone is not None and (target.arithmetic or target.linear[0][0] == 1.0):
        scale = student.temperature / alone.temperature  # both are divided by the student's
        transform = alone.logit_scale * scale, math.inf if alone.softcap is None else alone.softcap * scale
        own = alone.weight is student.weight and alone.bias is student.bias
        inputs = Inputs(
            student.hidden, student.weight, student.bias,
            teacher=alone.hidden.detach(),
            teacher_weight=None if own else alone.weight.detach(),
            teacher_bias=constant(alone.bias),
        )  # fmt: skip
        mixture = None
    else:
        mixture, tensors = _planned(target, student)
        transform = 1.0, math.inf
        inputs = Inputs(student.hidden, student.weight, student.bias, mixed=tensors)
    objective = Objective.checked(
        beta=beta, temperature=student.temperature, entry_clip=entry_clip, token_clip=token_clip, top_k=top_k,
        top_k_from=top_k_from, tail_bucket=tail_bucket, logit_scale=student.logit_scale, softcap=student.softcap,
        teacher_logit_scale=transform[0], teacher_softcap=transform[1],
    )  # fmt: skip
    sizes = {"student.weight": student.weight.shape[0]}
    sizes |= {f"the weight of stream {i} of target": s.weight.shape[0] for i, s in enumerate(target.streams)}
    valid = [s.valid_vocab for s in (student, *target.streams) if s.valid_vocab is not None]
    vocab = checks.vocabulary(min(valid, default=None), sizes)
    if not valid and len(set(sizes.values())) > 1:
        raise ValueError(f"target must have student.weight's number of rows, or valid_vocab, got {sizes}")
    checks.support(objective, vocab)
    spec = make_spec(
        "divergence", objective, student.hidden, vocab, backend, workspace_bytes, None, columns=len(Column)
    )
    spec = replace(spec, mixture=mixture)
    tokens = Tokens.checked(student.hidden, spec.accumulate, mask=mask, target_ids=target_ids, reduction="none")
    losses, stats = loss_of(inputs, spec, tokens, True)
    return (losses + stats.teacher_entropy if value == "ce" else losses), stats


def logprob(
    stream: Stream,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """`token_logprobs` of a stream: (N,) log p(target), with a gradient where its tensors require one."""
    stream = _Gather()("stream", stream)
    _check_stream("stream", stream)
    options: Any = {"mask": mask, "backend": backend, "workspace_bytes": workspace_bytes}
    found = token_logprobs(stream.hidden, stream.weight, target_ids, **stream.options(), **options)
    assert isinstance(found, Tensor)  # the entropy was not asked for
    return found


@torch.no_grad()
def statistics(
    streams: Mapping[str, Stream],
    target_ids: Tensor,
    *,
    top_k: int | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Constants of each stream, by its name: "logprob" of the target and "entropy", (N,) each in nats.

    With `top_k` k also "top_k_ids" and "top_k_logprobs", (N, k) each and likeliest first, "top_k_entropy" (N,), the
    entropy of the k renormalised, and "logsumexp" (N,), of the tempered logits, at one more product.
    """
    found = {}
    options: Any = {"backend": backend, "workspace_bytes": workspace_bytes}
    gather = _Gather()
    for name, stream in streams.items():
        stream = gather(f"streams[{name!r}]", stream)
        _check_stream(f"streams[{name!r}]", stream)
        head = {**stream.options(), **options}
        logprobs, entropy = token_logprobs(stream.hidden, stream.weight, target_ids, return_entropy=True, **head)
        found[name] = {"logprob": logprobs, "entropy": entropy}
        if top_k is not None:
            logs, ids, log_z = top_k_logprobs(stream.hidden, stream.weight, top_k, **head)
            own = logs.log_softmax(-1)
            found[name] |= {"top_k_ids": ids, "top_k_logprobs": logs, "logsumexp": log_z}
            found[name]["top_k_entropy"] = -(own.exp() * own.masked_fill(own == -torch.inf, 0.0)).sum(-1)
    return found


@torch.no_grad()
def logits_at(stream: Stream, ids: Tensor) -> Tensor:
    """The tempered logits of a few tokens of each row: ids (N, k) int64 in [0, V) → (N, k), by looking up their rows of
    the head."""
    stream = _Gather()("stream", stream)
    _check_stream("stream", stream)
    checks.int64("ids", ids)
    checks.shape("ids", ids, (stream.hidden.shape[0], None), "(N, k), N of the stream's rows")
    dtype = torch.float64 if stream.hidden.dtype == torch.float64 else torch.float32
    out = torch.empty(ids.shape, dtype=dtype, device=ids.device)
    step = max(1, LOOKED_UP // max(1, ids.shape[1] * stream.hidden.shape[1]))
    for start in range(0, ids.shape[0], step):
        some = ids[start : start + step]
        rows = stream.hidden[start : start + step].to(dtype).unsqueeze(-1)
        z = torch.bmm(stream.weight[some].to(stream.hidden.dtype).to(dtype), rows).squeeze(-1)
        if stream.bias is not None:
            z = z + stream.bias[some]
        transform = LogitTransform(stream.logit_scale, stream.softcap)
        out[start : start + step] = transformed(z, transform, stream.temperature)
    return out


@torch.no_grad()
def union_kl(
    teacher: Stream, student: Stream, k: int, *, backend: str = "auto", workspace_bytes: int | None = None
) -> Tensor:
    """(N,) KL(p_T‖p_S) on the union of both models' k likeliest tokens, each renormalised there; a constant."""
    options: Any = {"backend": backend, "workspace_bytes": workspace_bytes}
    found = [top_k_logprobs(s.hidden, s.weight, k, **s.options(), **options)[1] for s in (teacher, student)]
    return kl_at(teacher, student, torch.cat(found, 1))


@torch.no_grad()
def kl_at(teacher: Stream, student: Stream, ids: Tensor) -> Tensor:
    """(N,) KL(p_T‖p_S) on the tokens `ids` (N, k) int64 of each row, each once, both renormalised there; a constant."""
    ids, _ = ids.sort(-1)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    log_t, log_s = (logits_at(s, ids).masked_fill(again, -torch.inf).log_softmax(-1) for s in (teacher, student))
    return (log_t.exp() * (log_t - log_s).masked_fill(again, 0.0)).sum(-1)


@torch.no_grad()
def top_k_mass(
    teacher: Stream, student: Stream, k: int, *, backend: str = "auto", workspace_bytes: int | None = None
) -> Tensor:
    """(N,) probability that the teacher gives to the student's k likeliest tokens, a constant."""
    options: Any = {"backend": backend, "workspace_bytes": workspace_bytes}
    _, ids, _ = top_k_logprobs(student.hidden, student.weight, k, **student.options(), **options)
    _, _, log_z = top_k_logprobs(teacher.hidden, teacher.weight, 1, **teacher.options(), **options)
    return mass_at(teacher, ids, log_z)


@torch.no_grad()
def mass_at(stream: Stream, ids: Tensor, logsumexp: Tensor) -> Tensor:
    """(N,) probability of the tokens `ids` (N, k) int64, none twice; `logsumexp` (N,) is of the tempered logits."""
    return (logits_at(stream, ids) - logsumexp.unsqueeze(-1)).exp().sum(-1)


def layer_mse(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """(N,) mean over the pairs (student (N, d), constant teacher (N, d), weight) of weight·‖student − teacher‖² / d.

    Raises:
        ValueError: there is no pair, or the shapes of one differ.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one (student, teacher, weight), got none")
    total: Any = 0.0
    for i, (student, teacher, weight) in enumerate(pairs):
        checks.floating(f"pairs[{i}][0]", student)
        checks.shape(f"pairs[{i}][1]", teacher, tuple(student.shape), "that of the student's")
        total = total + weight * (student - teacher.detach()).square().mean(-1)
    return total / len(pairs)


class _Gather:
    """Streams whose heads are whole: a head that FSDP2 has sharded is gathered once for all that share it."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, Any]] = {}  # by the identity of what is kept beside it

    def __call__(self, name: str, stream: Any) -> Stream:
        if not isinstance(stream, Stream):
            raise TypeError(f"{name} must be an opsd_kernels.Stream, got {type(stream).__name__}")
        weight, bias = self._whole(stream.weight), self._whole(stream.bias)
        if weight is stream.weight and bias is stream.bias:
            return stream
        return self._once(stream, lambda: replace(stream, weight=weight, bias=bias))

    def _whole(self, tensor: Any) -> Any:
        return self._once(tensor, lambda: whole(tensor)) if checks.is_dtensor(tensor) else tensor

    def _once(self, given: Any, make: Callable[[], Any]) -> Any:
        if id(given) not in self.made:
            self.made[id(given)] = (given, make())
        return self.made[id(given)][1]


def _check_stream(name: str, stream: Stream, like: Stream | None = None) -> None:
    checks.projection(f"{name}.hidden", stream.hidden, stream.weight, stream.bias)
    checks.shape(f"{name}.hidden", stream.hidden, (None, None), "(N, H)")
    for option in ("temperature", "logit_scale"):
        positive(f"{name}.{option}", getattr(stream, option))
    if stream.softcap is not None:
        positive(f"{name}.softcap", stream.softcap)
    if like is not None:
        checks.shape(f"{name}.hidden", stream.hidden, (like.hidden.shape[0], None), "the student's N rows")
        checks.same_device(like.hidden, **{f"{name}.hidden": stream.hidden})


def _checked(target: Any, student: Stream, gather: _Gather) -> Target:
    """`target` with whole heads, every factor a number or an (N,) tensor; raises where it is no target."""
    if not isinstance(target, Target):
        raise TypeError(f"target must be an opsd_kernels.Stream or Target, got {type(target).__name__}")
    if bool(target.arithmetic) == bool(target.linear or target.residual):
        raise ValueError("target must have arithmetic streams alone, or linear and residual ones")
    if target.clip is not None and target.tanh is not None:
        raise ValueError("target must have clip or tanh, got both")
    for name in ("clip", "tanh"):
        if getattr(target, name) is not None:
            positive(f"target.{name}", getattr(target, name))
    number("target.scale", target.scale, "a finite number", low=-1e300, high=1e300)
    lowest = {"linear": -1e300, "residual": -1e300, "arithmetic": 0.0}
    roles: dict[str, Any] = {role: [] for role in lowest}
    for role, low in lowest.items():
        for i, (factor, given) in enumerate(getattr(target, role)):
            name = f"target.{role}[{i}]"
            stream = gather(name, given)
            _check_stream(name, stream, student)
            roles[role].append((factor, stream))
            if isinstance(factor, Tensor):
                checks.floating(f"{name}'s factor", factor)
                checks.shape(f"{name}'s factor", factor, (student.hidden.shape[0],), "(N,)")
            else:
                number(f"{name}'s factor", factor, f"an (N,) tensor or a number >= {low:g}", low=low, high=1e300)
    return replace(target, **roles)


def _planned(target: Target, student: Stream) -> tuple[Mixture, list[Tensor]]:
    """The products that make `target`, and the tensors that they speak of."""
    plan = _Plan(student)
    linear, residual = list(target.linear), list(target.residual)
    for factor, stream in target.arithmetic:
        plan.add("arithmetic", factor, stream)
    bound = target.clip if target.tanh is None else target.tanh
    if bound is None:  # g is linear, and what centring takes is a constant of the row, which does not matter: one sum
        linear, residual = linear + [(target.scale * b, stream) for b, stream in residual], []
    for group in _by_head(linear):
        plan.add_sum("linear", group, exact=True)
    if residual and not target.centre:
        if _is_difference(target):
            plan.add_sum("difference", residual)
        else:
            for factor, stream in residual:
                plan.add("residual", factor, stream)
    else:
        for group in _by_head(residual):
            plan.add_sum("residual", group)
    return Mixture(tuple(plan.parts), float(target.scale), bound, target.tanh is not None, target.centre), plan.tensors


def _is_difference(target: Target) -> bool:
    """Whether the residual is log p_F − log p_P, P being all of the linear part: F's normaliser follows from P's."""
    if len(target.residual) != 2 or len(target.linear) != 1:
        return False
    (a, base), ((b, full), (c, part)) = target.linear[0], target.residual
    factors = [x for x in (a, b, c) if isinstance(x, Tensor)]
    plain = base.softcap is None and full.same_head(base)
    return not factors and (a, b, c) == (1, 1, -1) and part is base and plain


def _by_head(terms: Sequence[tuple[float | Tensor, Stream]]) -> list[list[tuple[float | Tensor, Stream]]]:
    """The terms in groups that one product may serve."""
    groups: list[list[tuple[float | Tensor, Stream]]] = []
    for term in terms:
        for group in groups:
            if group[0][1].same_head(term[1]) and term[1].softcap is None:
                group.append(term)
                break
        else:
            groups.append([term])
    return groups


class _Plan:
    """Parts of a mixture, and their tensors, each once."""

    def __init__(self, student: Stream):
        self.student = student
        self.parts: list[Part] = []
        self.given: list[Tensor] = []
        self.compute = compute_dtype(student.hidden)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.given]

    def place(self, tensor: Tensor | None, own: Tensor | None = None) -> int:
        if tensor is None:
            return -2
        if tensor is own:
            return -1
        for i, known in enumerate(self.given):
            if known is tensor:
                return i
        self.given.append(tensor)
        return len(self.given) - 1

    def head(self, stream: Stream) -> dict[str, int]:
        own = self.student
        return {"weight": self.place(stream.weight, own.weight), "bias": self.place(stream.bias, own.bias)}

    def add(self, role: str, factor: float | Tensor, stream: Stream) -> None:
        """One stream as one product."""
        by_token = isinstance(factor, Tensor)
        self.parts.append(
            Part(
                role,
                self.place(stream.hidden),
                **self.head(stream),
                factor=1.0 if by_token else float(factor),
                factors=self.place(factor) if isinstance(factor, Tensor) else -2,
                logit_scale=stream.logit_scale,
                softcap=stream.softcap,
                temperature=stream.temperature,
            )
        )

    def add_sum(self, role: str, group: Sequence[tuple[float | Tensor, Stream]], *, exact: bool = False) -> None:
        """Several streams under one head as one product with the sum of their rows; `exact`: two where one would round
        away what the sum is for."""
        narrow = self.compute in (torch.bfloat16, torch.float16)
        if len(group) == 1 or (exact and narrow and len(group) == 2):  # two products either way
            for factor, stream in group:
                self.add(role, factor, stream)
            return
        wide = torch.float64 if self.compute == torch.float64 else torch.float32
        rows: Any = 0.0
        constants: Any = 0.0
        for factor, stream in group:
            scaled = factor * stream.logit_scale / stream.temperature
            constants = constants + scaled
            by_row = scaled.detach().unsqueeze(-1) if isinstance(scaled, Tensor) else scaled
            rows = rows + stream.hidden.detach().to(wide) * by_row
        by_token = isinstance(constants, Tensor)
        head = self.head(group[0][1])
        high = rows.to(self.compute)
        self.parts.append(
            Part(
                role,
                self.place(high),
                **head,
                bias_factor=1.0 if by_token else float(constants),
                bias_factors=self.place(constants) if by_token else -2,
            )
        )
        if exact and narrow:
            low = (rows - high.to(wide)).to(self.compute)
            self.parts.append(Part(role, self.place(low), head["weight"], -2))
