"""What the two contexts thought of each token of one rollout: the numbers behind the report's token view."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opsd import distributed
from opsd.models import autocast
from opsd.prompts import Example
from opsd.rollouts import Rollout
from opsd.run import Run
from opsd.scoring import rollout_hidden
from opsd_kernels import Head
from opsd_kernels.gemm import Products, accumulation_dtype
from opsd_kernels.objective import LogitTransform
from opsd_kernels.probe import evaluating
from opsd_kernels.reference import entries, log_softmax, transformed

LIKELIEST = 5
"""How many of each distribution's likeliest tokens are alternatives."""

NEGLIGIBLE = 1e-4
"""Alternatives below this for both are left out: a peaked distribution's fifth candidate means nothing."""

MAX_ROWS, MAX_ELEMENTS = 64, 1 << 22
"""Rows of dense logits held at a time, and rows times vocabulary: a (rows, V) tensor in float64 stays below 32 MiB."""


@torch.no_grad()
def token_view(run: Run, example: Example, rollout: Rollout) -> list[dict[str, Any]]:
    """For each token of `rollout`, in order and ready for JSON:

    - `text`: joined, the texts are the rollout's text. Where several tokens make up one character, the last of them has
      it and those before it have none.
    - `id`
    - `p_student`, `p_teacher`: probability of the token in the student's and in the teacher's context, at
      `objective.temperature`.
    - `divergence`: nats, over the whole vocabulary and before clips, as in the metrics; None where it is infinite. For
      the form sampled_token, whose own estimate of it is a single term, the reverse KL divergence it estimates.
    - `alternatives`: [text, p_student, p_teacher] of the tokens among the 5 likeliest of either, the likeliest first;
      without those that neither gives 0.0001.
    - `dominant`: [text, term, p_student, p_teacher], the vocabulary entry with the largest term of the divergence, the
      term None where it is infinite.

    Numbers have four significant digits. The weights are as they are now, dropout off; modes are left as they were, and
    only a few tokens' logits exist at a time. Empty where the teacher is no model here.
    """
    if not rollout.ids or run.teacher.source is None:  # what a teacher that is no model here thought of all others
        return []
    with autocast(run.config.model, run.device):
        teacher_hidden = run.teacher.hidden([example.teacher], [rollout.ids])
        with evaluating(run.model):
            student_hidden = rollout_hidden(run.model, [example.student], [rollout.ids])
    student, teacher = run.head, run.teacher.head
    vocab = min(student.weight.shape[0], teacher.weight.shape[0], student.valid_vocab or teacher.weight.shape[0])
    words = _Words(run.tokenizer, rollout.ids)
    texts = words.pieces()
    rows = max(1, min(MAX_ROWS, MAX_ELEMENTS // vocab))
    project_s, project_t = _projection(run, student, vocab), _projection(run, teacher, vocab)
    view: list[dict[str, Any]] = []
    for start in range(0, len(rollout.ids), rows):
        chunk = slice(start, start + rows)
        log_s, log_t = project_s(student_hidden[chunk]), project_t(teacher_hidden[chunk])
        numbers = _numbers(run, log_s, log_t, rollout.ids[chunk])
        for text, token, number in zip(texts[chunk], rollout.ids[chunk], numbers, strict=True):
            view.append(_entry(words, text, token, number))
    return view


def _projection(run: Run, head: Head, vocab: int) -> Callable[[Tensor], Tensor]:
    """From (rows, H) hidden states to (rows, vocab) float64 log-probabilities, projected in the types of the loss."""
    compute = torch.bfloat16 if run.config.model.autocast == "bfloat16" else head.weight.dtype
    wide = accumulation_dtype(compute)
    weight = distributed.full(head.weight)[:vocab].to(compute)  # converted once, if at all
    bias = head.options()["bias"]
    bias = None if bias is None else distributed.full(bias)[:vocab].to(wide)
    products = Products("torch", weight.device, compute, budget=0)
    transform = LogitTransform(head.logit_scale, None if head.softcap == math.inf else head.softcap)

    def log_probabilities(hidden: Tensor) -> Tensor:
        logits = torch.empty(hidden.shape[0], vocab, dtype=wide, device=hidden.device)
        products.project(logits, hidden.to(compute), weight, bias)
        return log_softmax(transformed(logits.double(), transform, run.config.objective.temperature))

    return log_probabilities


def _numbers(run: Run, log_s: Tensor, log_t: Tensor, ids: Sequence[int]) -> list[dict[str, Any]]:
    """For each row the token's two probabilities, the divergence, its largest term, and the alternatives' ids."""
    objective = run.config.objective
    beta = 1.0 if objective.form == "sampled_token" else objective.beta
    terms, infinite = entries(log_s, log_t, beta)
    terms = terms.masked_fill(infinite, math.inf)
    largest = terms.argmax(-1, keepdim=True)
    k = min(LIKELIEST, log_s.shape[1])
    targets = torch.tensor(ids, device=log_s.device).unsqueeze(-1)
    # the token, the entry that dominates, the student's likeliest, the teacher's likeliest
    chosen = torch.cat([targets, largest, log_s.topk(k).indices, log_t.topk(k).indices], -1)
    columns = {
        "ids": chosen,
        "student": log_s.gather(-1, chosen).exp(),
        "teacher": log_t.gather(-1, chosen).exp(),
        "divergence": terms.sum(-1),
        "term": terms.gather(-1, largest).squeeze(-1),
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    return [{name: values[row] for name, values in lists.items()} for row in range(len(ids))]


def _entry(words: _Words, text: str, token: int, number: dict[str, Any]) -> dict[str, Any]:
    candidates = list(zip(number["ids"], number["student"], number["teacher"], strict=True))
    (_, p_student, p_teacher), (dominant, dominant_s, dominant_t) = candidates[:2]
    alternatives = {i: (s, t) for i, s, t in candidates[2:] if max(s, t) >= NEGLIGIBLE}
    order = sorted(alternatives, key=lambda i: -max(alternatives[i]))
    return {
        "text": text,
        "id": token,
        "p_student": _rounded(p_student),
        "p_teacher": _rounded(p_teacher),
        "divergence": _rounded(number["divergence"]),
        "alternatives": [[words.alone(i), *map(_rounded, alternatives[i])] for i in order],
        "dominant": [words.alone(dominant), *map(_rounded, (number["term"], dominant_s, dominant_t))],
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


class _Words:
    """The text of tokens, within a rollout and on their own."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(ids)
        # Some tokenizers drop a leading space from the first token they decode, so one stands before it.
        self.anchor = next((i for i in self.ids if self._decode([i]) and "\ufffd" not in self._decode([i])), None)
        self.known: dict[int, str] = {}

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self) -> list[str]:
        """One text for each token of the rollout; empty where a character is complete only with a later token."""
        texts, before, done = [], 0, 0  # what is decoded together starts one piece earlier, for its spaces
        for end in range(1, len(self.ids) + 1):
            old, new = self._decode(self.ids[before:done]), self._decode(self.ids[before:end])
            waits = new.endswith("\ufffd") and end < len(self.ids)
            texts.append("" if waits else new[len(old) :])
            if not waits:
                before, done = done, end
        return texts

    def alone(self, token: int) -> str:
        """The text of any token of the vocabulary, with its leading space if it has one."""
        if token not in self.known:
            text = self._decode([token])
            if self.anchor is not None:
                first, both = self._decode([self.anchor]), self._decode([self.anchor, token])
                text = both[len(first) :] if both.startswith(first) else text
            self.known[token] = text
        return self.known[token]
