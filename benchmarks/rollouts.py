"""Tokens per second of the ways to write rollouts: the step `rollouts` of `benchmarks.parts`.

A batch of prompts of 300 tokens ± 50 %, Qwen3 shapes, random weights, sampling at temperature 1 and no end token, so
that every rollout has the same length. Each way writes them twice; the first time, with whatever it compiles, is
reported apart.

`generate` of transformers runs with a cache that grows ("dynamic") or with one of fixed size ("static", and "static,
compiled", which transformers does by itself on a GPU), "continuous" is its `generate_batch`; "opsd" is
`opsd.engines.GenerateEngine`, which is on a dynamic cache and keeps the sampler's log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.cells import Unavailable
from benchmarks.measure import peak_bytes
from benchmarks.packing import Shape
from benchmarks.runner import Item, Report, synchronize
from benchmarks.step import SHAPES
from opsd.engines import GenerateEngine
from opsd.options import ModelConfig
from opsd.rollouts import Sampling

Write = Callable[[Any, list[list[int]], int], list[int]]
"""(model, prompts, new tokens) → how many tokens each rollout has."""


def options(new: int, **more: Any) -> Any:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **sampling, **more)


def by_generate(**more: Any) -> Write:
    def write(model: Any, prompts: list[list[int]], new: int) -> list[int]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=options(new, **more))
        return [out.shape[1] - width] * len(prompts)

    return write


def compiled(model: Any, prompts: list[list[int]], new: int) -> list[int]:
    if model.device.type != "cuda":
        raise Unavailable("transformers compiles on an accelerator only")
    return by_generate(cache_implementation="static")(model, prompts, new)


def continuous(model: Any, prompts: list[list[int]], new: int) -> list[int]:
    if not hasattr(model, "generate_batch"):
        raise Unavailable("this version of transformers has no generate_batch")
    from transformers import ContinuousBatchingConfig

    # By itself it takes nearly all memory for its cache, which on a CPU is a minute of clearing it.
    small = {} if model.device.type == "cuda" else {"num_blocks": 16, "max_batch_tokens": 64}
    found = model.generate_batch(
        prompts,
        generation_config=options(new, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(**small),
        progress_bar=False,
    )
    return [len(one.generated_tokens) for one in found.values()]


def ours(model: Any, prompts: list[list[int]], new: int) -> list[int]:
    sampling = Sampling(max_new_tokens=new)
    seeds = list(range(len(prompts)))
    found = GenerateEngine([], 0, ModelConfig()).write(model, prompts, sampling, seeds, len(prompts))
    return [len(one.ids) for one in found]


WAYS: dict[str, Write] = {
    "opsd": ours,
    "dynamic": by_generate(),
    "static": by_generate(cache_implementation="static", disable_compile=True),
    "static, compiled": compiled,
    "continuous": continuous,
}


def prompts_of(count: int, vocab: int, scale: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(150 // scale, 450 // scale + 1, (count,), generator=random).tolist()
    return [torch.randint(3, vocab, (n,), generator=random).tolist() for n in lengths]


def measure(shape: Shape, device: torch.device, way: str, batch: int) -> dict[str, Any]:
    from transformers import GenerationConfig

    on_gpu = device.type == "cuda"
    new = 512 if on_gpu else 4
    model = shape.model(device).eval()
    model.generation_config = GenerationConfig()  # no end token
    prompts = prompts_of(batch, shape.vocab, 1 if on_gpu else 32)
    seconds: list[float] = []

    def write() -> None:
        begun = time.perf_counter()
        lengths = WAYS[way](model, prompts, new)  # its results are on the host when it returns
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
        if lengths != [new] * batch:
            raise RuntimeError(f"{len(lengths)} rollouts of {sorted(set(lengths))} tokens instead of {batch} of {new}")

    torch.manual_seed(0)
    write()
    peak = peak_bytes(write, device) if on_gpu else None
    if peak is None:  # the profiler that sees a CPU's allocations would be what is timed
        write()
    rate = batch * new / seconds[-1]
    print(f"  {rate:.0f} tokens/s, the first time {seconds[0]:.1f} s", flush=True)
    return {
        "shape": asdict(shape), "way": way, "batch": batch, "new_tokens": new, "first_seconds": seconds[0],
        "seconds": seconds[-1], "tokens_per_second": rate, "peak_bytes": peak,
    }  # fmt: skip


def items(device: torch.device) -> Iterator[Item]:
    on_gpu = device.type == "cuda"
    for name in ("1.7B", "4B") if on_gpu else ("toy",):
        for batch in (32, 8) if on_gpu else (2,):
            for way in WAYS:

                def run(report: Report, name: str = name, batch: int = batch, way: str = way) -> dict[str, Any]:
                    return {"model": name, **measure(SHAPES[device.type][name], report.device, way, batch)}

                yield Item(f"rollouts/{name} batch {batch} {way}", 150 if "compiled" in way else 75, run)


def table(cells: list[dict[str, Any]]) -> str:
    """Tokens per second, in Markdown."""
    found = {(cell["model"], cell["batch"], cell["way"]): cell for cell in cells}
    ways = [way for way in WAYS if any(key[2] == way for key in found)]
    lines = ["| model | batch | " + " | ".join(ways) + " |", "|---|---|" + "---|" * len(ways)]
    for model, batch in dict.fromkeys(key[:2] for key in found):
        cells = [found.get((model, batch, way)) for way in ways]
        rates = [f"{cell['tokens_per_second']:,.0f}" if cell else "–" for cell in cells]
        lines.append(f"| {model} | {batch} | " + " | ".join(rates) + " |")
    return "\n".join(lines)
