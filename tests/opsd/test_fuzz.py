"""A short run of the fuzzer, and that it would see what it is there to see."""

import time
from pathlib import Path

import fuzz
import pytest

COUNTS = {"data": 150, "yaml": 60, "options": 30, "model": 15, "adapter": 15, "directory": 30}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", COUNTS)
def test_random_inputs(kind):
    assert fuzz.fuzz(kind, COUNTS[kind], seed=0) >= COUNTS[kind] // 2  # there may be fewer, but of others none


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
