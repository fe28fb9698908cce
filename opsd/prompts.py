"""What the student and the teacher read, as token ids."""

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple

from opsd.contexts import first_half
from opsd.data import Messages, Row, Rows, name_rows, read_rows
from opsd.dates import template_date
from opsd.errors import ConfigError, DataError
from opsd.options import DataConfig, PromptsConfig

Who = Literal["student", "teacher"]


@dataclass(frozen=True)
class Example:
    """A row and the ids of both prompts; `teacher` is empty where an evaluation row has no privileged information.

    `reason` is the prompt under which the teacher analyses the solution; empty where it does not. `contexts` are those
    of `opsd.contexts` that the recipe reads besides; empty where `teacher` is.
    """

    row: Row
    student: list[int]
    teacher: list[int]
    reason: list[int] = field(default_factory=list)
    contexts: dict[str, list[int]] = field(default_factory=dict)

    def read_as(self, context: str) -> list[int]:
        """The prompt of a constant context that a recipe names."""
        return self.teacher if context == "teacher" else self.contexts[context]


class Encoded(NamedTuple):
    """The usable examples, and a message (file, line, reason) for each row that is too long or cannot be encoded."""

    examples: list[Example]
    too_long: list[str]
    skipped: list[str]


def fill(template: str, **values: str) -> str:
    """`template` with each {name} replaced by its value, in one pass: braces within the values mean nothing."""
    pattern = "|".join(re.escape("{" + name + "}") for name in values)
    return re.sub(pattern, lambda match: values[match.group()[1:-1]], template)


