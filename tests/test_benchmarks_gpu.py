"""The benchmarks that need a GPU, on a CPU at toy sizes: what runs them and goes on after faults, what they measure,
their tables and their search on made-up data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _faulty_benchmark as faulty
import pytest
import torch

from benchmarks import attention, gpu, machine, parts, precompile, probe, rollouts, step
from benchmarks.attention import Heads
from benchmarks.cells import LABELS, LIKELIEST, PROJECT, Cell, build, make_inputs
from benchmarks.measure import phases
from benchmarks.record import DRY_NAME, NAME, Results
from benchmarks.report import DOCUMENTS
from benchmarks.runner import SECONDS, Item, Report, main
from opsd_kernels import backends

CPU = torch.device("cpu")
COMPILES = precompile.triton_backend.triton is not None and not precompile.triton_backend.INTERPRETED
CELL = "loss/64x96x1009-float32-frozen-beta0.5"


def measured(items: list[Item], name: str, **options: Any) -> dict[str, Any]:
    """What one measurement finds, in this process."""
    (item,) = (item for item in items if item.name == name)
    return item.run(Report(CPU, **options))


# What runs the measurements.


@pytest.fixture(autouse=True)
def _findable(monkeypatch):
    """By processes that run a module of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def run_faulty(directory: Path, *options: str) -> int:
    arguments = ["--dry-run", "--out", str(directory), *options]
    return main("_faulty_benchmark", "", faulty.items, lambda _: {}, arguments)


def stored(directory: Path) -> dict[str, Any]:
    return json.loads((directory / DRY_NAME).read_text())


def test_a_fault_costs_only_itself(tmp_path, capsys):
    assert run_faulty(tmp_path) == 1
    data = stored(tmp_path)
    assert data["cells"].keys() == {"a/good", "a/several", "b/absent", "b/last"}
    assert data["failed"].keys() == {"a/sleeps", "b/broken"}
    assert data["failed"]["a/sleeps"].startswith("stopped after")
    assert data["failed"]["b/broken"].startswith("ValueError: a fault of its own (_faulty_benchmark.py:")
    assert data["cells"]["b/absent"]["unavailable"] == "there is none"
    ways = data["cells"]["a/several"]["contenders"]
    assert (ways["first"], ways["last"]) == ({"value": 1}, {"value": 2})
    assert ways["hangs"]["failed"].startswith("stopped after")
    assert ways["dies"] == {"failed": "its process ended with status 7"}
    assert ways["raises"]["failed"].startswith("KeyError: 'nothing there'")
    assert ways["spoils"]["failed"].startswith("RuntimeError: an illegal memory access was encountered")
    assert data["cells"]["a/several"]["faults"].keys() == {"hangs", "dies", "spoils"}
    assert data["faults"] == {}
    assert {"date", "processor", "versions"} <= data["machines"][data["cells"]["a/good"]["machine"]].keys()
    said = capsys.readouterr().out
    assert "4 of 6 measured, 2 failed, 0 left out" in said
    assert "with faults: a/several" in said

    # A second command measures what is missing, and nothing else.
    del data["cells"]["b/last"]
    (tmp_path / DRY_NAME).write_text(json.dumps(data))
    assert run_faulty(tmp_path) == 1
    again = stored(tmp_path)
    assert again["cells"].pop("b/last")["value"] > data["cells"]["a/good"]["value"]
    assert again == data
    assert run_faulty(tmp_path, "--only", "a/good", "--again") == 0
    assert stored(tmp_path)["cells"]["a/good"]["value"] > data["cells"]["a/good"]["value"]


def test_what_there_is_no_time_for_is_named_with_the_way_on(tmp_path, capsys):
    assert run_faulty(tmp_path, "--only", "a/good", "b/last", "--seconds", "0.1") == 3
    assert stored(tmp_path)["left_out"] == dict.fromkeys(["a/good", "b/last"], "the time is used up")
    said = capsys.readouterr().out
    assert "left out: a/good, b/last" in said
    assert f"to go on: python -m _faulty_benchmark --dry-run --out {tmp_path} --only a/good b/last" in said


