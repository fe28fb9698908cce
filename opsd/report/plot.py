"""Which charts there are, of what, and where in a plot everything lies, in percent of it from the top left corner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from opsd.report.read import RunData, finite

MAX_POINTS = 800
"""Points of a curve; of a longer one each interval keeps its smallest and its largest value."""


class Chart(NamedTuple):
    """One line per run for each of `metrics` (name: label), the second one lighter. Values times `scale`.

    `note`: what it shows and what to make of it, for one who sees it for the first time.
    """

    title: str
    unit: str
    metrics: dict[str, str]
    note: str = ""
    scale: float = 1.0

    @property
    def percent(self) -> bool:
        """Whether it shows shares in percent, which are recorded as 0 to 1."""
        return self.unit.startswith("%")

    def value(self, recorded: Any) -> float | None:
        """To five digits, as it is drawn; None if it is no number."""
        known = finite(recorded)
        return None if known is None else float(f"{known * (100 if self.percent else self.scale):.5g}")


# fmt: off
CHARTS = (
    Chart("Loss", "nats per token", {"loss": "loss", "divergence": "divergence before clips"},
          "How far student and teacher are apart on the student's own rollouts. Falls as it learns."),
    Chart("Entropy", "nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"},
          "How undecided each is. The student's may fall to the teacher's; far below it, rollouts no longer vary."),
    Chart("Rollout length", "tokens, mean", {"rollout_length": "rollout"},
          "Neither direction is better. A steep fall may mean answers without their work."),
    Chart("Longest and shortest", "tokens", {"rollout_length_max": "longest", "rollout_length_min": "shortest"},
          "Of each step's rollouts. One of rollout.max_new_tokens was most likely cut."),
    Chart("Truncated rollouts", "% of rollouts", {"truncated": "truncated"},
          "Cut at rollout.max_new_tokens, so their endings are not learnt. Low is good."),
    Chart("Teacher's prompt", "tokens, mean", {"teacher_context_length": "prompt"},
          "Problem and solution as the teacher reads them. It follows the data, and costs time and memory."),
    Chart("Clipped tokens", "% of tokens", {"entry_clipped": "an entry", "token_clipped": "the token"},
          "Tokens that a clip acts on. Clips are for outliers: above half, they shape the loss."),
    Chart("Taken by the clips", "nats per token", {"clipped_amount": "clipped"},
          "What the clips remove from the divergence. Above half of it, most of the teacher's signal is lost."),
    Chart("Gradient norm", "before clipping", {"grad_norm": "norm"},
          "Single peaks are common. Many of ten times the usual, or a steady rise, are instability."),
    Chart("Learning rate", "", {"lr": "rate"}, "As optim.lr, its warm-up and its schedule have it."),
    Chart("Top-k overlap", "% of the likeliest tokens", {"top_k_overlap": "overlap"},
          "Of the teacher's 8 likeliest tokens, those among the student's 8. May fall while the two agree better: "
          "once both are sure of one token, the other 7 are next to impossible."),
    Chart("Sampler mismatch", "nats per token", {"sampler_mismatch": "mismatch"},
          "How far the sampler's log-probabilities are off the student's. About 0 is good; above 0.1, the rollouts "
          "come from other weights or settings."),
    Chart("Importance weight", "mean", {"importance_weight": "weight"},
          "p_student / p_sampler of the sampled tokens, capped. About 1 is good: the sampler is the student."),
    Chart("Capped importance weights", "% of tokens", {"importance_capped": "capped"},
          "Weights held at rollout.importance_cap. Low is good, unless the cap is 1 or less."),
    Chart("Throughput", "rollout tokens per second", {"tokens_per_second": "tokens/s"},
          "Of whole steps. High is good; dips on a CPU are often other work on the same cores."),
    Chart("Peak memory", "GiB", {"peak_memory_bytes": "peak"},
          "A GPU's in that step; on a CPU the most that the process has held so far.", 2.0**-30),
)
# fmt: on

ACCURACY = Chart("Accuracy", "% of answers", {}, "High is good. Bars and the band are 95 % intervals; dashed: the "
                 "teacher, who reads the solution; dotted: the base model.")  # fmt: skip


def training_figures(runs: Sequence[RunData]) -> tuple[list[dict[str, Any]], list[str]]:
    """A figure for each chart that there is something to draw for, and the titles of those that are zero throughout."""
    known = {"step", "tokens", "seconds", "warnings", *(name for chart in CHARTS for name in chart.metrics)}
    found = {name for run in runs for record in run.metrics for name in record if not name.startswith("seconds_")}
    others = [Chart(name.replace("_", " ").capitalize(), "", {name: name}) for name in sorted(found - known)]
    figures, flat = [], []
    for chart in (*CHARTS, *others):
        metrics = {name: label for name, label in chart.metrics.items() if any(run.values(name) for run in runs)}
        if metrics.keys() == {"loss", "divergence"}:
            pairs = [pair for run in runs for pair in zip(*map(run.values, metrics), strict=False)]
            if all(math.isclose(loss, divergence, rel_tol=1e-3) for loss, divergence in pairs):
                del metrics["divergence"]  # no clip acts, and they are one line
        if any(any(run.values(name)) for name in metrics for run in runs):
            lines = [
                {"run": number, "second": second > 0, "label": label, "points": points}
                for second, (name, label) in enumerate(metrics.items())
                for number, run in enumerate(runs)
                if (points := thinned([(r["step"], chart.value(r[name])) for r in run.metrics if name in r]))
            ]
            figures.append(figure(chart, lines, *steps_of(runs)))
        elif metrics:
            flat.append(chart.title)
    return figures, flat


def accuracy_figure(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The evaluations by step, and as references the teacher's and the base model's; None if there are none."""
    lines: list[dict[str, Any]] = []
    references: dict[tuple[Any, ...], str] = {}
    for number, run in enumerate(runs):
        rows = sorted((e for e in run.evaluations if e.get("name") != "teacher"), key=lambda e: e["step"])
        values = [[ACCURACY.value(e.get(key)) for key in ("accuracy", "low", "high")] for e in rows]
        points = [(e["step"], value) for e, (value, *_) in zip(rows, values, strict=True)]
        intervals = [interval for _, *interval in values]
        if points:
            lines.append(
                {"run": number, "second": False, "label": "accuracy", "points": points, "intervals": intervals}
            )
        for name in ("teacher", "base"):
            if e := run.evaluation(name):
                known = (name, *(ACCURACY.value(e.get(key)) for key in ("accuracy", "low", "high")))
                references[known] = "shared" if known in references else f"r{number % 6}"
    first, last = steps_of(runs)
    steps = [first, last, 0, *(step for line in lines for step, _ in line["points"])]
    found = [(f"{name} {look}", *known) for (name, *known), look in references.items()]
    return figure(ACCURACY, lines, min(steps), max(steps), found) if lines else None


