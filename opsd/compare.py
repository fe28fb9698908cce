"""`opsd compare`: several methods on the same data, with the same seeds and budget; a table and a plot with intervals.

A directory holds a run for each method and seed, DIR/METHOD-seed-N. What is there is kept: a run that was stopped goes
on, and more methods or seeds may be added.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from opsd import recipes, trainer
from opsd.config import Config, load_config, to_yaml
from opsd.errors import ConfigError, config_error
from opsd.evaluation import wilson
from opsd.files import replace_file
from opsd.objective import make_recipe
from opsd.recipes.in_loop import lacking
from opsd.run_dir import make_directory, write_json
from opsd.setup import absolute_paths

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles 0.975 of Student's t distribution with 1, 2, ... degrees of freedom."""

MOST_SEEDS = len(STUDENT_T) + 1
PLOTS = importlib.util.find_spec("matplotlib") is not None
OWN = ("objective.form", "objective.recipe", "run.dir")
"""Options that a comparison sets itself."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval, all from 0 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def estimate(evaluations: Sequence[Mapping[str, Any]]) -> Estimate:
    """Of evaluations, one for each seed: the mean accuracy with Student's t interval over the seeds, or Wilson's over
    all of their problems where that is wider, as where seeds happen to agree; of one seed, its evaluation's own."""
    values = [evaluation["accuracy"] for evaluation in evaluations]
    if len(values) == 1:
        return Estimate(values[0], evaluations[0]["low"], evaluations[0]["high"])
    centre = mean(values)
    half = STUDENT_T[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    low, high = wilson(centre, sum(evaluation["problems"] for evaluation in evaluations))
    return Estimate(centre, max(0.0, min(low, centre - half)), min(1.0, max(high, centre + half)))


def compare(
    names: Sequence[str],
    seeds: int,
    output: str | Path,
    *,
    source: str | Path | None = None,
    overrides: Iterable[tuple[str, Any]] = (),
    preset: str | None = None,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train every method of `names` from run.seed, run.seed + 1, ... and write what came of it to `output`.

    Args:
        names: recipes that the loop can train with, and forms of its own objective (`objective.form`).
        seeds: how many of each; 1 to 10.
        output: the directory; where it holds a comparison with the same options, what is missing is added.
        source, overrides, preset: the options of all runs, as `opsd.load_config` takes them.
        say: is handed a line before each run.
        quiet: print nothing else.

    Returns:
        What compare.json holds: "base" and "teacher" before training and "methods", by name, each with "runs" (seed,
        accuracy, low, high, seconds, curve: pairs of step and accuracy), "accuracy", "low" and "high".

    Raises:
        ConfigError: before any work, naming what cannot be compared. Others: as `opsd.train`.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds is {seeds}; accepted: 1 to {MOST_SEEDS}")
    methods = {name: _options_of(name) for name in names}
    if not methods or len(methods) != len(names):
        raise ConfigError(f"--recipes is {','.join(names)!r}; accepted: one name or more, each once")
    overrides = list(overrides)
    given = {name.replace("-", "_") for name, _ in overrides}
    for option in OWN:
        if option in given:
            raise ConfigError(f"--{option} has no meaning for a comparison: --recipes and --output say it")
    common = absolute_paths(load_config(source, overrides, preset))
    if common.model.path is not None and not common.data.eval:
        raise ConfigError("data.eval is not given: a comparison needs data with answers")
    first = common.run.seed
    wanted = {
        (name, seed): load_config(source, [*overrides, *chosen.items(), ("run.seed", seed)], preset)
        for name, chosen in methods.items()
        for seed in range(first, first + seeds)
    }
    for config in wanted.values():
        make_recipe(config)  # refuses now what the last run would
    directory = Path(output)
    with config_error("--output: the directory cannot be written", OSError):
        make_directory(directory, "compare")
        _keep_options(directory / "options.yaml", common)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    begins = {}
    for number, ((name, seed), config) in enumerate(wanted.items(), 1):
        run_dir = directory / f"{name}-seed-{seed}"
        done = _summary(run_dir)
        say(f"[{number}/{len(wanted)}] {name}, seed {seed}{': done before' if done else ''}")
        if done is None:
            if (run_dir / "run.json").exists():
                trainer.resume(run_dir, quiet=quiet)
            else:
                trainer.train(config.changed({"run.dir": str(run_dir)}), quiet=quiet)
            done = _summary(run_dir)
            assert done is not None  # a run that comes to its end leaves it
        found = done["evaluations"]
        begins[seed] = found
        kept = {key: found["trained"][key] for key in ("accuracy", "low", "high", "problems")}
        runs[name].append({"seed": seed, **kept, "seconds": done["seconds"], "curve": _curve(run_dir)})
        result = _result(runs, list(begins.values()))
        with config_error("--output: the directory cannot be written", OSError):
            write_json(directory / "compare.json", result)
            replace_file(directory / "compare.md", "\n".join(table(result)) + "\n")
    if PLOTS:
        plot(result, directory / "compare.png")
    return result


def _options_of(name: str) -> dict[str, str]:
    """The options that choose a method."""
    if name in recipes.FORMS:
        return {"objective.form": name}
    if name not in recipes.names():
        able = [each for each in recipes.names() if not lacking(recipes.make(each))]
        raise ConfigError(f"--recipes names {name!r}; accepted: {', '.join([*recipes.FORMS, *able])}")
    if missing := lacking(recipes.make(name)):
        raise ConfigError(f"--recipes names {name}, which the loop cannot train with: it has no {', '.join(missing)}")
    return {"objective.recipe": name}


def _keep_options(path: Path, common: Config) -> None:
    """Writes them; a comparison that is there already must have the same."""
    if not path.exists():
        replace_file(path, to_yaml(common))
        return
    before, now = load_config(path, complete=False).options(), common.options()
    for name, value in now.items():
        if before[name] != value and not name.startswith("run."):
            raise ConfigError(
                f"{name} is {value!r}, the comparison in {path.parent} began with {before[name]!r}; "
                "name another --output"
            )


def _summary(run_dir: Path) -> dict[str, Any] | None:
    """Of a run that came to its end."""
    path = run_dir / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    found = {e["step"]: e["accuracy"] for e in map(json.loads, lines) if e["name"] != "teacher"}
    return sorted(found.items())


def _result(runs: Mapping[str, list[dict[str, Any]]], begins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def of(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return vars(estimate(evaluations)) if evaluations else {}

    before = {name: of([found[name] for found in begins if name in found]) for name in ("base", "teacher")}
    methods = {name: {**of(each), "runs": each} for name, each in runs.items() if each}
    return {**before, "methods": methods}


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines of a table in Markdown: the best first, by the mean."""
    lines = ["| method | accuracy | 95 % interval | by seed | seconds per run |", "|---|---|---|---|---|"]

    def row(name: str, found: Mapping[str, Any], each: str = "", seconds: str = "") -> str:
        return f"| {name} | {found['value']:.1%} | {found['low']:.1%} to {found['high']:.1%} | {each} | {seconds} |"

    labels = {"base": "before training", "teacher": "the teacher, shown the privileged information"}
    lines += [row(label, result[name]) for name, label in labels.items() if result[name]]
    for name, found in sorted(result["methods"].items(), key=lambda item: -item[1]["value"]):
        each = ", ".join(f"{run['accuracy']:.1%}" for run in found["runs"])
        lines.append(row(name, found, each, f"{mean(run['seconds'] for run in found['runs']):.0f}"))
    return lines


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy by step, the mean over seeds, and the final accuracies with their intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9.0, 4.2), dpi=150, layout="constrained")
    curves, ends = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    methods = sorted(result["methods"].items(), key=lambda item: -item[1]["value"])
    for place, (name, found) in enumerate(methods):
        points = [dict(run["curve"]) for run in found["runs"]]
        steps = sorted(set.intersection(*map(set, points)))
        (line,) = curves.plot(steps, [mean(each[step] for each in points) for step in steps], label=name)
        error = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
        ends.errorbar([place], [found["value"]], error, color=line.get_color(), marker="o", capsize=4)
    if result["teacher"]:
        for axes in (curves, ends):
            axes.axhline(result["teacher"]["value"], color="#777777", linestyle=":", linewidth=1.2)
        curves.annotate("teacher", (0, result["teacher"]["value"]), (2, 3), textcoords="offset points", fontsize=8)
    curves.set(xlabel="training step", ylabel="accuracy", title="mean over seeds")
    ends.set(title="after training, 95 % intervals", xlim=(-0.5, len(methods) - 0.5))
    ends.set_xticks(range(len(methods)), [name for name, _ in methods], rotation=30, ha="right", fontsize=8)
    for axes in (curves, ends):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    curves.legend(frameon=False, fontsize=8)
    figure.savefig(path)
