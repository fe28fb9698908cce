"""How far a run has come, and whether it is asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counts of a run over all processes that worked on it: with the weights, all that a checkpoint has to hold."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  #: as of the last step
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  #: "base", "teacher" and "trained"
    best: dict[str, Any] | None = None  #: step and accuracy of the best evaluation in training
    since_best: int = 0  #: evaluations since then
    last_record: dict[str, Any] = field(default_factory=dict)

    def judge(self, accuracy: float) -> bool:
        """Counts an evaluation of the present step; returns whether it is the best one so far."""
        if self.best is not None and accuracy <= self.best["accuracy"]:
            self.since_best += 1
            return False
        self.best, self.since_best = {"step": self.step, "accuracy": accuracy}, 0
        return True

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether `eval.patience` ends the run."""
        return patience is not None and self.since_best >= patience

    def summary(self, counts: dict[str, int], steps: int, *, saved: bool) -> dict[str, Any]:
        """What `summary.json` holds; `counts` are of the rows, `saved` says whether the model was."""
        return {
            "steps": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            **counts,
            "evaluations": self.evaluations,
            "best": self.best,
            "stopped_early": self.step < steps,
            "last_step": self.last_record,
            "model": "model" if saved else None,
        }

    def finished(self, steps: int, patience: int | None) -> str | None:
        """Why there is no further step, or None if there is one."""
        if self.step >= steps:
            return f"step {self.step} was the last; a higher optim.steps goes on from there"
        if self.out_of_patience(patience):
            return (
                f"it stopped early after step {self.step}, by eval.patience {patience}; a higher one, or none, goes on "
                "from there"
            )
        return None


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
            with suppress(AttributeError, OSError, ValueError):  # without standard error, or it cannot be written
                os.write(
                    sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint; once more stops at once\n"
                )
