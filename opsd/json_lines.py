"""Lines of JSON from a file that may be anything, and a plain word on what it is if it is something else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd.errors import DataError
from opsd.files import read_file

ACCEPTED = (
    "accepted: JSON lines in UTF-8, a .parquet file, a directory of .jsonl or .parquet parts, or one saved by datasets"
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
LONGEST_NUMBER = 4300  # digits, what Python converts

_BEGINNINGS = {
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file, whose name has to end with .parquet",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"SQLite format 3": "an SQLite database",
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16",
    b"\x00\x00\xfe\xff": "text in UTF-32",
}


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) for each line of `path` that is not blank. A byte-order mark of UTF-8 is left out.

    Raises:
        DataError: the file cannot be read, holds nothing, or is known to be something else than JSON lines.
    """
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if kind := _other_kind(path, data):
        raise DataError(f"{path}: is {kind}; {ACCEPTED}")
    return ((number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def _other_kind(path: Path, data: bytes) -> str | None:
    """What the file is if it is no JSON lines, as far as its beginning tells."""
    start = data[:4096].lstrip()
    if not data.strip():
        return "empty"
    for beginning, kind in _BEGINNINGS.items():
        if data.startswith(beginning):
            return kind
    if b"\0" in start:
        return "text in UTF-16 or a binary file, since it holds NUL bytes"
    separated = {".csv": "comma", ".tsv": "tab"}.get(path.suffix.lower())
    if separated and not start.startswith((b"{", b"[")):
        return f"{separated}-separated values ({path.suffix[1:].upper()})"
    return None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in `line`.

    Raises:
        ValueError: there is none, a key is given twice in it or in an object within, or a whole number has more than
            `LONGEST_NUMBER` digits.
    """
    array = line.lstrip().startswith(b"[")  # the first line of one large array
    hint = "; accepted: one object per line (JSONL), no array around them" if array else ""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: not UTF-8: {error.reason} at byte {error.start + 1}") from None
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except json.JSONDecodeError as error:  # which would name the line, of the one that it was given
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}{hint}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}{hint}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in record if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice; accepted: each key once")
    return record


def _whole(digits: str) -> int:
    count = len(digits.lstrip("-"))
    if count > LONGEST_NUMBER:
        raise ValueError(f"a number of {count} digits; accepted: up to {LONGEST_NUMBER}, longer ones as text in quotes")
    return int(digits)
