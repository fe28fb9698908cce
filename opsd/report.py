"""One self-contained HTML page of one run or of several: what `opsd report` writes.

Python reads the run directories and writes all text and tables; `report.js` draws the charts and the token view from a
block of JSON in the page. Nothing is fetched from anywhere: a content security policy in the page forbids it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from opsd.config import ConfigError

MAX_SAMPLES = 40
"""Rollouts in a page unless asked otherwise."""

MAX_TOKENS = 4096
"""Tokens of one rollout in the token view: each is an element of the page."""

MAX_PAGE_TOKENS = 50_000
"""Tokens of all rollouts, about: each takes some 100 to 300 bytes of the page. Long rollouts are therefore fewer."""

MAX_POINTS = 800
"""Points of a curve; of a longer one each interval keeps its smallest and its largest value."""

TABLE_ROWS = 12

Record = dict[str, Any]


@dataclass
class RunData:
    """What a run directory holds, as far as it could be read. `notes` says what could not."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    metrics: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: dict[str, Any] = field(default_factory=dict)
    """What run.json says: when, on what and with which packages the run began."""
    written: datetime | None = None

    def option(self, name: str) -> Any:
        """The value of section.option in config.yaml, or None."""
        section, _, key = name.partition(".")
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    def options(self) -> dict[str, Any]:
        """section.option: value."""
        return {
            f"{section}.{name}": value
            for section, values in self.config.items()
            if isinstance(values, dict)
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Chart:
    """A figure: one line per run, or two where `metrics` has a second one, drawn lighter. Values times `scale`.

    `note`: what it shows and what to make of it, for one who sees it for the first time.
    """

    title: str
    metrics: tuple[tuple[str, str], ...]
    unit: str = ""
    scale: float = 1.0
    note: str = ""


CHARTS = (
    Chart(
        "Loss",
        (("loss", "loss"), ("divergence", "divergence before clips")),
        "nats per token",
        note="How far student and teacher are apart on the student's own rollouts. Falls as it learns.",
    ),
    Chart(
        "Entropy",
        (("student_entropy", "student"), ("teacher_entropy", "teacher")),
        "nats per token",
        note="How undecided each is. The student's may fall to the teacher's; far below it, rollouts no longer vary.",
    ),
    Chart(
        "Rollout length",
        (("rollout_length", "rollout"),),
        "tokens, mean",
        note="Neither direction is better. A steep fall may mean answers without their work.",
    ),
    Chart(
        "Longest and shortest",
        (("rollout_length_max", "longest"), ("rollout_length_min", "shortest")),
        "tokens",
        note="Of each step's rollouts. One of rollout.max_new_tokens was most likely cut.",
    ),
    Chart(
        "Truncated rollouts",
        (("truncated", "truncated"),),
        "% of rollouts",
        100.0,
        note="Cut at rollout.max_new_tokens, so their endings are not learnt. Low is good.",
    ),
    Chart(
        "Teacher's prompt",
        (("teacher_context_length", "prompt"),),
        "tokens, mean",
        note="Problem and solution as the teacher reads them. It follows the data, and costs time and memory.",
    ),
    Chart(
        "Clipped tokens",
        (("entry_clipped", "an entry"), ("token_clipped", "the token")),
        "% of tokens",
        100.0,
        note="Tokens that a clip acts on. Clips are for outliers: above half, they shape the loss.",
    ),
    Chart(
        "Taken by the clips",
        (("clipped_amount", "clipped"),),
        "nats per token",
        note="What the clips remove from the divergence. Above half of it, most of the teacher's signal is lost.",
    ),
    Chart(
        "Gradient norm",
        (("grad_norm", "norm"),),
        "before clipping",
        note="Single peaks are common. Many of ten times the usual, or a steady rise, are instability.",
    ),
    Chart("Learning rate", (("lr", "rate"),), note="As optim.lr, its warm-up and its schedule have it."),
    Chart(
        "Top-k overlap",
        (("top_k_overlap", "overlap"),),
        "% of the likeliest tokens",
        100.0,
        note="Of the teacher's 8 likeliest tokens, those among the student's 8. May fall while the two agree better: "
        "once both are sure of one token, the other 7 are next to impossible.",
    ),
    Chart(
        "Sampler mismatch",
        (("sampler_mismatch", "mismatch"),),
        "nats per token",
        note="How far the sampler's log-probabilities are off the student's. About 0 is good; above 0.1, the rollouts "
        "come from other weights or settings.",
    ),
    Chart(
        "Importance weight",
        (("importance_weight", "weight"),),
        "mean",
        note="p_student / p_sampler of the sampled tokens, capped. About 1 is good: the sampler is the student.",
    ),
    Chart(
        "Capped importance weights",
        (("importance_capped", "capped"),),
        "% of tokens",
        100.0,
        note="Weights held at rollout.importance_cap. Low is good, unless the cap is 1 or less.",
    ),
    Chart(
        "Throughput",
        (("tokens_per_second", "tokens/s"),),
        "rollout tokens per second",
        note="Of whole steps. High is good; dips on a CPU are often other work on the same cores.",
    ),
    Chart(
        "Peak memory",
        (("peak_memory_bytes", "peak"),),
        "GiB",
        2.0**-30,
        note="A GPU's in that step; on a CPU the most that the process has held so far.",
    ),
)

ESSENTIAL = (
    "model.path",
    "model.dtype",
    "model.autocast",
    "lora.enabled",
    "lora.r",
    "data.train",
    "data.eval",
    "teacher.kind",
    "teacher.path",
    "objective.form",
    "objective.beta",
    "objective.temperature",
    "objective.entry_clip",
    "objective.token_clip",
    "objective.top_k",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.per_prompt",
    "optim.lr",
    "optim.schedule",
    "optim.steps",
    "optim.batch_size",
    "run.seed",
)


def write_report(
    directories: Sequence[str | Path], output: str | Path | None = None, *, max_samples: int = MAX_SAMPLES
) -> Path:
    """Write the page and return where it is.

    Args:
        directories: of one run or more.
        output: the file; None: `report.html` in the directory of the one run, for several `opsd-report.html` in the
            current directory.
        max_samples: rollouts in the token view, spread evenly over the runs and their steps.

    Raises:
        ConfigError: something is not a run directory, has no step recorded, or the page cannot be written.
    """
    names = _names([Path(directory) for directory in directories])
    runs = [read_run(directory, name) for directory, name in zip(directories, names, strict=True)]
    if output is None:
        output = runs[0].path / "report.html" if len(runs) == 1 else Path("opsd-report.html")
    try:
        Path(output).write_text(render(runs, max_samples=max_samples), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
    return Path(output)


def read_run(directory: str | Path, name: str | None = None) -> RunData:
    """What is in a run directory. Files that are missing, and lines that are half written, end up in `notes`.

    Raises:
        ConfigError: it is no run directory, or no step has been recorded in it.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"{directory}: {'not a directory' if path.exists() else 'there is no such run directory'}")
    if not (path / "metrics.jsonl").exists():
        missing = "no metrics.jsonl: no step was recorded" if (path / "config.yaml").exists() else "not a run directory"
        raise ConfigError(f"{directory}: {missing}")
    run = RunData(path, name or path.resolve().name)
    run.metrics = _by_step(_read_lines(run, "metrics.jsonl"))
    if not run.metrics:
        raise ConfigError(f"{directory}: metrics.jsonl holds no step that can be read")
    run.evaluations = list(
        {(e.get("step"), e.get("name")): e for e in _read_lines(run, "evaluations.jsonl") if _ok_evaluation(e)}.values()
    )
    run.samples = [s for s in _read_lines(run, "samples.jsonl") if isinstance(s.get("rollout"), str)]
    run.config = _read_mapping(run, "config.yaml", yaml.safe_load) or {}
    run.summary = _read_mapping(run, "summary.json", json.loads)
    run.started = _read_mapping(run, "run.json", json.loads) or {}
    with contextlib.suppress(KeyError, TypeError, ValueError):
        run.written = datetime.fromisoformat(run.started["created"])
    return run


def render(runs: Sequence[RunData], *, max_samples: int = MAX_SAMPLES) -> str:
    """The page."""
    charts, flat = _charts(runs)
    samples, left_out = _samples(runs, max_samples)
    payload = {
        "runs": [run.name for run in runs],
        "charts": [_chart_data(runs, chart) for chart in charts],
        "accuracy": _accuracy_data(runs),
        "samples": samples,
    }
    script, style = _asset("report.js"), _asset("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = ", ".join(run.name for run in runs)
    parts = [
        _header(runs),
        _results(runs),
        _notes(runs),
        _curves(runs, charts, flat),
        _time(runs),
        _tokens(runs, samples, left_out),
        _options(runs),
    ]
    # Filled in one pass over the template, so that what a run wrote is never taken for a placeholder.
    values = {
        "title": escape(title),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        "style": style,
        "body": "\n".join(part for part in parts if part),
        "data": _script_json(payload),
        "script": script,
    }
    pieces = _asset("report.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        key, _, rest = piece.partition("}}")
        filled += [values[key], rest]
    return "".join(filled)


# Reading


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: as few of the last folders as do."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len({*parts}):
            return names
    return ["/".join(p) for p in parts]


def _read_lines(run: RunData, name: str) -> list[Record]:
    path = run.path / name
    if not path.exists():
        run.notes.append(f"{name} is missing")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
        return []
    records, bad = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad.append(number)
    if bad and bad[-1] == len(lines):  # no newline after it
        run.notes.append(f"the last line of {name} is half written and left out")
        bad.pop()
    if bad:
        run.notes.append(f"{name}: {len(bad)} lines are no records and are left out, the first is line {bad[0]}")
    return records


def _read_mapping(run: RunData, name: str, load: Callable[[str], Any]) -> dict[str, Any] | None:
    path = run.path / name
    if not path.exists():
        unfinished = ": the run is not finished" if name == "summary.json" else ""
        run.notes.append(f"{name} is missing{unfinished}")
        return None
    try:
        loaded = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        loaded = None
    if not isinstance(loaded, dict):
        run.notes.append(f"{name} cannot be read")
        return None
    return loaded


def _by_step(records: Iterable[Record]) -> list[Record]:
    """In the order of steps; of a step that was run twice, before and after an interruption, the later record."""
    latest = {r["step"]: r for r in records if isinstance(r.get("step"), int) and not isinstance(r["step"], bool)}
    return [latest[step] for step in sorted(latest)]


def _ok_evaluation(record: Record) -> bool:
    return _finite(record.get("accuracy")) is not None and _finite(record.get("step")) is not None


def _finite(value: Any) -> float | None:
    """`value` if it is a number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _sum(run: RunData, metric: str) -> float:
    return sum(_finite(r.get(metric)) or 0.0 for r in run.metrics)


def _max(run: RunData, metric: str) -> float | None:
    return max((v for r in run.metrics if (v := _finite(r.get(metric))) is not None), default=None)


def _last(run: RunData, metric: str) -> float | None:
    return next((v for r in reversed(run.metrics) if (v := _finite(r.get(metric))) is not None), None)


def _warnings(run: RunData) -> dict[str, list[int]]:
    """The steps of each warning."""
    found: dict[str, list[int]] = {}
    for record in run.metrics:
        given = record.get("warnings")
        for text in given if isinstance(given, list) else []:
            found.setdefault(str(text), []).append(record["step"])
    return found


# Data of the charts


def _charts(runs: Sequence[RunData]) -> tuple[list[Chart], list[str]]:
    """The charts there is something to draw for, and the titles of those that would be zero throughout."""
    known = {name for chart in CHARTS for name, _ in chart.metrics}
    known |= {"step", "tokens", "seconds", "warnings"}
    other = sorted({name for run in runs for record in run.metrics for name in record} - known)
    more = [Chart(name.replace("_", " ").capitalize(), ((name, name),)) for name in other if "seconds_" not in name]
    charts, flat = [], []
    for chart in (*CHARTS, *more):
        metrics = tuple((name, label) for name, label in chart.metrics if any(_max(r, name) is not None for r in runs))
        if chart.title == "Loss" and all(_same(run, "loss", "divergence") for run in runs):
            metrics = metrics[:1]
        values = [v for n, _ in metrics for run in runs for r in run.metrics if (v := _finite(r.get(n))) is not None]
        if values and any(values):
            charts.append(replace(chart, metrics=metrics))
        elif values:
            flat.append(chart.title)
    return charts, flat


def _same(run: RunData, a: str, b: str) -> bool:
    pairs = ((_finite(r.get(a)), _finite(r.get(b))) for r in run.metrics)
    return all(x is None or y is None or abs(x - y) <= 1e-3 * max(abs(x), abs(y)) for x, y in pairs)


def _chart_data(runs: Sequence[RunData], chart: Chart) -> dict[str, Any]:
    lines = []
    for second, (metric, label) in enumerate(chart.metrics):
        for number, run in enumerate(runs):
            raw = [(r["step"], _finite(r.get(metric))) for r in run.metrics if metric in r]
            points = [[step, None if v is None else _short(v * chart.scale)] for step, v in thinned(raw)]
            if points:
                lines.append({"run": number, "second": bool(second), "label": label, "points": points})
    return {"title": chart.title, "unit": chart.unit, "lines": lines}


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
        if drawn:
            kept |= {min(drawn)[1], max(drawn)[1]}
        if len(drawn) < len(chosen):
            kept.add(next(j for j in chosen if points[j][1] is None))
    return [points[j] for j in sorted(kept)]


def _accuracy_data(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    data = []
    for number, run in enumerate(runs):
        rows = [
            {"step": e["step"], "name": str(e.get("name", "")), "values": [_percent_of(e, k) for k in _INTERVAL]}
            for e in run.evaluations
        ]
        teacher = [row for row in rows if row["name"] == "teacher"]
        rest = sorted((row for row in rows if row["name"] != "teacher"), key=lambda row: row["step"])
        if rows:
            data.append({"run": number, "points": rest, "teacher": teacher[-1] if teacher else None})
    return data


_INTERVAL = ("accuracy", "low", "high")


def _percent_of(record: Record, key: str) -> float | None:
    value = _finite(record.get(key))
    return None if value is None else round(100 * value, 4)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# Data of the token view


def _samples(runs: Sequence[RunData], limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rollouts to embed, spread evenly over each run, and for each run that has more a sentence that says so."""
    chosen: list[dict[str, Any]] = []
    left_out = []
    lengths = [min(MAX_TOKENS, len(s["view"])) for run in runs for s in run.samples if isinstance(s.get("view"), list)]
    if lengths and sum(lengths):
        limit = min(limit, MAX_PAGE_TOKENS * len(lengths) // sum(lengths))
    share = max(1, limit // len(runs)) if limit else 0
    for number, run in enumerate(runs):
        total = len(run.samples)
        last = total - 1
        kept = range(total) if total <= share else sorted({round(i * last / max(1, share - 1)) for i in range(share)})
        for i in kept:
            chosen.append(_sample(number, run.samples[i]))
        dropped = sorted({str(run.samples[i].get("step")) for i in range(total) if i not in kept}, key=_natural)
        if dropped:
            some = ", ".join(dropped[:12]) + (" …" if len(dropped) > 12 else "")
            left_out.append(f"{run.name}: {len(kept)} of {total} rollouts are here; left out are some of steps {some}")
    return chosen, left_out


def _natural(text: str) -> tuple[int, str]:
    return len(text), text


def _sample(number: int, record: Record) -> dict[str, Any]:
    view = record.get("view")
    view = [t for t in view if isinstance(t, dict)] if isinstance(view, list) else []
    keys = ("text", "id", "p_student", "p_teacher", "divergence", "alternatives", "dominant")
    source = str(record.get("source") or "")
    return {
        "run": number,
        "step": _finite(record.get("step")),
        "source": _tail(source),
        "problem": str(record.get("problem") or ""),
        "rollout": record["rollout"] if not view else "",
        "tokens": _finite(record.get("tokens")),
        "truncated": bool(record.get("truncated")),
        "of": len(view),
        "view": [[_plain(token.get(key)) for key in keys] for token in view[:MAX_TOKENS]],
    }


def _plain(value: Any) -> Any:
    """`value` without the numbers that JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if not isinstance(value, float) else _finite(value)


def _script_json(payload: Any) -> str:
    """JSON that stays within its script element: no `<`, so neither an end tag nor a comment can begin in it."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, which JSON can spell, cannot be written as UTF-8.
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return resources.files("opsd").joinpath(name).read_text(encoding="utf-8")


# The parts of the page


def _header(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        title, lead = escape(runs[0].name), _state(runs[0])
    else:
        title = " <span class='versus'>beside</span> ".join(escape(run.name) for run in runs)
        lead = f"{len(runs)} runs"
    facts: list[tuple[str, str]] = []
    for label, option in (("Model", "model.path"), ("Data", "data.train")):
        named = dict.fromkeys(_tail(str(run.option(option) or "the embedded tiny set-up")) for run in runs)
        facts.append((label, ", ".join(named)))
    days = dict.fromkeys(f"{run.written:%d %B %Y}" for run in sorted(runs, key=_written) if run.written)
    if len(runs) == 1 and runs[0].written:
        facts.append(("Started", f"{runs[0].written:%d %B %Y, %H:%M} UTC"))
    elif days:
        facts.append(("Started", " to ".join(dict.fromkeys([next(iter(days)), next(reversed(days))]))))
    if len(runs) == 1:
        facts.append(("Duration", _duration(_seconds(runs[0]))))
    versions = dict.fromkeys(v for run in runs for v in _versions(run))
    if versions:
        facts.append(("Versions", ", ".join(versions)))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return (
        f"<header class='top'><p class='eyebrow'>On-policy self-distillation</p><h1>{title}</h1>"
        f"<p class='lead'>{escape(lead)}</p><dl class='facts'>{items}</dl></header>"
    )


def _written(run: RunData) -> datetime:
    return run.written or datetime.min.replace(tzinfo=timezone.utc)


def _state(run: RunData) -> str:
    done, planned = run.metrics[-1]["step"], _finite(run.option("optim.steps"))
    steps = f"{done:,} step{'s' if done != 1 else ''}"
    if run.summary is not None:
        return f"Finished after {steps}"
    return f"Not finished: {steps}" + (f" of {planned:,.0f}" if planned else "")


def _versions(run: RunData) -> list[str]:
    versions = run.started.get("packages")
    return [f"{k} {v}" for k, v in versions.items()] if isinstance(versions, dict) else []


def _seconds(run: RunData) -> float:
    return _finite((run.summary or {}).get("seconds")) or _sum(run, "seconds")


def _results(runs: Sequence[RunData]) -> str:
    """The figures that matter, and how they came about: tiles for one run, a table for several."""
    evaluated = any(run.evaluations for run in runs)
    parts = [_tiles(runs[0]) if len(runs) == 1 else _comparison(runs)]
    if evaluated:
        parts.append(
            "<figure class='chart tall' data-accuracy><figcaption><h3>Accuracy over the steps</h3>"
            "<p class='unit'>% of answers</p></figcaption><p class='quiet'>High is good. Bars and the band are 95 % "
            "intervals; dotted: the teacher, who reads the solution, and the base model.</p>"
            "<div class='readout'></div><div class='plot'></div></figure>"
        )
        parts.append(_evaluation_table(runs))
    else:
        parts.append("<p class='quiet'>No evaluation was recorded.</p>")
    return _section("results", "Results", "", "".join(parts))


def _evaluation(run: RunData, *names: str) -> Record | None:
    return next((e for name in names for e in reversed(run.evaluations) if e.get("name") == name), None)


def _after(run: RunData) -> Record | None:
    """The evaluation after training, or the latest there is."""
    learnt = [e for e in run.evaluations if e.get("name") not in ("base", "teacher")]
    return _evaluation(run, "trained") or max(learnt, key=lambda e: e["step"], default=None)


def _tiles(run: RunData) -> str:
    """What it learnt, and below that what it took: two rows, each filled whatever is known of either."""
    base, teacher, after = _evaluation(run, "base"), _evaluation(run, "teacher"), _after(run)
    learnt: list[tuple[str, str, str]] = []
    if after:
        where = "trained" if after.get("name") == "trained" else f"after step {after['step']}"
        learnt.append((f"Accuracy, {where}", _percent(after.get("accuracy")), _interval(after)))
    if base:
        learnt.append(("Accuracy, base", _percent(base.get("accuracy")), _interval(base)))
    if teacher:
        learnt.append(("Accuracy, teacher", _percent(teacher.get("accuracy")), _interval(teacher)))
    first = _finite(run.metrics[0].get("loss"))
    took = [("Loss, last step", _number(_last(run, "loss")), f"first step {_number(first)}")]
    tokens = _sum(run, "tokens")
    if tokens:
        took.append(("Rollout tokens", f"{tokens:,.0f}", f"in {run.metrics[-1]['step']:,} steps"))
    speed = _speed(run)
    if speed:
        took.append(("Speed", f"{speed:,.0f}", "rollout tokens per second"))
    memory = _max(run, "peak_memory_bytes")
    if memory:
        took.append(("Peak memory", f"{memory / 2**30:.2f} GiB", "of the GPU, or of the process on a CPU"))
    rows = (
        "".join(
            f"<div class='tile'><dt>{escape(k)}</dt><dd>{escape(v)}</dd><dd class='sub'>{escape(s)}</dd></div>"
            for k, v, s in tiles
        )
        for tiles in (learnt, took)
    )
    return "".join(f"<dl class='tiles'>{cells}</dl>" for cells in rows if cells)


def _speed(run: RunData) -> float | None:
    seconds = _sum(run, "seconds")
    return _sum(run, "tokens") / seconds if seconds else None


def _comparison(runs: Sequence[RunData]) -> str:
    rows = []
    for number, run in enumerate(runs):
        evaluations = [_evaluation(run, "base"), _after(run), _evaluation(run, "teacher")]
        shares = [_percent(e.get("accuracy")) if e else "–" for e in evaluations]
        memory, speed = _max(run, "peak_memory_bytes"), _speed(run)
        rows.append(
            [
                _key(number) + escape(run.name),
                *shares,
                _number(_last(run, "loss")),
                f"{run.metrics[-1]['step']:,}" + ("" if run.summary is not None else " (not finished)"),
                f"{_sum(run, 'tokens'):,.0f}",
                _duration(_seconds(run)),
                f"{speed:,.0f}" if speed else "–",
                f"{memory / 2**30:.2f} GiB" if memory else "–",
            ]
        )
    head = ["Run", "Base", "Trained", "Teacher", "Last loss", "Steps", "Tokens", "Duration", "Tokens/s", "Peak memory"]
    return _table(head, rows, "The runs side by side; accuracies are those of the evaluations", html=True)


def _passes(evaluation: Record) -> dict[int, Record]:
    """By k, the records of pass@k."""
    found = evaluation.get("pass_at")
    found = found if isinstance(found, list) else []
    return {p["k"]: p for p in found if isinstance(p, dict) and isinstance(p.get("k"), int)}


def _passed(record: Record | None) -> str:
    return "–" if record is None else f"{_percent(record.get('value'))} ({_interval(record)})"


def _evaluation_table(runs: Sequence[RunData]) -> str:
    several = len(runs) > 1
    rows = []
    passes = sorted({k for run in runs for e in run.evaluations for k in _passes(e) if k > 1})
    for number, run in enumerate(runs):
        for e in run.evaluations:
            row = [
                escape(str(e.get("name", ""))),
                _number(e.get("step")),
                _percent(e.get("accuracy")),
                _interval(e),
                *(_passed(_passes(e).get(k)) for k in passes),
                _number(e.get("problems")),
                _number(e.get("samples")),
                _number(e.get("mean_length")),
                _percent(e.get("truncated")),
            ]
            rows.append([_key(number) + escape(run.name), *row] if several else row)
    head = ["Evaluation", "Step", "Accuracy", "95 % interval", *(f"pass@{k}" for k in passes)]
    head += ["Problems", "Answers each", "Mean length", "Truncated"]
    return _table(["Run", *head] if several else head, rows, "Evaluations", html=True, words=1 + several)


def _curves(runs: Sequence[RunData], charts: Sequence[Chart], flat: Sequence[str]) -> str:
    legend = ""
    if len(runs) > 1:
        keys = "".join(f"<li>{_key(number)}{escape(run.name)}</li>" for number, run in enumerate(runs))
        legend = f"<ul class='legend' aria-label='Runs'>{keys}</ul>"
    figures = "".join(
        f"<figure class='chart' data-chart='{number}'><figcaption><h3>{escape(chart.title)}</h3>"
        f"<p class='unit'>{escape(chart.unit)}</p></figcaption>{_remark(chart.note)}<div class='readout'></div>"
        f"<div class='plot'></div>{_curve_table(runs, chart)}</figure>"
        for number, chart in enumerate(charts)
    )
    notes = []
    if flat:
        notes.append(f"Zero at every step, and so not drawn: {', '.join(flat).lower()}.")
    longest = max(len(run.metrics) for run in runs)
    if longest > MAX_POINTS:
        notes.append(
            f"{longest:,} steps are drawn as {MAX_POINTS} points: the smallest and the largest value of each interval."
        )
    said = "".join(f"<p class='quiet'>{escape(note)}</p>" for note in notes)
    lead = "Point at a chart, or focus it and use the arrow keys: all of them show the values at that step."
    tools = f"{legend}<label class='switch js'><input type='checkbox' id='log'> logarithmic</label>"
    body = f"<div class='tools'>{tools}</div><div class='grid'>{figures}</div>{said}"
    return _section("curves", "Training", lead, body)


def _remark(note: str) -> str:
    return f"<p class='quiet'>{escape(note)}</p>" if note else ""


def _curve_table(runs: Sequence[RunData], chart: Chart) -> str:
    steps = sorted({r["step"] for run in runs for r in run.metrics})
    if len(steps) > TABLE_ROWS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)})
    by_step = [{r["step"]: r for r in run.metrics} for run in runs]
    head, rows = ["Step"], [[f"{step:,}"] for step in steps]
    for metric, label in chart.metrics:
        for run, records in zip(runs, by_step, strict=True):
            head.append(f"{run.name}: {label}" if len(runs) > 1 else label)
            for row, step in zip(rows, steps, strict=True):
                value = _finite(records.get(step, {}).get(metric))
                row.append(_number(None if value is None else value * chart.scale))
    table = _table(head, rows, f"{chart.title} at some steps", words=0)
    return f"<details class='data'><summary>Table</summary>{table}</details>"


def _time(runs: Sequence[RunData]) -> str:
    phases = [
        {k[8:]: _sum(run, k) for k in dict.fromkeys(k for r in run.metrics for k in r if k.startswith("seconds_"))}
        for run in runs
    ]
    totals = [_sum(run, "seconds") for run in runs]
    if not any(totals):
        return ""
    for times, total in zip(phases, totals, strict=True):
        rest = total - sum(times.values())
        if times and rest > 0.001 * total:
            times["other"] = rest
    names = list(dict.fromkeys(name for times in phases for name in times if name != "other"))
    names += ["other"] if any("other" in times for times in phases) else []
    bars = []
    for run, times in zip(runs, phases, strict=True):
        total = sum(times.values())
        segments = "".join(
            f"<span class='phase p{names.index(name) % 7}' style='flex-grow:{seconds / total:.5f}' "
            f"title='{escape(name, quote=True)}: {seconds / total:.1%}'>{_share(seconds / total)}</span>"
            for name, seconds in sorted(times.items(), key=lambda item: names.index(item[0]))
            if total and seconds > 0
        )
        label = f"<span class='label'>{escape(run.name)}</span>" if len(runs) > 1 else ""
        bars.append(f"<div class='bar'>{label}<div class='stack' aria-hidden='true'>{segments}</div></div>")
    head = ["Phase"]
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        head += [prefix + "seconds", prefix + "share", prefix + "per step"]
    rows = []
    for name in names:
        row = [f"<i class='swatch p{names.index(name) % 7}'></i>{escape(name)}"]
        for run, times in zip(runs, phases, strict=True):
            seconds, total = times.get(name), sum(times.values())
            row += ["–"] * 3 if seconds is None else _times(seconds, total, len(run.metrics))
        rows.append(row)
    row = ["all steps"]
    for run, total in zip(runs, totals, strict=True):
        row += _times(total, total, len(run.metrics))
    rows.append(row)
    outside = [
        f"{run.name + ': ' if len(runs) > 1 else ''}{_duration(spent - total)} more for loading, evaluation and saving"
        for run, total in zip(runs, totals, strict=True)
        if run.summary is not None and (spent := _seconds(run)) > total
    ]
    note = f"<p class='quiet'>{escape('; '.join(outside))}.</p>" if outside else ""
    body = "".join(bars) + _table(head, rows, "Time of each phase of a step", html=True) + note
    return _section("time", "Where the time went", "", body)


def _times(seconds: float, total: float, steps: int) -> list[str]:
    return [f"{seconds:,.1f}", f"{seconds / total:.1%}" if total else "–", f"{seconds / steps:.3g} s"]


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.06 else ""


def _tokens(runs: Sequence[RunData], samples: Sequence[dict[str, Any]], left_out: Sequence[str]) -> str:
    if not samples:
        return ""
    lead = (
        "Rollouts of the student, token by token. Colour says whether the teacher, who reads the solution, gives the "
        "sampled token less or more probability than the student; its strength is the divergence at that position."
    )
    notes = list(left_out)
    if any(sample["of"] > MAX_TOKENS for sample in samples):
        notes.append(f"of long rollouts the first {MAX_TOKENS:,} tokens are shown")
    if any(not sample["view"] for sample in samples):
        notes.append("rollouts without recorded probabilities are shown as plain text")
    said = f"<p class='quiet'>{escape('. '.join(_capital(note) for note in notes))}.</p>" if notes else ""
    return _section("tokens", "Token view", lead, f"<div id='token-view'></div>{said}")


def _capital(text: str) -> str:
    return text if ":" in text else text[:1].upper() + text[1:]


def _options(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) == 1:
        essential = [(name, runs[0].option(name)) for name in ESSENTIAL]
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(_option(value, name))}</dd></div>"
            for name, value in essential
            if value is not None and not (name == "lora.r" and not runs[0].option("lora.enabled"))
        )
        if items:
            parts.append(f"<dl class='options'>{items}</dl>")
    else:
        columns = [run.options() for run in runs]
        names = list(dict.fromkeys(name for options in columns for name in options if name != "run.dir"))
        absent = object()
        rows = [
            [name, *(_option(options.get(name), name) for options in columns)]
            for name in names
            if any(options.get(name, absent) != columns[0].get(name, absent) for options in columns)
        ]
        table = _table(["Option", *(run.name for run in runs)], rows, "Options that differ", words=len(runs) + 1)
        parts.append(table if rows else "<p class='quiet'>The runs have the same options.</p>")
    for run in runs:
        rows = [[name, _option(value)] for name, value in run.options().items()]
        if rows:
            of = f" of {escape(run.name)}" if len(runs) > 1 else ""
            table = _table(["Option", "Value"], rows, "All options", words=2)
            parts.append(f"<details class='all'><summary>All options{of}</summary>{table}</details>")
    heading = "Options" if len(runs) == 1 else "Options that differ"
    return _section("options", heading, "", "".join(parts)) if parts else ""


def _option(value: Any, name: str = "") -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return _tail(text) if name in ("model.path", "teacher.path", "data.train", "data.eval") else text


def _notes(runs: Sequence[RunData]) -> str:
    """Warnings of the runs, and what of their directories could not be read."""
    items = []
    for run in runs:
        prefix = f"<b>{escape(run.name)}</b> " if len(runs) > 1 else ""
        for text, steps in _warnings(run).items():
            some = ", ".join(map(str, steps[:10])) + (" …" if len(steps) > 10 else "")
            at = f"step {some}" if len(steps) == 1 else f"{len(steps)} steps: {some}"
            items.append(f"<li class='warning'>{prefix}{escape(text)} <span class='quiet'>{at}</span></li>")
        items += [f"<li>{prefix}{escape(note)}</li>" for note in run.notes]
    if not items:
        return ""
    return _section("notes", "Warnings and notes", "", f"<ul class='notes'>{''.join(items)}</ul>")


# Pieces of HTML


def _section(name: str, title: str, lead: str, body: str) -> str:
    said = f"<p class='lead'>{escape(lead)}</p>" if lead else ""
    return (
        f"<section id='{name}' aria-labelledby='{name}-h'><h2 id='{name}-h'>{escape(title)}</h2>{said}{body}</section>"
    )


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, html: bool = False, words: int = 1
) -> str:
    """A table that scrolls sideways where it must. The first `words` columns hold text, the others aligned numbers;
    `html`: the cells are escaped already."""

    def cell(text: str, column: int, tag: str) -> str:
        scope = " scope='col'" if tag == "th" else ""
        numeric = "" if column < words else " class='n'"
        return f"<{tag}{scope}{numeric}>{text}</{tag}>"

    top = "".join(cell(escape(text), i, "th") for i, text in enumerate(head))
    body = "".join(
        "<tr>" + "".join(cell(text if html else escape(text), i, "td") for i, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    label = escape(caption, quote=True)
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'>"
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _key(number: int) -> str:
    """A piece of the run's line."""
    return (
        f"<svg class='key r{number % 6} d{number % 5}' viewBox='0 0 26 8' width='26' height='8' aria-hidden='true'>"
        "<path d='M0 4H26'/></svg>"
    )


def _number(value: Any) -> str:
    number = _finite(value)
    if number is None:
        return "–"
    if float(number).is_integer() and abs(number) < 1e15:
        return f"{number:,.0f}"
    if abs(number) >= 1000:
        return f"{number:,.1f}"
    return f"{number:.4g}" if abs(number) >= 1e-3 else f"{number:.3g}"


def _percent(value: Any) -> str:
    number = _finite(value)
    return "–" if number is None else f"{100 * number:.1f}%"


def _interval(record: Record) -> str:
    low, high = _finite(record.get("low")), _finite(record.get("high"))
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _tail(path: str) -> str:
    """The end of a long path; a hub id and a plain name are left as they are."""
    parts = path.replace("\\", "/").split("/")
    return path if len(parts) <= 2 else "…/" + "/".join(parts[-2:])
