"""Problems and their reference solutions, read from JSON lines, Parquet or a directory of `datasets`."""

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from opsd.dataset_records import HUB, dataset_records
from opsd.errors import ConfigError, DataError, brief, one_line
from opsd.json_lines import ACCEPTED, COMPRESSED, json_lines, parse_object

_SHOWN = 30
"""So many columns are named in a message."""

FIELDS = ("problem", "solution", "answer", "teacher_prompt")
_FINAL = re.compile(r"^####(?!#)", re.MULTILINE)  # GSM8K has a solution and, after this, the answer
SYNONYMS = {"prompt": "problem", "privileged_context": "solution"}
SPLITS = {"train": ("train",), "eval": ("eval", "validation", "test")}

Messages = list[dict[str, Any]]
"""A chat: dicts of `role` and `content`, both text. What else a message holds is left for the chat template."""


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    problem: str | Messages
    solution: str | None
    answer: str | None
    teacher_prompt: str | Messages | None
    source: str  # "file:line", or "file:row N" counted from 1 where a file has no lines
    record: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)  # the row as the file has it

    @property
    def problem_text(self) -> str:
        """The problem as plain text for people to read: a chat of several messages with the role before each."""
        if isinstance(self.problem, str):
            return self.problem
        if len(self.problem) == 1:
            return self.problem[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.problem)


class Rows(NamedTuple):
    """The usable rows, and for each one skipped a message: file, line and reason."""

    rows: list[Row]
    skipped: list[str]


def read_rows(
    path: str | Path,
    *,
    required: Sequence[str] = ("problem", "solution"),
    columns: Iterable[str] | None = None,
    skip_bad_rows: bool = False,
) -> Rows:
    """The rows of a data file in order, and what was skipped as unusable.

    Args:
        path: a JSONL file (any name not listed here; blank lines do not count); a `.parquet` file; a directory written
            by `Dataset.save_to_disk`; one by `DatasetDict.save_to_disk` with a single split or one that fits: train for
            training; one of eval, validation and test for evaluation; or a directory of the numbered `.jsonl` or
            `.parquet` parts of one data set; or `hub:org/name`, `hub:org/name:SPLIT` or `hub:org/name:CONFIG:SPLIT`, a
            data set of the Hugging Face hub. All but JSONL need the extra `data`.
        required: the fields each row must have. A `teacher_prompt` stands in for a required `solution`. The file is
            read for training if "solution" is among them, else for evaluation.
        columns: "field=column" pairs for columns with names of their own; a field named here is read from there alone.
        skip_bad_rows: skip a row that cannot be used instead of raising.

    The fields are `problem` or `prompt`, text or chat messages that do not end with the assistant's; `solution` or
    `privileged_context`, text; `answer`, text or a number; `teacher_prompt`, text or chat messages. Null and blank text
    count as missing. An answer that is a whole number has no decimal point, since Parquet columns of integers with
    gaps are often stored as floats. Of an answer with a line that begins with `####`, as GSM8K has it after the
    solution, what follows the last one is the answer.

    Raises:
        ConfigError: `columns` cannot be understood, or the package that reads `path` is missing.
        DataError: the file cannot be read, a mapped column is in no row, a row cannot be used (file, line and reason),
            or no row is left.
    """
    mapped = _parse_columns(columns or ())
    use = "train" if "solution" in required else "eval"
    rows, bad = [], []
    present: dict[str, None] = {}  # the names of the file's columns, in order
    for source, raw in _records(Path(path), use):
        try:
            record = parse_object(raw) if isinstance(raw, bytes) else raw
            present.update(dict.fromkeys(record))
            rows.append(_row(record, source, required, mapped))
        except ValueError as error:
            bad.append(f"{source}: {error}")
    # Names may be anything, a whole page in a file without the columns that are looked for.
    shown = [name if len(name) <= 50 and name.isprintable() else brief(name, 100) for name in map(str, present)]
    there = f"its columns: {', '.join(shown[:_SHOWN]) or 'none'}{', ...' * (len(shown) > _SHOWN)}"
    # One mapping serves both files, and each may lack what is not read from it.
    needed = {*required, "teacher_prompt"} if use == "train" else set(required)
    absent = [f"{name}={column}" for name, column in mapped.items() if name in needed and column not in present]
    if absent and present:
        raise DataError(f"data.columns has {','.join(absent)}, but no row of {path} has such a column; {there}")
    if bad and not skip_bad_rows:
        hint = f"\n{there} (data.columns gives the fields others)" if any(b.endswith("is missing") for b in bad) else ""
        raise DataError(name_rows("rows that cannot be used (data.skip_bad_rows skips them):", bad) + hint)
    if not rows:
        raise DataError(name_rows(f"{path}: no usable row; {there}", bad))
    return Rows(rows, bad)


