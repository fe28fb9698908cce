"""What a recipe's constant contexts read of a row, beside the teacher's prompt."""

import re

CONTEXTS = {
    "base": "the student's prompt, read by the initial model (teacher.kind base)",
    "plain": "the student's prompt, read by the teacher",
    "reference": "the solution without the problem, by prompts.reference",
    "partial": "the teacher's prompt with the first half of the solution",
}
"""Those that the loop can have read, and what they are."""


def first_half(text: str) -> str:
    """Up to the white space after its middle, or to the middle where there is none."""
    middle = len(text) // 2
    found = re.compile(r"\s").search(text.rstrip(), middle)
    return text[: found.start() if found else middle]