def test_a_fault_that_was_met_is_not_met_again(tmp_path):
    """Where the time ended before the repetition."""
    results = Results(tmp_path / DRY_NAME, dry_run=True)
    results.fault("a/several", "hangs", "stopped")
    results.fault("a/several", "dies", "status 7")
    results.fault("a/several", "spoils", "status 70")
    assert run_faulty(tmp_path, "--only", "a/several") == 1
    cell = stored(tmp_path)["cells"]["a/several"]
    assert cell["contenders"]["hangs"] == {"failed": "stopped"}
    assert cell["contenders"]["last"] == {"value": 2}


def test_a_kill_loses_what_is_in_flight_and_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "_faulty_benchmark", "--dry-run", "--out", str(tmp_path), "--limit", "300",
               "--only", "a/good", "a/sleeps"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"] + os.pathsep + str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "a/sleeps" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = 0
    for _ in range(300):
        found = children.read_text().split()
        child = int(found[0]) if found else 0
        if child and b"--item" in Path(f"/proc/{child}/cmdline").read_bytes():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert stored(tmp_path)["cells"].keys() == {"a/good"}
    for _ in range(300):
        if not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the measurement outlived the command")


def test_results_are_taken_over_from_elsewhere(tmp_path):
    elsewhere, here = Results(tmp_path / "there.json"), Results(tmp_path / NAME)
    elsewhere.keep("a/good", {"machine": {"gpu": "one"}, "value": 1})
    elsewhere.keep("a/other", {"machine": {"gpu": "one"}, "value": 1})
    elsewhere.note("failed", "b/broken", "why")
    elsewhere.note("left_out", "b/last", "late")
    here.keep("a/good", {"machine": {"gpu": "two"}, "value": 0})
    here.keep("b/broken", {"machine": {"gpu": "two"}, "value": 2})
    here.merge(json.loads((tmp_path / "there.json").read_text()))
    cells = {n: (c["value"], here.data["machines"][c["machine"]]["gpu"]) for n, c in here.data["cells"].items()}
    assert cells == {"a/good": (1, "one"), "a/other": (1, "one"), "b/broken": (2, "two")}
    assert (here.data["failed"], here.data["left_out"]) == ({}, {"b/last": "late"})
    with pytest.raises(ValueError, match="dry run"):
        Results(tmp_path / DRY_NAME, dry_run=True).merge(here.data)


def test_arguments(tmp_path, capsys):
    for wrong, message in (
        (["--only", "nothing"], "--only nothing: no such measurement"),
        (["--from", str(tmp_path / "none.json")], "the results cannot be read: FileNotFoundError"),
    ):
        with pytest.raises(SystemExit):
            run_faulty(tmp_path, *wrong)
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main("_faulty_benchmark", "", faulty.items, lambda _: {}, ["--out", str(tmp_path)])
        assert "--dry-run does without" in capsys.readouterr().err


# The loss.


def test_the_dry_run_of_a_cell_with_faults(tmp_path, capsys):
    """In one contender an error, in one an abort, in one compilation an error; and no document from a dry run."""
    arguments = ["--dry-run", "--out", str(tmp_path), "--only", CELL, "compile", "--rounds", "1"]
    arguments += ["--contenders", "floor", "torch", "native", "dense", "--inject", "raise:native", "abort:dense"]
    broken = "divergence_kernel 1"
    assert main("benchmarks.gpu", "", gpu.items, gpu.tables, [*arguments, f"raise:{broken}"]) == 1
    data = stored(tmp_path)
    assert data["cells"].keys() == {CELL, "compile/kernels"}
    assert data["failed"] == data["left_out"] == {}
    ways = data["cells"][CELL]["contenders"]
    assert ways.keys() == {"floor", "torch", "native", "dense"}
    assert ways["native"]["failed"].startswith("RuntimeError: injected")
    assert ways["dense"]["failed"] == "its process was ended by SIGABRT"
    assert ways["torch"]["over_floor"] == ways["torch"]["median"] / ways["floor"]["median"]
    assert ways["torch"]["phases"].keys() == {"project", "rows", "dX", "whole"}
    assert ways["torch"]["dx_error"] < 1e-4
    if COMPILES:
        compiled = data["cells"]["compile/kernels"]["contenders"]
        libraries = {name: compiled.pop(name) for name in list(compiled) if name.startswith("library")}
        assert libraries.keys() == {f"library {name}" for name in PROJECT} - {"library torch", "library triton"}
        assert not any("failed" in one for one in libraries.values())
        assert len(compiled) == precompile.DRY_KERNELS
        assert "injected" in compiled.pop(broken)["failed"]
        assert all("shared" in one and "KIND" in one["choices"] for one in compiled.values())

    before = [document.read_bytes() for document in DOCUMENTS]
    capsys.readouterr()
    assert main("benchmarks.gpu", "", gpu.items, gpu.tables, ["--dry-run", "--out", str(tmp_path), "--table"]) == 2
    said = capsys.readouterr()
    assert "| 64 × 96 × 1,009 | frozen | 0.5 |" in said.out
    assert "Dry run on a CPU at toy sizes: these are no measurements." in said.out
    assert "The documents are left as they are" in said.err
    assert [document.read_bytes() for document in DOCUMENTS] == before


