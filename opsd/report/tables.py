"""The tables of a report and other lists of values, and how the values are written."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from opsd.report.read import Record, RunData, finite, tail

ESSENTIAL = (
    *("model.path", "model.dtype", "model.autocast", "lora.enabled", "lora.r", "data.train", "data.eval"),
    *("teacher.kind", "teacher.path", "objective.form", "objective.beta", "objective.temperature"),
    *("objective.entry_clip", "objective.token_clip", "objective.top_k", "rollout.max_new_tokens"),
    *("rollout.temperature", "rollout.per_prompt", "optim.lr", "optim.schedule", "optim.steps", "optim.batch_size"),
    "run.seed",
)


@dataclass(frozen=True)
class Table:
    """Cells are texts, or numbers to be written as such; the first `words` columns are aligned as text.

    `marks`: for each of the first rows the number of its run or phase, whose sign stands before its first cell.
    """

    caption: str
    head: list[str]
    rows: list[list[Any]]
    words: int = 1
    marks: Sequence[int] = field(default=())


def state(run: RunData) -> str:
    steps = f"{run.steps:,} step{'s' if run.steps != 1 else ''}"
    planned = finite(run.options().get("optim.steps"))
    if run.summary:
        return f"Finished after {steps}"
    return f"Not finished: {steps}" + (f" of {planned:,.0f}" if planned else "")


def facts(runs: Sequence[RunData]) -> dict[str, str]:
    """On what the runs were made, by title: of several runs, what is not the same."""
    named: dict[str, list[str]] = {"Model": [], "Data": [], "Started": [], "Duration": [], "Versions": []}
    for run in runs:
        for title, path in (("Model", "model.path"), ("Data", "data.train")):
            named[title].append(tail(str(run.options().get(path) or "the embedded tiny set-up")))
        with contextlib.suppress(KeyError, TypeError, ValueError):
            began = datetime.fromisoformat(run.started["created"]).astimezone(timezone.utc)
            named["Started"].append(f"{began:%d %B %Y, %H:%M} UTC")
        named["Duration"].append(duration(run.seconds))
        packages = run.started.get("packages")
        if isinstance(packages, dict):
            named["Versions"].append(", ".join(f"{name} {version}" for name, version in packages.items()))
    return {title: " · ".join(dict.fromkeys(values)) for title, values in named.items() if values}


def key_numbers(run: RunData) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """What the run learnt and what it took, each as (title, value, remark); an unknown value is a dash."""
    trained, tokens, seconds = run.trained or {}, run.total("tokens"), run.total("seconds")
    after = "" if trained.get("name", "trained") == "trained" else f" after step {trained['step']}"
    known = {f"trained{after}": trained, "base": run.evaluation("base"), "teacher": run.evaluation("teacher")}
    last, memory = next(reversed(run.values("loss")), None), max(run.values("peak_memory_bytes"), default=0)
    learnt = [(f"Accuracy, {k}", percent((e or {}).get("accuracy")), interval(e or {})) for k, e in known.items()]
    took = [
        ("Loss, last step", number(last), f"first step {number(run.metrics[0].get('loss'))}"),
        ("Rollout tokens", number(tokens or None), f"in {run.steps:,} steps"),
        ("Speed", f"{tokens / seconds:,.0f}" if tokens and seconds else "–", "rollout tokens per second"),
        ("Peak memory", f"{memory / 2**30:.2f} GiB" if memory else "–", "of the GPU, or of the process on a CPU"),
    ]
    return learnt, took


def comparison(runs: Sequence[RunData]) -> Table:
    head = ["Run", "Trained", "Base", "Teacher", "Last loss", "Tokens", "Tokens/s", "Peak memory", "Steps", "Duration"]
    rows = []
    for run in runs:
        learnt, took = key_numbers(run)
        steps = f"{run.steps:,}{'' if run.summary else ' (not finished)'}"
        rows.append([run.name, *(value for _, value, _ in learnt + took), steps, duration(run.seconds)])
    return Table("The runs side by side; accuracies are those of the evaluations", head, rows, marks=range(len(runs)))


def evaluations(runs: Sequence[RunData]) -> Table:
    several = len(runs) > 1
    found = [(number, e, _passes(e)) for number, run in enumerate(runs) for e in run.evaluations]
    ks = sorted({k for *_, passes in found for k in passes if k > 1})
    head = ["Evaluation", "Step", "Accuracy", "95 % interval", *(f"pass@{k}" for k in ks)]
    head += ["Problems", "Answers each", "Mean length", "Truncated"]
    rows = []
    for number, e, passes in found:
        row = [runs[number].name] * several + [str(e.get("name", "")), e["step"], percent(e["accuracy"]), interval(e)]
        row += [f"{percent(passes[k].get('value'))} ({interval(passes[k])})" if k in passes else None for k in ks]
        rows.append([*row, e.get("problems"), e.get("samples"), e.get("mean_length"), percent(e.get("truncated"))])
    marks = [number for number, *_ in found] if several else []
    return Table("Evaluations", ["Run"] * several + head, rows, 1 + several, marks)


def _passes(evaluation: Record) -> dict[int, Record]:
    """By k, the records of pass@k."""
    found = evaluation.get("pass_at")
    found = found if isinstance(found, list) else []
    return {p["k"]: p for p in found if isinstance(p, dict) and isinstance(p.get("k"), int)}


def phases(runs: Sequence[RunData]) -> list[dict[str, float]]:
    """For each run the seconds of each phase of a step, and what none of them covers: all have the same phases."""
    known = dict.fromkeys(name for run in runs for r in run.metrics for name in r if name.startswith("seconds_"))
    times = [{name.removeprefix("seconds_"): run.total(name) for name in known} for run in runs]
    for run, spent in zip(runs, times, strict=True):
        rest = run.total("seconds") - sum(spent.values())
        rest = rest if known and rest > 0.001 * run.total("seconds") else 0.0
        spent["other"] = spent.pop("other", 0.0) + rest
    used = [name for name in times[0] if any(spent[name] for spent in times)]
    return [{name: spent[name] for name in used} for spent in times]


def time_table(runs: Sequence[RunData]) -> Table:
    times = phases(runs)
    head, columns = ["Phase"], [[*times[0], "all steps"]]
    for run, spent in zip(runs, times, strict=True):
        whole = run.total("seconds")
        head += [f"{run.name if len(runs) > 1 else ''} {title}".strip() for title in ("seconds", "share", "per step")]
        seconds = [*spent.values(), whole]
        columns.append([f"{s:,.1f}" for s in seconds])
        columns.append([percent(s / (whole or 1.0)) for s in seconds])
        columns.append([f"{s / len(run.metrics):.3g} s" for s in seconds])
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Table("Time of each phase of a step", head, rows, marks=range(len(times[0])))


def differing(runs: Sequence[RunData]) -> Table:
    columns = [run.options() for run in runs]
    names = dict.fromkeys(name for options in columns for name in options if name != "run.dir")
    absent = object()
    rows = [
        [name, *(option(options.get(name), name) for options in columns)]
        for name in names
        if any(options.get(name, absent) != columns[0].get(name, absent) for options in columns)
    ]
    return Table("Options that differ", ["Option", *(run.name for run in runs)], rows, len(runs) + 1)


def essential(run: RunData) -> dict[str, str]:
    """The options by which one knows a run."""
    options = run.options()
    lora = bool(options.get("lora.enabled"))
    named = {name: options[name] for name in ESSENTIAL if options.get(name) is not None and (lora or name != "lora.r")}
    return {name: option(value, name) for name, value in named.items()}


def all_options(run: RunData) -> Table:
    return Table("All options", ["Option", "Value"], [[name, option(v)] for name, v in run.options().items()], words=2)


def number(value: Any) -> str:
    known = finite(value)
    if known is None:
        return "–"
    if float(known).is_integer() and abs(known) < 1e15:
        return f"{known:,.0f}"
    return f"{known:,.1f}" if abs(known) >= 1000 else f"{known:.4g}" if abs(known) >= 1e-3 else f"{known:.3g}"


def percent(share: Any) -> str:
    known = finite(share)
    return "–" if known is None else f"{100 * known:.1f}%"


def interval(record: Record) -> str:
    low, high = finite(record.get("low")), finite(record.get("high"))
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def option(value: Any, name: str = "") -> str:
    """As the command line spells it; of the path that the option `name` is, the end."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return tail(text) if name in ("model.path", "teacher.path", "data.train", "data.eval") else text
