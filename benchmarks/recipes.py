"""The README's table of recipes, made from the recipes themselves: `python -m benchmarks.recipes`.

With `--measure` it first trains the embedded model with every recipe that the loop can train with, and by supervised
fine-tuning for comparison: same models, data, number of rollouts and learning rate. What is in the file of results
already is kept, so that a measurement that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.learning import sft_step
from benchmarks.machine import machine
from benchmarks.record import write_json
from benchmarks.report import replace_section
from opsd import recipes, tiny, trainer
from opsd.compare import estimate
from opsd.config import load_config
from opsd.errors import ConfigError, RunError
from opsd.recipes.in_loop import lacking, why_lacking

DATA = Path(__file__).parent / "results" / "recipes.json"
SEEDS = (0, 1, 2)
SFT = {"sft": "solution", "sft_own": "own_solution"}  # the column that it learns from
BUDGET: dict[str, Any] = {
    "optim.steps": 30,
    "optim.batch_size": 8,
    "optim.micro_batch_size": 64,
    "rollout.per_prompt": 8,  # 64 rollouts a step, of which a recipe with advantages compares 8
    "eval.max_problems": 200,
    "eval.every": 0,
}
"""What differs from the embedded set-up: short, so that methods differ, and the same for all."""

CONTEXTS = {"cepo": {"negative": "Q:{problem}\nR:{wrong_rollout}\nA:"}}
SAME = {"pi_play": "sdft", "rock": "sdft", "vpd": "sdft", "rgsd": "opsd", "zppo": "act_guide"}
"""Recipes that differ from another in what their teacher reads, or in an option, and not on this data."""

LEFT_OUT = {"mad_opd": "the data have no debates"}


def methods() -> list[str]:
    """Those of the divergence first, which are quick to tell apart."""
    able = [name for name in recipes.names() if not lacking(recipes.make(name)) and name not in {*SAME, *LEFT_OUT}]
    return [*SFT, *sorted(able, key=lambda name: "advantage" in recipes.make(name).needs)]


def run_once(method: str, seed: int) -> dict[str, Any]:
    """Trains once; supervised fine-tuning sees a solution where the others have a rollout, so 64 problems a step."""
    torch.set_num_threads(1)
    built = tiny.prepare(seed=seed)
    options = {f"{section}.{name}": v for section, values in tiny.SETTINGS.items() for name, v in values.items()}
    options |= {
        "model.path": str(built / "model"),
        "data.train": str(built / "train.jsonl"),
        "data.eval": str(built / "eval.jsonl"),
        "run.seed": seed,
        "run.threads": 1,
        "run.save": False,
        "run.checkpoint_every": 0,
        "run.sample_every": 0,
        **BUDGET,
    }
    step: dict[str, Any] = {}
    if method in SFT:
        options |= {"data.columns": {"solution": SFT[method]}, "rollout.per_prompt": 1, "optim.batch_size": 64}
        step["step"] = sft_step
    else:
        options["objective.recipe"] = method
        if method in CONTEXTS:
            options["prompts.contexts"] = CONTEXTS[method]
    began, record = time.perf_counter(), {"method": method, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        options["run.dir"] = str(Path(scratch) / "run")
        try:
            found = trainer.train(load_config(None, options.items()), quiet=True, **step).summary
        except (ConfigError, RunError) as error:  # a loss that is not finite, say, is a result too
            return {**record, "failed": str(error)}
    kept = {
        name: {key: found["evaluations"][name][key] for key in ("accuracy", "low", "high", "problems")}
        for name in ("base", "teacher", "trained")
    }
    return {**record, **kept, "tokens": found["tokens"], "seconds": round(time.perf_counter() - began, 1)}


def measure(workers: int) -> None:
    """Makes the runs that the file lacks, seed after seed, and writes each at once."""
    runs = read()["runs"]
    known = {(run["method"], run["seed"]) for run in runs}
    wanted = [(name, seed) for seed in SEEDS for name in methods() if (name, seed) not in known]
    with ProcessPoolExecutor(workers) as pool:
        for record in pool.map(run_once, *zip(*wanted, strict=True)) if wanted else ():
            runs.append(record)
            print(record["method"], record["seed"], record.get("failed", record.get("trained")), flush=True)
            write_json(DATA, {**machine(torch.device("cpu")), "processes": workers, "budget": BUDGET, "runs": runs})


def read() -> dict[str, Any]:
    """The file, or one without runs. Raises ValueError: it is of another budget."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"runs": [], "budget": BUDGET}
    if data["budget"] != BUDGET:
        raise ValueError(f"{DATA} is of another budget; remove it to measure anew")
    return data


def result(runs: list[dict[str, Any]], name: str, when: str = "trained") -> str:
    """The mean accuracy with its 95 % interval, and the number of seeds where it is not all."""
    if name in SAME:
        return f"as `{SAME[name]}`"
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    own = [run for run in runs if run["method"] == name]
    found = [run[when] for run in own if when in run]
    failed = [run["seed"] for run in own if "failed" in run]
    words = []
    if found:
        all_seeds = estimate(found)
        words.append(f"{all_seeds.value:.1%} ({all_seeds.low:.0%} to {all_seeds.high:.0%})")
    if failed:
        words.append(f"failed: seed {', '.join(map(str, failed))}")
    elif 0 < len(found) < len(SEEDS):
        words.append(f"({len(found)} of {len(SEEDS)} seeds)")
    return " ".join(words)


def table() -> str:
    runs = read()["runs"]
    lines = [
        "| recipe | paper | contexts that it reads | what else it needs | in the loop | source of the formula "
        "| result on the small model |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in recipes.names():
        recipe = recipes.make(name)
        paper = f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})" if recipe.paper else ""
        contexts, needs = (", ".join(words) or "–" for words in (recipe.contexts, recipe.needs))
        loop = f"no: {why_lacking(recipe)}" if lacking(recipe) else "yes"
        lines.append(f"| `{name}` | {paper} | {contexts} | {needs} | {loop} | {recipe.source} | {result(runs, name)} |")
    return "\n".join([*lines, "", reading(runs)]) if runs else "\n".join(lines)


def reading(runs: list[dict[str, Any]]) -> str:
    """What the results are, and what they stand beside."""
    trained = [run for run in runs if run["method"] not in SFT]
    of_seed = {run["seed"]: run for run in trained if "base" in run}
    seeds = ", ".join(map(str, sorted(of_seed)))
    before, teacher = (f"{mean(run[name]['accuracy'] for run in of_seed.values()):.1%}" for name in ("base", "teacher"))
    missing = [name for name in methods() if not any(run["method"] == name for run in runs)]
    return " ".join(
        [
            f"Accuracy on {BUDGET['eval.max_problems']} held-out problems after {BUDGET['optim.steps']} steps of 64 "
            f"rollouts (95 % interval over seeds {seeds}), at the embedded set-up's "
            f"own learning rate; before training {before}, the teacher {teacher}, "
            f"supervised fine-tuning on the reference solutions {result(runs, 'sft')}, on solutions in the model's own "
            f"notation {result(runs, 'sft_own')}.",
            *([f"Not measured yet: {', '.join(missing)}."] if missing else []),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="make the runs that are missing")
    parser.add_argument("--workers", type=int, default=1, help="processes, each of one thread")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.workers)
    replace_section("recipes", table())
