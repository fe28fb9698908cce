"""One self-contained HTML page of one run or of several: what `opsd report` writes.

`page.html.j2` draws everything; `script.js` adds the charts' values at a step and the token view. Nothing is fetched
from anywhere: a content security policy in the page forbids it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opsd.errors import ConfigError
from opsd.report.plot import MAX_POINTS, accuracy_figure, steps_of, training_figures
from opsd.report.read import Record, RunData, finite, read_run, short_names

MAX_SAMPLES = 40
"""Rollouts in a page unless asked otherwise."""

MAX_TOKENS = 4096
"""Tokens of one rollout: each is an element of the page."""

MAX_PAGE_TOKENS = 50_000
"""Tokens of all rollouts, about: each takes some 100 to 300 bytes of the page. Long rollouts are therefore fewer."""


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
    names = short_names([Path(directory) for directory in directories])
    runs = [read_run(directory, name) for directory, name in zip(directories, names, strict=True)]
    if output is None:
        output = runs[0].path / "report.html" if len(runs) == 1 else Path("opsd-report.html")
    try:
        # A lone surrogate, which JSON can spell, cannot be written as UTF-8.
        Path(output).write_text(render(runs, max_samples=max_samples), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
    return Path(output)


def render(runs: Sequence[RunData], *, max_samples: int = MAX_SAMPLES) -> str:
    """The page."""
    figures, flat = training_figures(runs)
    samples, left_out = choose_samples(runs, max_samples)
    style, script = (resources.files("opsd.report").joinpath(f).read_text("utf-8") for f in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _TEMPLATES.get_template("page.html.j2").render(
        runs=runs,
        figures=figures,
        flat=flat,
        accuracy=accuracy_figure(runs),
        steps=steps_of(runs),
        longest=max(len(run.metrics) for run in runs),
        max_points=MAX_POINTS,
        evaluations=evaluations(runs),
        phases=phases(runs),
        samples=samples,
        left_out=left_out,
        data={"charts": [[line["points"] for line in figure["lines"]] for figure in figures], "samples": samples},
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=Markup(style),
        script=Markup(script),
    )


class Table(NamedTuple):
    """Cells are texts, or numbers to be written as such; the first `words` columns are aligned as text."""

    caption: str
    head: list[str]
    rows: list[list[Any]]
    words: int = 1


def results(run: RunData) -> list[tuple[str, str, str]]:
    """What the run learnt, as (title, value, remark); an unknown value is a dash."""
    during = run.trained if run.trained and run.trained.get("name") != "trained" else None
    found = {"trained": run.trained, "base": run.evaluation("base"), "teacher": run.evaluation("teacher")}
    after = {"trained": f", step {during['step']}"} if during else {}
    rows = [
        (f"Accuracy, {name}", percent((e or {}).get("accuracy")), interval(e) + after.get(name, "") if e else "")
        for name, e in found.items()
    ]
    losses = [number(loss) for loss in run.values("loss")] or ["–"]
    return [*rows, ("Loss, last step", losses[-1], f"first {losses[0]}")]


def facts(run: RunData) -> dict[str, str]:
    """What the run is and what it took; what is unknown is left out."""
    options, tokens, seconds = run.options(), run.total("tokens"), run.total("seconds")
    planned, memory = finite(options.get("optim.steps")), max(run.values("peak_memory_bytes"), default=0)
    steps = f"{run.steps:,} steps"
    found = {
        "State": f"Finished after {steps}" if run.summary else f"Not finished: {steps}",
        "Model": str(options.get("model.path") or "the embedded tiny set-up"),
        "Data": str(options.get("data.train") or "the embedded tiny set-up"),
        "Duration": duration(run.seconds),
        "Rollout tokens": f"{tokens:,.0f} ({tokens / seconds:,.0f} per second)" if tokens and seconds else "",
        "Peak memory": f"{memory / 2**30:.2f} GiB of the GPU, or of the process on a CPU" if memory else "",
    }
    if planned and not run.summary:
        found["State"] += f" of {planned:,.0f}"
    with contextlib.suppress(KeyError, TypeError, ValueError):
        began = datetime.fromisoformat(run.started["created"]).astimezone(timezone.utc)
        found["Started"] = f"{began:%d %B %Y, %H:%M} UTC"
    if isinstance(packages := run.started.get("packages"), dict):
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return {title: value for title, value in found.items() if value}


def comparison(runs: Sequence[RunData]) -> Table:
    columns = [{t: f"{value} ({more})" if more else value for t, value, more in results(r)} | facts(r) for r in runs]
    rows = [[title, *(column.get(title, "–") for column in columns)] for title in _keys(columns)]
    return Table("The runs side by side, with 95 % intervals", ["", *(run.name for run in runs)], rows, len(runs) + 1)


def evaluations(runs: Sequence[RunData]) -> Table:
    found = [(run.name, e, _passes(e)) for run in runs for e in run.evaluations]
    ks = sorted({k for *_, passes in found for k in passes if k > 1})
    head = ["Run", "Evaluation", "Step", "Accuracy", "95 % interval", *(f"pass@{k}" for k in ks)]
    head += ["Problems", "Answers each", "Mean length", "Truncated"]
    several = int(len(runs) > 1)  # or else there is no column of names
    rows: list[list[Any]] = []
    for name, e, passes in found:
        at_k = [f"{percent(passes[k].get('value'))} ({interval(passes[k])})" if k in passes else None for k in ks]
        row = [name, str(e.get("name", "")), e["step"], percent(e["accuracy"]), interval(e), *at_k]
        rows.append([*row, e.get("problems"), e.get("samples"), e.get("mean_length"), percent(e.get("truncated"))])
    return Table("Evaluations", head[1 - several :], [row[1 - several :] for row in rows], 1 + several)


def _passes(evaluation: Record) -> dict[int, Record]:
    """By k, the records of pass@k."""
    found = evaluation.get("pass_at")
    found = found if isinstance(found, list) else []
    return {p["k"]: p for p in found if isinstance(p, dict) and isinstance(p.get("k"), int)}


def phases(runs: Sequence[RunData]) -> dict[str, list[float]]:
    """By phase of a step, and for what none of them covers, the seconds that each run spent in it."""
    names = [name for name in _keys([r for run in runs for r in run.metrics]) if name.startswith("seconds_")]
    times = {name.removeprefix("seconds_"): [run.total(name) for run in runs] for name in names}
    spent = [sum(seconds) for seconds in zip(*times.values(), strict=True)] or [0.0] * len(runs)
    wholes = [run.total("seconds") for run in runs]
    times["other"] = [w - s if w - s > 0.001 * w else 0.0 for w, s in zip(wholes, spent, strict=True)]
    return {name: seconds for name, seconds in times.items() if any(seconds)}


def option_table(runs: Sequence[RunData], differing: bool = False) -> Table:
    """All options of the runs, or only those in which they differ."""
    columns = [run.options() for run in runs]
    rows = [[name, *(_option(column, name) for column in columns)] for name in _keys(columns)]
    if differing:
        rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run.dir"]
    caption = "Options that differ" if differing else "All options"
    return Table(caption, ["Option", *(run.name for run in runs)], rows, len(runs) + 1)


def _option(options: Record, name: str) -> str:
    """As the command line spells it."""
    if name not in options:
        return "–"
    value = options[name]
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _keys(mappings: Sequence[dict[str, Any]]) -> list[str]:
    """Those of all, in the order in which they come up."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def choose_samples(runs: Sequence[RunData], limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rollouts to show, at most about `limit` spread evenly over each run, and sentences on what is left out."""
    lengths = [min(MAX_TOKENS, len(_view(sample))) for run in runs for sample in run.samples]
    if sum(lengths):
        limit = min(limit, MAX_PAGE_TOKENS * len(lengths) // sum(lengths))
    share = max(1, limit // len(runs)) if limit else 0
    samples: list[dict[str, Any]] = []
    notes = []
    for run in runs:
        total = len(run.samples)
        kept = range(total) if total <= share else {round(i * (total - 1) / max(1, share - 1)) for i in range(share)}
        samples += [_sample(run.name if len(runs) > 1 else "", run.samples[i]) for i in sorted(kept)]
        if len(kept) < total:
            notes.append(f"{run.name}: {len(kept)} of {total} rollouts are here; the others are in samples.jsonl.")
    if any(sample["of"] > MAX_TOKENS for sample in samples):
        notes.append(f"Of long rollouts the first {MAX_TOKENS:,} tokens are shown.")
    if any(not sample["view"] for sample in samples):
        notes.append("Rollouts without recorded probabilities are shown as plain text.")
    return samples, notes


def _view(sample: Record) -> list[Record]:
    """The tokens of a recorded rollout as `opsd.token_view` described them in training."""
    view = sample.get("view")
    return [token for token in view if isinstance(token, dict)] if isinstance(view, list) else []


def _sample(run: str, record: Record) -> dict[str, Any]:
    """A rollout as the page's script reads it."""
    tokens = _view(record)
    step, length = finite(record.get("step")), finite(record.get("tokens"))
    about = [run, f"step {'?' if step is None else step}", "" if length is None else f"{length:,} tokens"]
    about += ["cut off at the longest length" if record.get("truncated") else "ended by itself"]
    keys = ("text", "id", "p_student", "p_teacher", "divergence", "alternatives", "dominant")  # in the script's order
    return {
        "name": " · ".join(filter(None, [*about[:2], str(record.get("problem") or "")[:48]])),
        "about": " · ".join(filter(None, [*about, Path(str(record.get("source") or "")).name])),
        "problem": str(record.get("problem") or ""),
        "rollout": "" if tokens else record["rollout"],
        "of": len(tokens),
        "view": [[_plain(token.get(key)) for key in keys] for token in tokens[:MAX_TOKENS]],
    }


def _plain(value: Any) -> Any:
    """`value` without the numbers that JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def number(value: Any) -> str:
    known = finite(value)
    if known is None:
        return "–"
    if float(known).is_integer() and abs(known) < 1e15:
        return f"{known:,.0f}"
    return f"{known:,.1f}" if abs(known) >= 1000 else f"{known:.4g}"


def percent(share: Any) -> str:
    known = finite(share)
    return "–" if known is None else f"{100 * known:.1f}%"


def interval(record: Record) -> str:
    low, high = finite(record.get("low")), finite(record.get("high"))
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


_TEMPLATES = Environment(
    loader=PackageLoader("opsd", "report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_TEMPLATES.filters.update(number=number, percent=percent, duration=duration)
_TEMPLATES.globals.update(results=results, facts=facts, comparison=comparison, option_table=option_table)