def steps_of(runs: Sequence[RunData]) -> tuple[int, int]:
    """The first and the last step of any of the runs, at least one apart."""
    first = min(run.metrics[0]["step"] for run in runs)
    return first, max(first + 1, *(run.steps for run in runs))


def figure(
    chart: Chart, lines: list[dict[str, Any]], first: int, last: int, references: Sequence[tuple[Any, ...]] = ()
) -> dict[str, Any]:
    """What a template needs to draw `chart` from step `first` to `last`.

    The values' axis is logarithmic where all are positive and the largest is more than 100 times the lowest tenth of
    them, and never one of percentages.

    Args:
        lines: each with `run`, its number; `second`, drawn lighter; `label`; `points`, (step, value or None);
            maybe `intervals`, a pair of values or Nones for each point.
        references: what is the same at every step: class, value, low, high.
    """
    pairs = [pair for line in lines for pair in line.get("intervals", ())] + [known[1:] for known in references]
    values = [*(value for line in lines for _, value in line["points"]), *(value for pair in pairs for value in pair)]
    drawn = sorted(value for value in values if value is not None)
    log = not chart.percent and drawn[0] > 0 and drawn[-1] > 100 * drawn[len(drawn) // 10]
    height = math.log10 if log else float
    low, high = height(drawn[0]), height(drawn[-1])
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = 0.0 if not log and 0 <= low < 0.35 * high else low - room, high + room
    if chart.percent:
        low, high = min(drawn[0], max(0.0, low)), max(drawn[-1], min(100.0, high))

    def x(step: float) -> float:
        return round(100 * (step - first) / (last - first), 2)

    def y(value: float | None) -> float | None:
        return None if value is None else round(100 * (high - height(value)) / (high - low), 2)

    for line in lines:
        line["path"], line["dots"] = "", []
        for known, group in groupby(line["points"], lambda point: point[1] is not None):
            spots = [(x(step), y(value)) for step, value in group] if known else []
            line["path"] += "".join(f"{'L' if i else 'M'}{a:g} {b:g}" for i, (a, b) in enumerate(spots))
            line["dots"] += spots if len(spots) == 1 or "intervals" in line else []  # no line reaches one alone
        bars = zip(line["points"], line.get("intervals", ()), strict="intervals" in line)
        line["bars"] = [(x(step), y(pair[0]), y(pair[1])) for (step, _), pair in bars if None not in pair]
    return {
        "chart": chart,
        "log": log,
        "lines": lines,
        "references": [(look, *map(y, values)) for look, *values in references],
        "x_ticks": [(x(step), f"{step:,.0f}") for step in _ticks(first, last, whole=True)],
        "y_ticks": [(y(10**v if log else v), f"{10**v if log else v:,.6g}") for v in _ticks(low, high, whole=log)],
    }


def thinned(points: Sequence[tuple[int, float | None]], limit: int = MAX_POINTS) -> list[tuple[int, float | None]]:
    """At most about `limit` of `points`: each interval's smallest and largest value, the ends, and a gap if it has one.

    A value of None is a gap.
    """
    if len(points) <= limit:
        return list(points)
    intervals = limit // 2
    kept = {0, len(points) - 1}
    for i in range(intervals):
        chosen = range(i * len(points) // intervals, (i + 1) * len(points) // intervals)
        drawn = [(value, j) for j in chosen if (value := points[j][1]) is not None]
        kept |= {min(drawn)[1], max(drawn)[1]} if drawn else set()
        kept |= set([j for j in chosen if points[j][1] is None][:1])
    return [points[j] for j in sorted(kept)]


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Round numbers between the two, about five; only `whole` ones if so."""
    rough = max((high - low) / 5, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
