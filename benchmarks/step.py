"""The whole training step but for its rollouts, way by way: the steps `step` and `longest` of `benchmarks.parts`.

Both contexts, the loss, backward and the optimiser on a batch of eight prompts with a rollout each: Qwen3 shapes,
random weights, layers checkpointed, LoRA (r = 64, the teacher is the model without it) or all of the weights (its own
teacher). On a GPU weights are bfloat16, adapters float32 under autocast, and every way attends by FlashAttention. The
learning rate is 0: the optimiser does all its work, and yet the contenders, who take turns on one model, find the same
weights, so that their losses and gradients must agree.

`longest` looks for the longest rollouts, all eight alike, that still fit in the memory there is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import fused_sdpa
from benchmarks.cells import peer
from benchmarks.measure import peak_bytes
from benchmarks.packing import (
    FULL_SHAPES,
    PROMPTS,
    SCALE,
    Case,
    Contender,
    Draw,
    Shape,
    draw,
    packed,
    padded,
    padded_dense,
    ratio,
    rows_of,
)
from benchmarks.runner import Item, Report, release, synchronize
from opsd.clock import Clock
from opsd.models import is_adapted
from opsd_kernels import lm_head_of

CASE = Case(generations=1, rollout_max=1024)
SHAPES = {
    "cuda": FULL_SHAPES,
    "cpu": {"toy": Shape(hidden=32, layers=2, vocab=503, intermediate=64, heads=(4, 2, 8))},
}
TRAININGS = ("lora", "full")
ORDER = ("1.7B", "4B", "8B", "0.6B", "toy")
ROUNDS = 5
TOLERANCE = {"cuda": 0.05, "cpu": 1e-3}
NAMES = {
    "padded_dense": "padded, dense loss",
    "padded_trl": "padded, TRL's loss",
    "padded_loss": "padded, our loss",
    "packed_two": "packed, two passes",
    "packed_joint": "packed, joint pass",
    "packed_joint_triton": "joint, Triton attention",
}


def contenders(device: torch.device) -> dict[str, Contender]:
    """By the names in `NAMES`, each a step further than the one before."""
    kernel, own = ("varlen", "triton") if device.type == "cuda" else ("sdpa", "eager")
    return {
        "padded_dense": padded_dense,
        "padded_trl": padded(trl),
        "padded_loss": padded(),
        "packed_two": packed("two", kernel),
        "packed_joint": packed("joint", kernel),
        "packed_joint_triton": packed("joint", own),
    }


def trl(model: Any, student: Tensor, teacher: Tensor) -> Tensor:
    function, weight = peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction"), lm_head_of(model).weight
    divergence, _ = function.apply(student, weight, None, teacher, weight.detach(), None, 0.5, 1.0)
    return divergence.mean()


@dataclass
class Training:
    """A model and its optimiser."""

    model: Any
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, shape: Shape, kind: str, device: torch.device) -> Training:
        model = shape.model(device)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            # Random B, too: with B = 0, A would have no gradient to agree on.
            options: dict[str, Any] = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
            model = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", **options))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        return cls(model, torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(self, contender: Contender, data: Draw, clock: Clock) -> tuple[Tensor, Tensor]:
        """The loss, and the norm of the gradient."""
        with fused_sdpa(self.device):
            # Without its cache: what a pass without gradients casts would be kept without its gradient.
            half = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
            with half if self.device.type == "cuda" and is_adapted(self.model) else nullcontext():
                loss = contender(self.model, data, clock)
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                trained = [p for group in self.optimizer.param_groups for p in group["params"]]
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                self.optimizer.step()
                self.clear()
        return loss.detach(), norm

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def bytes(self) -> int:
        """Weights and the optimiser's state."""
        state = [t for one in self.optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*self.model.parameters(), *state))


