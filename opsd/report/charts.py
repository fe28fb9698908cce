"""What a report draws of metrics and evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsd.report.plot import Line, plot
from opsd.report.read import Record, RunData, finite
from opsd.report.tables import Table

MAX_POINTS = 800
"""Points of a curve; of a longer one each interval keeps its smallest and its largest value."""

TABLE_ROWS = 12


@dataclass(frozen=True)
class Chart:
    """A figure: one line per run for each of `metrics` (name: label), the second one lighter. Values times `scale`.

    `note`: what it shows and what to make of it, for one who sees it for the first time.
    """

    title: str
    unit: str
    metrics: dict[str, str]
    note: str = ""
    scale: float = 1.0


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
          "Cut at rollout.max_new_tokens, so their endings are not learnt. Low is good.", 100.0),
    Chart("Teacher's prompt", "tokens, mean", {"teacher_context_length": "prompt"},
          "Problem and solution as the teacher reads them. It follows the data, and costs time and memory."),
    Chart("Clipped tokens", "% of tokens", {"entry_clipped": "an entry", "token_clipped": "the token"},
          "Tokens that a clip acts on. Clips are for outliers: above half, they shape the loss.", 100.0),
    Chart("Taken by the clips", "nats per token", {"clipped_amount": "clipped"},
          "What the clips remove from the divergence. Above half of it, most of the teacher's signal is lost."),
    Chart("Gradient norm", "before clipping", {"grad_norm": "norm"},
          "Single peaks are common. Many of ten times the usual, or a steady rise, are instability."),
    Chart("Learning rate", "", {"lr": "rate"}, "As optim.lr, its warm-up and its schedule have it."),
    Chart("Top-k overlap", "% of the likeliest tokens", {"top_k_overlap": "overlap"},
          "Of the teacher's 8 likeliest tokens, those among the student's 8. May fall while the two agree better: "
          "once both are sure of one token, the other 7 are next to impossible.", 100.0),
    Chart("Sampler mismatch", "nats per token", {"sampler_mismatch": "mismatch"},
          "How far the sampler's log-probabilities are off the student's. About 0 is good; above 0.1, the rollouts "
          "come from other weights or settings."),
    Chart("Importance weight", "mean", {"importance_weight": "weight"},
          "p_student / p_sampler of the sampled tokens, capped. About 1 is good: the sampler is the student."),
    Chart("Capped importance weights", "% of tokens", {"importance_capped": "capped"},
          "Weights held at rollout.importance_cap. Low is good, unless the cap is 1 or less.", 100.0),
    Chart("Throughput", "rollout tokens per second", {"tokens_per_second": "tokens/s"},
          "Of whole steps. High is good; dips on a CPU are often other work on the same cores."),
    Chart("Peak memory", "GiB", {"peak_memory_bytes": "peak"},
          "A GPU's in that step; on a CPU the most that the process has held so far.", 2.0**-30),
)
# fmt: on

ACCURACY = Chart(
    "Accuracy over the steps",
    "% of answers",
    {},
    "High is good. Bars and the band are 95 % intervals; dotted: the teacher, who reads the solution, and the base "
    "model.",
)


@dataclass(frozen=True)
class Figure:
    """A chart as it is drawn: `plots`, on a linear axis and where it can be on a logarithmic one, are `plot`'s."""

    chart: Chart
    lines: list[Line]
    plots: list[dict[str, Any]]
    table: Table | None = None


def training_figures(runs: Sequence[RunData]) -> tuple[list[Figure], list[str]]:
    """A figure for each chart that there is something to draw for, and the titles of those that are zero throughout."""
    known = {"step", "tokens", "seconds", "warnings", *(name for chart in CHARTS for name in chart.metrics)}
    found = {name for run in runs for record in run.metrics for name in record if not name.startswith("seconds_")}
    others = [Chart(name.replace("_", " ").capitalize(), "", {name: name}) for name in sorted(found - known)]
    figures, flat = [], []
    for chart in (*CHARTS, *others):
        metrics = {name: label for name, label in chart.metrics.items() if any(run.values(name) for run in runs)}
        # Where no clip acts the loss is the divergence, and one line.
        if {"loss", "divergence"} <= metrics.keys() and all(_alike(r) for run in runs for r in run.metrics):
            del metrics["divergence"]
        if any(any(run.values(name)) for name in metrics for run in runs):
            lines = [
                {"run": number, "second": second > 0, "label": label, "points": points}
                for second, (name, label) in enumerate(metrics.items())
                for number, run in enumerate(runs)
                if (points := _points(run, name, chart.scale))
            ]
            plots = [drawn for log in (False, True) if (drawn := plot(lines, log=log))]
            figures.append(Figure(chart, lines, plots, _table(runs, chart, metrics)))
        elif metrics:
            flat.append(chart.title)
    return figures, flat


def accuracy_figure(runs: Sequence[RunData]) -> Figure | None:
    """The evaluations by step with their intervals, and as references the teacher's and the base model's."""
    lines: list[Line] = []
    bands: dict[tuple[str, tuple], str] = {}  # runs often share their teacher and base, which then are no run's own
    for number, run in enumerate(runs):
        rows = sorted((e for e in run.evaluations if e.get("name") != "teacher"), key=lambda e: e["step"])
        line: Line = {"run": number, "second": False, "label": "accuracy", "points": [], "errors": [], "names": []}
        for e in rows:
            accuracy, *interval = _percentages(e)
            line["points"].append([e["step"], accuracy])
            line["errors"].append(interval)
            named = {"base": "base model", "trained": f"trained, step {e['step']}"}
            line["names"].append(named.get(str(e.get("name")), str(e.get("name"))))
        lines += [line] if rows else []
        base = run.evaluation("base") if len(rows) > 1 else None
        for label, known in ("teacher", run.evaluation("teacher")), ("base", base and {"accuracy": base["accuracy"]}):
            if known:
                key = label, tuple(_percentages(known))
                bands[key] = "shared" if key in bands else f"r{number % 6}"
    drawn = plot(lines, [(label, look, v) for (label, v), look in bands.items()], bounded=True, marks=6)
    return Figure(ACCURACY, lines, [drawn]) if drawn else None


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


def _points(run: RunData, metric: str, scale: float) -> list[list[float | None]]:
    raw = [(record["step"], _scaled(record[metric], scale)) for record in run.metrics if metric in record]
    return [[step, None if value is None else float(f"{value:.5g}")] for step, value in thinned(raw)]


def _scaled(value: Any, scale: float) -> float | None:
    known = finite(value)
    return None if known is None else known * scale


def _alike(record: Record) -> bool:
    loss, divergence = finite(record.get("loss")), finite(record.get("divergence"))
    return loss is None or divergence is None or math.isclose(loss, divergence, rel_tol=1e-3)


def _percentages(evaluation: Record) -> list[float | None]:
    return [_scaled(evaluation.get(key), 100.0) for key in ("accuracy", "low", "high")]


def _table(runs: Sequence[RunData], chart: Chart, metrics: dict[str, str]) -> Table:
    steps = sorted({record["step"] for run in runs for record in run.metrics})
    if len(steps) > TABLE_ROWS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)})
    head, columns = ["Step"], [steps]
    for metric, label in metrics.items():
        for run in runs:
            head.append(f"{run.name}: {label}" if len(runs) > 1 else label)
            values = {record["step"]: _scaled(record.get(metric), chart.scale) for record in run.metrics}
            columns.append([values.get(step) for step in steps])
    return Table(f"{chart.title} at some steps", head, [list(row) for row in zip(*columns, strict=True)], words=0)
