"""Where in a plot everything lies: curves, error bars, bands, ticks and labels, in percent of the plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

LABEL = 7.5
"""Height of a label beside a plot, in percent of the lowest plot that has labels."""

Line = dict[str, Any]
"""`run`: its number, `second`: drawn lighter, `label`, `points`: [[step, value or None], ...]; with evaluations also
`errors`: [[low, high], ...] and `names`, one for each point. It goes to the page's script as it is."""

Band = tuple[str, str, Sequence[float | None]]
"""What is the same at every step: label, class, and (value, low, high), the last two of which may be None."""


def plot(
    lines: Sequence[Line], bands: Sequence[Band] = (), *, bounded: bool = False, log: bool = False, marks: int = 4
) -> dict[str, Any] | None:
    """What a template needs to draw, in percent from the top left corner; None if there is no line or no logarithm.

    Args:
        bounded: values are percentages: the axis ends at 0 and 100, and no interval fills it.
        log: logarithmic values.
        marks: about how many an axis has.
    """
    pairs = [pair for line in lines for pair in line.get("errors", ())] + [values[1:] for *_, values in bands]
    errors = [pair for pair in pairs if None not in pair]
    some = [*(v for line in lines for _, v in line["points"]), *(v for *_, values in bands for v in values)]
    values = [value for value in (*some, *(v for pair in errors for v in pair)) if value is not None]
    if not lines or not values or (log and min(values) <= 0):
        return None
    height: Callable[[float], float] = math.log10 if log else float
    low, high = height(min(values)), height(max(values))
    if bounded:  # no interval takes more than a third of the plot: those of a few problems would fill it
        span = min(100.0, max([high - low, *(3 * (over - under) for under, over in errors)]))
        start = min(100.0 - span, max(0.0, (low + high - span) / 2))
        low, high = min(low, start), max(high, start + span)
    room = 0.06 * (high - low) or (0.01 if log else 0.1 * abs(high)) or 1.0
    low, high = 0.0 if 0 <= low < 0.35 * high and not log else low - room, high + room
    steps = sorted({step for line in lines for step, _ in line["points"]})
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)

    def x(step: float) -> float:
        return round(100 * (step - first) / (last - first), 2)

    def y(value: float) -> float:
        return round(100 * (high - height(value)) / (high - low), 2)

    curves = []
    for line in lines:
        path, dots = "", []
        for drawn, group in groupby(line["points"], lambda point: point[1] is not None):
            spots = [(x(step), y(value)) for step, value in group] if drawn else []
            path += "".join(f"{'L' if i else 'M'}{a:g} {b:g}" for i, (a, b) in enumerate(spots))
            dots += spots if len(spots) == 1 or "errors" in line else []  # no line reaches one alone
        known = zip(line["points"], line.get("errors", ()), strict="errors" in line)
        bars = [(x(step), y(pair[0]), y(pair[1])) for (step, _), pair in known if None not in pair]
        curves.append({"line": line, "path": path, "dots": dots, "bars": bars})
    whole = [step for step in _ticks(first, last, marks) if step == int(step) and steps[0] <= step <= steps[-1]]
    heights = _log_ticks(low, high, marks) if log else _ticks(low, min(high, 100.0) if bounded else high, marks)
    return {
        "log": log,
        "steps": (steps[0], steps[-1]),
        "x": (first, last),
        "y": (low, high),
        "x_ticks": [(x(step), _tick_label(step)) for step in whole],
        "y_ticks": [(y(value), _tick_label(value)) for value in heights],
        "curves": curves,
        "bands": [(look, *(None if v is None else y(v) for v in values)) for _, look, values in bands],
        "labels": _apart([(y(values[0]), label) for label, _, values in bands if values[0] is not None]),
    }


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between the two, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers whose decimal logarithms lie between the two."""
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [float(f"{m}e{e}") for e in powers for m in digits if low <= e + math.log10(m) <= high]
    return found if len(found) > 1 else _ticks(10**low, 10**high, count)


def _tick_label(value: float) -> str:
    divisor, sign = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1.0, "")
    return f"{value / divisor:.6g}{sign}".replace("e-0", "e-").replace("-", "−")


def _apart(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The labels moved up or down so that none hides another; those of one text that would are one."""
    kept: list[tuple[float, str]] = []
    for at, text in sorted(labels):
        if not any(text == other and at - there < LABEL for there, other in kept):
            kept.append((at, text))
    kept = kept[: int(100 / LABEL)]
    for i, (at, text) in enumerate(kept):
        kept[i] = max(at, kept[i - 1][0] + LABEL if i else 0.0), text
    for i in reversed(range(len(kept))):
        kept[i] = min(kept[i][0], kept[i + 1][0] - LABEL if i + 1 < len(kept) else 100.0), kept[i][1]
    return kept
