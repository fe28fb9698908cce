"""The packed dual-context path: student and privileged teacher as rows without padding."""

from .dual import Plan, context_hidden_states, dual_hidden_states, plan_passes
from .joint import DualHidden
from .layout import DualContextBatch, fill_token_budget, pack_dual_context

__all__ = [
    "DualContextBatch",
    "DualHidden",
    "Plan",
    "context_hidden_states",
    "dual_hidden_states",
    "fill_token_budget",
    "pack_dual_context",
    "plan_passes",
]
