"""A short run of the fuzzer, and that it would see what it is there to see."""

import re
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

COUNTS = {"data": 150, "yaml": 60, "options": 30, "model": 15, "adapter": 15, "directory": 30}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", COUNTS)
def test_random_inputs(kind):
    """In a process of its own: what other tests have left in this one is no part of the inputs."""
    command = [sys.executable, fuzz.__file__, "--kind", kind, "--inputs", str(COUNTS[kind])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    done = re.search(rf"{kind}: seed 0, (\d+) of", run.stdout)
    assert int(done[1]) >= COUNTS[kind] // 2  # there may be fewer, but of others none


def fails(*_, **__):
    raise KeyError("x")


def writes(*_, **__):
    Path("/tmp/opsd-fuzz-stray").write_text("x")


def waits(*_, **__):
    time.sleep(60)


@pytest.mark.parametrize(("does", "raises", "said"), [
    (fails, KeyError, "x"),
    (writes, (fuzz.Failure, PermissionError), "outside"),
    (waits, fuzz.Failure, "no end within 1 s"),
])  # fmt: skip
def test_what_must_not_be_is_seen(does, raises, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "read_examples", does)
    with pytest.raises(raises, match=said):
        fuzz.read_data(fuzz.DataFile("d.jsonl", b"{}", {}, (), False), tmp_path)


@pytest.mark.parametrize("message", ["", "error", "data.train: a\nb", "data.train" + "x" * 9000])
def test_a_message_that_does_not_help_is_seen(message):
    with pytest.raises(fuzz.Failure):
        fuzz.check_message(message, ("data.",))
