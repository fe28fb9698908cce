"""What there is to measure on one GPU beside the loss itself.

    python -m benchmarks.parts --out DIR                     # as much as fits in ten minutes; again for the rest
    python -m benchmarks.parts --out DIR --only "step/1.7B"  # some only; --list names them
    python -m benchmarks.parts --out DIR --table             # the documents' tables

Steps: `step` and `longest` (benchmarks.step), `attention` and `tuning` (benchmarks.attention), `mixtures`
(benchmarks.mixtures), `sanitizer` (NVIDIA's compute-sanitizer on the kernels, where it is installed), `rollouts`
(benchmarks.rollouts), `learning` (benchmarks.curves). As in benchmarks.gpu, whose `compile` and `tests` should have run
before: everything in a process of its own, results added to DIR/gpu.json, nothing measured twice.
`--dry-run` needs a CPU only.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import attention, curves, mixtures, rollouts, step
from benchmarks.cells import Unavailable
from benchmarks.record import of_step, where
from benchmarks.runner import Item, Report, main, run_command

TOOLS = ("memcheck", "racecheck")
PROGRAMS = {
    "attention": """
import torch
from benchmarks.attention import HEADS, backend, layouts, measure
student, teacher = layouts(4, 64, 0, torch.device("cuda"))
measure(backend("triton"), student, teacher, HEADS["cpu"]["4:2"], torch.bfloat16, True)
""",
    "rows": """
import torch
from benchmarks.probe import OBJECTIVES, Chunk, fit
device = torch.device("cuda")
for confident in (False, True):
    chunk = Chunk.of(4, 4112, torch.bfloat16, device, confident)
    for backend in fit(device):
        for beta in OBJECTIVES.values():
            chunk.run(backend, beta)()
torch.cuda.synchronize()
""",
}
"""What the sanitizer looks into: the kernels on a few rows."""


def sanitized(report: Report, tool: str, program: str) -> dict[str, Any]:
    found = shutil.which("compute-sanitizer")
    if found is None:
        raise Unavailable("compute-sanitizer is not installed")
    if report.device.type != "cuda":
        raise Unavailable("there is no CUDA device")
    # Without torch's cache each tensor is an allocation of its own, whose bounds are known.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PROGRAMS[program]]
    status, lines = run_command(command, report.deadline - time.monotonic())
    print("\n".join(f"  {line}" for line in lines[-2:]), flush=True)
    return {"status": status, "tail": lines[-20:], "agree": status == 0}


def _sanitizer() -> Iterator[Item]:
    for program in PROGRAMS:
        for tool in TOOLS:
            yield Item(f"sanitizer/{program} {tool}", 60, lambda r, t=tool, p=program: sanitized(r, t, p))


def _mixtures(device: torch.device) -> Item:
    on_gpu = device.type == "cuda"
    size, dtype = (mixtures.SIZE_ON_GPU, torch.bfloat16) if on_gpu else ((64, 32, 503), torch.float32)
    return Item("mixtures/targets", 40, lambda _: mixtures.measure(device, dtype, size))


def items(device: torch.device) -> list[Item]:
    """The most telling first: a step, one size of attention and its likeliest tilings, the longest rollouts of the
    largest model; last all other tilings."""
    steps, layers, tunings = (list(of(device)) for of in (step.items, attention.items, attention.tuning))
    rest = [_mixtures(device), *_sanitizer(), *step.longest(device), *rollouts.items(device), *curves.items(device)]
    likely = [item for item in tunings if item.name.endswith(" first")]
    largest = [item for item in rest if item.name.startswith("longest/8B")]
    first = [*steps[:1], *layers[:2], *likely, *largest]
    return [*first, *(item for item in (*steps, *layers, *rest, *tunings) if item not in first)]


def tables(data: dict[str, Any]) -> dict[str, str]:
    """The documents' sections, by name, of the steps that there are results of."""
    made = {}
    if cells := of_step(data, "attention"):
        made["attention-gpu"] = f"{attention.table(cells)}\n\n{where(data, ['attention'])}"
    if cells := of_step(data, "step"):
        both = [step.table(cells, of_step(data, "longest")), step.phases_table(cells), where(data, ["step", "longest"])]
        made["step-gpu"] = "\n\n".join(both)
    for cell in of_step(data, "mixtures"):
        on = data["machines"][cell["machine"]]
        made["mixtures-gpu"] = mixtures.table(cell, f"{on['gpu']}, {on['date']}")
    if cells := of_step(data, "rollouts"):
        made["rollouts-gpu"] = f"{rollouts.table(cells)}\n\n{where(data, ['rollouts'])}"
    return made


if __name__ == "__main__":
    sys.exit(main("benchmarks.parts", __doc__, items, tables))
