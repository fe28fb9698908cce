"""Chats of messages, and the templates that make their text."""

import re
from collections.abc import Sequence
from typing import Any

from opsd.data import Messages


def fill(template: str, **values: str) -> str:
    """`template` with each {name} replaced by its value, in one pass: braces within the values mean nothing."""
    pattern = "|".join(re.escape("{" + name + "}") for name in values)
    return re.sub(pattern, lambda match: values[match.group()[1:-1]], template)


def as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _last_user(chat: Messages) -> int:
    return max(number for number, message in enumerate(chat) if message["role"] == "user")


def text_of(chat: Messages) -> str:
    return chat[_last_user(chat)]["content"]


def with_text(chat: Messages, text: str) -> Messages:
    """`chat` with `text` in its last user message."""
    chosen = _last_user(chat)
    return [{**message, "content": text} if i == chosen else message for i, message in enumerate(chat)]


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the tokenizer's special tokens in text. Other added tokens, such as "<think>", are ordinary text."""
    added: Sequence[Any] = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Text as the tokenizer has it, but with one BOS where the text begins with its own, and without an end token
    that the tokenizer puts after it: the rollout goes on from there."""
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    twice, ended = bos is not None and ids[:2] == [bos, bos], eos is not None and ids[-1:] == [eos]
    if not twice and not ended:
        return ids
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if twice and own[:1] == [bos]:
        ids = ids[1:]
    return ids[:-1] if own and ended and ids[-len(own) - 1 :] == [*own, eos] else ids
