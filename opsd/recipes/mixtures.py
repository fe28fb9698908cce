"""Recipes of several contexts: composed targets, several teachers, a second pass of the student, hidden layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import Stream, Target, layer_mse

from .base import Losses, TokenRecipe, choice, count, described, flag, fraction, kept, number, positive
from .batch import TokenBatch
from .weights import Sequences, threshold


@dataclass(frozen=True, kw_only=True)
class Purified(TokenRecipe):
    """D_β to p* ∝ p_B·exp(c·tanh(Δ/c)), Δ = ln p_T − ln p_R minus its mean over the vocabulary.

    T reads problem and reference, R the reference alone, B is the initial model without either's help: what the
    reference says by itself is taken out. arXiv 2607.02234. `limit` is c.
    """

    paper, source = "2607.02234", "notes: the paper"
    contexts = ("teacher", "reference", "base")
    beta: float = fraction(0.5)
    limit: float = positive(10.0)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        target = Target(
            linear=[(1.0, teachers["base"])],
            residual=[(1.0, teachers["teacher"]), (-1.0, teachers["reference"])],
            tanh=self.limit,
            centre=True,
        )
        losses, stats = self._divergence(student, target, batch, beta=self.beta)
        return losses, described(stats)


@dataclass(frozen=True, kw_only=True)
class AROPD(TokenRecipe):
    """KL(p*‖S) with p* ∝ p_part·exp(λ·clip(ln p_full − ln p_part, ±c)): an amplified residual of the full trace.

    "teacher" reads the whole trace, "partial" its first half, both a moving average. arXiv 2606.10385. `coefficient`
    is λ, `clip` c (None: no clip).
    """

    paper, source = "2606.10385", "notes: the paper"
    contexts = ("teacher", "partial")
    beta: float = fraction(0.0)
    coefficient: float = number(0.6)
    clip: float | None = positive(5.0, none=True)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        partial = teachers["partial"]
        target = Target(
            linear=[(1.0, partial)],
            residual=[(1.0, teachers["teacher"]), (-1.0, partial)],
            scale=self.coefficient,
            clip=self.clip,
        )
        losses, stats = self._divergence(student, target, batch, beta=self.beta)
        return losses, described(stats)


@dataclass(frozen=True, kw_only=True)
class NCA(TokenRecipe):
    """KL(S(x)‖T(x,c)) + b·KL(sg S(x)‖S(x,c)) over the target's 256 likeliest entries.

    The second term holds the student that reads the context to the one that does not; its stream,
    "privileged_student", is made with a gradient and receives one. arXiv 2606.11627. `coefficient` b = 1 is our
    choice.
    """

    paper, source = "2606.11627", "notes: the paper; coefficient not stated"
    contexts = ("teacher", "privileged_student")
    coefficient: float = number(1.0)
    top_k: int | None = count(256, none=True)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        losses, stats = self._divergence(student, teachers["teacher"], batch, beta=1.0, top_k=self.top_k)
        if not self.coefficient:
            return losses, described(stats)
        read = teachers["privileged_student"]
        anchor, _ = self._divergence(read, student.detach(), batch, beta=0.0, top_k=self.top_k)
        return losses + self.coefficient * anchor, described(stats) | {"anchor": anchor}


@dataclass(frozen=True, kw_only=True)
class MADOPD(TokenRecipe):
    """Multi-agent debate: Σ_k w_k·D_β(p_k, p_S), w = softmax(confidence/100/τ) over the teachers.

    Each teacher, "teacher_1" and so on, reads the debate's transcript. arXiv 2605.01347; β 0.5 for agents, 1 for
    code. At β 1 over the whole vocabulary the teachers are mixed geometrically, in one divergence of the same
    gradient; its value is lower by −ln Σ_v Π_k p_k^{w_k}, which the student cannot change. With `top_k` each teacher
    has its own entries. A confidence of −inf is a missing teacher: its weight goes to the others. `temperature` is τ.
    """

    paper, source = "2605.01347", "primary: official code chiefovoavicii/MAD-OPD, mad_opd_core.py"
    needs = ("confidence",)
    number_of_teachers: int = count(2)
    beta: float = fraction(0.5)
    temperature: float = positive(1.0)
    top_k: int | None = count(None)

    @property
    def contexts(self) -> Any:
        return tuple(f"teacher_{k}" for k in range(1, self.number_of_teachers + 1))

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        confidence = batch.confidence
        assert confidence is not None
        if confidence.shape[1] != self.number_of_teachers:
            got, wanted = tuple(confidence.shape), (len(confidence), self.number_of_teachers)
            raise ValueError(f"batch.confidence is of shape {got}; accepted: {wanted}, one column for each teacher")
        streams = [teachers[name] for name in self.contexts]
        weights = list(torch.softmax(confidence / 100 / self.temperature, 1).unbind(1))
        named = {f"weight_{name}": weight for name, weight in zip(self.contexts, weights, strict=True)}
        if self.beta == 1 and self.top_k is None:
            target = Target(linear=list(zip(weights, streams, strict=True)))
            losses, stats = self._divergence(student, target, batch, beta=1.0)
            return losses, described(stats) | named
        losses = student.hidden.new_zeros(())
        found: dict[str, Tensor] = {}
        for weight, stream in zip(weights, streams, strict=True):
            own, stats = self._divergence(student, stream, batch, beta=self.beta, top_k=self.top_k)
            losses = losses + kept(weight * own, weight > 0)
            shared = described(stats)
            for name in ("divergence", "teacher_entropy"):
                shared[name] = kept(weight * shared[name], weight > 0) + found.get(name, 0.0)
            found = {name: value for name, value in shared.items() if name != "teacher_logprob"}
        return losses, found | named


@dataclass(frozen=True, kw_only=True)
class OPRD(TokenRecipe):
    """Representation distillation: the mean over layer pairs of weight·‖h_S − h_T‖²/d.

    `batch.layers` has the pairs; the losses of positions before the `last` ones of each rollout are 0 (None: all
    positions count). No head takes part. arXiv 2606.06021.
    """

    paper, source = "2606.06021", "notes: the paper"
    contexts = ()
    needs = ("layers",)
    last: int | None = count(None)

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        assert batch.layers is not None
        losses = layer_mse(batch.layers)
        if self.last is None:
            return losses, {"divergence": losses}
        sequences = Sequences.of(batch.sequence_ids)
        mask = sequences.position >= sequences.length - self.last
        return kept(losses, mask), {"divergence": losses, "mask": mask}


@dataclass(frozen=True, kw_only=True)
class EDGE(TokenRecipe):
    """−1[l_r > l_x]·(l_r − l_S)·log p_S(y) + a·KL(S‖B): evidence from the reference alone, and an anchor.

    l_r is log p_T(y) with the reference read ("teacher"), l_x without ("plain"), B the initial model ("base").
    arXiv 2605.23493. The anchor's direction is our choice (`anchor="reverse"`), `coefficient` a. `live_teacher`: the
    teacher has the student's own weights, so that l_x is l_S and "plain" is not needed.
    """

    paper, source = "2605.23493", "notes: the paper; direction of the anchor's KL not stated"
    coefficient: float = number(0.05)
    anchor: str = choice("reverse", "forward")
    live_teacher: bool = flag(False)

    @property
    def contexts(self) -> Any:
        return ("teacher", "base") if self.live_teacher else ("teacher", "plain", "base")

    def _losses(self, student: Stream, teachers: Mapping[str, Stream], batch: TokenBatch) -> Losses:
        logprob = self._logprob(student, batch)
        own = logprob.detach()
        read = {name: teachers[name] for name in self.contexts if name != "base"}
        constants = self._statistics(read, batch)
        reference = constants["teacher"]["logprob"]
        plain = own if self.live_teacher else constants["plain"]["logprob"]
        weight = kept(reference - own, threshold(reference - plain, 0.0))
        stats = {"weight": weight, "student_logprob": own, "teacher_logprob": reference}
        losses = -weight * logprob
        if not self.coefficient:
            return losses, stats
        beta = 1.0 if self.anchor == "reverse" else 0.0
        anchor, _ = self._divergence(student, teachers["base"], batch, beta=beta)
        return losses + self.coefficient * anchor, stats | {"anchor": anchor}
