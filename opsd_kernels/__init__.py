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

__all__ = [
    "Head",
    "TokenStats",
    "jsd_loss",
    "jsd_loss_from_logits",
    "jsd_loss_from_top_k",
    "lm_head_of",
    "token_logprobs",
    "top_k_logprobs",
]