class Prompter:
    """Renders rows with one tokenizer and one set of templates.

    A template makes the text of the last user message; what a chat has before it stays. A `teacher_prompt` of text
    takes the place of the teacher's text, one of messages that of the teacher's whole chat.

    Text of a row that spells a special token, "<|im_end|>" say, would be read as that very token: a solution could end
    the message that quotes it. Such a row is an error. With prompts.chat "off" the text is the user's own rendering,
    and special tokens in it are meant.

    A chat template that asks for the date gets `date`, by default that of now, each time. `contexts` are the names, of
    `opsd.contexts`, that every example is to have besides.

    Raises:
        ConfigError: `prompts.chat` is "on" and the tokenizer has no chat template; or chat arguments that are no JSON
            object, that no chat template is there for, or that it does not read.
    """

    def __init__(
        self, tokenizer: Any, config: PromptsConfig, date: datetime | None = None, contexts: Sequence[str] = ()
    ):
        self.tokenizer, self.config, self.contexts = tokenizer, config, contexts
        self.date = date or datetime.now().astimezone()
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if config.chat == "on" and not has_template:
            raise ConfigError("prompts.chat is 'on' but the tokenizer has no chat template")
        self.chat = config.chat != "off" and has_template
        self._chat_args = {
            "student": self._parse_chat_args("student_chat_args", config.student_chat_args),
            "teacher": self._parse_chat_args("teacher_chat_args", config.teacher_chat_args),
        }
        self._special = _special_tokens(tokenizer)

    def encode(self, row: Row, analysis: str | None = None) -> Example:
        """`row` with the token ids of both prompts.

        Args:
            analysis: the teacher's own, which joins its text by the template `prompts.analysis`. What in it spells a
                special token is left out: the model has written it, which is no fault of the row.

        Raises:
            DataError: naming the row: its text spells a special token, its chat cannot be rendered, the student's
                prompt has no tokens, or there is an analysis of nothing.
        """
        chat = _as_messages(row.problem)
        student = _with_text(chat, fill(self.config.student, problem=_text(chat)))
        teacher = self._teacher(row)
        self._check(row, row.teacher_prompt if row.teacher_prompt is not None else row.solution)
        if analysis is not None:
            if teacher is None:
                raise DataError(f"{row.source}: an analysis without a solution or teacher_prompt")
            text = fill(self.config.analysis, teacher=_text(teacher), analysis=self._without_special(analysis))
            teacher = _with_text(teacher, text)
        ids = self._ids(row, "student", student)
        if not ids:
            raise DataError(f"{row.source}: the student's prompt has no tokens")
        if teacher is None:
            return Example(row, ids, [])
        contexts = {name: self._context(row, name, ids) for name in self.contexts}
        return Example(row, ids, self._ids(row, "teacher", teacher), contexts=contexts)

    def _context(self, row: Row, name: str, student: list[int]) -> list[int]:
        if name in ("base", "plain"):
            return student
        if row.solution is None:
            raise DataError(f"{row.source}: 'solution' is missing, which the context {name!r} reads")
        chat = _as_messages(row.problem)
        if name == "reference":
            system = [message for message in chat if message["role"] == "system"]
            alone = fill(self.config.reference, solution=row.solution)
            return self._ids(row, "teacher", [*system, {"role": "user", "content": alone}])
        text = fill(self.config.teacher, problem=_text(chat), solution=first_half(row.solution))
        return self._ids(row, "teacher", _with_text(chat, text))

    def reason(self, row: Row) -> list[int]:
        """The token ids of the prompt under which the teacher writes its analysis of the solution of `row`.

        Raises:
            DataError: naming the row: it has no solution, its text spells a special token, or its chat cannot be
                rendered.
        """
        if row.solution is None:
            raise DataError(f"{row.source}: teacher.reason_first needs a solution to analyse")
        self._check(row, row.solution)
        chat = _as_messages(row.problem)
        text = fill(self.config.reason, problem=_text(chat), solution=row.solution)
        return self._ids(row, "teacher", _with_text(chat, text))

    def _teacher(self, row: Row) -> Messages | None:
        if isinstance(row.teacher_prompt, list):
            return row.teacher_prompt
        chat = _as_messages(row.problem)
        if row.teacher_prompt is not None:
            return _with_text(chat, row.teacher_prompt)
        if row.solution is None:
            return None
        return _with_text(chat, fill(self.config.teacher, problem=_text(chat), solution=row.solution))

    def _without_special(self, text: str) -> str:
        while self._special is not None and self._special.search(text):  # leaving one out may join another
            text = self._special.sub("", text)
        return text

    def _check(self, row: Row, *texts: str | Messages | None) -> None:
        if self._special is None or self.config.chat == "off":
            return
        for text in (row.problem, *texts):
            for message in () if text is None else _as_messages(text):
                if found := self._special.search(message["content"]):
                    raise DataError(
                        f"{row.source}: its text has {found.group()!r}, which would become the special token of that "
                        "name; prompts.chat off takes such text as meant"
                    )

    def _ids(self, row: Row, who: Who, messages: Messages) -> list[int]:
        if not self.chat:
            if len(messages) > 1 or messages[0]["role"] != "user":
                raise DataError(
                    f"{row.source}: a chat of more than one user message needs a chat template, and "
                    + ("prompts.chat is 'off'" if self.config.chat == "off" else "the tokenizer has none")
                )
            return self._plain_ids(messages[0]["content"])
        try:
            with template_date(self.tokenizer.chat_template, self.date):
                rendered = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **self._chat_args[who]
                )
        except Exception as error:  # a template is a program: it refuses roles by raising, and what it raises varies
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{row.source}: the chat template refuses the {who}'s messages ({roles}): {error}"
            ) from error
        # The chat template writes the special tokens itself; a second BOS would be a different prompt.
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _plain_ids(self, text: str) -> list[int]:
        """Text as the tokenizer has it, but with one BOS where the text begins with its own, and without an end token
        that the tokenizer puts after it: the rollout goes on from there."""
        ids = list(self.tokenizer(text)["input_ids"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        twice, ended = bos is not None and ids[:2] == [bos, bos], eos is not None and ids[-1:] == [eos]
        if not twice and not ended:
            return ids
        own = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if twice and own[:1] == [bos]:
            ids = ids[1:]
        return ids[:-1] if own and ended and ids[-len(own) - 1 :] == [*own, eos] else ids

    def _parse_chat_args(self, option: str, text: str | None) -> dict[str, Any]:
        if text is None:
            return {}
        try:
            arguments = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"prompts.{option} is {text!r}; accepted: a JSON object: {error}") from error
        if not isinstance(arguments, dict):
            raise ConfigError(f"prompts.{option} is {text!r}; accepted: a JSON object")
        if not self.chat:
            why = "prompts.chat is 'off'" if self.config.chat == "off" else "the tokenizer has no chat template"
            raise ConfigError(f"prompts.{option} is {text!r}, but {why}")
        # Its own parameters belong to the caller, but for these; the template's variables can have any other name.
        own = {*inspect.signature(self.tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
        template = str(self.tokenizer.chat_template)
        for name in arguments:
            if name in own:
                raise ConfigError(f"prompts.{option} has {name!r}, which is not for the chat template")
            if name not in template:
                raise ConfigError(f"prompts.{option} has {name!r}, which the tokenizer's chat template does not read")
        return arguments


def read_examples(
    options: DataConfig, prompter: Prompter, path: str, *, required: tuple[str, ...], **limits: Any
) -> Encoded:
    """The examples of usable rows of `path`, and what was left out; `limits` are those of `encode_read`.

    Raises:
        DataError: as `read_rows` and `encode_rows`.
    """
    rows = read_rows(path, required=required, columns=options.columns, skip_bad_rows=options.skip_bad_rows)
    return encode_read(options, prompter, rows, **limits)


def encode_read(
    options: DataConfig, prompter: Prompter, rows: Rows, *, most: int | None = None, reason: bool = False
) -> Encoded:
    """`encode_rows` of the first `most` rows that were read; skipped are also those that could not be."""
    encoded = encode_rows(prompter, rows.rows[:most], options, reason=reason)
    return encoded._replace(skipped=[*rows.skipped, *encoded.skipped])


def encode_rows(prompter: Prompter, rows: Iterable[Row], options: DataConfig, *, reason: bool = False) -> Encoded:
    """The examples whose prompts have at most `data.max_prompt_tokens` tokens, and which rows were left out. Prompts
    are never cut.

    Args:
        reason: the teacher will analyse solutions: every row with a prompt of the teacher has to have one, and its
            example gets the prompt for the analysis.

    Raises:
        DataError: naming the rows that are longer (with data.too_long "error") or cannot be encoded (unless
            data.skip_bad_rows); or no row is left.
    """
    limit = options.max_prompt_tokens
    encoded = Encoded([], [], [])
    for row in rows:
        try:
            example = prompter.encode(row)
            if reason and example.teacher:
                example = replace(example, reason=prompter.reason(row))
        except DataError as error:
            encoded.skipped.append(str(error))
            continue
        prompts = {
            "student's prompt": example.student,
            "teacher's prompt": example.teacher,
            "prompt for the teacher's analysis": example.reason,
            **{f"prompt of the context {name}": ids for name, ids in example.contexts.items()},
        }
        over = {name: len(ids) for name, ids in prompts.items() if len(ids) > limit}
        if over:
            lengths = " and ".join(f"the {name} has {length} tokens" for name, length in over.items())
            encoded.too_long.append(f"{row.source}: {lengths}, data.max_prompt_tokens is {limit}")
        else:
            encoded.examples.append(example)
    if encoded.skipped and not options.skip_bad_rows:
        raise DataError(name_rows("rows that cannot be used (data.skip_bad_rows skips them):", encoded.skipped))
    if encoded.too_long and options.too_long == "error":
        title = "prompts that are too long (raise data.max_prompt_tokens, or set data.too_long to drop such rows):"
        raise DataError(name_rows(title, encoded.too_long))
    if not encoded.examples:
        raise DataError(name_rows("no row is left:", [*encoded.skipped, *encoded.too_long]))
    return encoded


def decoded(tokenizer: Any, example: Example) -> list[str]:
    """The prompts of `example` as the model reads them."""
    prompts = {"student": example.student, "teacher": example.teacher, **example.contexts}.items()
    texts = [f"--- first {name} prompt, {len(ids)} tokens ---\n{tokenizer.decode(ids)}" for name, ids in prompts]
    return [*texts, "---"]


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _last_user(chat: Messages) -> int:
    return max(number for number, message in enumerate(chat) if message["role"] == "user")


def _text(chat: Messages) -> str:
    return chat[_last_user(chat)]["content"]


def _with_text(chat: Messages, text: str) -> Messages:
    """`chat` with `text` in its last user message."""
    chosen = _last_user(chat)
    return [{**message, "content": text} if i == chosen else message for i, message in enumerate(chat)]


def _special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds the tokenizer's special tokens in text. Other added tokens, such as "<think>", are ordinary text."""
    added: Sequence[Any] = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
