"""The packed path against two padded batches: `python -m benchmarks.packing`.

One round is the forward and backward pass of a small Qwen3-shaped model with the loss over its rollouts; the contenders
take turns on the same draw of lengths, each round is a new draw, and ratios are taken round by round. Lengths are those
of a real run divided by `SCALE`: prompts of 300 and solutions of 2000 tokens, each drawn ±50 %, rollouts up to 1024.
The contenders' losses must agree. Results go to results/packing.json. On a GPU, at full size: benchmarks.parts.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import peak_bytes
from benchmarks.report import replace_section
from benchmarks.runner import Report
from opsd.clock import Clock
from opsd.models import is_adapted
from opsd.scoring import rollout_hidden, teacher_then_student
from opsd_kernels import jsd_loss, lm_head_of
from opsd_kernels.packing import dual_hidden_states, pack_dual_context
from opsd_kernels.probe import evaluating

DATA = Path(__file__).parent / "results" / "packing.json"
THREADS, SCALE, PROMPTS = 2, 8, 8
TOLERANCE = 1e-3  # of the contenders' losses and gradients' norms
FLEX_ROWS = 2400  # of a teacher's context, about those of the cases with one rollout


@dataclass(frozen=True)
class Shape:
    """A Qwen3-shaped model with random weights."""

    hidden: int
    layers: int
    vocab: int
    intermediate: int
    heads: tuple[int, int, int] | None = None  #: query, key/value, size; None: of 64, two queries for each key
    tied: bool = False  #: embedding and head are one tensor

    def model(self, device: torch.device) -> Any:
        """On a GPU in bfloat16."""
        from transformers import AutoModelForCausalLM, Qwen3Config

        torch.manual_seed(0)
        heads, kv_heads, head_size = self.heads or (self.hidden // 64, max(1, self.hidden // 128), 64)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_size,
            max_position_embeddings=40960,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=self.tied,
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:  # billions of weights are drawn faster there
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


SHAPES = {
    # Parameters of the head over those of the body: 2.7, more than in any real model; 1.1, between Gemma 3 270M and
    # 1B; 0.2, that of Qwen3 1.7B.
    "shallow": Shape(hidden=256, layers=4, vocab=32768, intermediate=768),
    "small": Shape(hidden=256, layers=10, vocab=32768, intermediate=768),
    "deep": Shape(hidden=256, layers=12, vocab=8192, intermediate=768),
}
FULL_SHAPES = {
    "0.6B": Shape(hidden=1024, layers=28, vocab=151936, intermediate=3072, heads=(16, 8, 128), tied=True),
    "1.7B": Shape(hidden=2048, layers=28, vocab=151936, intermediate=6144, heads=(16, 8, 128), tied=True),
    "4B": Shape(hidden=2560, layers=36, vocab=151936, intermediate=9728, heads=(32, 8, 128), tied=True),
    "8B": Shape(hidden=4096, layers=36, vocab=151936, intermediate=12288, heads=(32, 8, 128)),
}


@dataclass(frozen=True)
class Case:
    """Lengths before scaling; `generations` rollouts for each of `PROMPTS` prompts."""

    generations: int
    rollout_max: int

    @property
    def key(self) -> str:
        return f"G{self.generations}-R{self.rollout_max}"


CASES = [Case(1, 1024), Case(8, 512)]


@dataclass(frozen=True)
class Draw:
    students: list[list[int]]
    teachers: list[list[int]]
    rollouts: list[list[list[int]]]

    @property
    def tokens(self) -> int:
        return sum(len(r) for own in self.rollouts for r in own)

    def flat(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Prompts repeated for each of their rollouts."""
        rows = list(zip(self.students, self.teachers, self.rollouts, strict=True))
        return (
            [s for s, _, own in rows for _ in own],
            [t for _, t, own in rows for _ in own],
            [r for _, _, own in rows for r in own],
        )


def draw(case: Case, vocab: int, seed: int, solutions: int = 1, scale: int = SCALE, prompts: int = PROMPTS) -> Draw:
    """Prompts P and P + S: the teacher reads the problem as the student does, then the solution,
    `solutions` times over: all else stays the same. All lengths are divided by `scale`."""
    random = torch.Generator().manual_seed(seed)

    def tokens(low: float, high: float) -> list[int]:
        least, most = max(1, round(low / scale)), max(1, round(high / scale))
        n = int(torch.randint(least, most + 1, (), generator=random))
        return torch.randint(3, vocab, (n,), generator=random).tolist()

    students = [tokens(150, 450) for _ in range(prompts)]
    # The template's last words differ, so the last token or two of the student's prompt are not shared.
    teachers = [[*s[:-2], *tokens(1000, 3000) * solutions] for s in students]
    longest = case.rollout_max
    rollouts = [[tokens(0.1 * longest, longest) for _ in range(case.generations)] for _ in range(prompts)]
    return Draw(students, teachers, rollouts)


