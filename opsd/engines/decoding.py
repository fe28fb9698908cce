"""Decoding a batch by `generate` in stretches: a prompt is read once for all its rollouts, and those that have ended
leave the batch and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAVING = 8
"""A stretch ends when one in so many rows has ended. To let rows go copies the cache."""

ROOM = 64
"""Tokens for which a cache has room when it has to be made anew."""


class GrowingLayer(DynamicLayer):
    """A cache layer whose keys and values are views of tensors with room for more, so that not each token copies it."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.room: dict[str, Tensor] = {}
        self.keys, self.values = self._with("keys", key_states), self._with("values", value_states)
        return self.keys, self.values

    def _with(self, name: str, new: Tensor) -> Tensor:
        known: Tensor = getattr(self, name)
        length, room = known.shape[2] + new.shape[2], self.room.get(name)
        if room is None or known.data_ptr() != room.data_ptr() or len(known) != len(room) or length > room.shape[2]:
            room = known.new_empty(*new.shape[:2], length + ROOM, new.shape[3])
            room[:, :, : known.shape[2]] = known
            self.room[name] = room
        room[:, :, known.shape[2] : length] = new
        return room[:, :, :length]


class Rows:
    """Which rollouts of a batch the rows of `generate` now are, and which of them have ended. A stopping criterion."""

    def __init__(self, count: int, end_ids: Sequence[int], device: torch.device):
        self.numbers = torch.arange(count, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.ends = torch.tensor(list(end_ids), dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Stops all rows at once, when enough have ended."""
        self.ended |= torch.isin(input_ids[:, -1], self.ends)
        return (self.ended.sum() * LEAVING >= len(self.ended)).expand(len(self.ended))

    def leave(self) -> Tensor:
        """Lets the rows that have ended go; what the others were."""
        kept = (~self.ended).nonzero()[:, 0]
        self.numbers, self.ended = self.numbers[kept], self.ended[kept]
        return kept


def decode(
    lm: Any, prompts: Sequence[Sequence[int]], rows: Rows, processors: LogitsProcessorList, pad_id: int, new: int
) -> list[list[int]]:
    """Up to `new` ids after each prompt, the likeliest by `processors`. What follows an end token is of no meaning.

    `rows` tells `processors` which prompts they are asked about. Where the cache of `lm` cannot be taken apart by rows,
    every row reads its prompt, and all stay to the end.
    """
    cache = _divisible_cache(lm)
    read = list(dict.fromkeys(map(tuple, prompts))) if cache is not None else list(map(tuple, prompts))
    width = max(map(len, read))
    ids = torch.tensor([[pad_id] * (width - len(own)) + list(own) for own in read], device=lm.device)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in read], device=lm.device)

    def generate(most: int, **more: Any) -> Any:
        config = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=pad_id,
            use_cache=True,  # even where training turned it off for gradient checkpointing
            return_dict_in_generate=True,
            output_logits="logits_processor" not in more,
        )
        return lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, past_key_values=cache, **more)

    if cache is None:
        ends = StoppingCriteriaList([lambda *given, **_: rows(*given) & rows.ended.all()])
        ids = generate(new, logits_processor=processors, stopping_criteria=ends).sequences
        return ids[:, width:].tolist()
    logits = generate(1).logits[0]  # the cache has the prompts now
    place = {prompt: row for row, prompt in enumerate(read)}
    own = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=lm.device)
    cache.batch_select_indices(own)
    ids, mask = ids[own], mask[own]
    first = processors(cast(Any, ids), logits[own])
    ids = torch.cat([ids, first.argmax(-1, keepdim=True)], dim=1)
    rows(ids, None)
    written = torch.full((len(prompts), new), pad_id, device=lm.device)
    written[:, 0] = ids[:, width]
    while (done := ids.shape[1] - width) < new and len(kept := rows.leave()):
        if len(kept) < len(ids):
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], mask[kept]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ids = generate(
            new - done, logits_processor=processors, stopping_criteria=StoppingCriteriaList([rows])
        ).sequences
        written[rows.numbers, done : ids.shape[1] - width] = ids[:, width + done :]
    return written.tolist()


def _divisible_cache(lm: Any) -> DynamicCache | None:
    """An empty cache for `lm` whose rows can be chosen, repeated and left out; None where it has another kind, a
    recurrent state, say."""
    if lm.is_remote_code() or not lm._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
