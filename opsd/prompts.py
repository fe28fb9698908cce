"""What the student and the teacher read, as token ids."""

import inspect
import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple

from opsd.chat import as_messages, fill, plain_ids, special_tokens, text_of, with_text
from opsd.contexts import confidences, filled, first_half, reads_step, templates_of
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
    confidence: tuple[float, ...] = ()  # of each of several teachers, 0 to 100

    def read_as(self, context: str) -> list[int]:
        """The prompt of a constant context that a recipe names."""
        return self.teacher if context == "teacher" else self.contexts[context]


class Encoded(NamedTuple):
    """The usable examples, and a message (file, line, reason) for each row that is too long or cannot be encoded."""

    examples: list[Example]
    too_long: list[str]
    skipped: list[str]


class Prompter:
    """Renders rows with one tokenizer and one set of templates.

    A template makes the text of the last user message; what a chat has before it stays. A `teacher_prompt` of text
    takes the place of the teacher's text, one of messages that of the teacher's whole chat.

    Text of a row that spells a special token, "<|im_end|>" say, would be read as that very token: a solution could end
    the message that quotes it. Such a row is an error. With prompts.chat "off" the text is the user's own rendering,
    and special tokens in it are meant.

    A chat template that asks for the date gets `date`, by default that of now, each time. `contexts` are the names, of
    `opsd.contexts`, that every example is to have besides. What `prompts.contexts` has a template for reads by that.

    Raises:
        ConfigError: `prompts.chat` is "on" and the tokenizer has no chat template; or chat arguments that are no JSON
            object, that no chat template is there for, or that it does not read.
    """

    def __init__(
        self, tokenizer: Any, config: PromptsConfig, date: datetime | None = None, contexts: Sequence[str] = ()
    ):
        self.tokenizer, self.config, self.contexts = tokenizer, config, contexts
        self.templates = templates_of(config.contexts, contexts)
        self.lenient = False  # a row without what the teacher's own template reads has no teacher
        self.date = date or datetime.now().astimezone()
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if config.chat == "on" and not has_template:
            raise ConfigError("prompts.chat is 'on' but the tokenizer has no chat template")
        self.chat = config.chat != "off" and has_template
        self._chat_args = {
            "student": self._parse_chat_args("student_chat_args", config.student_chat_args),
            "teacher": self._parse_chat_args("teacher_chat_args", config.teacher_chat_args),
        }
        self._special = special_tokens(tokenizer)

    def encode(self, row: Row, analysis: str | None = None) -> Example:
        """`row` with the token ids of both prompts.

        Args:
            analysis: the teacher's own, which joins its text by the template `prompts.analysis`. What in it spells a
                special token is left out: the model has written it, which is no fault of the row.

        Raises:
            DataError: naming the row: its text spells a special token, its chat cannot be rendered, the student's
                prompt has no tokens, or there is an analysis of nothing.
        """
        chat = as_messages(row.problem)
        student = with_text(chat, fill(self.config.student, problem=text_of(chat)))
        teacher = self._teacher(row)
        self._check(row, row.teacher_prompt if row.teacher_prompt is not None else row.solution)
        if analysis is not None:
            if teacher is None:
                raise DataError(f"{row.source}: an analysis without a solution or teacher_prompt")
            text = fill(self.config.analysis, teacher=text_of(teacher), analysis=self._without_special(analysis))
            teacher = with_text(teacher, text)
        ids = self._ids(row, "student", student)
        if not ids:
            raise DataError(f"{row.source}: the student's prompt has no tokens")
        if teacher is None:
            return Example(row, ids, [])
        taught = self._ids(row, "teacher", teacher)
        contexts = {name: self._context(row, name, ids, taught) for name in self.contexts}
        return Example(row, ids, taught, contexts=contexts, confidence=confidences(row, self.contexts))

    def for_evaluation(self) -> "Prompter":
        """One for rows that only the student and the teacher read, and the teacher where it has all that it reads."""
        other = copy(self)
        other.contexts, other.lenient = (), True
        return other

    def by_template(self, row: Row, name: str, **known: str) -> list[int]:
        """The prompt of a context by its own template, with the rollouts `known` that the model has written."""
        known = {key: self._without_special(text) for key, text in known.items()}
        return self._ids(row, "teacher", self._filled(row, name, **known))

    def _filled(self, row: Row, name: str, **known: str) -> Messages:
        chat = as_messages(row.problem)
        text, read = filled(self.templates[name], name, row, text_of(chat), **known)
        self._check(row, *read)
        return with_text(chat, text)

    def with_problem_of(self, row: Row, other: Row) -> list[int]:
        """The teacher's prompt of `row`, but for the problem. Raises DataError: it has a prompt of its own."""
        if row.teacher_prompt is not None:
            raise DataError(f"{row.source}: its teacher_prompt cannot be shown with another problem, as shuffled_1 is")
        teacher = self._teacher(replace(row, problem=other.problem))
        assert teacher is not None  # it has a solution, or what the teacher's template reads
        return self._ids(row, "teacher", teacher)

    def _context(self, row: Row, name: str, student: list[int], teacher: list[int]) -> list[int]:
        if name in ("base", "plain"):
            return student
        if name in self.templates:
            return student if reads_step(self.templates[name]) else self.by_template(row, name)
        if name in ("positive", "privileged_student"):
            return teacher
        if name.startswith("shuffled_"):
            return self.with_problem_of(row, row)
        if row.solution is None:
            raise DataError(f"{row.source}: 'solution' is missing, which the context {name!r} reads")
        chat = as_messages(row.problem)
        if name == "reference":
            system = [message for message in chat if message["role"] == "system"]
            alone = fill(self.config.reference, solution=row.solution)
            return self._ids(row, "teacher", [*system, {"role": "user", "content": alone}])
        text = fill(self.config.teacher, problem=text_of(chat), solution=first_half(row.solution))
        return self._ids(row, "teacher", with_text(chat, text))

    def reason(self, row: Row) -> list[int]:
        """The token ids of the prompt under which the teacher writes its analysis of the solution of `row`.

        Raises:
            DataError: naming the row: it has no solution, its text spells a special token, or its chat cannot be
                rendered.
        """
        if row.solution is None:
            raise DataError(f"{row.source}: teacher.reason_first needs a solution to analyse")
        self._check(row, row.solution)
        chat = as_messages(row.problem)
        text = fill(self.config.reason, problem=text_of(chat), solution=row.solution)
        return self._ids(row, "teacher", with_text(chat, text))

    def _teacher(self, row: Row) -> Messages | None:
        if isinstance(row.teacher_prompt, list):
            return row.teacher_prompt
        chat = as_messages(row.problem)
        if row.teacher_prompt is not None:
            return with_text(chat, row.teacher_prompt)
        if "teacher" in self.templates and not reads_step(self.templates["teacher"]):
            try:
                return self._filled(row, "teacher")
            except DataError:
                if self.lenient:
                    return None
                raise
        if row.solution is None:
            return None
        return with_text(chat, fill(self.config.teacher, problem=text_of(chat), solution=row.solution))

    def _without_special(self, text: str) -> str:
        while self._special is not None and self._special.search(text):  # leaving one out may join another
            text = self._special.sub("", text)
        return text

    def _check(self, row: Row, *texts: str | Messages | None) -> None:
        if self._special is None or self.config.chat == "off":
            return
        for text in (row.problem, *texts):
            for message in () if text is None else as_messages(text):
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
            return plain_ids(self.tokenizer, messages[0]["content"])
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