@pytest.mark.parametrize("name", ["rows/chunk", "ceilings/square", "products/96", f"{CELL}-confident"])
def test_other_measurements_of_the_loss(name):
    name = name.replace("64x96", "64x64")  # of confident rows there is the smaller one alone
    found = measured(gpu.items(CPU), name, rounds=1, contenders=["torch", "floor"])
    if name == "rows/chunk":
        rows = [f"torch, {objective}{more}" for more in ("", ", confident rows") for objective in probe.OBJECTIVES]
        assert list(found["contenders"]) == rows
        assert all(one["median"] > 0 for one in found["contenders"].values())
        assert probe.rows_table([found]).count("\n") == 1 + len(rows)
    elif name == "products/96":
        assert [one["flops"].keys() for one in found["contenders"].values()] == 2 * [{"project", "dX", "dW"}]
        assert "| 96 × 1,009 | 16 |" in probe.products_table([found])
    elif name == "ceilings/square":
        assert min(found.values()) > 0
    else:
        assert found["cell"]["confident"]
        assert found["contenders"]["torch"]["dx_error"] < 1e-4
        assert "| 64 × 64 × 1,009, confident rows |" in gpu.times_table([found])


def test_the_order_puts_most_into_the_first_command():
    items = gpu.items(torch.device("cuda"))
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    cells = [name for name in names if name.startswith("loss/")]
    cell = "loss/8192x{}x151936-bfloat16-frozen-beta0.5"
    assert cells[:2] == [cell.format(4096), cell.format(2048)]
    assert names[0] == "compile/kernels"
    assert any(name.endswith("-confident") for name in cells)
    steps = [item.step for item in items]
    assert steps.index("sweep") == len(steps) - steps.count("sweep")  # last
    first = names.index("products/2048") + 1
    assert {"tests", "loss", "rows", "profile", "ceilings", "products"} <= set(steps[:first])
    assert sum(item.seconds for item in items[:first]) <= SECONDS
    assert all(item.seconds <= SECONDS for item in [*items, *parts.items(torch.device("cuda"))])
    tunings = [item.name for item in parts.items(torch.device("cuda")) if item.step == "tuning"]
    assert [name.partition("T8192 ")[2] for name in tunings[:2]] == ["forward first", "key_gradient first"]


def test_every_backend_is_a_contender():
    assert set(PROJECT) == set(backends.NAMES) - {"auto"}
    assert set(PROJECT) <= LABELS.keys()


@pytest.mark.parametrize("hidden", [256, 1024])
def test_confident_rows_are_confident(hidden):
    cell = Cell(200, hidden, 8192, "bfloat16", confident=True)
    (inputs,) = make_inputs(cell, CPU)
    weight = inputs.weight.float()
    least, most = LIKELIEST
    for states in (inputs.teacher, inputs.student.detach()):
        likeliest = (states.float() @ weight.t()).softmax(-1).amax(-1)
        assert least - 0.15 < float(likeliest.min()) < least + 0.15
        assert 0.997 < float(likeliest.max()) <= most + 0.001
        assert 0.9 < float(likeliest.median()) < 0.99
    with pytest.raises(ValueError, match="hidden must be at least"):
        make_inputs(Cell(8, 16, 8192, confident=True), CPU)


def test_phases_add_up():
    cell = Cell(16, 64, 997, trainable=True)
    (inputs,) = make_inputs(cell, CPU)
    found = phases(build("torch", cell, inputs), inputs)
    whole = found.pop("whole")
    assert found.keys() == {"project", "rows", "dX", "dW"}
    assert min(found.values()) > 0
    assert sum(found.values()) < whole


