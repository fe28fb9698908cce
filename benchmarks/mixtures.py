"""Divergences to mixed targets beside plain OPSD, a dense implementation and their own bare products.

`python -m benchmarks.mixtures` measures forward and backward on a CPU with a frozen head, contenders taking turns, and
writes results/mixtures-cpu.json; `--table` makes the README's table from the file. On a GPU, benchmarks.parts does it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.measure import peak_bytes, seconds_of
from benchmarks.record import write_json
from benchmarks.report import replace_section
from opsd_kernels import Stream, Target, backends, divergence, native, workspace
from opsd_kernels.gemm import Products

DATA = Path(__file__).parent / "results" / "mixtures-cpu.json"
CPU = torch.device("cpu")
SIZE = (1024, 512, 32768)  # tokens, hidden size, vocabulary
SIZE_ON_GPU = (4096, 2048, 151936)
ROUNDS = 7


def targets(teacher: Stream, other: Stream, base: Stream) -> dict[str, tuple[Target, float, int]]:
    """Target, beta and the number of forward products with the head, the student's included."""
    purified = Target(linear=[(1, base)], residual=[(1, teacher), (-1, other)], tanh=10.0, centre=True)
    ar_opd = Target(linear=[(1, other)], residual=[(1, teacher), (-1, other)], clip=5.0, scale=0.6)
    return {"OPSD": (Target(linear=[(1, teacher)]), 0.5, 2), "Purified": (purified, 0.5, 3), "AR-OPD": (ar_opd, 0.0, 3)}


def dense(student: Stream, target: Target, beta: float) -> Tensor:
    """The same losses with all logits in memory."""

    def log_p(stream: Stream) -> Tensor:
        return (stream.hidden @ stream.weight.t()).float().log_softmax(-1)

    residual = student.hidden.new_zeros(())
    for b, stream in target.residual:
        residual = residual + b * log_p(stream)
    if target.centre:
        residual = residual - residual.mean(-1, keepdim=True)
    if target.tanh is not None:
        residual = target.tanh * torch.tanh(residual / target.tanh)
    elif target.clip is not None:
        residual = residual.clamp(-target.clip, target.clip)
    linear = student.hidden.new_zeros(())
    for a, stream in target.linear:
        linear = linear + a * log_p(stream)
    log_t = (linear + target.scale * residual).log_softmax(-1)
    log_s = log_p(student)
    if beta == 0.0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0))
    return 0.5 * (log_s.exp() * (log_s - log_m)).sum(-1) + 0.5 * (log_t.exp() * (log_t - log_m)).sum(-1)


def bare_products(student: Tensor, weight: Tensor, count: int) -> Callable[[], None]:
    """`count` products with the head and the one of dX, by torch and by the project's own, whichever takes less."""
    single = torch.float32
    logits = torch.empty(student.shape[0], weight.shape[0], device=student.device)
    dx = torch.empty(student.shape, device=student.device)
    dz = logits if student.dtype == single else torch.randn(logits.shape, device=student.device).to(student.dtype)
    backend = "native" if student.device.type == "cpu" else "torch"
    own = Products(backend, student.device, student.dtype, workspace.budget_bytes(student.device, None))

    def run() -> None:
        for _ in range(count):
            own.project(logits, student, weight, None)
        own.back_project(dx, dz, weight)

    return run


def measure(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> dict[str, Any]:
    tokens, hidden, vocab = size
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    weight = (normal(vocab, hidden) / hidden**0.5 * 4).to(dtype)
    base = normal(tokens, hidden)
    rows = [(base + 0.1 * normal(tokens, hidden)).to(dtype) for _ in range(4)]
    student = Stream(rows[0].requires_grad_(), weight)
    found: dict[str, Any] = {}
    for name, (target, beta, count) in targets(*(Stream(r, weight) for r in rows[1:])).items():

        def fused(target: Target = target, beta: float = beta) -> None:
            student.hidden.grad = None
            divergence(student, target, beta=beta)[0].mean().backward()

        def in_full(target: Target = target, beta: float = beta) -> None:
            student.hidden.grad = None
            dense(student, target, beta).mean().backward()

        bare = bare_products(student.hidden.detach(), weight, count)
        contenders: dict[str, Callable[[], None]] = {"fused": fused, "dense": in_full, "products": bare}
        if device.type == "cuda":  # elsewhere torch mixes anyway
            contenders["torch_mixes"] = mock.patch.object(backends, "mix_rows", new=mock.Mock(return_value=None))(fused)
        gradients, peaks = {}, {}
        for key in contenders.keys() - {"products"}:
            workspace.release()
            peaks[key] = peak_bytes(contenders[key], device)
            assert student.hidden.grad is not None
            gradients[key] = student.hidden.grad.clone()
        bare()
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for _ in range(ROUNDS):
            for key, run in contenders.items():
                times[key].append(seconds_of(run, device))

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
            return median(x / y for x, y in zip(times[a], times[b], strict=True))

        found[name] = {
            "products": count + 1,
            "gradient_difference": float((gradients["fused"] - gradients["dense"]).norm() / gradients["dense"].norm()),
            "peak_bytes": peaks,
            "seconds": times,
            **({"torch_over_fused": ratio("torch_mixes", "fused")} if "torch_mixes" in times else {}),
            "over_products": ratio("fused", "products"),
            "dense_over_fused": ratio("dense", "fused"),
        }
        print(name, {k: v for k, v in found[name].items() if k != "seconds"}, flush=True)
    own = {"own_products": native.outruns_torch()[0]} if device.type == "cpu" else {}
    return {"machine": machine(device), "size": size, "dtype": str(dtype)[6:], **own, "targets": found}


def table(stored: dict[str, Any], on: str) -> str:
    """In Markdown; `on` is the machine."""
    tokens, hidden, vocab = stored["size"]
    by_torch = "torch_over_fused" in next(iter(stored["targets"].values()))
    more = (" target's rows by torch over fused, time |", "---|") if by_torch else ("", "")
    lines = [
        f"{tokens:,} tokens, hidden size {hidden:,}, vocabulary {vocab:,}, {stored['dtype']}, frozen head, forward and "
        f"backward; {on}:",
        "",
        "| target | products | time over its own bare products | dense over fused, time | peak, fused | peak, dense |"
        + more[0],
        f"|---|---|---|---|---|---|{more[1]}",
    ]
    for name, record in stored["targets"].items():
        fused, dense_peak = (record["peak_bytes"][key] / 2**20 for key in ("fused", "dense"))
        lines.append(
            f"| {name} | {record['products']} | {record['over_products']:.2f} | {record['dense_over_fused']:.2f} | "
            f"{fused:,.0f} MiB | {dense_peak:,.0f} MiB |" + (f" {record['torch_over_fused']:.2f} |" if by_torch else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="make the document's table from the file, measure nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        write_json(DATA, measure(CPU, torch.float32, SIZE))
    stored = json.loads(DATA.read_text(encoding="utf-8"))
    on = stored["machine"]
    replace_section("mixtures", table(stored, f"{on['threads']} thread(s) of {on['processor']}, {on['date']}"))


if __name__ == "__main__":
    main()