def name_rows(title: str, messages: Sequence[str], most: int = 5) -> str:
    """`title` and the first of `messages` below it, with the count of the others."""
    more = [f"({len(messages) - most} more)"] if len(messages) > most else []
    return "\n".join([title, *messages[:most], *more])


def columns_used(rows: Iterable[Row], columns: Iterable[str] | None = None) -> list[str]:
    """The columns that the fields of `rows` come from, as a message names them; `columns` as in `read_rows`."""
    mapped, found = _parse_columns(columns or ()), [(row, name) for row in rows for name in FIELDS]
    used = (_find(row.record, name, mapped)[0] for row, name in found if getattr(row, name) is not None)
    return list(dict.fromkeys(used))


def _parse_columns(columns: Iterable[str]) -> dict[str, str]:
    mapped: dict[str, str] = {}
    for pair in columns:
        given, _, column = (part.strip() for part in pair.partition("="))
        if not (given and column):
            raise ConfigError(f"data.columns has {pair!r}; accepted: field=column, such as problem=question")
        if given not in FIELDS and given not in SYNONYMS:
            raise ConfigError(f"data.columns has {pair!r}; the fields are {', '.join([*FIELDS, *SYNONYMS])}")
        name = SYNONYMS.get(given, given)
        if name in mapped:
            raise ConfigError(f"data.columns gives {name} twice: {mapped[name]!r} and {column!r}")
        mapped[name] = column
    return mapped


def _records(path: Path, use: str) -> Iterator[tuple[str, Any]]:
    """(source, row) for each row of `path`: bytes of a line, or what a library made of it."""
    if str(path).startswith(HUB):
        yield from dataset_records(path, SPLITS[use])
        return
    try:
        files = [file.name for file in path.iterdir()] if path.is_dir() else None
    except OSError as error:  # no permission, or a name that is too long
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if files is not None:
        if "dataset_dict.json" in files or "dataset_info.json" in files:
            yield from dataset_records(path, SPLITS[use])
        else:
            for part in _parts(path, files):
                yield from _records(part, use)
    elif path.suffix == ".parquet":
        yield from _parquet_records(path)
    else:
        yield from ((f"{path}:{number}", line) for number, line in json_lines(path))