def measure(training: Training, shape: Shape, report: Report, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Seconds by round, as a whole and by phase, tokens of rollouts per second, peak memory, agreement."""
    device = training.device
    scale = SCALE if device.type == "cpu" else 1
    ways = contenders(device)
    first = draw(CASE, shape.vocab, 0, scale=scale)
    records: dict[str, dict[str, Any]] = {}

    def prepared(name: str) -> int:
        training.step(ways[name], first, Clock(device))  # compiles, and makes the optimiser's state
        return peak_bytes(lambda: training.step(ways[name], first, Clock(device)), device)

    def once(name: str, data: Draw) -> tuple[float, float, float]:
        clock = Clock(device)
        synchronize(device)
        begun = time.perf_counter()
        loss, norm = training.step(ways[name], data, clock)
        synchronize(device)
        seconds, one = time.perf_counter() - begun, records[name]
        one["seconds"].append(seconds)
        one["tokens_per_second"].append(data.tokens / seconds)
        one["losses"].append(float(loss))
        for phase, value in clock.seconds().items():
            one["phases"].setdefault(phase, []).append(value)
        return seconds, float(loss), float(norm)

    for name in names:
        peak = report.attempt(name, lambda n=name: prepared(n))
        if peak is not None:
            records[name] = {"seconds": [], "tokens_per_second": [], "phases": {}, "losses": [], "peak_bytes": peak}
        training.clear()
        release(device)
    order, tokens, worst = list(records), [], 0.0
    for number in range(rounds):
        if number and report.late:
            break
        data = draw(CASE, shape.vocab, 1 + number, scale=scale)
        tokens.append(data.tokens)
        seen = [one for name in order if (one := report.attempt(name, lambda n=name, d=data: once(n, d)))]
        order = [*order[1:], *order[:1]]
        for values in list(zip(*seen, strict=True))[1:]:
            worst = max(worst, (max(values) - min(values)) / abs(values[0]))
    for name, one in records.items():
        if name in report.out:
            continue
        rate, peak = median(one["tokens_per_second"]), one["peak_bytes"] / 2**30
        phases = ", ".join(f"{phase} {1e3 * median(values):.0f}" for phase, values in one["phases"].items())
        print(f"  {name}: {rate:.0f} tokens/s, {peak:.1f} GiB above the weights; ms: {phases}", flush=True)
    return {
        "shape": asdict(shape), "case": asdict(CASE), "prompts": PROMPTS, "tokens": tokens, "rows": rows_of(first),
        "base_bytes": training.bytes(), "contenders": {n: report.out.get(n) or records[n] for n in names},
        "largest_difference": worst, "agree": worst <= TOLERANCE[device.type],
    }  # fmt: skip


def items(device: torch.device) -> Iterator[Item]:
    shapes = SHAPES[device.type]
    for kind in TRAININGS:
        for name in (name for name in ORDER if name in shapes):

            def run(report: Report, name: str = name, kind: str = kind) -> dict[str, Any]:
                training = Training.of(shapes[name], kind, device)
                found = measure(training, shapes[name], report, report.rounds or ROUNDS, report.wanted(list(NAMES)))
                return {"model": name, "training": kind, **found}

            yield Item(f"step/{name} {kind}", 240 if name == "8B" else 150, run, patience=120)


# The longest rollout.


def even(length: int, vocab: int, scale: int) -> Draw:
    """Prompts of 300 tokens, solutions of 2000, both divided by `scale`, and rollouts of `length`."""
    random = torch.Generator().manual_seed(length)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, vocab, (n,), generator=random).tolist()

    students = [tokens(300 // scale) for _ in range(PROMPTS)]
    teachers = [[*student[:-2], *tokens(2000 // scale)] for student in students]
    return Draw(students, teachers, [[tokens(length)] for _ in students])


@dataclass
class Search:
    """`fits` is known to fit, `fails` not to; None: nothing tried failed."""

    fits: int = 0
    fails: int | None = None
    stopped: bool = False  # for want of time


def search(
    attempt: Callable[[int], int | None],
    capacity: int,
    *,
    start: int = 256,
    most: int = 1 << 17,
    resolution: float = 0.04,
    seconds: float = float("inf"),
) -> Search:
    """The longest length that `attempt` makes within `capacity` bytes.

    Memory grows about evenly with the length, so that two attempts tell where the end should be; what they tell is
    kept within doubling and bisection.

    Args:
        attempt: returns the bytes in use at its peak, or None if it ran out of memory.
        resolution: stop when `fits` and `fails` are so close, relative to `fails`.
        seconds: no attempt is made that should take longer than what is left of them; time grows at most as the square
            of the length.
    """
    found, length, known = Search(), start, []
    deadline, last = time.monotonic() + seconds, (start, 0.0)
    while True:
        if time.monotonic() + last[1] * max(1.0, length / last[0]) ** 2 > deadline:
            found.stopped = True
            return found
        begun = time.monotonic()
        used = attempt(length)
        last = (length, time.monotonic() - begun)
        print(f"    {length}: {'out of memory' if used is None else f'{used / 2**30:.3g} GiB'}", flush=True)
        if used is None:
            found.fails = length
        else:
            found.fits = length
            known.append((length, used))
        if found.fits >= most or (found.fails and found.fails - found.fits <= max(1, resolution * found.fails)):
            return found
        guess: float = 2 * found.fits if found.fails is None else (found.fits + found.fails) / 2
        if len(known) > 1 and known[-1][1] > known[-2][1]:
            (a, used_a), (b, used_b) = known[-2:]
            told = b + (0.98 * capacity - used_b) * (b - a) / (used_b - used_a)
            guess = told if told < (found.fails or math.inf) else guess
        if found.fails is None:
            length = int(min(max(guess, 1.125 * found.fits), 8 * found.fits, most))
        else:
            edge = max(1.0, 0.5 * resolution * found.fails)  # so close to either end that the next attempt may end it
            length = int(min(max(guess, found.fits + edge), found.fails - edge))


def longest(device: torch.device) -> Iterator[Item]:
    """Within 24 GiB, and what the largest model does with all the memory there is."""
    on_gpu = [("4B", "24 GiB"), ("1.7B", "24 GiB"), ("8B", "all memory")]
    wanted = on_gpu if device.type == "cuda" else [("toy", "16 MiB")]
    for model, memory in wanted:
        for name in NAMES:
            if name == "packed_joint_triton" or (memory == "all memory" and not name.startswith("packed")):
                continue

            def run(report: Report, model: str = model, memory: str = memory, name: str = name) -> dict[str, Any]:
                return longest_of(report, model, memory, name)

            yield Item(f"longest/{model} lora {memory} {name}", 150, run)


def longest_of(report: Report, model: str, memory: str, name: str) -> dict[str, Any]:
    device = report.device
    shape, on_gpu = SHAPES[device.type][model], device.type == "cuda"
    amount, _, unit = memory.partition(" ")
    capacity = torch.cuda.mem_get_info()[1] if amount == "all" else int(amount) << {"GiB": 30, "MiB": 20}[unit]
    training, way = Training.of(shape, "lora", device), contenders(device)[name]
    if on_gpu:  # the process is this search's own
        torch.cuda.set_per_process_memory_fraction(capacity / torch.cuda.mem_get_info()[1])

    def attempt(length: int) -> int | None:
        data, used, weights = even(length, shape.vocab, 1 if on_gpu else SCALE), None, training.bytes()
        try:
            if on_gpu:
                weights = torch.cuda.memory_allocated()
            used = weights + peak_bytes(lambda: training.step(way, data, Clock(device)), device)
        except torch.OutOfMemoryError:
            pass
        training.clear()
        release(device)
        return None if used is None or used > capacity else used

    start, resolution = (256, 0.04) if on_gpu else (8, 0.2)
    left = report.deadline - time.monotonic()
    found = search(attempt, capacity, start=start, resolution=resolution, seconds=left)
    about = {"model": model, "training": "lora", "contender": name, "capacity": capacity, "prompts": PROMPTS}
    return {**about, **asdict(found)}


# The tables.


def table(steps: list[dict[str, Any]], longest: list[dict[str, Any]]) -> str:
    """By model and training: tokens per second, with the gain over the way before it, peak memory, the longest rollout
    that fits; in Markdown."""
    names = [name for name in NAMES if any("seconds" in cell["contenders"].get(name, {}) for cell in steps)]
    lines = ["| model | | " + " | ".join(NAMES[name] for name in names) + " |", "|---|---|" + "---|" * len(names)]
    for cell in steps:
        ways = {name: one for name, one in cell["contenders"].items() if "seconds" in one}

        def speed(name: str, before: str | None, ways: dict[str, Any] = ways) -> str:
            if name not in ways:
                return "–"
            rate = f"{median(ways[name]['tokens_per_second']):,.0f}"
            return rate if before is None else f"{rate} ({ratio(ways, before, name)['median']:.2f}×)"

        def before(name: str, ways: dict[str, Any] = ways) -> str | None:
            return next((other for other in reversed(names[: names.index(name)]) if other in ways), None)

        start = f"| {cell['model']}, {cell['training']} | "
        lines.append(start + "tokens/s | " + " | ".join(speed(name, before(name)) for name in names) + " |")
        base = cell["base_bytes"]
        peaks = [f"{(base + ways[n]['peak_bytes']) / 2**30:.1f}" if n in ways else "–" for n in names]
        lines.append(start + "peak, GiB | " + " | ".join(peaks) + " |")
    searches: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in longest:
        key = (cell["model"], cell["training"], cell["capacity"])
        searches.setdefault(key, {})[cell["contender"]] = cell
    for (model, kind, capacity), found in searches.items():
        fits = [f"{found[n]['fits']:,}" + " or more" * found[n]["stopped"] if n in found else "–" for n in names]
        lines.append(f"| {model}, {kind} | longest in {capacity / 2**30:.0f} GiB | " + " | ".join(fits) + " |")
    return "\n".join(lines)


def phases_table(steps: list[dict[str, Any]]) -> str:
    """Milliseconds by phase, in Markdown; medians."""
    order = ("teacher", "student", "score", "loss", "backward", "optimizer")
    lines = ["| model | way | " + " | ".join(order) + " | whole |", "|---|---|" + "---|" * (len(order) + 1)]
    for cell in steps:
        for name, one in cell["contenders"].items():
            if "seconds" not in one:
                continue
            found = [one["phases"].get(phase) for phase in order] + [one["seconds"]]
            values = [f"{1e3 * median(seconds):,.0f}" if seconds else "–" for seconds in found]
            lines.append(f"| {cell['model']}, {cell['training']} | {NAMES[name]} | " + " | ".join(values) + " |")
    return "\n".join(lines)
