"""Table and plot of what `benchmarks.published` measured: `python -m benchmarks.published_report`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.published import METHODS, RESULTS, best_rates, share
from benchmarks.published_tasks import TASKS
from benchmarks.report import replace_section
from opsd.compare import Estimate, estimate
from opsd.evaluation import wilson

DATA, PLOT = RESULTS / "published.json", RESULTS / "published.png"
Record = Mapping[str, Any]


def accuracy(marks: Sequence[str]) -> Estimate:
    """Of the answers of several seeds, each a string of 1 and 0."""
    found = []
    for one in marks:
        low, high = wilson(share(one), len(one))
        found.append({"accuracy": share(one), "low": low, "high": high, "problems": len(one)})
    return estimate(found)


def chosen(records: Sequence[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Task, method, and its runs of all seeds with the learning rate that was best on dev."""
    rates = best_rates(records)
    for task in TASKS:
        for method in METHODS:
            if (task, method) in rates:
                of = [r for r in records if (r["task"], r["method"], r["lr"]) == (task, method, rates[task, method])]
                yield task, method, sorted(of, key=lambda run: run["seed"])


def table(data: Mapping[str, Any]) -> str:
    """The document's table, in Markdown, and how it came about."""
    records, options = data["runs"], data["options"]
    lines = [
        "| task | | learning rate (tried) | seeds | accuracy | KL from the base on other text |",
        "|---|---|---|---|---|---|",
    ]
    for task, of in TASKS.items():
        for base in [r for r in records if r["task"] == task and not r["method"]]:
            shown = (("untrained", "base_test"), ("untrained, shown the solution", "teacher_test"))
            for name, part in shown:
                lines.append(f"| {of.title} | {name} | | | {accuracy([base[part]['right']])} | |")
        for _, method, runs in (found for found in chosen(records) if found[0] == task):
            tried = sorted(r["lr"] for r in records if (r["task"], r["method"], r["seed"]) == (task, method, 0))
            lr = f"{runs[0]['lr']:g} ({', '.join(f'{rate:g}' for rate in tried)})"
            found, kl = accuracy([r["test"]["right"] for r in runs]), mean(r["text"]["kl"] for r in runs)
            lines.append(f"| {of.title} | {METHODS[method].name} | {lr} | {len(runs)} | {found} | {kl:.4f} |")
    versions = data["versions"]
    lines += [
        "",
        f"SmolLM2-135M-Instruct (`{data['package']}`), all weights trained in float32: {options['steps']} steps of "
        f"{options['optim.batch_size']} problems, one rollout each but where it says otherwise, or their worked "
        "solutions. Greedy answers to 200 problems that no run has seen, with 95 % intervals; learning rates are "
        "chosen with the first seed by 100 others; nats per token over 48 passages. "
        f"{data['threads']} thread(s) of {data['processor']}, {data['date']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}.",
    ]
    return "\n".join(lines)


def plot(data: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    records = data["runs"]
    found = list(chosen(records))
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(1.5 + 4.5 * len(tasks), 4.2), dpi=150, layout="constrained", squeeze=False, sharey=True
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        for base in [r for r in records if r["task"] == task and not r["method"]]:
            start = share(base["base_dev"])
            axes.axhline(share(base["teacher_dev"]), color="#777777", linestyle=":", linewidth=1.2)
            axes.annotate("shown the solution, untrained", (0, share(base["teacher_dev"])), (2, -11),
                          textcoords="offset points", color="#555555", fontsize=8)  # fmt: skip
            for _, method, runs in (one for one in found if one[0] == task):
                points = zip(*(run["curve"] for run in runs), strict=True)
                values = {0: [start], **{at[0][0]: [share(marks) for _, marks in at] for at in points}}
                of = METHODS[method]
                axes.plot(list(values), [mean(v) for v in values.values()], color=of.color, linewidth=2, label=of.name)
                axes.fill_between(
                    list(values), [min(v) for v in values.values()], [max(v) for v in values.values()],
                    color=of.color, alpha=0.13, linewidth=0,
                )  # fmt: skip
        axes.set(title=TASKS[task].title, xlabel=f"training step ({data['options']['optim.batch_size']} problems each)")
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    panels[0][0].set_ylabel("accuracy on 100 problems, greedy")
    handles = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(PLOT)


def main() -> None:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    replace_section("published", table(data))
    plot(data)
    print(table(data))


if __name__ == "__main__":
    main()