def _parts(path: Path, files: Iterable[str]) -> list[Path]:
    """The `.jsonl` and `.parquet` ones of the `files` in `path`, numbered parts of one data set."""
    parts = sorted(path / name for name in files if name.endswith((".jsonl", ".parquet")))
    packed = sorted(name for name in files if name.endswith(COMPRESSED))
    if packed:  # which would be left out
        raise DataError(f"{path}: holds {packed[0]}, which is compressed; {ACCEPTED}")
    if not parts:
        raise DataError(f"{path}: neither a directory saved by datasets nor one of .jsonl or .parquet files")
    # train-00000-of-00002 and test-00000-of-00001 side by side must not become one training set.
    names = {re.sub(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$", "", part.stem) for part in parts}
    if len(names) > 1:
        raise DataError(f"{path}: holds different data sets: {', '.join(sorted(names))}; name one file")
    return parts


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs the package pyarrow: pip install 'opsd[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(f"{path}: the column {twice[0]!r} is there twice; accepted: each column once")
            records = (record for batch in file.iter_batches() for record in batch.to_pylist())
            yield from ((f"{path}:row {number}", record) for number, record in enumerate(records, start=1))
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # text that is not UTF-8, or a date
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def _row(record: Mapping[str, Any], source: str, required: Sequence[str], mapped: Mapping[str, str]) -> Row:
    found = {name: _find(record, name, mapped) for name in FIELDS}
    values: dict[str, Any] = {name: None if v is None else _value(name, label, v) for name, (label, v) in found.items()}
    for name in required:
        if values[name] is None and not (name == "solution" and values["teacher_prompt"] is not None):
            label, value = found[name]
            raise ValueError(f"{label} is {'missing' if value is None else 'empty'}")
    return Row(**values, source=source, record=record)


def _find(record: Mapping[str, Any], name: str, mapped: Mapping[str, str]) -> tuple[str, Any]:
    """The name and the value of the column that holds the field `name`."""
    if name in mapped:
        return f"{mapped[name]!r} ({name})", _given(record.get(mapped[name]))
    names = [name, *(synonym for synonym, meant in SYNONYMS.items() if meant == name)]
    found = {key: record[key] for key in names if _given(record.get(key)) is not None}
    if not found:
        return repr(name), None
    key, *others = found
    if any(found[other] != found[key] for other in others):
        raise ValueError(f"{' and '.join(map(repr, found))} differ, but mean the same; data.columns can choose one")
    return repr(key), found[key]


def _given(value: Any) -> Any:
    """`value`, or None for the not-a-number that a missing one becomes in a column of floats."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _value(name: str, label: str, value: Any) -> str | Messages | None:
    """`value` as the field `name` holds it; None if it is blank."""
    chat = name in ("problem", "teacher_prompt")
    if chat and isinstance(value, list):
        return _messages(label, value)
    if name == "answer" and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _number(label, value)
    if not isinstance(value, str):
        expected = {"answer": "text or a number"}.get(name, "text or a list of chat messages" if chat else "text")
        raise ValueError(f"{label} is {type(value).__name__}, expected {expected}")
    _check_text(label, value)
    if name == "answer" and _FINAL.search(value):
        value = _FINAL.split(value)[-1].strip()
    return value if value.strip() else None


def _number(label: str, value: int | float | Decimal) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{label} is {value}, expected text or a finite number")
    text = f"{Decimal(str(value)):f}"  # without an exponent
    return text.rstrip("0").rstrip(".") if "." in text else text


def _messages(label: str, value: list[Any]) -> Messages:
    messages: Messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise ValueError(f"{label}: message {number} is {type(message).__name__}, expected role and content")
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str):
                kind = "missing" if text is None else type(text).__name__
                raise ValueError(f"{label}: the {key} of message {number} is {kind}, expected text")
        for part in message.values():  # the chat template may show any of them
            if isinstance(part, str):
                _check_text(label, part)
        # A column of structs gives each message every key that any message has.
        messages.append({key: part for key, part in message.items() if part is not None})
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked or not asked[-1].strip():
        raise ValueError(f"{label} has no user message with text")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{label} ends with the assistant's message, which the model is to write")
    return messages


def _check_text(label: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{label} is no valid Unicode: {error.reason}") from None


def batches(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of `batch_size` row numbers below `count`; each epoch is a new order, given by `seed` alone.

    A batch may span two epochs, so that every batch is full. With `start` the first so many batches are left out, at
    the cost of at most one epoch's order.

    Raises:
        ValueError: `count` or `batch_size` is below 1, or `start` below 0.
    """
    if count < 1 or batch_size < 1 or start < 0:
        raise ValueError(f"no batches of {batch_size} of {count} rows from batch {start} on")
    first, offset = divmod(start * batch_size, count)
    epochs = (_shuffled(count, seed, epoch) for epoch in itertools.count(first))
    rows = itertools.islice(itertools.chain.from_iterable(epochs), offset, None)
    return (list(itertools.islice(rows, batch_size)) for _ in itertools.count())


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
