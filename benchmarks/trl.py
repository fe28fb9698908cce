"""TRL's trainers beside themselves with our loss and packed rows: `python -m benchmarks.trl`.

Forward and backward of one batch of ragged prompts and completions, made as in `benchmarks.packing`, in the trainers'
own `compute_loss`, which is all that differs. Each pair's losses must agree. Results go to results/trl.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import peak_bytes
from benchmarks.packing import SHAPES, Case, draw, keep_memory
from benchmarks.report import replace_section

DATA = Path(__file__).parent / "results" / "trl.json"
CASES = {"one rollout": Case(1, 1024), "eight rollouts": Case(8, 256)}
TOLERANCE = 1e-4


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """(B, T) ids and their mask."""
    width = max(map(len, rows))
    blank = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, blank, strict=True))
    ids = [gap + row if left else row + gap for row, gap in pairs]
    mask = [[0 * i for i in gap] + [1] * len(row) if left else [1] * len(row) + gap for row, gap in pairs]
    return torch.tensor(ids), torch.tensor(mask)


def batch_of(students: list[list[int]], teachers: list[list[int]], rollouts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts of both and a rollout for each, as TRL's trainers hand them to `compute_loss`."""
    prompt, prompt_mask = padded(students, left=True)
    completion, completion_mask = padded(rollouts, left=False)
    taught, taught_mask = padded(teachers, left=True)
    return {
        "prompt_ids": prompt, "prompt_mask": prompt_mask,
        "completion_ids": completion, "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([taught, completion], 1),
        "teacher_attention_mask": torch.cat([taught_mask, completion_mask], 1),
    }  # fmt: skip


def pairs_of(folder: str) -> dict[str, tuple[Any, Any]]:
    """TRL's trainer and ours, of the same weights."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from opsd.integrations import trl as ours

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2, "a": 3}, unk_token="a"))
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left")
    data = Dataset.from_list([{"prompt": "a", "privileged_context": "a"}] * 8)
    device = torch.device("cpu")
    common: dict[str, Any] = {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False}
    divergence = {"distillation_mode": "full_logits", "distillation_alpha": 0.5, "teacher_model_kind": "live"}
    made = {}
    for name, classes, config, options in (
        ("SDFT", (SDFTTrainer, ours.SDFTTrainer), SDFTConfig, divergence),
        ("Distillation", (trl.DistillationTrainer, ours.DistillationTrainer), trl.DistillationConfig, {"beta": 0.5}),
    ):
        pair = []
        for one in classes:
            more = {} if name == "SDFT" else {"teacher_model": SHAPES["shallow"].model(device)}
            args = config(**common, **options)
            student = SHAPES["small"].model(device)
            trainer = one(model=student, args=args, train_dataset=data, processing_class=words, **more)
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # TRL's default, as in a training
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
            pair.append(trainer)
        made[name] = (pair[0], pair[1])
    return made


def step(trainer: Any, batch: dict[str, Tensor]) -> float:
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return float(loss.detach())


def measured(theirs: Any, ours: Any, case: Case, rounds: int, privileged: bool) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"TRL": [], "opsd": []}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):  # the first is not timed
        batch, losses = batch_of(*draw(case, SHAPES["small"].vocab, number).flat()), {}
        if not privileged:
            batch = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
        both = [("TRL", theirs), ("opsd", ours)]
        for name, trainer in both if number % 2 else both[::-1]:
            gc.collect()
            begun = time.perf_counter()
            losses[name] = step(trainer, batch)
            if number:
                seconds[name].append(time.perf_counter() - begun)
            else:
                trainer.model.zero_grad(set_to_none=True)
                peaks[name] = peak_bytes(lambda t=trainer, b=batch: step(t, b), torch.device("cpu"))
        if abs(losses["TRL"] - losses["opsd"]) > TOLERANCE * abs(losses["TRL"]):
            raise RuntimeError(f"the losses differ: {losses}")
    return {"seconds": seconds, "peak_bytes": peaks}


def table(data: dict[str, Any]) -> str:
    lines = ["| trainer | batch | time, TRL over ours | peak, TRL | peak, ours |", "|---|---|---|---|---|"]
    for record in data["records"]:
        ratios = [t / o for t, o in zip(*(record["seconds"][name] for name in ("TRL", "opsd")), strict=True)]
        peaks = [f"{record['peak_bytes'][name] / 2**20:.0f} MiB" for name in ("TRL", "opsd")]
        lines.append(
            f"| {record['trainer']} | {record['case']} per prompt | {median(ratios):.2f} | {' | '.join(peaks)} |"
        )
    own = data["machine"]
    versions = ", ".join(f"{name} {own['versions'][name]}" for name in ("torch", "trl", "transformers"))
    what = "Qwen3-shaped model of 10 layers, hidden size 256, vocabulary 32,768, layers checkpointed, float32"
    return "\n".join(
        [*lines, "", f"{what}; {own['threads']} thread(s) of {own['processor']}, {own['date']}; {versions}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    known = parser.parse_args()
    torch.set_num_threads(known.threads)
    keep_memory()
    warnings.simplefilter("ignore")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for trainer, (theirs, ours) in pairs_of(folder).items():
            for name, case in CASES.items():
                found = measured(theirs, ours, case, known.rounds, trainer == "SDFT")
                records.append({"trainer": trainer, "case": name, **found})
                print(trainer, name, found, flush=True)
    data = {"machine": machine(torch.device("cpu")), "records": records}
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    replace_section("trl", table(data))


if __name__ == "__main__":
    main()
