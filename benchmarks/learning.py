"""OPSD beside supervised fine-tuning on the embedded model: `python -m benchmarks.learning`.

Every method starts from the same base models, sees the same problems in the same number of steps, and has its learning
rate chosen from the same grid, on a seed that is not reported. `--continue` keeps the runs that are in the data file
and makes those that are missing; `--plot` only draws.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.report import replace_section
from opsd import tiny
from opsd.config import load_config
from opsd.prompts import Example
from opsd.run import Run, StepResult
from opsd.scoring import supervised_loss
from opsd.trainer import train

RESULTS = Path(__file__).parent / "results"
DATA, PLOT = RESULTS / "learning.json", RESULTS / "learning.png"
SEARCH_SEED, SEEDS = 3, (0, 1, 2)
LEARNING_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
EVERY = 20  # steps between evaluations


@dataclass(frozen=True)
class Method:
    name: str  # in the table and the plot
    color: str
    options: dict[str, Any] = field(default_factory=dict)  # other than those of `opsd train`'s embedded set-up
    solutions: str | None = None  # the column that supervised fine-tuning learns from; None: OPSD


METHODS = {
    "opsd": Method("OPSD, JSD (β = 0.5)", "#0b6bcb"),
    "forward": Method("OPSD, forward KL (β = 0)", "#6aa9e0", {"objective.beta": 0.0}),
    "reverse": Method("OPSD, reverse KL (β = 1)", "#5b3fa8", {"objective.beta": 1.0}),
    "sampled": Method("OPSD, sampled-token form", "#e07b00", {"objective.form": "sampled_token"}),
    "sft_reference": Method("SFT on the reference solutions", "#b3261e", solutions="solution"),
    "sft_own": Method(
        "SFT on solutions in the model's own notation (upper comparison)", "#3c8c40", solutions="own_solution"
    ),
}


@dataclass(frozen=True)
class Task:
    method: str
    lr: float
    seed: int


def sft_step(run: Run, examples: Sequence[Example], number: int) -> StepResult:
    """Supervised fine-tuning on the rows' solutions after the student's prompt, in place of the OPSD step."""
    completions = [[*run.tokenizer.encode(e.row.solution), run.engine.end_ids[0]] for e in examples]
    tokens, size = sum(map(len, completions)), run.config.optim.micro_batch_size
    total = torch.zeros((), device=run.device)
    for start in range(0, len(examples), size):
        prompts = [e.student for e in examples[start : start + size]]
        loss = supervised_loss(run.model, prompts, completions[start : start + size], tokens)
        loss.backward()
        total += loss.detach()
    return StepResult(total, tokens)


def run_task(task: Task) -> dict:
    """Trains once and returns the accuracies by step."""
    torch.set_num_threads(1)  # one process per core is faster than threads on a model this small
    built, method = tiny.prepare(seed=task.seed), METHODS[task.method]
    with tempfile.TemporaryDirectory() as scratch:
        options = {f"{section}.{name}": v for section, values in tiny.SETTINGS.items() for name, v in values.items()}
        options |= {
            "model.path": str(built / "model"),
            "data.train": str(built / "train.jsonl"),
            "data.eval": str(built / "eval.jsonl"),
            "optim.lr": task.lr,
            "eval.every": EVERY,
            "run.seed": task.seed,
            "run.threads": 1,
            "run.save": False,
            "run.checkpoint_every": 0,
            "run.sample_every": 0,
            "run.dir": str(Path(scratch) / "run"),
            **method.options,
        }
        step = {}
        if method.solutions:
            options["data.columns"] = {"solution": method.solutions}
            step["step"] = sft_step
        started = time.perf_counter()
        train(load_config(None, options.items()), quiet=True, **step)
        evaluations = [json.loads(line) for line in (Path(scratch) / "run/evaluations.jsonl").open(encoding="utf-8")]
    curve = [(e["step"], e["accuracy"]) for e in evaluations if e["name"] != "teacher"]
    teacher = next(e["accuracy"] for e in evaluations if e["name"] == "teacher")
    return {**asdict(task), "curve": curve, "teacher": teacher, "seconds": round(time.perf_counter() - started, 1)}


def final(record: dict) -> float:
    return record["curve"][-1][1]


def best_rates(records: list[dict]) -> dict[str, float]:
    """The learning rate of the grid with the best final accuracy on the search seed; the lower one of equals."""
    rates = {}
    for method in METHODS:
        found = [r for r in records if r["method"] == method and r["seed"] == SEARCH_SEED]
        rates[method] = min(found, key=lambda r: (-final(r), r["lr"]))["lr"]
    return rates


def measure(records: list[dict]) -> None:
    """Makes the runs that `records` lacks, and writes all of them."""
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_prepare, [SEARCH_SEED, *SEEDS]))
        for tasks in (_search, _report):
            known = {(r["method"], r["lr"], r["seed"]) for r in records}
            wanted = [t for t in tasks(records) if (t.method, t.lr, t.seed) not in known]
            for record in pool.map(run_task, wanted):
                records.append(record)
                print(record["method"], record["lr"], record["seed"], f"{final(record):.1%}", flush=True)
                stored = machine(torch.device("cpu")) | {"processes": workers, "threads": 1, "runs": records}
                DATA.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _prepare(seed: int) -> None:
    torch.set_num_threads(1)
    tiny.prepare(seed=seed)


def _search(records: list[dict]) -> Iterator[Task]:
    return (Task(method, lr, SEARCH_SEED) for method in METHODS for lr in LEARNING_RATES)


def _report(records: list[dict]) -> Iterator[Task]:
    rates = best_rates(records)
    return (Task(method, rates[method], seed) for method in METHODS for seed in SEEDS)


def table(records: list[dict]) -> str:
    """The README's table, in Markdown."""
    rates = best_rates(records)
    kept = [r for r in records if r["seed"] in SEEDS and r["lr"] == rates[r["method"]]]
    lines = [
        "| | learning rate | " + " | ".join(f"seed {s}" for s in SEEDS) + " | mean |",
        "|---|---|" + "---|" * (len(SEEDS) + 1),
    ]

    def line(name: str, rate: str, values: list[float]) -> str:
        return f"| {name} | {rate} | " + " | ".join(f"{v:.1%}" for v in [*values, mean(values)]) + " |"

    any_method = sorted((r for r in kept if r["method"] == "opsd"), key=lambda r: r["seed"])
    lines.append(line("base model, unaided", "", [r["curve"][0][1] for r in any_method]))
    lines.append(line("base model shown the reference (the teacher)", "", [r["teacher"] for r in any_method]))
    for method, of in METHODS.items():
        runs = sorted((r for r in kept if r["method"] == method), key=lambda r: r["seed"])
        lines.append(line(of.name, f"{rates[method]:g}", [final(r) for r in runs]))
    return "\n".join(lines)