Contender = Callable[[Any, Draw, Clock], Tensor]
"""Returns the mean loss over the draw's tokens, whose `backward()` adds its gradients to the model. The clock gets the
phases "teacher" and "student", or "score" where both run in one pass, and "loss"."""


@contextmanager
def teaching(model: Any) -> Iterator[None]:
    """While open, `model` is its own teacher: without its adapters, where it has any."""
    with torch.no_grad(), evaluating(model), model.disable_adapter() if is_adapted(model) else nullcontext():
        yield


def teacher_of(model: Any) -> str:
    return "base" if is_adapted(model) else "live"


Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""The mean JSD of (R, H) hidden states of student and teacher."""


def fused(model: Any, student: Tensor, teacher: Tensor) -> Tensor:
    head = lm_head_of(model)
    return jsd_loss(student, teacher, head.weight, **head.options())


def padded(loss: Loss = fused) -> Contender:
    """Two right-padded batches through the stock attention, then a loss on the rollouts' rows."""

    def contender(model: Any, data: Draw, clock: Clock) -> Tensor:
        students, teachers, rollouts = data.flat()
        with clock("teacher"), teaching(model):
            teacher = rollout_hidden(model, teachers, rollouts)
        with clock("student"):
            student = rollout_hidden(model, students, rollouts)
        with clock("loss"):
            return loss(model, student, teacher)

    return contender


def packed(passes: str, backend: str = "auto", loss: Loss = fused) -> Contender:
    def contender(model: Any, data: Draw, clock: Clock) -> Tensor:
        batch = pack_dual_context(data.students, data.teachers, data.rollouts)
        with clock("score") if passes == "joint" else teacher_then_student(clock, model):
            hidden = dual_hidden_states(model, batch, teacher=teacher_of(model), passes=passes, backend=backend)
        with clock("loss"):
            return loss(model, hidden.student, hidden.teacher)

    return contender


def padded_dense(model: Any, data: Draw, clock: Clock) -> Tensor:
    """Two right-padded batches, logits of all rows, a JSD in eager torch; eight sequences at a time."""
    students, teachers, rollouts = data.flat()
    total = torch.zeros((), device=model.device)
    for start in range(0, len(rollouts), PROMPTS):
        part = slice(start, start + PROMPTS)
        with clock("teacher"), teaching(model):
            teacher = dense_logits(model, teachers[part], rollouts[part])
        with clock("student"):
            student = dense_logits(model, students[part], rollouts[part])
        with clock("loss"):
            p, q = (logits.float().log_softmax(-1) for logits in (student, teacher))
            m = torch.logaddexp(p, q) - math.log(2.0)
            both = p.exp() * (p - m) + q.exp() * (q - m)
            loss = 0.5 * both.sum() / data.tokens
            del student, teacher, p, q, m, both
            if start + PROMPTS < len(rollouts) and loss.requires_grad:
                loss.backward()
                loss = loss.detach()
        total = total + loss
    return total


