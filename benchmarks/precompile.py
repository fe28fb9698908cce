"""Compiles the project's kernels for a GPU, all cores at once, before anything waits for them: they are then in the
caches on disk, Triton's and that of the backends that are libraries.

What is compiled is recorded, not listed: the calls that the GPU tests and the benchmarks make are made on the CPU, on
few rows, under a driver that only names the target, and every launch is taken down instead of run. Each kernel is then
compiled in a process of its own, so that one which fails, or takes its compiler down, costs no other.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import opsd_kernels
from benchmarks.cells import PROJECT, Unavailable
from benchmarks.runner import Report, described, fail_if_told
from opsd_kernels import Stream, Target, backends, divergence, native
from opsd_kernels.objective import LogitTransform, Objective
from opsd_kernels.packing import pack_dual_context, triton_attention
from opsd_kernels.rows import Column, triton_backend

SECONDS = 120.0  # after which one compilation is given up
PROCESSORS = 132  # of the device that is meant; only whether rows are split depends on it
WIDTHS = (4099, 4096)  # of logits: rows that begin anywhere, and at multiples of 16 bytes
# Kernels are compiled anew where a stride is 1 or a multiple of 16: these stand for the tests' numbers of rows, under
# which rows are split, and for those with a program each.
SPLIT, WHOLE = (1, 7, 32), 300
PLAIN: list[dict[str, Any]] = [{}, {"top_k": 64}, {"top_k": 64, "tail_bucket": True}]
OPTIONS: list[dict[str, Any]] = [
    *PLAIN[:2],
    {"entry_clip": 0.002},
    {"softcap": 30.0, "entry_clip": 0.002},
    {"logit_scale": 1.2, "teacher_logit_scale": 0.9},
    {"top_k": 64, "tail_bucket": True, "entry_clip": 0.01},
    {"top_k": 64, "tail_bucket": True, "top_k_from": "student", "softcap": 30.0},
]


@dataclass(frozen=True)
class Launch:
    """What a compiler needs to know of a kernel's launch."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    target: Any

    @property
    def choices(self) -> str:
        """Its compile-time arguments, but for absent tensors and strides."""
        names = self.kernel.arg_names
        chosen = {names[path[0]]: value for path, value in self.constants.items()}
        return ", ".join(f"{name} {value}" for name, value in chosen.items() if name.isupper())

    def compile(self) -> dict[str, Any]:
        import triton

        source = triton.compiler.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return {"shared": triton.compile(source, target=self.target, options=self.options.__dict__).metadata.shared}


@dataclass(frozen=True)
class Library:
    """A backend that builds itself when it is first asked for, which takes up to a minute."""

    backend: str
    device: torch.device
    choices = ""

    @property
    def name(self) -> str:
        return f"library {self.backend}"

    def compile(self) -> dict[str, Any]:
        reason = backends.unfit(self.backend, self.device, torch.float32, check=False)
        return {"skipped": reason} if reason else {}


class _Driver:
    """As far as a launch asks before it compiles."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[dict[Any, Launch]]:
    """While open, Triton launches from CPU tensors are those of a device of this compute capability, and the values of
    the dictionary, each compilation once, instead of being compiled and run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    found: dict[Any, Launch] = {}
    counted: Counter[str] = Counter()

    def record(kernel: Any, key: Any, signature: Any, _: Any, constants: Any, options: Any, attributes: Any, *__: Any):
        if (kernel, key) not in found:
            name = kernel.fn.__name__
            counted[name] += 1
            found[kernel, key] = Launch(
                f"{name} {counted[name]}", kernel, signature, constants, attributes, options, target
            )

    def configuration(tokens: int, vocab: int, _: torch.device) -> triton_backend.Configuration:
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
            return of_device(tokens, vocab, torch.device("cuda"))

    def tilings(head_size: int, dtype: torch.dtype, _: Any, *, capped: bool = False) -> triton_attention.Tilings:
        return of_capability(head_size, dtype, capability, capped=capped)

    properties = mock.Mock(multi_processor_count=PROCESSORS)
    of_device, of_capability = triton_backend.configuration, triton_attention.tilings
    there = mock.Mock(return_value=(True, ""))
    before = getattr(driver, "_active", None)
    driver.set_active(_Driver(target))  # type: ignore[arg-type]
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", record),
            mock.patch.object(triton_backend, "configuration", configuration),
            mock.patch.object(triton_backend, "capability_of", mock.Mock(return_value=capability[0])),
            mock.patch.object(triton_attention, "tilings", tilings),
            mock.patch.object(triton_attention, "available", there),
            mock.patch.object(backends, "unfit", mock.Mock(return_value="")),
            mock.patch.object(backends, "mix_error", mock.Mock(return_value=0.0)),
        ):
            yield found
    finally:
        driver.set_active(before)  # type: ignore[arg-type]