@pytest.mark.skipif(not COMPILES, reason="Triton is not installed, or interprets")
def test_launches_are_recorded_once_each_and_not_run():
    found, failed = precompile.launches((9, 0))
    assert not failed
    assert len({launch.name for launch in found}) == len(found)
    kernels = {launch.name.split()[0] for launch in found}
    rows, attends = precompile.triton_backend, precompile.triton_attention
    both = [*rows.compilations(), *attends.compilations(128, torch.bfloat16, (9, 0))]
    assert kernels == {compilation.kernel.fn.__name__ for compilation in both}
    whole = [launch for launch in found if launch.kernel is rows.divergence_kernel]
    for kind in (0, 1, 2):  # what ships, and what the tests ask for
        assert {"*bf16", "*fp32", "*fp16"} <= {
            launch.signature["dz"] for launch in whole if f"KIND {kind}, CLIP False, STATS True" in launch.choices
        }
    assert {launch.options.num_warps for launch in whole} == {rows.WIDE.warps}
    lean = [launch for launch in found if launch.kernel is rows.lean_kernel]
    assert {launch.options.maxnreg for launch in lean} == {rows.LEAN_REGISTERS}
    # what the self-check launches is among them
    with precompile.recording((9, 0)) as checked:
        precompile._self_check()
    assert {(launch.kernel, str(launch.signature), launch.choices) for launch in checked.values()} <= {
        (launch.kernel, str(launch.signature), launch.choices) for launch in found
    }
    with precompile.recording((10, 0)) as newer:
        precompile._self_check()
    registers = {launch.options.maxnreg for launch in newer.values() if launch.kernel is rows.lean_kernel}
    assert registers == {rows.LEAN_REGISTERS_OF_BLACKWELL}


def test_the_profilers_figures_are_read():
    head = ["==PROF== Connected", '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"']
    values = [("SpeedOfLight", "DRAM Throughput", "%", "71.2"), ("Occupancy", "Waves", "", "3"),
              ("LaunchStats", "Registers Per Thread", "register/thread", "64")]  # fmt: skip
    lines = [f'"{i}","divergence_kernel","{s}","{m}","{u}","{v}"' for i in (0, 1) for s, m, u, v in values]
    metrics = {"DRAM Throughput, %": "71.2", "Registers Per Thread, register/thread": "64"}
    assert probe.parsed(head + lines) == 2 * [{"kernel": "divergence_kernel", "metrics": metrics}]
    assert probe.parsed(["==ERROR== no permission"]) == []


