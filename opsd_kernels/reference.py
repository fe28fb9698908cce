"""Dense definitions of the divergences, written like their formulas; every kernel is tested against them in float64.

They hold every logit and are differentiable by autograd: use them to check, not to train.
Conventions: OPSD (arXiv 2601.18734) and the generalised JSD of GKD (arXiv 2306.13649).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .objective import LogitTransform, Objective


def transformed(raw: Tensor, transform: LogitTransform, temperature: float) -> Tensor:
    """softcap·tanh(scale·raw / softcap) / T, with −inf kept as −inf. Shapes (..., V) → (..., V)."""
    masked = raw == -math.inf
    z = raw.masked_fill(masked, 0.0) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return (z / temperature).masked_fill(masked, -math.inf)


def log_softmax(logits: Tensor) -> Tensor:
    """log p over the last dimension; a row that is −inf everywhere stays −inf everywhere, with zero gradient."""
    dead = (logits == -math.inf).all(-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(dead, 0.0), -1).masked_fill(dead, -math.inf)


def entries(log_p_s: Tensor, log_p_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The summands ℓ_v of the divergence, and which of them are infinite (those are given as 0). Shapes (..., V)."""
    no_s, no_t = log_p_s == -math.inf, log_p_t == -math.inf
    log_s, log_t = log_p_s.masked_fill(no_s, 0.0), log_p_t.masked_fill(no_t, 0.0)
    p_s, p_t = log_s.exp().masked_fill(no_s, 0.0), log_t.exp().masked_fill(no_t, 0.0)
    both = ~no_s & ~no_t
    if beta == 0.0:
        return (p_t * (log_t - log_s)).masked_fill(~both, 0.0), no_s & ~no_t
    if beta == 1.0:
        return (p_s * (log_s - log_t)).masked_fill(~both, 0.0), no_t & ~no_s
    m = (1 - beta) * p_s + beta * p_t
    nowhere = no_s & no_t | (m == 0)
    log_m = m.masked_fill(nowhere, 1.0).log()
    terms = beta * p_t * (log_t - log_m) + (1 - beta) * p_s * (log_s - log_m)
    return terms.masked_fill(nowhere, 0.0), torch.zeros_like(no_s)


def restricted(y_s: Tensor, y_t: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Both rows of logits on the top-k support (..., k), with one more entry for the tail if asked (..., k + 1)."""
    assert objective.top_k is not None
    k = min(objective.top_k, y_s.shape[-1])
    chosen = (y_t if objective.top_k_from == "teacher" else y_s).detach().topk(k, dim=-1).indices

    def support(y: Tensor) -> Tensor:
        kept = y.gather(-1, chosen)
        if not objective.tail_bucket:
            return kept
        rest = y.scatter(-1, chosen, -math.inf)
        empty = (rest == -math.inf).all(-1, keepdim=True)
        tail = rest.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf)
        return torch.cat([kept, tail], -1)

    return support(y_s), support(y_t)


def divergence(student_logits: Tensor, teacher_logits: Tensor, objective: Objective) -> Tensor:
    """Per-token loss after the clips, (..., V) × 2 → (...), differentiable in `student_logits` alone."""
    y_s = transformed(student_logits, objective.student, objective.temperature)
    y_t = transformed(teacher_logits.detach(), objective.teacher, objective.temperature)
    if objective.top_k is not None:
        y_s, y_t = restricted(y_s, y_t, objective)
    terms, infinite = entries(log_softmax(y_s), log_softmax(y_t), objective.beta)
    if objective.entry_clip is not None:
        over = infinite | (terms > objective.entry_clip)
        terms = torch.where(over, objective.entry_clip, terms)
        infinite = torch.zeros_like(infinite)
    loss = torch.where(infinite.any(-1), math.inf, terms.sum(-1))
    dead = (y_s == -math.inf).all(-1) | (y_t == -math.inf).all(-1)
    loss = torch.where(dead, 0.0, loss)
    if objective.token_clip is not None:
        loss = torch.where(loss > objective.token_clip, objective.token_clip, loss)
    return loss


def jsd_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    objective: Objective,
    *,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """Per-token loss from hidden states (N, H) and (N, H_t), heads (V, H) and (V, H_t) → (N,); holds all logits."""
    shared = teacher_weight is None
    student = torch.nn.functional.linear(student_hidden, weight, bias)
    with torch.no_grad():
        head, head_bias = (weight, bias) if shared else (teacher_weight, teacher_bias)
        assert head is not None
        teacher = torch.nn.functional.linear(teacher_hidden, head, head_bias)
    return divergence(student, teacher, objective)


def token_logprobs(logits: Tensor, target_ids: Tensor, temperature: float, transform: LogitTransform) -> Tensor:
    """log p(target) at temperature T, (..., V) and (...) int64 → (...), differentiable."""
    log_p = log_softmax(transformed(logits, transform, temperature))
    return log_p.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
