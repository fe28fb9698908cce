"""What a person at the terminal sees of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from opsd.evaluation import Evaluation
from opsd.output import all_shown


class Display:
    """Progress: a bar in a terminal, else a plain line every so many steps. `quiet` shows nothing.

    While open, whatever is printed can be lost but ends no run, be it by a bar of another package.
    """

    def __init__(self, *, every: int = 1, steps: int = 0, quiet: bool = False):
        self.console, self.every, self.steps, self.quiet = Console(highlight=False), every, steps, quiet
        self.live = self.console.is_terminal and not quiet
        start, end = (
            ("{task.description}", BarColumn(), MofNCompleteColumn()),
            (TimeElapsedColumn(), TimeRemainingColumn()),
        )
        self.progress = Progress(*start, "{task.fields[text]}", *end, console=self.console, disable=not self.live)
        self.tasks: dict[str, TaskID] = {}
        self.held = ExitStack()

    def __enter__(self) -> Display:
        self.held.enter_context(all_shown())
        if self.live:  # rich before 14.3 ends even a disabled bar with an empty line
            self.progress.start()
            self.held.callback(self.progress.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def note(self, text: str, *, style: str | None = None) -> None:
        """A line of its own, above the bar; `style`, as rich spells it, shows in a terminal only."""
        if self.live:
            self.console.print(text, markup=False, style=style)
        elif not self.quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """A note that stands out."""
        self.note(f"warning: {text}", style="yellow")

    def advance(self, phase: str, step: int, total: int, text: str, *, every: int | None = None) -> None:
        """`phase` has come to `step` of `total`; `text` says how it stands."""
        if self.live:
            if phase not in self.tasks:
                self.tasks[phase] = self.progress.add_task(phase, total=total, text="")
            self.progress.update(self.tasks[phase], completed=step, text=text)
        elif step % (every or self.every) == 0 or step in (1, total):
            self.note(f"{phase} {step}/{total}  {text}")

    def on_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        text = "  ".join(f"{k} {record[k]:.4g}" for k in ("loss", "rollout_length", "grad_norm") if k in record)
        self.advance("step", record["step"], self.steps, f"{text}  {record['tokens_per_second']:.0f} tokens/s")
        for warning in record["warnings"]:
            self.warn(f"step {record['step']}: {warning}")

    def on_evaluation(self, record: Mapping[str, Any]) -> None:
        self.note(f"accuracy, {record['name']}: {Evaluation.of(record)}")