def test_the_state_of_the_gpu(tmp_path, monkeypatch):
    """From an nvidia-smi that knows the older name of the throttle reasons alone, and without any."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *event*) echo "not a valid field"; exit 2;; esac\n'
        'echo "1980, 2619, 612.50, 55, 100, 0x0000000000000004"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    found = machine.gpu_state()
    assert found["clocks.sm"] == "1980"
    assert found["clocks_throttle_reasons.active"] == "0x0000000000000004"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_state() == {}


# The other parts.


@pytest.mark.parametrize("generations", [1, 8])
def test_attention(generations):
    names = ["sdpa", "eager", "padded"]
    cell = measured(parts.items(CPU), f"attention/4:2 G{generations} T256", rounds=1, contenders=names)
    assert cell["agree"]
    assert list(cell["contenders"]) == names
    for one in cell["contenders"].values():
        assert {"student backward", "student prepare", "teacher forward FLOP/s"} <= one.keys()
    assert f"| 4:2 × 16 | {generations} |" in attention.table([cell])


def test_pairs_are_those_that_the_reference_computes():
    for generations in (1, 3):
        layout, _ = attention.layouts(generations, 256, 0, CPU)
        seen = sum(
            1 for s in layout.segments for row in range(s.start, s.stop) for _ in range(s.position + row - s.start + 1)
        )
        assert attention.pairs(layout) == seen
    assert attention.flops(layout, Heads(4, 2, 16), "student backward") == 2.5 * 4 * seen * 4 * 16


@pytest.mark.parametrize("kernel", ["forward", "key_gradient"])
def test_tuning(kernel, monkeypatch):
    """Without a device the reference stands for the kernel; a tiling that fails leaves the other."""
    eager = attention.backend("eager")
    monkeypatch.setattr(attention.triton_attention, "serves", lambda *_: (True, ""))
    monkeypatch.setattr(attention, "backend", lambda _: eager)
    cell = measured(parts.items(CPU), f"tuning/G8 T128 {kernel} first", inject=["raise:16x16 warps 1 stages 1"])
    assert cell["kernel"] == kernel
    assert cell["agree"]
    usual, other = cell["contenders"].values()
    assert {"tiling", "seconds", "flops"} == usual.keys()
    assert "injected" in other["failed"]


@pytest.mark.parametrize("training", step.TRAININGS)
def test_step(training):
    cell = measured(parts.items(CPU), f"step/toy {training}", rounds=1, inject=["raise:packed_joint_triton"])
    assert cell["agree"]
    assert cell["largest_difference"] < 1e-3
    assert cell["base_bytes"] > 0
    assert cell["contenders"].keys() == step.NAMES.keys()
    ways = {name: one for name, one in cell["contenders"].items() if "seconds" in one}
    missing = cell["contenders"].keys() - ways.keys()
    assert {"packed_joint_triton"} <= missing <= {"padded_trl", "packed_joint_triton"}  # TRL need not be installed
    for name, one in ways.items():
        passes = {"score"} if "joint" in name else {"teacher", "student"}
        assert one["phases"].keys() == passes | {"loss", "backward", "optimizer"}
        assert one["tokens_per_second"][0] == pytest.approx(cell["tokens"][0] / one["seconds"][0])
        assert one["losses"][0] == pytest.approx(ways["padded_dense"]["losses"][0], rel=1e-3)
        assert one["peak_bytes"] > 0
    assert ways["packed_two"]["peak_bytes"] < ways["padded_dense"]["peak_bytes"]
    assert "Triton attention" not in step.table([cell], [])


def test_longest():
    items, fits = parts.items(CPU), {}
    for name in ("padded_dense", "packed_two"):
        cell = measured(items, f"longest/toy lora 16 MiB {name}")
        assert cell["fits"] < cell["fails"] <= 1.3 * cell["fits"]
        fits[name] = cell["fits"]
    assert 0 < fits["padded_dense"] < fits["packed_two"]


def test_rollouts():
    items, cells = parts.items(CPU), []
    for way in ("opsd", "dynamic", "static", "continuous"):
        cells.append(measured(items, f"rollouts/toy batch 2 {way}"))
        assert cells[-1]["tokens_per_second"] > 0
    with pytest.raises(parts.Unavailable, match="accelerator"):
        measured(items, "rollouts/toy batch 2 static, compiled")
    assert rollouts.table(cells).count("\n") == 2


def test_learning():
    cell = measured(parts.items(CPU), "learning/toy")
    assert [point[0] for point in cell["curve"]] == [0, 1, 2]
    assert [line["step"] for line in cell["steps"]] == [1, 2]
    assert {"loss", "tokens_per_second", "seconds_rollout", "seconds_backward"} <= cell["steps"][0].keys()


@pytest.mark.parametrize("end", [100, 257, 5000, 10**9])
@pytest.mark.parametrize("bend", [0, 2000])
def test_search_finds_the_end_in_few_attempts(end, bend):
    def used(length: int) -> int:
        return 1000 + 7 * length + 20 * max(0, length - bend)

    tried = []

    def attempt(length: int) -> int | None:
        tried.append(length)
        return used(length) if length <= end else None

    found = step.search(attempt, used(end))
    if end == 10**9:
        assert (found.fits, found.fails) == (1 << 17, None)
    else:
        assert found.fits <= end < found.fails
        assert found.fails - found.fits <= max(1, 0.04 * found.fails)
    assert len(tried) <= 9, tried
    assert not found.stopped


def test_search_stops_for_want_of_time():
    def attempt(length: int) -> int:
        time.sleep(0.1)
        return length

    found = step.search(attempt, 1 << 40, seconds=0.2)
    assert found.stopped
    assert found.fits == 256


def test_tables(tmp_path):
    """On made-up figures, as files of the documents' sections."""
    way = {"seconds": [0.5, 0.5], "tokens_per_second": [8000.0, 8000.0], "peak_bytes": 3 << 30}
    first = {**way, "seconds": [1.0, 1.0], "tokens_per_second": [4000.0, 4000.0], "phases": {"student": [0.2, 0.2]}}
    second = {**way, "phases": {"score": [0.1, 0.1]}}
    ways = {"padded_dense": first, "packed_joint": second, "packed_two": {"failed": "why"}}
    here = {"date": "2026-01-01", "gpu": "H200", "driver": "1.2", "cuda": "13.0", "python": "3.12.3",
            "versions": {"torch": "2.11"}}  # fmt: skip
    results = Results(tmp_path / NAME)
    assert parts.tables(results.data) == gpu.tables(results.data) == {}

    def keep(name: str, **cell: Any) -> None:
        results.keep(name, {"machine": here, **cell})

    keep("step/4B lora", model="4B", training="lora", base_bytes=8 << 30, contenders=ways)
    about = {"model": "4B", "training": "lora", "capacity": 24 << 30}
    keep("longest/a", **about, contender="padded_dense", fits=512, stopped=False)
    keep("longest/b", **about, contender="packed_joint", fits=8000, stopped=True)
    keep("rollouts/a", model="4B", batch=8, way="static", tokens_per_second=1234.5)
    results.note("failed", "step/8B full", "out of memory")
    made = parts.tables(results.data)
    assert made.keys() == {"step-gpu", "rollouts-gpu"}
    for line in (
        "| model | | padded, dense loss | packed, joint pass |",
        "| 4B, lora | tokens/s | 4,000 | 8,000 (2.00×) |",
        "| 4B, lora | peak, GiB | 11.0 | 11.0 |",
        "| 4B, lora | longest in 24 GiB | 512 | 8,000 or more |",
        "| 4B, lora | packed, joint pass | – | – | 100 | – | – | – | 500 |",
        "H200, driver 1.2, CUDA 13.0, 2026-01-01; Python 3.12.3, torch 2.11.",
        "Not measured: step/8B full (out of memory).",
    ):
        assert line in made["step-gpu"].splitlines()
    assert "| 4B | 8 | 1,234 |" in made["rollouts-gpu"]

    cell = {"tokens": 8192, "hidden": 4096, "vocab": 151936, "trainable": False, "beta": 0.5, "confident": False}
    floor = {"median": 0.042, "over_floor": 1.0, "phases": {"project": 0.03, "dX": 0.01, "whole": 0.042}}
    ours = {"median": 0.047, "over_floor": 1.12, "peak_bytes": 1 << 30, "phases": {"rows": 0.005, "whole": 0.047}}
    loaded = {"loaded": {"clocks.sm": "1755", "power.draw": "690.5"}}
    keep("loss/a", cell=cell, gpu=loaded, contenders={"floor": floor, "triton": ours, "trl": {"failed": "why"}})
    row = {"median": 0.001, "bytes_per_second": 2.5e12}
    keep("rows/chunk", tokens=1024, vocab=151936, contenders={"triton, JSD": row, "torch, JSD": {"failed": "why"}})
    keep("ceilings/square", flops=7.9e14, bytes_per_second=3e12)
    made = gpu.tables(results.data)
    assert made.keys() == {"loss-gpu", "rows-gpu"}
    for line in (
        "| tokens × hidden × vocabulary | head | β | bare GEMMs | opsd, Triton |",
        "| 8,192 × 4096 × 151,936 | frozen | 0.5 | 42.0 ms | 1.12× |",
        "| 8,192 × 4096 × 151,936 | frozen | 0.5 | opsd, Triton | – | 5.00 | – | – | 47.00 |",
        "Under load: SM clock 1755 to 1755 MHz, 690 to 690 W.",
        "H200, driver 1.2, CUDA 13.0, 2026-01-01; Python 3.12.3, torch 2.11.",
    ):
        assert line in made["loss-gpu"].splitlines()
    assert "| opsd, Triton: JSD | 1,024 × 151,936 | 1.000 | 2.50 |" in made["rows-gpu"]
    for section in ("attention-gpu", *made, *parts.tables(results.data)):  # there is a place for each
        assert sum(d.read_text(encoding="utf-8").count(f"<!-- {section} -->") for d in DOCUMENTS) == 1
    assert "790 TFLOP/s, a large copy at 3.00 TB/s" in made["rows-gpu"]
