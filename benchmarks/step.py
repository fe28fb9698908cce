"""The whole training step but for its rollouts, way by way: the parts `step` and `longest` of `benchmarks.parts`.

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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import fused_sdpa
from benchmarks.cells import Unavailable, peer
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
from benchmarks.record import Record, release
from opsd.clock import Clock
from opsd.models import is_adapted
from opsd_kernels import lm_head_of

CASE = Case(generations=1, rollout_max=1024)
SHAPES = {
    "cuda": FULL_SHAPES,
    "cpu": {"toy": Shape(hidden=32, layers=2, vocab=503, intermediate=64, heads=(4, 2, 8))},
}
TRAININGS = ("lora", "full")
ORDER = ("4B", "1.7B", "8B", "0.6B", "toy")
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


def measure(
    training: Training, shape: Shape, rounds: int, names: list[str], deadline: float = float("inf")
) -> dict[str, Any]:
    """Seconds by round, as a whole and by phase, tokens of rollouts per second, peak memory, agreement."""
    device = training.device
    scale = SCALE if device.type == "cpu" else 1
    ways, wait = contenders(device), torch.cuda.synchronize if device.type == "cuda" else lambda: None
    first = draw(CASE, shape.vocab, 0, scale=scale)
    records: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        reason = ""
        try:
            training.step(ways[name], first, Clock(device))  # compiles, and makes the optimiser's state
            peak = peak_bytes(lambda n=name: training.step(ways[n], first, Clock(device)), device)
            records[name] = {"seconds": [], "tokens_per_second": [], "phases": {}, "losses": [], "peak_bytes": peak}
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Unavailable as error:
            reason = str(error)
        except Exception as error:  # the other ways are worth having
            reason = f"failed: {type(error).__name__}: {str(error)[:300]}"
        if reason:
            left_out[name] = reason
            print(f"  {name}: left out: {reason}", flush=True)
        training.clear()
        release(device)
    order, tokens, worst = list(records), [], 0.0
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            left_out["rounds"] = f"{rounds - number} of {rounds}: the time is used up"
            break
        data = draw(CASE, shape.vocab, 1 + number, scale=scale)
        tokens.append(data.tokens)
        seen = []
        for name in order:
            clock = Clock(device)
            wait()
            begun = time.perf_counter()
            loss, norm = training.step(ways[name], data, clock)
            wait()
            seconds, one = time.perf_counter() - begun, records[name]
            one["seconds"].append(seconds)
            one["tokens_per_second"].append(data.tokens / seconds)
            one["losses"].append(float(loss))
            for phase, value in clock.seconds().items():
                one["phases"].setdefault(phase, []).append(value)
            seen.append((float(loss), float(norm)))
        order = [*order[1:], *order[:1]]
        for values in zip(*seen, strict=True):
            worst = max(worst, (max(values) - min(values)) / abs(values[0]))
    for name, one in records.items():
        rate, peak = median(one["tokens_per_second"]), one["peak_bytes"] / 2**30
        phases = ", ".join(f"{phase} {1e3 * median(values):.0f}" for phase, values in one["phases"].items())
        print(f"  {name}: {rate:.0f} tokens/s, {peak:.1f} GiB above the weights; ms: {phases}", flush=True)
    return {
        "shape": asdict(shape), "case": asdict(CASE), "prompts": PROMPTS, "tokens": tokens, "rows": rows_of(first),
        "base_bytes": training.bytes(), "contenders": records, "largest_difference": worst,
        "agree": worst <= TOLERANCE[device.type], "left_out": left_out,
    }  # fmt: skip


def run(
    record: Record,
    *,
    models: list[str] | None = None,
    trainings: list[str] | None = None,
    rounds: int | None = None,
    only: list[str] | None = None,
) -> None:
    shapes = SHAPES[record.device.type]
    names = [name for name in NAMES if not only or name in only]

    def cell(name: str, kind: str) -> dict[str, Any]:
        training = Training.of(shapes[name], kind, record.device)
        found = measure(training, shapes[name], rounds or ROUNDS, names, record.deadline)
        return {"model": name, "training": kind, **found}

    for kind in trainings or TRAININGS:
        for name in models or [n for n in ORDER if n in shapes]:
            record.measure(f"{name} {kind}", lambda n=name, k=kind: cell(n, k))


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


def longest(
    record: Record,
    *,
    models: list[str] | None = None,
    trainings: list[str] | None = None,
    memory: list[float] | None = None,
    only: list[str] | None = None,
) -> None:
    """Args:
    memory: GiB that may be used, several for several searches; 0: all there is.
    """
    device, shapes = record.device, SHAPES[record.device.type]
    on_gpu = device.type == "cuda"
    ways = contenders(device)
    names = [name for name in NAMES if name != "packed_joint_triton" and (not only or name in only)]

    def cell(training: Training, name: str, model: str, kind: str, capacity: int) -> dict[str, Any]:
        shape = shapes[model]
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(capacity / torch.cuda.mem_get_info()[1])

        def attempt(length: int) -> int | None:
            data, used, weights = even(length, shape.vocab, 1 if on_gpu else SCALE), None, training.bytes()
            try:
                if on_gpu:
                    weights = torch.cuda.memory_allocated()
                used = weights + peak_bytes(lambda: training.step(ways[name], data, Clock(device)), device)
            except torch.OutOfMemoryError:
                pass
            training.clear()
            release(device)
            return None if used is None or used > capacity else used

        start, resolution = (256, 0.04) if on_gpu else (8, 0.2)
        try:
            found = search(
                attempt, capacity, start=start, resolution=resolution, seconds=record.deadline - time.monotonic()
            )
        finally:
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)
        left_out = {"the rest of the search": "the time is used up"} if found.stopped else {}
        about = {"model": model, "training": kind, "contender": name, "capacity": capacity, "prompts": PROMPTS}
        return {**about, **asdict(found), "left_out": left_out}

    for kind in trainings or ["lora"]:
        for model in models or (["4B", "1.7B"] if on_gpu else ["toy"]):
            made: list[Training] = []  # for all contenders, when the first one comes to it

            def begun(model: str = model, kind: str = kind, made: list[Training] = made) -> Training:
                if not made:
                    made.append(Training.of(shapes[model], kind, device))
                return made[0]

            for gib in memory or ([24.0] if on_gpu else [1 / 64]):
                capacity = int(gib * 2**30) if gib else torch.cuda.mem_get_info()[1]
                label = f"{gib:g} GiB" if gib else "all memory"
                for name in names:
                    record.measure(
                        f"{model} {kind} {label} {name}",
                        lambda n=name, m=model, k=kind, c=capacity, b=begun: cell(b(), n, m, k, c),
                    )
            made.clear()
            release(device)


# The tables.


def table(steps: dict[str, Any], longest: dict[str, Any] | None = None) -> str:
    """By model and training: tokens per second, with the gain over the way before it, peak memory, the longest rollout
    that fits; in Markdown."""
    names = [name for name in NAMES if any(name in cell["contenders"] for cell in steps["cells"])]
    lines = ["| model | | " + " | ".join(NAMES[name] for name in names) + " |", "|---|---|" + "---|" * len(names)]
    for cell in steps["cells"]:
        ways = cell["contenders"]

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
    for cell in (longest or {"cells": []})["cells"]:
        key = (cell["model"], cell["training"], cell["capacity"])
        searches.setdefault(key, {})[cell["contender"]] = cell
    for (model, kind, capacity), found in searches.items():
        fits = [f"{found[n]['fits']:,}" + " or more" * found[n]["stopped"] if n in found else "–" for n in names]
        lines.append(f"| {model}, {kind} | longest in {capacity / 2**30:.0f} GiB | " + " | ".join(fits) + " |")
    return "\n".join(lines)


def phases_table(steps: dict[str, Any]) -> str:
    """Milliseconds by phase, in Markdown; medians."""
    order = ("teacher", "student", "score", "loss", "backward", "optimizer")
    lines = ["| model | way | " + " | ".join(order) + " | whole |", "|---|---|" + "---|" * (len(order) + 1)]
    for cell in steps["cells"]:
        for name, one in cell["contenders"].items():
            found = [one["phases"].get(phase) for phase in order] + [one["seconds"]]
            values = [f"{1e3 * median(seconds):,.0f}" if seconds else "–" for seconds in found]
            lines.append(f"| {cell['model']}, {cell['training']} | {NAMES[name]} | " + " | ".join(values) + " |")
    return "\n".join(lines)
