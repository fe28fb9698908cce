"""One self-contained HTML page of one run or of several: what `opsd report` writes.

`page.html.j2` draws everything; `script.js` adds what answers to a hand: values at a step and the token view.
Nothing is fetched from anywhere: a content security policy in the page forbids it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opsd.errors import ConfigError
from opsd.report import tables
from opsd.report.charts import MAX_POINTS, accuracy_figure, training_figures
from opsd.report.read import RunData, read_run, short_names
from opsd.report.token_view import choose_samples

MAX_SAMPLES = 40
"""Rollouts in a page unless asked otherwise."""


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
    accuracy = accuracy_figure(runs)
    samples, left_out = choose_samples(runs, max_samples)
    data = {
        "runs": [run.name for run in runs],
        "charts": [figure.lines for figure in figures],
        "accuracy": accuracy and accuracy.lines,
        "samples": samples,
    }
    style, script = (resources.files("opsd.report").joinpath(f).read_text("utf-8") for f in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _TEMPLATES.get_template("page.html.j2").render(
        runs=runs,
        many=len(runs) > 1,
        figures=figures,
        flat=flat,
        accuracy=accuracy,
        longest=max(len(run.metrics) for run in runs),
        timed=any(run.total("seconds") for run in runs),
        max_points=MAX_POINTS,
        samples=samples,
        left_out=left_out,
        data=data,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=Markup(style),
        script=Markup(script),
    )


_TEMPLATES = Environment(
    loader=PackageLoader("opsd", "report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
_TEMPLATES.globals["tables"] = tables
_TEMPLATES.filters.update(number=tables.number, percent=tables.percent)
