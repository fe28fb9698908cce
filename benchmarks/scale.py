"""What each of several processes holds while the whole model is trained, and what that means for larger models.

`python -m benchmarks.scale` takes a step with 1, 2 and 4 processes of gloo on a CPU, counts the bytes of weights,
gradients, optimiser state and the teacher's copy in each of them, and writes results/scale-cpu.json and the tables of
docs/scale.md. `--table` makes those from the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.packing import FULL_SHAPES, Shape
from benchmarks.report import replace_section

ROOT = Path(__file__).parent.parent
DATA = ROOT / "benchmarks/results/scale-cpu.json"
PROCESSES = (1, 2, 4)
SHAPE = Shape(hidden=256, layers=6, vocab=8192, intermediate=768, tied=True)
PARTS = ("weights", "gradients", "optimiser", "teacher's copy")
GIB = 2**30


def parameters(shape: Shape) -> int:
    """Of a Qwen3-shaped model."""
    heads, kv_heads, size = shape.heads or (shape.hidden // 64, max(1, shape.hidden // 128), 64)
    attention = shape.hidden * size * (2 * heads + 2 * kv_heads) + 2 * size
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return shape.layers * layer + (1 if shape.tied else 2) * shape.vocab * shape.hidden + shape.hidden


def adapters(shape: Shape, rank: int = 64) -> int:
    """Parameters of LoRA on all linear layers but the head."""
    heads, kv_heads, size = shape.heads or (shape.hidden // 64, max(1, shape.hidden // 128), 64)
    hidden, wide = shape.hidden, shape.intermediate
    sides = 2 * (hidden + heads * size) + 2 * (hidden + kv_heads * size) + 3 * (hidden + wide)
    return shape.layers * rank * sides


def held(shape: Shape, count: int) -> dict[str, float]:
    """Bytes in each of `count` processes by the formula: float32, AdamW's two averages, the frozen initial model."""
    each = 4 * parameters(shape) / count
    return dict(zip(PARTS, (each, each, 2 * each, each), strict=True))


def _local_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors if t is not None)


def process(config: str) -> None:
    """One of them: a step, and a line of bytes."""
    import opsd
    from opsd.engines import GenerateEngine
    from opsd.loop import Loop

    found: dict[str, Any] = {}
    apply, write = Loop._apply, GenerateEngine._write

    def applied(self: Any, *given: Any) -> Any:
        own, teacher = list(self.run.model.parameters()), self.run.teacher.model.parameters()
        found.update({
            "weights": _local_bytes(own), "gradients": _local_bytes(p.grad for p in own),
            "teacher's copy": _local_bytes(teacher),
        })  # fmt: skip
        done = apply(self, *given)
        state = self.optimizer.state.values()
        found["optimiser"] = _local_bytes(v for one in state for name, v in one.items() if name != "step")
        return done

    def written(self: Any, lm: Any, *given: Any) -> Any:
        found["weights while rollouts are written"] = _local_bytes(lm.parameters())
        return write(self, lm, *given)

    Loop._apply, GenerateEngine._write = applied, written  # type: ignore[method-assign]
    opsd.train(json.loads(config), quiet=True)
    print(json.dumps(found), flush=True)


def measured(count: int) -> list[dict[str, Any]]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder) / "model", Path(folder) / "data.jsonl"
        SHAPE.model(torch.device("cpu")).save_pretrained(base)
        vocab = {"<pad>": 0, "<end>": 2} | {f"w{i}": i for i in range(SHAPE.vocab) if i not in (0, 2)}
        raw = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>").save_pretrained(base)
        row = {"problem": "w5 w6 w7", "solution": "w8", "answer": "w8"}
        data.write_text(4 * (json.dumps(row) + "\n"), encoding="utf-8")
        config = {
            "model": {"path": str(base)}, "data": {"train": str(data)}, "rollout": {"max_new_tokens": 8},
            "optim": {"steps": 1, "batch_size": 4, "micro_batch_size": 1},
            "run": {"device": "cpu", "dir": f"{folder}/run", "save": False, "threads": 1},
        }  # fmt: skip
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*launch, "-m", "benchmarks.scale", "--process", json.dumps(config)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-4000:])
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def measured_table(data: dict[str, Any]) -> str:
    lines = [f"| processes | {' | '.join(PARTS)} | together | formula | weights while rollouts are written |"]
    lines.append("|" + "---|" * (len(PARTS) + 4))
    for count, found in data["processes"].items():
        most = {name: max(one[name] for one in found) / 2**20 for name in found[0]}
        parts, whole = [most[name] for name in PARTS], sum(held(SHAPE, int(count)).values()) / 2**20
        cells = [*parts, sum(parts), whole, most["weights while rollouts are written"]]
        lines.append(f"| {count} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    own = data["machine"]
    note = f"MiB in the process that has most; {parameters(SHAPE) / 1e6:.1f} M parameters in float32, gloo on a CPU"
    return "\n".join([*lines, "", f"{note}, {own['date']}, torch {own['versions']['torch']}."])


def size_table() -> str:
    lines = [
        "| model | trained | 1 | 2 | 4 | 8 processes | while 8 write | at set-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in FULL_SHAPES.items():
        whole = [sum(held(shape, count).values()) / GIB for count in (1, 2, 4, 8)]
        weights = 4 * parameters(shape) / GIB
        more = f"{whole[-1] + weights:.0f} | {2 * weights:.0f}"
        lines.append(f"| Qwen3 {name} | all | {' | '.join(f'{size:.0f}' for size in whole)} | {more} |")
        adapted = (2 * parameters(shape) + 16 * adapters(shape)) / GIB
        lines.append(f"| | LoRA, r = 64 | {' | '.join(6 * [f'{adapted:.0f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="from the file of results")
    known = parser.parse_args()
    if known.process:
        return process(known.process)
    if not known.table:
        found = {count: measured(count) for count in PROCESSES}
        data = {"machine": machine(torch.device("cpu")), "processes": found}
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    data = json.loads(DATA.read_text(encoding="utf-8"))
    replace_section("measured", measured_table(data))
    replace_section("sizes", size_table())


if __name__ == "__main__":
    main()
