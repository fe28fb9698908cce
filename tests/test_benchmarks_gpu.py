"""The benchmarks that need a GPU, on a CPU at toy sizes; their tables and their search on made-up data."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from benchmarks import attention, parts, rollouts, step
from benchmarks.attention import Heads
from benchmarks.cells import Unavailable
from benchmarks.record import Record, merge

CPU = torch.device("cpu")


def dry_run(directory, part: str, *options: str) -> dict[str, Any]:
    assert parts.main(["--dry-run", "--part", part, "--out", str(directory), *options]) == 0
    stored = json.loads((directory / f"{part}-gpu-dry-run.json").read_text())
    assert {"date", "processor", "versions"} <= stored["machines"][0].keys()
    assert all(cell["machine"] == 0 and cell["took"] >= 0 for cell in stored["cells"])
    return stored


def test_attention(tmp_path):
    stored = dry_run(tmp_path, "attention", "--rounds", "1", "--only", "sdpa", "eager", "padded")
    assert [cell["key"] for cell in stored["cells"]] == ["4:2 G1 T256", "4:2 G8 T256"]
    for cell in stored["cells"]:
        assert cell["agree"]
        assert cell["contenders"].keys() == {"sdpa", "eager", "padded"}
        for one in cell["contenders"].values():
            assert {"student backward", "student prepare", "teacher forward FLOP/s"} <= one.keys()
    assert "| 4:2 × 16 | 8 |" in attention.table(stored)


def test_pairs_are_those_that_the_reference_computes():
    for generations in (1, 3):
        layout, _ = attention.layouts(generations, 256, 0, CPU)
        seen = sum(
            1 for s in layout.segments for row in range(s.start, s.stop) for _ in range(s.position + row - s.start + 1)
        )
        assert attention.pairs(layout) == seen
    assert attention.flops(layout, Heads(4, 2, 16), "student backward") == 2.5 * 4 * seen * 4 * 16


def test_tuning(tmp_path, monkeypatch):
    """Without a device the reference stands for the kernel."""
    eager = attention.backend("eager")
    monkeypatch.setattr(attention.triton_attention, "serves", lambda *_: (True, ""))
    monkeypatch.setattr(attention, "backend", lambda _: eager)
    stored = dry_run(tmp_path, "tuning", "--only", "forward", "key_gradient")
    assert [cell["kernel"] for cell in stored["cells"]] == ["forward", "key_gradient"]
    for cell in stored["cells"]:
        assert cell["agree"]
        assert len(cell["found"]) == 2
        assert {"tiling", "seconds", "flops"} <= cell["found"][0].keys()


@pytest.mark.parametrize("training", step.TRAININGS)
def test_step(tmp_path, training):
    stored = dry_run(tmp_path, "step", "--rounds", "1", "--training", training)
    (cell,) = stored["cells"]
    assert cell["agree"]
    assert cell["largest_difference"] < 1e-3
    assert cell["base_bytes"] > 0
    ways = cell["contenders"]
    missing = {one["key"].split()[-1] for one in stored["left_out"]}
    assert missing <= {"padded_trl"}  # TRL need not be installed
    assert ways.keys() == step.NAMES.keys() - missing
    for name, one in ways.items():
        passes = {"score"} if "joint" in name else {"teacher", "student"}
        assert one["phases"].keys() == passes | {"loss", "backward", "optimizer"}
        assert one["tokens_per_second"][0] == pytest.approx(cell["tokens"][0] / one["seconds"][0])
        assert one["losses"][0] == pytest.approx(ways["padded_dense"]["losses"][0], rel=1e-3)
        assert one["peak_bytes"] > 0
    assert ways["packed_two"]["peak_bytes"] < ways["padded_dense"]["peak_bytes"]


def test_longest(tmp_path):
    stored = dry_run(tmp_path, "longest", "--only", "padded_dense", "packed_two", "--memory", str(1 / 64))
    fits = {cell["contender"]: cell["fits"] for cell in stored["cells"]}
    assert 0 < fits["padded_dense"] < fits["packed_two"]
    assert all(cell["fits"] < cell["fails"] <= 1.3 * cell["fits"] for cell in stored["cells"])


def test_rollouts(tmp_path):
    stored = dry_run(tmp_path, "rollouts")
    ways = [cell["way"] for cell in stored["cells"]]
    assert ways == ["opsd", "dynamic", "static", "continuous"]
    assert [one["key"] for one in stored["left_out"]] == ["toy batch 2 static, compiled"]
    assert all(cell["tokens_per_second"] > 0 for cell in stored["cells"])
    assert rollouts.table(stored).count("\n") == 2


def test_learning(tmp_path):
    (cell,) = dry_run(tmp_path, "learning")["cells"]
    assert [point[0] for point in cell["curve"]] == [0, 1, 2]
    assert [line["step"] for line in cell["steps"]] == [1, 2]
    assert {"loss", "tokens_per_second", "seconds_rollout", "seconds_backward"} <= cell["steps"][0].keys()


def test_checks_without_a_device(tmp_path, monkeypatch):
    passed = {"arguments": [], "status": "0", "seconds": 0.0, "tail": []}
    monkeypatch.setattr(parts, "run_tests", lambda *_: [passed])
    monkeypatch.setattr(parts.shutil, "which", lambda _: None)
    stored = dry_run(tmp_path, "checks")
    assert [cell["status"] for cell in stored["cells"]] == ["0"]
    assert {one["key"]: one["reason"] for one in stored["left_out"]}["compute-sanitizer memcheck"].endswith("installed")


def test_nothing_is_left_out_in_silence(tmp_path):
    """Neither what there is no time for, nor what fails; and what was measured before stays."""
    path = tmp_path / "part.json"
    record = Record(path, CPU, 60.0)
    record.measure("kept", lambda: {"value": 1})
    record.measure("partly", lambda: {"left_out": {"one": "no room"}})

    def fails(error: Exception):
        raise error

    record.measure("large", lambda: fails(torch.OutOfMemoryError("much")))
    record.measure("absent", lambda: fails(Unavailable("not installed")))
    record.measure("wrong", lambda: fails(KeyError("oops")))
    assert record.failed == 1

    again = Record(path, CPU, 0.0)
    again.measure("late", lambda: pytest.fail("there was no time"))
    stored = json.loads(path.read_text())
    assert [cell["key"] for cell in stored["cells"]] == ["kept", "partly"]
    assert {one["key"]: one["reason"] for one in stored["left_out"]} == {
        "partly one": "no room",
        "large": "out of memory",
        "absent": "not installed",
        "wrong": "failed: KeyError: 'oops'",
        "late": "the time is used up",
    }


def test_no_cell_is_begun_that_the_time_is_too_short_for(tmp_path):
    record = Record(tmp_path / "part.json", CPU, 60.0)
    record.measure("first", dict, like="slow")
    record._longest["slow"] = 61.0
    record.measure("second", lambda: pytest.fail("begun"), like="slow")
    record.measure("third", dict, like="quick")
    assert [cell["key"] for cell in record.data["cells"]] == ["first", "third"]


def test_merging_keeps_each_cells_machine():
    def file(machine: str, cells: dict[str, int], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            "machines": [{"gpu": machine}],
            "cells": [{"key": key, "machine": 0, "value": value} for key, value in cells.items()],
            "left_out": [{"key": key, "reason": "late"} for key in left_out],
        }

    merged = merge(file("one", {"a": 1, "b": 1}, ("c", "c part", "d")), file("other", {"b": 2, "c": 2}, ("e",)))
    found = {cell["key"]: (cell["value"], merged["machines"][cell["machine"]]["gpu"]) for cell in merged["cells"]}
    assert found == {"a": (1, "one"), "b": (2, "other"), "c": (2, "other")}
    assert [one["key"] for one in merged["left_out"]] == ["d", "e"]


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
    """On made-up figures, as files of the README's sections."""
    way = {"seconds": [0.5, 0.5], "tokens_per_second": [8000.0, 8000.0], "peak_bytes": 3 << 30}
    first = {**way, "seconds": [1.0, 1.0], "tokens_per_second": [4000.0, 4000.0], "phases": {"student": [0.2, 0.2]}}
    second = {**way, "phases": {"score": [0.1, 0.1]}}
    ways = {"padded_dense": first, "packed_joint": second}
    machines = [{"date": "2026-01-01", "gpu": "H200", "driver": "1.2", "cuda": "13.0", "versions": {"torch": "2.11"}}]

    def write(part: str, *cells: dict[str, Any]) -> None:
        stored = {
            "machines": machines,
            "cells": [{"key": str(i), "machine": 0, **cell} for i, cell in enumerate(cells)],
            "left_out": [{"key": "8B full", "reason": "out of memory"}],
        }
        (tmp_path / f"{part}-gpu.json").write_text(json.dumps(stored))

    assert parts.tables(tmp_path) == {}
    write("step", {"model": "4B", "training": "lora", "base_bytes": 8 << 30, "contenders": ways})
    about = {"model": "4B", "training": "lora", "capacity": 24 << 30, "stopped": False}
    write("longest", {**about, "contender": "padded_dense", "fits": 512},
          {**about, "contender": "packed_joint", "fits": 8000, "stopped": True})  # fmt: skip
    write("rollouts", {"model": "4B", "batch": 8, "way": "static", "tokens_per_second": 1234.5})
    made = parts.tables(tmp_path)
    assert made.keys() == {"step-gpu", "rollouts-gpu"}
    for line in (
        "| model | | padded, dense loss | packed, joint pass |",
        "| 4B, lora | tokens/s | 4,000 | 8,000 (2.00×) |",
        "| 4B, lora | peak, GiB | 11.0 | 11.0 |",
        "| 4B, lora | longest in 24 GiB | 512 | 8,000 or more |",
        "| 4B, lora | packed, joint pass | – | – | 100 | – | – | – | 500 |",
        "H200, driver 1.2, CUDA 13.0, 2026-01-01; torch 2.11.",
        "Left out: 8B full (out of memory).",
    ):
        assert line in made["step-gpu"].splitlines()
    assert "| 4B | 8 | 1,234 |" in made["rollouts-gpu"]
