"""Files that are there whole or not at all, whatever happens to the process or the disk; and lines of JSON.

What is being written has a name that begins with `UNFINISHED`, and is renamed once it is on the disk.
"""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError

UNFINISHED = ".unfinished-"


def remove_unfinished(directory: Path) -> None:
    """Removes what an earlier process left behind in the middle of writing, and puts back what it had set aside."""
    for path in directory.glob(f"{UNFINISHED}old-*"):
        former = directory / path.name.removeprefix(f"{UNFINISHED}old-")
        if not former.exists():
            path.rename(former)
    for path in directory.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_file(path: Path) -> bytes:
    """All that `path` holds.

    Raises:
        OSError: it cannot be read, or is a device, which may have no end.
        ValueError: no file can have that name.
    """
    if stat.S_ISCHR(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a device, not a file")
    return path.read_bytes()


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a new directory and puts it in the place of `directory`, which is never half-written.

    Raises:
        OSError: it cannot be written; `directory` is as it was. So it is after any error of `write`.
    """
    fresh, old = (directory.with_name(f"{UNFINISHED}{kind}-{directory.name}") for kind in ("new", "old"))
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        write(fresh)
        for path in fresh.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    flush(file)
        flush_directory(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    flush_directory(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path`, which holds either all of it or what it held before.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    fresh = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            flush(file)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """One more line in `path`: all of it or, on an error, nothing. Numbers that JSON cannot hold become null.

    Raises:
        OSError: the line cannot be written, as on a full disk; `path` is as long as before.
    """
    line = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        length = os.fstat(file).st_size
        try:
            # One write, so that killing the process rarely halves a line; a short one means that space ran out, and
            # the next attempt says how.
            while line:
                line = line[os.write(file, line) :]
        except BaseException:
            os.ftruncate(file, length)
            raise
    finally:
        os.close(file)


def _finite(value: Any) -> Any:
    """`value` with null for the numbers that JSON cannot hold, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rewind_json(path: Path, step: int) -> None:
    """Forget the records of `path`, as written by `append_json`, that are of later steps than `step`.

    A run that goes on from the checkpoint of `step` calls this first. The last line may be half-written, since the
    process may have been killed at any moment; it is dropped then. `path` is replaced at once and need not exist.

    Raises:
        ConfigError: another line is not a record with a step, so that the file is not what a run leaves.
        OSError: the file cannot be read or replaced; it is as it was.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    *lines, last = data.split(b"\n")
    kept = []
    for number, line in enumerate([*lines, last], 1):
        try:
            of = json.loads(line.decode())["step"]
            if not isinstance(of, int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number > len(lines):  # empty, or half-written
                break
            raise ConfigError(f"{path}:{number}: not a record with a step: {line[:80]!r}") from None
        if of <= step:
            kept.append(line + b"\n")
    rewound = b"".join(kept)
    if rewound != data:
        replace_file(path, rewound)


def flush(file: Any) -> None:
    """Until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Until the names in `path` are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
