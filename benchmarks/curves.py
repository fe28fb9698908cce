"""Whole runs of the training loop on embedded set-ups: the step `learning` of `benchmarks.parts`.

"embedded" is the set-up of `opsd train` as it comes, "larger" has more digits, a larger model, more problems and larger
batches, and computes in bfloat16. Kept is the curve: held-out accuracy, loss, tokens per second and time by phase.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Item
from opsd import tiny
from opsd.config import load_config
from opsd.prompts import Example
from opsd.run import Run, StepResult
from opsd.step import opsd_step
from opsd.trainer import train


@dataclass(frozen=True)
class Course:
    """A base model with its problems, and what its run has other than `tiny.SETTINGS`."""

    build: tiny._Build = field(default_factory=tiny._Build)
    options: dict[str, Any] = field(default_factory=dict)


COURSES = {
    "embedded": Course(options={"eval.every": 10}),
    "larger": Course(
        tiny._Build(
            steps=1500, batch_size=64, lr=1e-3, warmup=50, train_problems=20000, eval_problems=1000,
            hidden_size=256, layers=6, digits=6,
        ),
        {
            "model.autocast": "bfloat16", "rollout.max_new_tokens": 72, "rollout.batch_size": 128,
            "optim.steps": 200, "optim.batch_size": 128, "optim.micro_batch_size": 128, "optim.warmup_steps": 10,
            "eval.every": 20, "eval.batch_size": 1000,
        },
    ),
}  # fmt: skip
TOY = Course(
    tiny._Build(steps=3, batch_size=4, train_problems=8, eval_problems=4, hidden_size=16, layers=1, heads=2, digits=4),
    {"optim.steps": 2, "optim.batch_size": 2, "eval.every": 1, "rollout.max_new_tokens": 8},
)
KEPT = ("step", "loss", "grad_norm", "tokens_per_second", "seconds", "rollout_length", "peak_memory_bytes")


class OutOfTime(Exception):
    pass


def curve(course: Course, device: torch.device, deadline: float) -> dict[str, Any]:
    """One run, ended early where `deadline`, on time.monotonic's clock, comes first."""

    def step(run: Run, examples: Sequence[Example], number: int) -> StepResult:
        if time.monotonic() > deadline:
            raise OutOfTime
        return opsd_step(run, examples, number)

    left_out = {}
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        built = tiny.prepare(Path(scratch) / "built", _build=replace(course.build, device=device.type))
        building = time.monotonic() - began
        options = {f"{section}.{name}": v for section, values in tiny.SETTINGS.items() for name, v in values.items()}
        options |= course.options | {
            "model.path": str(built / "model"),
            "data.train": str(built / "train.jsonl"),
            "data.eval": str(built / "eval.jsonl"),
            "run.device": device.type,
            "run.save": False,
            "run.dir": str(Path(scratch) / "run"),
        }
        steps = options["optim.steps"]
        try:
            train(load_config(None, options.items()), quiet=True, step=step)
        except OutOfTime:
            left_out["last steps"] = f"of {steps}: the time is used up"
        lines = {
            name: [json.loads(line) for line in (Path(scratch) / "run" / f"{name}.jsonl").open(encoding="utf-8")]
            for name in ("evaluations", "metrics")
        }
    evaluations = lines["evaluations"]
    points = [(e["step"], e["accuracy"]) for e in evaluations if e["name"] != "teacher"]
    print(f"  accuracy by step: {', '.join(f'{step}: {accuracy:.1%}' for step, accuracy in points)}", flush=True)
    return {
        "build": asdict(course.build), "options": course.options, "seconds_building": building, "curve": points,
        "teacher": next(e["accuracy"] for e in evaluations if e["name"] == "teacher"),
        "steps": [
            {k: v for k, v in line.items() if k in KEPT or k.startswith("seconds_")} for line in lines["metrics"]
        ],
        "left_out": left_out,
    }  # fmt: skip


def items(device: torch.device) -> Iterator[Item]:
    courses = COURSES if device.type == "cuda" else {"toy": TOY}
    for name, course in courses.items():
        yield Item(f"learning/{name}", 200, lambda report, c=course: curve(c, report.device, report.deadline))