def launches(capability: tuple[int, int]) -> tuple[list[Launch], dict[str, dict[str, str]]]:
    """All of them, the row pass's of the benchmarks first, and which calls could not be made: {"failed": why} each."""
    failed = {}
    with recording(capability) as found:
        for make in (_losses, _mixtures, _rows, _self_check, _logprobs, _attention):
            try:
                make()
            except Exception as error:  # the others' kernels are worth having
                failed[f"calls of {make.__name__}"] = {"failed": described(error)}
    return list(found.values()), failed


def _losses() -> None:
    """What `jsd_loss` runs in the benchmarks. Its chunks begin anywhere in the table, aligned or not."""
    vocab, hidden = WIDTHS[1], 8
    for beta, dtype in itertools.product((0.5, 0.0, 1.0), (torch.bfloat16, torch.float32)):
        weight = torch.zeros(vocab, hidden, dtype=dtype)
        x = torch.zeros(2 * WHOLE + 1, hidden, dtype=dtype, requires_grad=True)
        budget = WHOLE * (vocab * (8 + 2 * (dtype == torch.bfloat16)) + 64 * hidden)
        for options in ({}, {"return_stats": True, "target_ids": torch.zeros(len(x), dtype=torch.int64)}):
            opsd_kernels.jsd_loss(x, x.detach(), weight, beta=beta, backend="triton", workspace_bytes=budget, **options)


def _mixtures() -> None:
    """What tests/gpu/test_streams_gpu.py runs, and the benchmark of mixtures."""
    for dtype, vocab, tokens in itertools.product((torch.float32, torch.bfloat16), WIDTHS, (40, WHOLE)):
        weight = torch.zeros(vocab, 8, dtype=dtype)
        student, teacher, other, base = (Stream(torch.zeros(tokens, 8, dtype=dtype), weight) for _ in range(4))
        student.hidden.requires_grad_()
        residual: dict[str, Any] = {"linear": [(1, base)], "residual": [(1, teacher), (-1, other)]}
        for target in (
            Target(linear=[(1, teacher)]),
            Target(linear=[(1.8, teacher), (-0.8, other)]),
            Target(**residual, clip=0.8, scale=0.6),
            Target(**{**residual, "linear": [(1, other)]}, clip=5.0, scale=0.6),
            Target(**residual, tanh=1.5, centre=True),
            Target(arithmetic=[(0.3, teacher), (0.7, other)]),
        ):
            for beta in (0.0, 0.5, 1.0):
                divergence(student, target, beta=beta, backend="triton")


def _rows() -> None:
    """What tests/gpu/test_triton_gpu.py runs."""
    unaligned = WIDTHS[0]

    def launch(beta: float, tokens: int, vocab: int, options: dict[str, Any], *dtypes: Any, scale: Any = None) -> None:
        student, teacher, table = (
            torch.zeros(tokens, vocab),
            torch.zeros(tokens, vocab),
            torch.zeros(len(Column), tokens),
        )
        targets, objective = torch.zeros(tokens, dtype=torch.int64), Objective.checked(beta=beta, **options)
        for dtype in dtypes:
            backends.divergence_rows(
                triton_backend, student, teacher, objective, targets=targets, table=table,
                dz=torch.zeros_like(student, dtype=dtype), row_scale=scale,
            )  # fmt: skip

    single, halves = torch.float32, (torch.bfloat16, torch.float16)
    for beta in (0.5, 0.0, 1.0):
        for vocab, tokens, options in itertools.product(WIDTHS, (3, WHOLE), PLAIN):
            launch(beta, tokens, vocab, options, single, *halves)
        for vocab, options in itertools.product(WIDTHS, PLAIN):
            launch(beta, 32, vocab, options, single)
        for tokens, options in itertools.product((*SPLIT, WHOLE), OPTIONS):
            launch(beta, tokens, unaligned, options, single)
        launch(beta, 5, unaligned, {}, single, scale=torch.ones(5))


def _self_check() -> None:
    for rows, objective in itertools.product(backends.problems(PROCESSORS), backends.CHECKED):
        rows.row_pass("triton", torch.device("cpu"), objective)


def _logprobs() -> None:
    targets, table = torch.zeros(40, dtype=torch.int64), torch.zeros(2, 40)
    for vocab, transform in itertools.product(WIDTHS, (LogitTransform(), LogitTransform(1.2, 20.0))):
        z = torch.zeros(40, vocab)
        dz = torch.zeros_like(z)
        triton_backend.logprob_rows(z, targets, transform, 0.8, table=table, dz=dz, row_scale=None)


