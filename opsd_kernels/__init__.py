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
from .streams import Stream, Target, divergence, layer_mse, logits_at, logprob, statistics, top_k_mass, union_kl

__all__ = [
    "DualContextBatch",
    "DualHidden",
    "Head",
    "Stream",
    "Target",
    "TokenStats",
    "divergence",
    "dual_hidden_states",
    "jsd_loss",
    "jsd_loss_from_logits",
    "jsd_loss_from_top_k",
    "layer_mse",
    "lm_head_of",
    "logits_at",
    "logprob",
    "pack_dual_context",
    "statistics",
    "token_logprobs",
    "top_k_logprobs",
    "top_k_mass",
    "union_kl",
]
