"""Sampling from a model: prompts in, verbatim token ids out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opsd.models import causal_lm, evaluating


@dataclass(frozen=True)
class Rollout:
    """What the model wrote: at least one id, the first end token last. `truncated`: it never came to an end token."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; `temperature` 0 is greedy. Nothing else changes the distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    batch_size: int,
    seed: int,
) -> list[Rollout]:
    """One rollout for each prompt, in the order of `prompts`.

    Args:
        model: used in evaluation mode and without gradients; its modes, its generation config and torch's random state
            are left as they were.
        prompts: token ids, padded on the left within a batch.
        end_ids: any of these ends a rollout, which keeps the first one and nothing after it.
        pad_id: fills a batch; may equal an end id, or be any token: positions are told apart, not ids.
        batch_size: prompts generated together, those of similar length with each other.
        seed: of the sampling, with `batch_size` and the prompts the only thing the rollouts depend on.
    """
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rollouts: dict[int, Rollout] = {}
    devices = [device] if device.type == "cuda" else []
    with _own_generation_config(lm), evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = [[pad_id] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
            output = lm.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=_generation_config(sampling, end_ids, pad_id),
            )
            for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
                rollouts[i] = first_end(row, end_ids)
    return [rollouts[i] for i in range(len(prompts))]


def first_end(ids: Sequence[int], end_ids: Sequence[int]) -> Rollout:
    """`ids` up to and including the first of `end_ids`."""
    ends = set(end_ids)
    for position, token in enumerate(ids):
        if token in ends:
            return Rollout(list(ids[: position + 1]), truncated=False)
    return Rollout(list(ids), truncated=True)


def _generation_config(sampling: Sampling, end_ids: Sequence[int], pad_id: int) -> Any:
    from transformers import GenerationConfig

    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # An unset top_k would become the library's default, 50.
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        if sampling.min_p > 0:
            options["min_p"] = sampling.min_p
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,  # even where training turned it off for gradient checkpointing
        **options,
    )


class _own_generation_config:
    """While open, `lm` has no generation config of its own: `generate` fills what a call leaves unset from it, and a
    repetition penalty, say, would make the rollouts something else than samples of the model."""

    def __init__(self, lm: Any):
        self.lm = lm

    def __enter__(self) -> None:
        from transformers import GenerationConfig

        self.saved = self.lm.generation_config
        self.lm.generation_config = GenerationConfig()

    def __exit__(self, *_: object) -> None:
        self.lm.generation_config = self.saved


def derive_seed(*parts: object) -> int:
    """A seed for torch that depends on all of `parts`, the same on every machine."""
    return random.Random("/".join(map(str, parts))).getrandbits(32)