def _attention() -> None:
    """What tests/gpu/test_triton_attention_gpu.py runs, and the benchmarks of attention."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    layout = pack_dual_context([[3] * 9], [[3] * 9], [[[3] * 5, [3] * 4]]).student.layout
    both = {"window": 4, "softcap": 20.0}
    cases: list[tuple[torch.dtype, int, tuple[int, int], dict[str, Any]]] = [
        *((bfloat16, 128, heads, {}) for heads in ((4, 1), (2, 1), (1, 1), (8, 1), (3, 1))),
        *((bfloat16, size, (4, 2), options) for size in (64, 128, 256, 96, 40) for options in ({}, both)),
        (bfloat16, 128, (4, 2), {"softcap": 20.0}),
        (bfloat16, 128, (4, 2), {"window": 4}),
        (bfloat16, 64, (4, 2), {"window": 4}),
        (torch.float16, 128, (4, 2), {}),
        *((float32, size, (4, 2), options) for size in (128, 64) for options in ({}, both)),
    ]
    for dtype, size, (heads, kv_heads), options in cases:
        q, k, v = (
            torch.zeros(1, layout.rows, n, size, dtype=dtype).transpose(1, 2).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        )
        chosen = {"window": None, "softcap": None, **options}
        out = triton_attention.attend(q, k, v, layout, size**-0.5, **chosen)
        out.backward(torch.zeros_like(out))


def run(report: Report) -> dict[str, Any]:
    """Compiles all that is recorded; by kernel the seconds it took, or why it failed.

    Raises:
        Unavailable: there is no Triton, or it interprets.
    """
    if triton_backend.triton is None or triton_backend.INTERPRETED:
        raise Unavailable("Triton is not installed" if triton_backend.triton is None else "Triton interprets")
    on_gpu = report.device.type == "cuda"
    capability = _capability() if on_gpu else (9, 0)
    begun = time.monotonic()
    wanted, broken = launches(capability)
    recorded = time.monotonic() - begun
    if not on_gpu:
        wanted = wanted[:DRY_KERNELS]
    libraries = [Library(name, report.device) for name in PROJECT if name not in ("torch", "triton")]
    workers = max(1, min(16, len(os.sched_getaffinity(0))))
    print(f"  {len(wanted)} kernels for sm_{capability[0]}{capability[1]}, {workers} at a time", flush=True)
    found = {**broken, **compile_all([*libraries, *wanted], workers, report)}
    failed = [name for name, one in found.items() if "failed" in one]
    print(f"  {len(found) - len(failed)} compiled in {time.monotonic() - begun:.0f} s", flush=True)
    for name in failed:
        print(f"  {name} ({found[name].get('choices', '')}): {found[name]['failed']}", flush=True)
    if on_gpu and not failed:
        _marker().parent.mkdir(parents=True, exist_ok=True)
        _marker().write_text("", encoding="utf-8")
    return {
        "capability": list(capability),
        "workers": workers,
        "seconds_recording": round(recorded, 1),
        "contenders": found,
    }


DRY_KERNELS = 3


def _cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def entries() -> int:
    """Of Triton's cache on disk."""
    return sum(1 for _ in _cache().iterdir()) if _cache().is_dir() else 0


def _marker() -> Path:
    """There once all kernels of these sources are in the cache."""
    package = Path(opsd_kernels.__file__).parent
    sources = sorted([*package.rglob("*.py"), *native.source_directory().iterdir()])
    text = b"".join(path.read_bytes() for path in sources if path.is_file())
    return _cache() / f"opsd-{hashlib.sha256(text).hexdigest()[:16]}"


def cached() -> bool:
    """Whether this machine has all kernels, as after `run`."""
    return _marker().exists()


def _capability() -> tuple[int, int]:
    """Asked of another process: this one forks, which a process with a device must not."""
    program = "import torch; print(*torch.cuda.get_device_capability())"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    major, minor = map(int, ran.stdout.split())
    return major, minor


def compile_all(wanted: Sequence[Launch | Library], workers: int, report: Report) -> dict[str, dict[str, Any]]:
    """By name, {"seconds", ...}, {"skipped"} or {"failed"}; nothing is begun after the report's deadline."""
    context = multiprocessing.get_context("fork")
    found: dict[str, dict[str, Any]] = {}
    waiting = list(reversed(wanted))
    running: dict[Any, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers and not report.late:
            launch = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_compile, args=(launch, theirs, report.inject), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (launch.name, process, time.monotonic())
        if report.late:
            found |= {launch.name: {"skipped": "the time is used up"} for launch in waiting}
            waiting = []
        for pipe in wait(list(running), timeout=1.0) if running else []:
            name, process, begun = running.pop(pipe)  # type: ignore[index]
            try:
                found[name] = {"seconds": round(time.monotonic() - begun, 2), **pipe.recv()}  # type: ignore[union-attr]
            except EOFError:
                process.join(5)
                found[name] = {"failed": f"its process ended with status {process.exitcode}"}
        for pipe, (name, process, begun) in list(running.items()):
            if report.late or time.monotonic() - begun > SECONDS:
                process.kill()
                running.pop(pipe)
                found[name] = {"failed": f"stopped after {time.monotonic() - begun:.0f} s"}
    return {launch.name: {"choices": launch.choices, **found[launch.name]} for launch in wanted}


def _compile(launch: Launch | Library, pipe: Any, inject: list[str]) -> None:
    try:
        fail_if_told(inject, launch.name)
        pipe.send(launch.compile())
    except Exception as error:
        pipe.send({"failed": described(error)})
    finally:
        pipe.close()
        os._exit(0)
