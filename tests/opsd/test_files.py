import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opsd.clock import peak_memory
from opsd.display import Display
from opsd.errors import ConfigError
from opsd.files import append_json, rewind_json

RECORDS = [{"step": n, "loss": n / 7, "text": "größer → ∞"} for n in (0, 1, 2, 3, 10, 11)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for record in RECORDS:
        append_json(path, record)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_record_is_one_line_of_strict_json(tmp_path):
    path = tmp_path / "a.jsonl"
    append_json(
        path, {"step": 1, "loss": math.nan, "pass": {"1": math.inf, "2": (0.5, -math.inf)}, "text": "a\nb\u2028"}
    )
    append_json(path, {"step": 2})
    data = path.read_bytes()
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 2
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in data.decode().split("\n")[:2])
    assert first == {"step": 1, "loss": None, "pass": {"1": None, "2": [0.5, None]}, "text": "a\nb\u2028"}
    assert second == {"step": 2}


@pytest.mark.parametrize(("step", "steps"), [
    (-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3]), (10, [0, 1, 2, 3, 10]), (99, [0, 1, 2, 3, 10, 11]),
])  # fmt: skip
def test_rewind_keeps_the_records_up_to_a_step(path, step, steps):
    rewind_json(path, step)
    assert [record["step"] for record in read(path)] == steps
    assert read(path) == [record for record in RECORDS if record["step"] in steps]
    append_json(path, {"step": 100})
    assert [record["step"] for record in read(path)] == [*steps, 100]


def test_rewind_survives_a_write_stopped_at_any_byte(path):
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        rewind_json(path, 10)
        append_json(path, {"step": 100})
        # A record that only lacks its line's end is whole.
        whole = data[:length].count(b"\n") + (length < len(data) and data[length : length + 1] == b"\n")
        expected = [record["step"] for record in RECORDS[:whole] if record["step"] <= 10]
        assert [record["step"] for record in read(path)] == [*expected, 100], length


def test_rewind_is_by_step_where_records_of_several_kinds_alternate(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    for step, name in [(0, "base"), (0, "teacher"), (20, "a"), (10, "late"), (20, "b")]:
        append_json(path, {"step": step, "name": name})
    rewind_json(path, 10)
    assert [record["name"] for record in read(path)] == ["base", "teacher", "late"]


def test_rewind_leaves_what_needs_nothing_alone(path, tmp_path):
    rewind_json(tmp_path / "absent.jsonl", 3)
    before = path.stat()
    rewind_json(path, 11)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "bad", ['{"step": 1, "lo{"step": 2}', '{"loss": 1}', "[1]", "", '{"step": "1"}', '{"step": 1.5}']
)
def test_rewind_refuses_a_file_that_no_run_leaves(path, bad):
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n", encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"metrics.jsonl:3: not a record with a step"):
        rewind_json(path, 1)
    assert path.read_bytes() == before


def test_rewind_replaces_at_once(path, monkeypatch):
    before = path.read_bytes()

    def replace(source, target):
        assert path.read_bytes() == before
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("opsd.files.os.replace", replace)
    with pytest.raises(OSError, match="broken"):
        rewind_json(path, 1)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path):
    pytest.importorskip("resource")
    code = """
import resource, sys
from pathlib import Path
from opsd.files import append_json
path = Path(sys.argv[1])
append_json(path, {"step": 1, "text": "a" * 100})
before = path.read_bytes()
# The limit cuts the next line in its middle: the write is short before it fails.
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        append_json(path, {"step": 2, "text": "b" * 100})
    except OSError as error:
        print("error", error.errno)
    assert path.read_bytes() == before, path.read_bytes()
append_json(path, {"step": 3})
"""
    path = tmp_path / "full.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["error", str(errno.EFBIG)] * 2
    assert [record["step"] for record in read(path)] == [1, 3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_no_space_is_an_error():
    with pytest.raises(OSError, match=r"No space|Invalid") as caught:
        append_json(Path("/dev/full"), {"step": 1})
    assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)


def test_peak_memory_of_a_process_grows_with_what_it_holds():
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    assert 10 * 2**20 < before < 2**40
    held = torch.ones(before // 4 + 2**26 // 4)  # more bytes than the peak so far, all of them touched
    after = peak_memory(cpu)
    assert after >= held.numel() * 4
    del held
    assert peak_memory(cpu) >= after


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu_is_of_the_time_since_the_last_call():
    device = torch.device("cuda")
    peak_memory(device)
    torch.empty(2**28, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= 2**28
    assert peak_memory(device) < 2**28


def test_warnings_are_shown_whole_and_verbatim(capsys):
    with Display() as display:
        display.warn("[bold] 50 % of 3 tokens")
    assert capsys.readouterr().out == "warning: [bold] 50 % of 3 tokens\n"
    with Display(quiet=True) as display:
        display.warn("nothing")
    assert capsys.readouterr().out == ""

    display = Display()
    display.console, display.live = Console(force_terminal=True, color_system="standard", highlight=False), True
    display.warn("[bold] 50 % of 3 tokens")
    shown = capsys.readouterr().out
    assert "warning: [bold] 50 % of 3 tokens" in shown
    assert "\x1b[33m" in shown
