"""How far a run has come: with the weights, all that a checkpoint has to hold."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counts of a run over all processes that worked on it."""

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

    def forget_best(self) -> None:
        """As if there had been no evaluation in training."""
        self.best, self.since_best = None, 0

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether `eval.patience` ends the run."""
        return patience is not None and self.since_best >= patience

    def standstill(self) -> str:
        """How long no evaluation was better, in words."""
        best, count = self.best or {}, self.since_best
        evaluations = "1 evaluation was" if count == 1 else f"{count} evaluations were"
        return f"{evaluations} no better than {best['accuracy']:.1%} at step {best['step']}"

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