def plot(records: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    rates = best_rates(records)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    teacher = mean(r["teacher"] for r in records if r["seed"] in SEEDS and r["method"] == "opsd")
    axes.axhline(teacher, color="#777777", linestyle=":", linewidth=1.2)
    axes.annotate("teacher: the base model shown the reference", (1, teacher), (0, -11), textcoords="offset points",
                  color="#555555", fontsize=8)  # fmt: skip
    for method, of in METHODS.items():
        runs = [r["curve"] for r in records
                if r["method"] == method and r["seed"] in SEEDS and r["lr"] == rates[method]]  # fmt: skip
        steps = [step for step, _ in runs[0]]
        values = [[accuracy for _, accuracy in points] for points in zip(*runs, strict=True)]
        dashed = "--" if method == "sft_own" else "-"
        axes.plot(steps, [mean(v) for v in values], dashed, color=of.color, linewidth=2, label=of.name)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=of.color, alpha=0.13,
                          linewidth=0)  # fmt: skip
    axes.set(xlabel="training step (64 problems each)", ylabel="held-out accuracy, greedy", ylim=(-0.02, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--continue", dest="more", action="store_true", help="keep the runs that are in the data file")
    choice.add_argument("--plot", action="store_true", help="only draw the plot and the table from the data file")
    options = parser.parse_args()
    if not options.plot:
        measure(json.loads(DATA.read_text(encoding="utf-8"))["runs"] if options.more else [])
    records = json.loads(DATA.read_text(encoding="utf-8"))["runs"]
    plot(records)
    replace_section("learning", table(records))
    print(table(records))


if __name__ == "__main__":
    main()
