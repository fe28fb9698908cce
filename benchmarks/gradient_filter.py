"""What `gradient_filter` drops and what that costs in accuracy: `python -m benchmarks.gradient_filter`.

Two sources of logits: a generator that gives every token a common Zipf-like part, the words that are likely anywhere,
plus a part of its own; and the embedded model after an OPSD run, whose directory is given with --model.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import opsd_kernels
from benchmarks.report import replace_section
from opsd_kernels import fused_linear

DATA = Path(__file__).parent / "results" / "gradient-filter.json"
EPSILONS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ROUNDS = 3


def zipf_like(tokens: int, hidden: int, vocab: int, *, own: float = 2.5, gap: float = 0.2) -> tuple[Tensor, ...]:
    """Student and teacher hidden states and a head, with z = −log(rank of v) for every token + own·N(0, 1) for each.

    `gap` is the standard deviation of z_student − z_teacher.
    """
    g = torch.Generator().manual_seed(7)
    rank = torch.randperm(vocab, generator=g) + 1.0
    weight = torch.cat([-rank.log().unsqueeze(1), torch.randn(vocab, hidden - 1, generator=g)], 1)

    def states(scale: float) -> Tensor:
        return scale * torch.randn(tokens, hidden - 1, generator=g) / (hidden - 1) ** 0.5

    particular = states(own)
    one = torch.ones(tokens, 1)
    return torch.cat([one, particular + states(gap)], 1), torch.cat([one, particular], 1), weight


def of_the_small_model(model_directory: Path) -> tuple[Tensor, ...]:
    """Hidden states of the trained model, unaided, and of its base model, shown the reference, on the same answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opsd import tiny
    from opsd.prompts import fill
    from opsd.scoring import rollout_hidden

    built = tiny.prepare()
    trained, base = (AutoModelForCausalLM.from_pretrained(d).eval() for d in (model_directory, built / "model"))
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    rows = [json.loads(line) for line in (built / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:200]]
    prompts = tiny.SETTINGS["prompts"]
    answers = [[*tokenizer.encode(row["own_solution"]), tokenizer.eos_token_id] for row in rows]

    def hidden(model: torch.nn.Module, template: str) -> Tensor:
        filled = [fill(template, problem=row["problem"], solution=row["solution"]) for row in rows]
        return rollout_hidden(model, [tokenizer.encode(text) for text in filled], answers)

    with torch.no_grad():
        return hidden(trained, prompts["student"]), hidden(base, prompts["teacher"]), trained.lm_head.weight.detach()


def measure(student: Tensor, teacher: Tensor, weight: Tensor) -> list[dict]:
    """One record for each eps: columns kept, the bound reported, dX's error, and time against no filter."""
    exact = _gradient(student, teacher, weight, None)[0]
    choose, kept = fused_linear._Filter.columns, []

    def recording(self: Any, dz: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        columns, dropped = choose(self, dz, *rest)
        kept.append(len(columns) / dz.shape[1])
        return columns, dropped

    records = []
    for eps in EPSILONS:
        kept.clear()
        with mock.patch.object(fused_linear._Filter, "columns", recording):
            gradient, stats, _ = _gradient(student, teacher, weight, eps)
        error = (gradient - exact).norm(dim=-1)
        size = exact.norm(dim=-1).clamp(min=1e-30)
        ratios = []
        for _ in range(ROUNDS):
            plain, filtered = (_gradient(student, teacher, weight, e)[2] for e in (None, eps))
            ratios.append(filtered / plain)
        records.append({
            "eps": eps,
            "columns kept": sum(kept) / len(kept),
            "bound over size of dX": float((stats.gradient_dropped / size).median()),
            "error over size of dX": float((error / size).median()),
            "time over no filter": median(ratios),
        })  # fmt: skip
        print(records[-1], flush=True)
    return records


def _gradient(student: Tensor, teacher: Tensor, weight: Tensor, eps: float | None):
    x = student.clone().requires_grad_()
    started = time.perf_counter()
    loss, stats = opsd_kernels.jsd_loss(
        x, teacher, weight, gradient_filter=eps, reduction="sum", return_stats=True, beta=0.5
    )
    loss.backward()
    return x.grad, stats, time.perf_counter() - started


def table(results: dict) -> str:
    """The document's table, in Markdown."""
    lines = [
        "| logits | eps | columns kept | bound / ‖dX‖ | error / ‖dX‖ | time / no filter |",
        "|---|---|---|---|---|---|",
    ]
    for source in results["sources"]:
        for r in source["records"]:
            lines.append(
                f"| {source['name']} | {r['eps']:.0e} | {r['columns kept']:.1%} | {r['bound over size of dX']:.1e} "
                f"| {r['error over size of dX']:.1e} | {r['time over no filter']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of the embedded model after a run, runs/tiny-1/model say")
    parser.add_argument("--table", action="store_true", help="only make the document's table from the data file")
    options = parser.parse_args()
    if not options.table:
        sources = [("Zipf-like, N 1024, H 256, V 32,768", zipf_like(1024, 256, 32_768))]
        if options.model is not None:
            sources.append(("embedded model, V 22", of_the_small_model(options.model)))
        results = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "sources": [{"name": name, "records": measure(*tensors)} for name, tensors in sources],
        }
        DATA.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace_section("gradient-filter", table(json.loads(DATA.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
