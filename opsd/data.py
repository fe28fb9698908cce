"""Problems and their reference solutions, read from JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opsd.config import ConfigError


class DataError(ConfigError):
    """A row that cannot be used, named by file, line and reason."""


@dataclass(frozen=True)
class Row:
    """One line of a data file."""

    problem: str
    solution: str | None
    answer: str | None
    teacher_prompt: str | None
    source: str  # "file:line"


def read_rows(
    path: str | Path, *, required: tuple[str, ...] = ("problem", "solution"), skip_bad_rows: bool = False
) -> tuple[list[Row], int]:
    """The usable rows of a JSONL file in order, and the number of rows skipped as unusable. Blank lines do not count.

    Args:
        path: one JSON object per line; `problem`, `solution`, `answer` and `teacher_prompt` are read, the rest ignored.
        required: the fields each row must have, as text that is not blank. An integer is accepted as an `answer`.
        skip_bad_rows: count and skip a row that cannot be used instead of raising.

    Raises:
        DataError: the file cannot be read, a row cannot be used (file, line number and reason), or no row is left.
    """
    rows, bad = [], []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(_row(line, f"{path}:{number}", required))
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
    if bad and not skip_bad_rows:
        more = f"\n({len(bad) - 5} more)" if len(bad) > 5 else ""
        raise DataError("rows that cannot be used (data.skip_bad_rows skips them):\n" + "\n".join(bad[:5]) + more)
    if not rows:
        raise DataError(f"{path}: no usable row" + (f"; the first of {len(bad)} bad ones: {bad[0]}" if bad else ""))
    return rows, len(bad)


def _row(line: bytes, source: str, required: tuple[str, ...]) -> Row:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    values: dict[str, str | None] = {}
    for name in ("problem", "solution", "answer", "teacher_prompt"):
        value = record.get(name)
        if name == "answer" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            if name in required:
                raise ValueError(f"{name!r} is missing")
        elif not isinstance(value, str):
            raise ValueError(f"{name!r} is {type(value).__name__}, expected text")
        elif not value.strip():
            raise ValueError(f"{name!r} is empty")
        values[name] = value
    return Row(**values, source=source)  # type: ignore[arg-type]


def batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of `batch_size` row numbers below `count`; each epoch is a new order, given by `seed` alone.

    A batch may span two epochs, so that every batch is full.
    """
    pending: list[int] = []
    epoch = 0
    while True:
        while len(pending) < batch_size:
            order = list(range(count))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            pending += order
            epoch += 1
        yield pending[:batch_size]
        pending = pending[batch_size:]
