"""Which rollouts a report shows token by token, and what of them goes into the page.

A recorded rollout has a `view`, one entry for each token, as `opsd.token_view` made it in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd.report.read import Record, RunData, finite, tail

MAX_TOKENS = 4096
"""Tokens of one rollout: each is an element of the page."""

MAX_PAGE_TOKENS = 50_000
"""Tokens of all rollouts, about: each takes some 100 to 300 bytes of the page. Long rollouts are therefore fewer."""

_KEYS = ("text", "id", "p_student", "p_teacher", "divergence", "alternatives", "dominant")
"""Of a token, in the order in which the page's script reads them."""


def choose_samples(runs: Sequence[RunData], limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rollouts to show, at most about `limit` spread evenly over each run, and sentences on what is left out."""
    lengths = [min(MAX_TOKENS, len(s["view"])) for run in runs for s in run.samples if isinstance(s.get("view"), list)]
    if lengths and sum(lengths):
        limit = min(limit, MAX_PAGE_TOKENS * len(lengths) // sum(lengths))
    share = max(1, limit // len(runs)) if limit else 0
    samples: list[dict[str, Any]] = []
    notes = []
    for number, run in enumerate(runs):
        total = len(run.samples)
        kept = range(total) if total <= share else {round(i * (total - 1) / max(1, share - 1)) for i in range(share)}
        samples += [_sample(number, run.samples[i]) for i in sorted(kept)]
        steps = {str(run.samples[i].get("step")) for i in range(total) if i not in kept}
        dropped = sorted(steps, key=lambda text: (len(text), text))
        if dropped:
            some = ", ".join(dropped[:12]) + (" …" if len(dropped) > 12 else ".")
            notes.append(f"{run.name}: {len(kept)} of {total} rollouts are here; left out are some of steps {some}")
    if any(sample["of"] > MAX_TOKENS for sample in samples):
        notes.append(f"Of long rollouts the first {MAX_TOKENS:,} tokens are shown.")
    if any(not sample["view"] for sample in samples):
        notes.append("Rollouts without recorded probabilities are shown as plain text.")
    return samples, notes


def _sample(run: int, record: Record) -> dict[str, Any]:
    view = record.get("view")
    tokens = [token for token in view if isinstance(token, dict)] if isinstance(view, list) else []
    return {
        "run": run,
        "step": finite(record.get("step")),
        "source": tail(str(record.get("source") or "")),
        "problem": str(record.get("problem") or ""),
        "rollout": "" if tokens else record["rollout"],
        "tokens": finite(record.get("tokens")),
        "truncated": bool(record.get("truncated")),
        "of": len(tokens),
        "view": [[_plain(token.get(key)) for key in _KEYS] for token in tokens[:MAX_TOKENS]],
    }


def _plain(value: Any) -> Any:
    """`value` without the numbers that JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value
