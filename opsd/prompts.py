"""What the student and the teacher read, as token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opsd.config import ConfigError, PromptsConfig
from opsd.data import DataError, Row


@dataclass(frozen=True)
class Example:
    """A row and the ids of both prompts; `teacher` is empty where an evaluation row has no privileged information."""

    row: Row
    student: list[int]
    teacher: list[int]


def fill(template: str, **values: str) -> str:
    """`template` with each {name} replaced by its value, in one pass: braces within the values mean nothing."""
    pattern = "|".join(re.escape("{" + name + "}") for name in values)
    return re.sub(pattern, lambda match: values[match.group()[1:-1]], template)


class Prompter:
    """Renders rows with one tokenizer and one pair of templates.

    Raises:
        ConfigError: `prompts.chat` is "on" and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, config: PromptsConfig):
        self.tokenizer, self.config = tokenizer, config
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if config.chat == "on" and not has_template:
            raise ConfigError("prompts.chat is 'on' but the tokenizer has no chat template")
        self.chat = config.chat != "off" and has_template

    def encode(self, row: Row) -> Example:
        """`row` with the token ids of both prompts."""
        student = fill(self.config.student, problem=row.problem)
        if row.teacher_prompt is not None:
            teacher = self._ids(row.teacher_prompt)
        elif row.solution is not None:
            teacher = self._ids(fill(self.config.teacher, problem=row.problem, solution=row.solution))
        else:
            teacher = []
        return Example(row, self._ids(student), teacher)

    def _ids(self, text: str) -> list[int]:
        if not self.chat:
            return list(self.tokenizer(text)["input_ids"])
        message = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        # The chat template writes the special tokens itself; a second BOS would be a different prompt.
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def encode_rows(prompter: Prompter, rows: Iterable[Row], *, limit: int, too_long: str) -> tuple[list[Example], int]:
    """The examples whose two prompts have at most `limit` tokens, and the number of rows dropped as too long.

    Raises:
        DataError: `too_long` is "error" and a prompt is longer, a prompt has no token at all, or no row is left.
    """
    examples, dropped = [], 0
    for row in rows:
        example = prompter.encode(row)
        if not example.student:
            raise DataError(f"{row.source}: the student's prompt has no tokens")
        for name, ids in (("student", example.student), ("teacher", example.teacher)):
            if len(ids) > limit and too_long == "error":
                raise DataError(
                    f"{row.source}: the {name}'s prompt has {len(ids)} tokens, data.max_prompt_tokens is {limit}; "
                    "raise it, or set data.too_long to drop such rows (prompts are never cut)"
                )
        if max(len(example.student), len(example.teacher)) > limit:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        raise DataError(f"no row is left: the prompts of all {dropped} are longer than data.max_prompt_tokens {limit}")
    return examples, dropped
