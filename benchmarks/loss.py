"""The loss against its floor and its peers on a CPU: `python -m benchmarks.loss`.

Runs the cells of the committed table (`--full`: more of them) and writes results/loss-cpu.json; `--only` runs part of
it and replaces that part of the file; `--table` makes the README's table and the plot from the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import BORROWED, FLOOR, FLOORS, LABELS, OWN_FLOOR, Cell, contenders, is_project, split
from benchmarks.machine import machine
from benchmarks.measure import measure, ratio
from benchmarks.report import replace_section
from benchmarks.runner import Report

RESULTS = Path(__file__).parent / "results"
DATA, PLOT = RESULTS / "loss-cpu.json", RESULTS / "loss.png"
THREADS = 2
ROUNDS = 3
SMALL_WORKSPACE = "300MiB"
LARGE, SMALL = (512, 1024, 151936), (2048, 512, 32768)  # tokens, hidden size, vocabulary
TABLE = [
    Cell(*SMALL, beta=0.0),
    Cell(*SMALL, beta=0.5),
    Cell(*SMALL, beta=1.0),
    Cell(*SMALL, beta=0.5, trainable=True),
    Cell(*LARGE, beta=0.0),
    Cell(*LARGE, beta=0.5),
    Cell(*LARGE, beta=0.5, trainable=True),
]
MORE = [
    Cell(*SMALL, beta=0.0, trainable=True),
    Cell(*SMALL, beta=1.0, trainable=True),
    Cell(*LARGE, beta=1.0),
    Cell(*LARGE, beta=0.0, trainable=True),
]


def names_for(cell: Cell) -> list[str]:
    """All contenders, and the small workspace where there is a limit on what it may cost."""
    limited = not cell.trainable and cell.beta != 1.0
    return contenders(workspaces=[f"auto@{SMALL_WORKSPACE}"] if limited else [])


def chosen(only: list[str], full: bool) -> list[tuple[Cell, list[str]]]:
    """The cells, with the contenders to run on each: all, or those that `only` names.

    An item of `only` is a contender's name or part of a cell's key; items of one kind add up, the two kinds intersect.
    """
    cells = TABLE + (MORE if full else [])
    known = {name for cell in TABLE + MORE for name in names_for(cell)} | {"liger-chunked-eager"}
    names = [item for item in only if item in known]
    parts = [item for item in only if item not in known]
    if parts:
        cells = [cell for cell in TABLE + MORE if any(part in cell.key for part in parts)]
        if not cells:
            raise ValueError(f"--only {' '.join(parts)}: neither part of a cell's key nor one of {sorted(known)}")
    return [(cell, [n for n in names_for(cell) if n in names] if names else names_for(cell)) for cell in cells]


def run(only: list[str], full: bool, rounds: int, path: Path) -> None:
    stored: dict[str, Any] = {"cells": {}}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
    here = machine(torch.device("cpu"))
    was = stored.get("machine", here)
    changed = [name for name in here if name != "date" and here[name] != was[name]]
    if only and changed:
        raise ValueError(
            f"{path} is from another machine or set-up ({', '.join(changed)}): run it all, or to another file"
        )
    for cell, names in chosen(only, full):
        started = time.monotonic()
        print(cell.key, flush=True)
        found = measure(cell, names, Report(torch.device("cpu")), rounds=rounds)
        own = {name: record for name, record in found["contenders"].items() if is_project(name) or name in FLOORS}
        broken = [name for name, record in own.items() if "failed" in record]
        if broken:
            raise RuntimeError(f"{cell.key}: {', '.join(broken)} failed; the file is as it was")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")  # contenders with the same one ran in the same rounds
        for record in found["contenders"].values():
            record["run"] = stamp
        old = stored["cells"].get(cell.key, {"contenders": {}})["contenders"] if only else {}
        found["contenders"] = {**old, **found["contenders"]}
        stored["cells"][cell.key] = found
        stored["machine"] = here
        path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"  in {time.monotonic() - started:.0f} s", flush=True)


def table(stored: dict[str, Any]) -> str:
    """The document's tables, in Markdown: what they say, times, then, folded, peak memory and errors."""
    cells = [stored["cells"][cell.key] for cell in TABLE + MORE if cell.key in stored["cells"]]
    ran = {name for cell in cells for name, record in cell["contenders"].items() if "median" in record}
    small = sorted(name for name in ran if "@" in name)
    names = [name for name in LABELS if name in ran and name not in FLOORS]
    times = [
        f"| tokens × hidden × vocabulary | head | β | {LABELS[FLOOR]} | " + " | ".join(map(label, names)) + " |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    folded = [*small, *names]
    memory = [
        "| tokens × hidden × vocabulary | head | β | | " + " | ".join(map(label, folded)) + " |",
        "|---|---|---|---|" + "---|" * len(folded),
    ]
    for cell in cells:
        shape, records = cell["cell"], cell["contenders"]
        start = (
            f"| {shape['tokens']} × {shape['hidden']} × {shape['vocab']:,} "
            f"| {'trainable' if shape['trainable'] else 'frozen'} | {shape['beta']:g} |"
        )
        timed = [over(records.get(name, {})) for name in names]
        times.append(f"{start} {records[FLOOR]['median']:.2f} s | " + " | ".join(timed) + " |")
        peaks = [peak(records.get(name, {})) for name in folded]
        memory.append(f"{start} peak MiB (bound) | " + " | ".join(peaks) + " |")
        errors = [_error(records.get(name, {})) for name in folded]
        memory.append(f"{start} error of dX | " + " | ".join(errors) + " |")
    where = stored["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    above = (
        f"Time of forward and backward over that of the bare GEMMs in the same rounds, torch's matrix products of the "
        f"same shapes and nothing else; median of {_counts(cells)} alternating rounds. Before each time ours "
        f"is run once untimed, so that its workspace is there, as from step to step; the others keep none. "
        f"{where['processor']}, {where['threads']} threads, float32, {where['date']}; "
        f"{versions}."
    )
    below = (
        "Peak memory is what is allocated above the inputs and the returned gradients; errors are RMS over rows "
        "against float64. Made by `python -m benchmarks.loss`."
    )
    details = ["<details><summary>Peak memory and errors</summary>", "", *memory, "", below, "",
               "</details>"]  # fmt: skip
    return "\n".join([*_claims(cells), *times, "", above, "", *details])


def label(name: str) -> str:
    backend, _, size = name.partition("@")
    return f"{LABELS[backend]}, {size.replace('MiB', ' MiB')} workspace" if size else LABELS[backend]


def over(record: dict[str, Any]) -> str:
    return f"{record['over_floor']:.2f}×" if "median" in record else "–"


def peak(record: dict[str, Any]) -> str:
    if "peak_bytes" not in record:
        return "–"
    bound = f" ({record['bound_bytes'] / 2**20:.0f})" if "bound_bytes" in record else ""
    return f"{record['peak_bytes'] / 2**20:.0f}{bound}"


def _error(record: dict[str, Any]) -> str:
    return f"{record['dx_error']:.0e}" if "dx_error" in record else "–"


def _counts(cells: list[dict[str, Any]]) -> str:
    counts = {len(r["seconds"]) for cell in cells for r in cell["contenders"].values() if "seconds" in r}
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def best_of(records: dict[str, Any]) -> str | None:
    """The project's backend that a user gets: the first of the table that ran."""
    return next((n for n in LABELS if is_project(n) and "median" in records.get(n, {})), None)


def _claims(cells: list[dict[str, Any]]) -> list[str]:
    """With a frozen head, least and most over cells: the speed beside each peer, the time over the bare products, by
    torch and its own, and what a small workspace costs."""
    faster: dict[str, list[float]] = {}
    slower: dict[str, list[float]] = {}
    over: list[float] = []
    borrowed: list[float] = []
    for cell in cells:
        records = cell["contenders"]
        mine = best_of(records)
        if cell["cell"]["trainable"] or mine is None:
            continue
        for name, record in records.items():
            if "median" not in record or name == FLOOR:
                continue
            if name == OWN_FLOOR:
                over.append(ratio(records, mine, name))
                continue
            if name == BORROWED:
                borrowed.append(record["over_floor"])
                continue
            if not is_project(name):
                faster.setdefault(LABELS[name], []).append(ratio(records, name, mine))
            elif "@" in name and split(name)[0] in (mine, "auto"):
                slower.setdefault(name.partition("@")[2].replace("MiB", " MiB"), []).append(ratio(records, name, mine))
    parts = [f"{_range(values)} times as fast as {name}" for name, values in faster.items()]
    parts += [f"{_range(over)} times as long as its own bare GEMMs"] if over else []
    parts += [f"with torch's products {_range(borrowed)} times as long as torch's bare GEMMs"] if borrowed else []
    parts += [f"with a {size} workspace {_range(values)} times as long" for size, values in slower.items()]
    return [f"With a frozen head: {'; '.join(parts)}.", ""] if parts else []


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def plot(stored: dict[str, Any], path: Path = PLOT) -> None:
    """Time over the floor per contender, frozen head: one panel per shape, one bar per β of 0 and 0.5."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    frozen = [c for c in stored["cells"].values() if not c["cell"]["trainable"] and c["cell"]["beta"] in (0.0, 0.5)]
    shapes = sorted({(c["cell"]["tokens"], c["cell"]["hidden"], c["cell"]["vocab"]) for c in frozen})
    if not shapes:
        raise ValueError("no cells with a frozen head to draw")
    names = [n for n in LABELS if n not in FLOORS and any("median" in c["contenders"].get(n, {}) for c in frozen)]
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(9, 0.9 + 0.44 * len(names)), dpi=150, sharey=True,
                                     squeeze=False)  # fmt: skip
    for axes, shape in zip(panels[0], shapes, strict=True):
        cells = [c for c in frozen if (c["cell"]["tokens"], c["cell"]["hidden"], c["cell"]["vocab"]) == shape]
        for cell in cells:
            beta = cell["cell"]["beta"]
            for row, name in enumerate(names):
                record = cell["contenders"].get(name, {})
                if "median" not in record:
                    continue
                at, value = row + (-0.19 if beta == 0.0 else 0.19), record["over_floor"]
                low, high = record["over_floor_spread"]
                color = "#0b6bcb" if is_project(name) else "#8a8f98"
                axes.barh(at, value, 0.34, color=color, alpha=0.6 if beta == 0.0 else 1.0,
                          xerr=[[value - low], [high - value]], error_kw={"lw": 0.8, "ecolor": "#333333"})  # fmt: skip
                axes.annotate(f"{value:.2f}×", (high, at), (4, 0), textcoords="offset points", va="center", fontsize=7,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
        axes.axvline(1.0, color="#333333", linestyle=":", linewidth=1.2)
        axes.set_title(f"{shape[0]} tokens, hidden {shape[1]}, vocabulary {shape[2]:,}", fontsize=9)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0][0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    panels[0][0].invert_yaxis()
    figure.supxlabel(
        "time over torch's bare GEMMs (dotted), forward + backward, frozen head; lower is better", fontsize=8
    )
    shades = {"β = 0, forward KL": 0.6, "β = 0.5, JSD": 1.0}
    handles = [Patch(color="#444444", alpha=alpha, label=text) for text, alpha in shades.items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also the cells that the committed table leaves out")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help="contenders and parts of cells' keys; merged into the file")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--data", type=Path, default=DATA, help="the results file")
    parser.add_argument("--list", action="store_true", help="print the cells and contenders, and run nothing")
    parser.add_argument("--table", action="store_true", help="run nothing: make the document's table and the plot")
    options = parser.parse_args()
    if options.list:
        for cell, names in chosen(options.only, options.full):
            print(cell.key, *names)
        return
    if not options.table:
        torch.set_num_threads(options.threads)
        run(options.only, options.full, options.rounds, options.data)
        return
    stored = json.loads(options.data.read_text(encoding="utf-8"))
    text = table(stored)
    print(text)
    plot(stored, options.data.with_name(PLOT.name))
    replace_section("loss", text)


if __name__ == "__main__":
    main()
