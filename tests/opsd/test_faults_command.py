"""What the command is given and cannot use, and where it cannot show what it says: one line, or no word, never a
traceback, and nothing of a run is lost."""

import io
import os
import subprocess
import sys

import pytest
from _models import write_model, write_rows

from opsd import train
from opsd.cli import main


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Options of a run of one step, by the words of a command line."""
    directory = tmp_path_factory.mktemp("setup")
    options = {
        "model.path": write_model(directory / "model"),
        "data.train": write_rows(directory / "train.jsonl", 2, teacher_prompt="é"),
        "optim.steps": 1,
        "optim.batch_size": 2,
        "rollout.max_new_tokens": 4,
        "run.device": "cpu",
    }
    return {name: str(value) for name, value in options.items()}


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full():
    return open("/dev/full", "w", encoding="utf-8")


def ascii_only():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = pytest.mark.parametrize("stream", [nobody_reads, full, ascii_only])
"""Where text cannot be shown."""


@STREAMS
def test_a_run_ends_well_where_its_words_cannot_be_shown(stream, setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert main(["train", *words({**setup, "run.dir": tmp_path / "é"})]) == 0
    assert (tmp_path / "é" / "summary.json").is_file()
    if stream is ascii_only:
        sys.stdout.seek(0)
        assert "\\xe9" in sys.stdout.read()


@STREAMS
def test_so_does_a_run_from_python(stream, setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert train({**nested(setup), "run": {"dir": str(tmp_path / "é"), "device": "cpu"}}).summary["steps"] == 1


def nested(options):
    sections: dict[str, dict[str, str]] = {}
    for name, value in options.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    return sections


@STREAMS
@pytest.mark.parametrize(("argv", "code"), [
    (["train", "--print-config"], 0),
    (["train", "--print-config", "--optim.steps", "é"], 2),
    (["report", "é"], 2),
])  # fmt: skip
def test_no_command_changes_its_exit_code(stream, argv, code, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert main(argv) == code


def test_what_finds_no_room_is_shown_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", full())
    assert main(["train", "--print-config"]) == 0
    assert "keep_checkpoints: 2" in capsys.readouterr().err


def test_python_ends_with_the_commands_own_exit_code():
    # Its last flush fails after the command has returned, which no test within the process sees.
    for stream in (nobody_reads(), full()):
        with stream:
            done = subprocess.run(
                [sys.executable, "-m", "opsd", "train", "--print-config"], stdout=stream, stderr=subprocess.PIPE
            )
        assert done.returncode == 0
        assert b"Exception" not in done.stderr


def test_without_standard_streams(setup, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["train", *words({**setup, "run.dir": tmp_path / "out"})]) == 0
