"""Fused teacher–student divergences over the whole vocabulary that never hold the logits."""

from .head import Head, lm_head_of
from .losses import (
    TokenStats,
    jsd_loss,
    jsd_loss_from_logits,
    jsd_loss_from_top_k,
    token_logprobs,
    top_k_logprobs,
)
from .packing import DualContextBatch, DualHidden, dual_hidden_states, pack_dual_context

__all__ = [
    "DualContextBatch",
    "DualHidden",
    "Head",
    "TokenStats",
    "dual_hidden_states",
    "jsd_loss",
    "jsd_loss_from_logits",
    "jsd_loss_from_top_k",
    "lm_head_of",
    "pack_dual_context",
    "token_logprobs",
    "top_k_logprobs",
]
