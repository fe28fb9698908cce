"""Where the answer is in what a model wrote."""

import re

from opsd.options import BOXED

# A backslash takes the brace after it out of the count, as in LaTeX: \{ is a sign to print.
_TOKENS = re.compile(r"\\+boxed(?![A-Za-z])\s*(\{)?|\\.|[{}]", re.DOTALL)


def extract(text: str, pattern: str) -> str | None:
    """The answer in `text`, stripped, or None: `last_box` for "boxed", else the group of the last match."""
    if pattern == BOXED:
        return last_box(text)
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{} of `text`, stripped; one around nothing but a second gives the second's.

    Braces are counted, at any depth. The last box is the last to be opened that is not within a complete one. Where it
    is empty, not closed or has no brace, there is no answer, so None: what an earlier box says was taken back.
    """
    boxes = _boxes(text)
    if not boxes or boxes[-1][1] is None:
        return None
    start, end, _ = boxes[-1]
    content = text[start:end].strip()
    boxes = _boxes(content)
    if len(boxes) == 1 and boxes[0][2] == 0 and boxes[0][1] == len(content) - 1:
        content = content[boxes[0][0] : -1].strip()
    return content or None


def _boxes(text: str) -> list[tuple[int, int | None, int]]:
    """Start and end of the content of each box that is not within a complete one, and where its command starts."""
    boxes: list[tuple[int, int | None, int]] = []
    opened: list[int | None] = []  # for each open brace the place in `boxes` of the box that it opens, if it does
    for token in _TOKENS.finditer(text):
        if "boxed" in token[0]:
            if token[1]:
                opened.append(len(boxes))
            boxes.append((token.end(), None, token.start()))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            place = opened.pop()
            if place is not None:
                start, _, command = boxes[place]
                boxes[place:] = [(start, token.start(), command)]
    return boxes
