"""Stopping a run between two steps, when it is asked to by a signal."""

from __future__ import annotations

import os
import signal
import threading


class StopRequest:
    """While open, the first SIGINT or SIGTERM asks for a stop after the step, and the next one stops at once.

    `signal` is the number of the signal, 0 before one came.
    """

    def __init__(self, *, quiet: bool):
        self.quiet, self.signal = quiet, 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if not self.quiet:  # print would fail where the signal comes in the middle of a print
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")
