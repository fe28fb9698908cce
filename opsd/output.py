"""Text for a person, shown where it can be: a reader that has gone, a full disk or a narrow encoding ends no run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EBADF)
"""Nobody reads any more, as behind `| head`."""


class Shown:
    """`stream`, writing to which never raises. Characters outside its encoding are escaped; text that finds no room
    goes to `instead`, where there is one; text that nobody reads is dropped."""

    def __init__(self, stream: TextIO, instead: TextIO | None = None):
        self.stream, self.instead = stream, instead

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()  # what is lost must be lost here
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if self.instead is not None and getattr(error, "errno", errno.EPIPE) not in GONE:
                self.instead.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def all_shown() -> Iterator[None]:
    """While open, printing never raises."""
    error = _shown(sys.stderr)
    with redirect_stdout(_shown(sys.stdout, error)), redirect_stderr(error):
        yield


def _shown(stream: TextIO | None, instead: TextIO | None = None) -> TextIO | None:
    return None if stream is None else cast(TextIO, Shown(stream, instead))  # None: it was closed from the start


def drop_rest() -> None:
    """What could not be written goes to the null device: Python would try again at its end, and exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())
                stream.flush()
