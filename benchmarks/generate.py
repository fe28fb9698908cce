"""Tokens per second of rollouts: `opsd`'s engine beside plain `generate`, on SmolLM2-135M-Instruct.

    python -m benchmarks.generate --measure [--model DIR]   writes results/generate-cpu.json
    python -m benchmarks.generate --table                   the README's lines from that file

Problems of three added numbers, eight rollouts of each, temperature 1, up to their own end tokens: lengths are mixed.
Plain `generate` gets each prompt with num_return_sequences, 32 rows together like the engine. The two take turns, each
time with other problems and seeds; only tokens up to the first end token count. Seconds are those of the processor, on
one thread, so that other programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.machine import machine
from benchmarks.published import WORK
from benchmarks.published_tasks import TASKS, convert, packaged_model, write_data
from benchmarks.record import write_json
from opsd.data import read_rows
from opsd.engines import GenerateEngine
from opsd.models import load_model, load_tokenizer
from opsd.options import LoraConfig, ModelConfig
from opsd.rollouts import Sampling, first_end

RESULTS = Path(__file__).parent / "results" / "generate-cpu.json"
EACH, TOGETHER, NEW = 8, 32, 192


def plain(model: Any, engine: GenerateEngine, prompts: Sequence[list[int]], seed: int) -> list[int]:
    """Lengths of the rollouts of transformers' `generate`."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=EACH,
        eos_token_id=list(engine.end_ids), pad_token_id=engine.pad_id,
    )  # fmt: skip
    prompts, lengths = sorted(prompts, key=len), []
    for start in range(0, len(prompts), TOGETHER // EACH):
        own = prompts[start : start + TOGETHER // EACH]
        width = max(map(len, own))
        ids = torch.tensor([[engine.pad_id] * (width - len(p)) + p for p in own])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in own])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        lengths += [len(first_end(row, engine.end_ids).ids) for row in out[:, width:].tolist()]
    return lengths


def ours(model: Any, engine: GenerateEngine, prompts: Sequence[list[int]], seed: int) -> list[int]:
    """The same of the engine."""
    rows = [prompt for prompt in prompts for _ in range(EACH)]
    seeds = [seed * 100_000 + number for number in range(len(rows))]
    return [len(rollout.ids) for rollout in engine.write(model, rows, Sampling(NEW), seeds, TOGETHER)]


def measure(where: Path, data: Path, task: str, rounds: int, count: int) -> dict[str, Any]:
    """Rounds of both ways, and their tokens per second over all rounds."""
    tokenizer, options = load_tokenizer(str(where)), ModelConfig(path=str(where))
    model: Any = load_model(options, LoraConfig(), torch.device("cpu")).eval()
    engine = GenerateEngine.of(model, tokenizer, options)
    problems = [row.problem for row in read_rows(str(data / task / "train.jsonl"), required=("problem",)).rows]
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "opsd": []}
    for number in range(rounds + 1):  # the first warms up
        own = problems[number * count : (number + 1) * count]
        chats = [[{"role": "user", "content": problem}] for problem in own]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
        for name, way in (("plain", plain), ("opsd", ours))[:: 1 if number % 2 else -1]:
            begun = time.process_time()
            lengths = way(model, engine, prompts, number)
            seconds = time.process_time() - begun
            print(f"{number} {name}: {sum(lengths) / seconds:.1f} tokens/s, {sum(lengths)} tokens", flush=True)
            if number:
                found[name].append({"seconds": seconds, "lengths": lengths})
    rates = {name: sum(sum(r["lengths"]) for r in own) / sum(r["seconds"] for r in own) for name, own in found.items()}
    return {
        "task": task, "prompts": count, "each": EACH, "together": TOGETHER, "new": NEW, "rounds": found,
        "tokens_per_second": rates, "machine": machine(torch.device("cpu")),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Two lines of Markdown."""
    rates = found["tokens_per_second"]
    lengths = [n for own in found["rounds"].values() for one in own for n in one["lengths"]]
    quarter, half, most = (statistics.quantiles(lengths, n=4)[i] for i in range(3))
    of = found["machine"]
    ours, plain = rates["opsd"], rates["plain"]
    return (
        f"SmolLM2-135M-Instruct, float32, {found['each']} rollouts of each of {found['prompts']} prompts, "
        f"{found['together']} at a time, lengths {quarter:.0f} / {half:.0f} / {most:.0f} (quartiles; at most "
        f"{found['new']}): {ours:.0f} tokens/s, plain `generate` {plain:.0f}, so {ours / plain:.2f} times. "
        f"{of['threads']} thread(s) of {of['processor']}, {of['date']}, transformers {of['versions']['transformers']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--model", type=Path, help="a directory of the converted model")
    parser.add_argument("--data", type=Path, help="a directory of benchmarks.published's tasks")
    parser.add_argument("--task", choices=list(TASKS), default="sums")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(1)
        if args.model is None:
            convert(packaged_model(), WORK / "model")
        if args.data is None:
            write_data(WORK / "data")
        found = measure(args.model or WORK / "model", args.data or WORK / "data", args.task, args.rounds, args.prompts)
        write_json(RESULTS, found)
    if args.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
