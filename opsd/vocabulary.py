"""Which ids a model and its tokenizer share: those with a row in the embedding, and the columns that are tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opsd.errors import ConfigError, DataError
from opsd.prompts import Example
from opsd_kernels import Head
from opsd_kernels.losses import whole


def embedding_rows(lm: Any) -> int:
    """How many ids the transformers model `lm` can read: 0 up to this number, which is left out."""
    return lm.get_input_embeddings().weight.shape[0]


def end_ids(lm: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: those of the generation config of `lm` and the tokenizer's.

    Raises:
        ConfigError: one of them has no row in the embedding, so that no answer would ever end with it.
    """
    configured = getattr(lm.generation_config, "eos_token_id", None)
    ends = [
        ("generation_config.json", i) for i in (configured if isinstance(configured, list | tuple) else [configured])
    ]
    ends.append(("its tokenizer", tokenizer.eos_token_id))
    rows = embedding_rows(lm)
    for source, i in ends:
        if i is not None and (not isinstance(i, int) or not 0 <= i < rows):
            raise ConfigError(
                f"model.path {lm.name_or_path!r}: eos_token_id {i!r} of {source} has no row in the model's embedding; "
                f"accepted: 0 to {rows - 1}"
            )
    return sorted({i for _, i in ends if i is not None})


def pad_id(lm: Any, tokenizer: Any, ends: Sequence[int]) -> int:
    """What fills a batch: the tokenizer's padding where it has a row in the embedding, else an end of `ends`. Any id
    with a row will do, since it is masked."""
    own = tokenizer.pad_token_id
    return own if own is not None and 0 <= own < embedding_rows(lm) else (ends or [0])[0]


def check_prompts(lm: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Tries the prompts of `examples` on the embedding of `lm`.

    Raises:
        DataError: one has an id without a row there, of a token that was added to the tokenizer alone, say.
    """
    rows = embedding_rows(lm)
    for example in examples:
        named = {"student": example.student, "teacher": example.teacher, "analysis": example.reason}
        for who, ids in {**named, **example.contexts}.items():
            if ids and max(ids) >= rows:
                i = max(ids)
                raise DataError(
                    f"{example.row.source}: the {who}'s prompt has id {i}, {tokenizer.convert_ids_to_tokens(i)!r}, "
                    f"which has no row in the model's embedding; accepted: 0 to {rows - 1}"
                )


def token_columns(columns: int, tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """How many of the `columns` of the logits are tokens, those beyond the last token of `tokenizer` being padding; and
    the ids below that which it has no token for."""
    known = set(tokenizer.get_vocab().values())
    valid = min(columns, max(known, default=columns - 1) + 1)
    # Two ids may share a token, of which the vocabulary then names one.
    return valid, tuple(i for i in range(valid) if i not in known and tokenizer.convert_ids_to_tokens(i) is None)


@dataclass(frozen=True)
class TokenHead(Head):
    """A head whose columns `gaps`, below valid_vocab, are no tokens: of bias −inf, they take no part in a loss."""

    gaps: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        weight = self.weight
        no_token = _no_token(self.gaps, weight.shape[0], weight.dtype, weight.device)
        return super().options() | {"bias": no_token if self.bias is None else whole(self.bias) + no_token}


@lru_cache(maxsize=8)
def _no_token(gaps: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows,) −inf at `gaps`, else 0: one tensor for all heads, so that theirs are seen to be the same."""
    return torch.zeros(rows, dtype=dtype).index_fill(0, torch.tensor(gaps), -torch.inf).to(device)


def of_tokens(head: Head, tokenizer: Any) -> Head:
    """`head` whose columns that are no tokens of `tokenizer` take no part in a loss."""
    rows = head.weight.shape[0]
    valid, gaps = token_columns(head.valid_vocab or rows, tokenizer)
    head = replace(head, valid_vocab=valid) if valid < rows else head
    return TokenHead(**vars(head) | {"gaps": gaps}) if gaps else head


def gaps_of(head: Head) -> tuple[int, ...]:
    """The columns of `head` below valid_vocab that are no tokens."""
    return getattr(head, "gaps", ())