def dense_logits(model: Any, prompts: list[list[int]], rollouts: list[list[int]]) -> Tensor:
    """(tokens, V): logits of all padded rows are computed, those that predict a rollout are used."""
    sequences = [[*p, *r[:-1]] for p, r in zip(prompts, rollouts, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    rows = [logits[i, len(p) - 1 : len(p) - 1 + len(r)] for i, (p, r) in enumerate(zip(prompts, rollouts, strict=True))]
    return torch.cat(rows)


CONTENDERS: dict[str, Contender] = {
    "padded_dense": padded_dense,
    "padded_loss": padded(),
    "packed_two": packed("two"),
    "packed_joint": packed("joint"),
}


def timed(contender: Contender, model: Any, data: Draw) -> tuple[float, float, float]:
    """(seconds, loss, norm of the gradient)."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    begun = time.perf_counter()
    loss = contender(model, data, Clock(model.device))
    loss.backward()
    seconds = time.perf_counter() - begun
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return seconds, float(loss.detach()), float(norm)


def memory(contender: Contender, model: Any, data: Draw) -> dict[str, int]:
    """Bytes that the graph holds after the forward pass, and the most that were allocated during a step."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = contender(model, data, Clock(model.device))
    saved = sum(size for size, _ in held.values())
    held.clear()
    del loss
    model.zero_grad(set_to_none=True)
    gc.collect()
    run = functools.partial(contender, model, data, Clock(model.device))
    return {"saved_bytes": saved, "peak_bytes": peak_bytes(lambda: run().backward(), model.device)}


def measure(shape: Shape, case: Case, rounds: int, names: list[str], checkpointing: bool) -> dict[str, Any]:
    """Times by round and contender, ratios of their medians by round, memory on the first draw."""
    model = shape.model(torch.device("cpu"))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first = draw(case, shape.vocab, 0)
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        records[name] = {"seconds": [], "tokens_per_second": []}
        if name == "padded_dense" and case.generations > 1:
            records[name]["memory"] = "not comparable: eight sequences at a time, backward in between"
            continue
        records[name] |= memory(CONTENDERS[name], model, first)
        longer = draw(case, shape.vocab, 0, solutions=2)
        if name != "padded_dense":
            records[name]["saved_bytes_solution_doubled"] = memory(CONTENDERS[name], model, longer)["saved_bytes"]
    worst = 0.0
    order, tokens = list(names), []
    for number in range(rounds):
        data = draw(case, shape.vocab, 1 + number)
        tokens.append(data.tokens)
        seen = []
        for name in order:
            seconds, loss, norm = timed(CONTENDERS[name], model, data)
            records[name]["seconds"].append(seconds)
            records[name]["tokens_per_second"].append(data.tokens / seconds)
            seen.append((loss, norm))
        order = [*order[1:], order[0]]
        for values in zip(*seen, strict=True):
            worst = max(worst, (max(values) - min(values)) / abs(values[0]))
        print(
            f"  round {number + 1}: " + ", ".join(f"{n} {records[n]['seconds'][-1]:.2f} s" for n in names), flush=True
        )
    if worst > TOLERANCE:
        raise RuntimeError(f"{case.key}: the contenders' losses or gradients differ by {worst:.1e}")
    rows = rows_of(first)
    return {
        "case": asdict(case), "checkpointing": checkpointing, "rounds": rounds, "rollout_tokens": tokens,
        "rows": rows, "largest_difference": worst, "load": os.getloadavg()[0],
        "contenders": records,
        "ratios": {
            f"{packed_name} over {name}": ratio(records, name, packed_name)
            for packed_name in names if packed_name.startswith("packed")
            for name in names if not name.startswith("packed")
        }
    }  # fmt: skip


def keep_memory() -> None:
    """Freed memory stays with the process: on a virtual machine fresh pages can cost more than what is computed on
    them, and whoever allocates most would pay for all."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: from the heap, whatever the size
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def ratio(records: dict[str, dict[str, Any]], slow: str, fast: str) -> dict[str, float]:
    by_round = [a / b for a, b in zip(records[slow]["seconds"], records[fast]["seconds"], strict=True)]
    return {"median": median(by_round), "least": min(by_round), "most": max(by_round)}


def rows_of(data: Draw) -> dict[str, int]:
    """How many rows go through the model."""
    students, teachers, rollouts = data.flat()
    batch = pack_dual_context(data.students, data.teachers, data.rollouts)

    def padded(prompts: list[list[int]]) -> int:
        return len(prompts) * max(len(p) + len(r) - 1 for p, r in zip(prompts, rollouts, strict=True))

    return {
        "padded_student": padded(students),
        "padded_teacher": padded(teachers),
        "packed_student": batch.student.layout.rows,
        "packed_teacher": batch.teacher.layout.rows,
        "joint": batch.joint(share_contexts=True).layout.rows,
    }


def beside_flex_attention(rounds: int) -> list[dict[str, Any]]:
    """The attention of a teacher's context by itself, beside FlexAttention with the layout as its mask."""
    from benchmarks.attention import Heads, compare

    found = []
    for generations in (1, 8):
        report = Report(torch.device("cpu"))
        found.append(compare(generations, FLEX_ROWS, Heads(4, 2, 64), report, ["sdpa", "flex"], rounds))
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether results of both may stand beside each other."""
    return all(one.get(key) == value for key, value in other.items() if key != "date")


NAMES = {"padded_dense": "padded, dense logits", "padded_loss": "padded, our loss", "packed_two": "packed, two passes",
         "packed_joint": "packed, joint"}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The document's table, in Markdown."""
    lines = [
        "| model | rollouts per prompt | " + " | ".join(NAMES.values()) + " | saved for backward |",
        "|---|---|" + "---|" * (len(NAMES) + 1),
    ]
    for found in results["shapes"].values():
        for case in found["cases"].values():
            contenders = case["contenders"]

            def relative(name: str, contenders: dict[str, Any] = contenders) -> str:
                if name not in contenders:
                    return "–"
                return f"{ratio(contenders, name, 'packed_two')['median']:.2f}"

            saved = (f"{contenders[n]['saved_bytes'] / 2**20:.0f}" for n in NAMES if "loss" in n or "packed" in n)
            sizes = found["shape"]
            model = f"{sizes['layers']} layers, V {sizes['vocab']:,}{', checkpointed' if case['checkpointing'] else ''}"
            cells = [model, str(case["case"]["generations"]), *map(relative, NAMES), " / ".join(saved) + " MiB"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_flex_claim(results.get("attention", []))])


def _flex_claim(compared: list[dict[str, Any]]) -> list[str]:
    parts = []
    for found in compared:
        mine, flex = (found["contenders"].get(name, {}) for name in ("sdpa", "flex"))
        if "teacher forward" not in mine or "teacher forward" not in flex:
            continue
        times = [a / b for a, b in zip(flex["teacher forward"], mine["teacher forward"], strict=True)]
        layers = [a / b for a, b in zip(flex["teacher prepare"], mine["teacher forward"], strict=True)]
        parts.append(
            f"{median(times):.2f} times as long as ours with {found['generations']} rollout(s) per prompt, plus once a "
            f"batch the time of {median(layers):.1f} such layers to build its mask"
        )
    if not parts:
        return []
    return ["", f"FlexAttention, compiled, on the teacher's rows (forward, one layer): {'; '.join(parts)}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS, help="1 where other work runs on the same cores")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--generations", type=int, action="append", help="of the cases; default: all")
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="contenders; default: all")
    parser.add_argument("--attention", action="store_true", help="only the attention by itself, beside FlexAttention")
    parser.add_argument("--data", type=Path, default=DATA, help="default: results/packing.json")
    parser.add_argument("--table", action="store_true", help="run nothing: make the document's table")
    options = parser.parse_args()
    if options.table:
        replace_section("packing", table(json.loads(options.data.read_text(encoding="utf-8"))))
        return
    if not options.shape and not options.attention:
        # each in a process of its own: the memory that is kept falls into pieces, which add up
        for part in (["--attention"], *(["--shape", name] for name in SHAPES)):
            subprocess.run([sys.executable, "-m", "benchmarks.packing", *sys.argv[1:], *part], check=True)
        return
    keep_memory()
    torch.set_num_threads(options.threads)
    here = {"machine": machine(torch.device("cpu")), "scale": SCALE, "prompts": PROMPTS}
    results: dict[str, Any] = {**here, "shapes": {}}
    if options.data.exists():  # what is not measured now stays, if it is from the same place
        stored = json.loads(options.data.read_text(encoding="utf-8"))
        if all(stored[k] == v for k, v in here.items() if k != "machine") and same(stored["machine"], here["machine"]):
            results |= {key: stored[key] for key in ("shapes", "attention") if key in stored}

    def write() -> None:
        options.data.parent.mkdir(exist_ok=True)
        options.data.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if options.attention:
        results["attention"] = beside_flex_attention(options.rounds)
        write()
        return
    for shape_name in options.shape or SHAPES:
        shape = SHAPES[shape_name]
        sizes = json.loads(json.dumps(asdict(shape)))
        found = results["shapes"].get(shape_name)
        if found is None or found["shape"] != sizes:
            found = results["shapes"][shape_name] = {"shape": sizes, "cases": {}}
        for case in CASES:
            if options.generations and case.generations not in options.generations:
                continue
            for checkpointing in (False, True):
                names = [n for n in options.only or CONTENDERS if not (checkpointing and n == "padded_dense")]
                key = case.key + ("-checkpointed" if checkpointing else "")
                print(f"{shape_name} {key}", flush=True)
                found["cases"][key] = measure(shape, case, options.rounds, names, checkpointing)
                for name, value in found["cases"][key]["ratios"].items():
                    print(f"  {name}: {value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f})", flush=True)
                write()


if __name__ == "__main__":
    main()
