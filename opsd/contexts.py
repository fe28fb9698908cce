"""What a recipe's contexts read of a row and of a step, beside the teacher's prompt, and the templates for it."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opsd.data import Row

CONTEXTS = {
    "base": "the student's prompt, read by the initial model (teacher.kind base)",
    "plain": "the student's prompt, read by the teacher",
    "reference": "the solution without the problem, by prompts.reference",
    "partial": "the teacher's prompt with the first half of the solution",
    "positive": "the teacher's prompt",
    "negative": "a wrong rollout of the same prompt",
    "privileged_student": "the teacher's prompt, read by the student and with a gradient",
    "teacher_1": "the column transcript_1, and so on for more teachers; their confidence_1 is 0 to 100",
    "shuffled_1": "the teacher's prompt with the problem of the next row of the step, and so on",
}
"""Those that the loop can have read, and what they are by default."""

_THEN = "answer the problem: work through it step by step and finish with the final answer in \\boxed{}."
_TRIED = "{problem}\n\nAn attempt at it that is %s:\n\n{%s}\n\nLet it inform you, then " + _THEN

READINGS = {
    "rubric": "{problem}\n\nWhat a good answer is judged by:\n\n{rubric}\n\nMeet all of it and " + _THEN,
    "feedback": "{problem}\n\nFeedback on an earlier attempt:\n\n{feedback}\n\nTake it to heart and " + _THEN,
    "translation": "{problem}\n\nThe same problem in another language:\n\n{translation}\n\nThink in it, then " + _THEN,
    "construction": "{problem}\n\nHow this problem was made:\n\n{construction}\n\nWith that known, " + _THEN,
    "wrong_answer": "{problem}\n\nThis answer to it is given as right:\n\n{wrong_answer}\n\nIn line with it, " + _THEN,
    "transcript": "{problem}\n\nA debate about it:\n\n{transcript}\n\nWeigh the arguments, then " + _THEN,
    "right_rollout": _TRIED % ("right", "right_rollout"),
    "wrong_rollout": _TRIED % ("given as right", "wrong_rollout"),
}
"""Templates by name: they read the column of that name, the last two another rollout of the same prompt in the step."""

SIBLINGS = ("right_rollout", "wrong_rollout")
_OWN = re.compile(r"teacher|positive|negative|teacher_[1-9]\d*")
_NUMBERED = re.compile(r"(teacher|shuffled)_[1-9]\d*")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def can_read(context: str) -> bool:
    """Whether the loop can have `context` read."""
    return context == "teacher" or context in CONTEXTS or _NUMBERED.fullmatch(context) is not None


def templates_of(given: str | None, contexts: Sequence[str]) -> dict[str, str]:
    """The templates of the teacher and of `contexts` that have one, by their names.

    Args:
        given: `prompts.contexts`: a JSON object of templates, or names of `READINGS`, by context.

    Raises:
        ConfigError: it is no such object, or has a context that reads by no template.
    """
    try:
        chosen = json.loads(given or "{}")
        if not isinstance(chosen, dict) or not all(isinstance(text, str) for text in chosen.values()):
            raise ValueError
    except ValueError:
        accepted = 'a JSON object of templates by context, such as {"teacher": "rubric"}'
        raise ConfigError(f"prompts.contexts is {given!r}; accepted: {accepted}") from None
    for name, text in chosen.items():
        if not _OWN.fullmatch(name):
            raise ConfigError(f"prompts.contexts has {name!r}; accepted: teacher, positive, negative, teacher_1, ...")
        if text not in READINGS and not _PLACEHOLDER.search(text):
            raise ConfigError(
                f"prompts.contexts has {text!r} for {name}; accepted: a template with a {{column}}, "
                f"or {', '.join(READINGS)}"
            )
    debate = {name: f"transcript{name.removeprefix('teacher')}" for name in contexts if name.startswith("teacher_")}
    found = {name: READINGS["transcript"].replace("{transcript}", f"{{{column}}}") for name, column in debate.items()}
    if "negative" in contexts:
        found["negative"] = READINGS["wrong_rollout"]
    found |= {name: READINGS.get(text, text) for name, text in chosen.items()}
    return {name: text for name, text in found.items() if name in ("teacher", *contexts)}


def reads_step(template: str) -> bool:
    """Whether it reads another rollout."""
    return not set(SIBLINGS).isdisjoint(_PLACEHOLDER.findall(template))


def filled(template: str, context: str, row: "Row", problem: str, **known: str) -> tuple[str, list[str]]:
    """`template` with each {name} replaced: the problem, the solution, one of `known`, or the row's column of that
    name; and what was read of columns.

    Raises:
        DataError: naming the row and a column that it does not have, or that is no text or number.
    """
    values, read = {"problem": problem, **known}, []
    for name in dict.fromkeys(_PLACEHOLDER.findall(template)):
        if name in values:
            continue
        value = row.solution if name == "solution" else row.record.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(
                f"{row.source}: {name!r} is missing, which the context {context!r} reads (prompts.contexts)"
            )
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{row.source}: {name!r} is {type(value).__name__}, expected text or a number")
        values[name] = str(value)
        read.append(values[name])
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], template), read


def confidences(row: "Row", contexts: Sequence[str]) -> tuple[float, ...]:
    """The columns confidence_1, ... of the contexts teacher_1, ...

    Raises:
        DataError: naming the row and the column that is no number from 0 to 100.
    """
    found = []
    for name in contexts:
        if name.startswith("teacher_"):
            column = f"confidence{name.removeprefix('teacher')}"
            value = row.record.get(column)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
                raise DataError(f"{row.source}: {column!r} is {value!r}, expected a number from 0 to 100")
            found.append(float(value))
    return tuple(found)


def first_half(text: str) -> str:
    """Up to the white space after its middle, or to the middle where there is none."""
    middle = len(text) // 2
    found = re.compile(r"\s").search(text.rstrip(), middle)
    return text[: found.start() if found else middle]
