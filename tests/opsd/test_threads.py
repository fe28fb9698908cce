"""The advice about threads that wait for each other."""

import pytest
import torch
from _models import model, tokenizer

import opsd
from opsd import threads
from opsd.threads import Timing, judge


@pytest.fixture
def two():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_that_wait_are_told_of():
    said = judge(Timing(3.0, 6.0), Timing(1.0, 1.0), 2)
    assert "2 threads take 3.0 times as long as one" in said
    assert "6.0 times as much of the cores" in said
    assert "--run.threads 1" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("all_", "one"),
    [
        (Timing(0.5, 1.0), Timing(1.0, 1.0)),  # twice as fast
        (Timing(0.9, 1.8), Timing(1.0, 1.0)),  # hardly faster, but faster
        (Timing(1.2, 1.2), Timing(1.0, 1.0)),  # slower for want of the core, not for waiting
    ],
)
def test_of_others_nothing_is_said(all_, one):
    assert judge(all_, one, 2) is None


def test_what_is_timed_and_what_is_left_as_it_was(two, monkeypatch):
    now, counts = [0.0], []
    mm = torch.mm

    def slow(left, right):  # with two threads three times as slow as with one, on a clock of its own
        counts.append(torch.get_num_threads())
        now[0] += 3.0 if counts[-1] == 2 else 1.0
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(threads.time, "process_time", lambda: now[0] * torch.get_num_threads())
    assert "2 threads take 3.0 times as long" in threads.advice()
    assert set(counts) == {1, 2}
    assert torch.get_num_threads() == 2


def test_one_thread_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "mm", None)
    assert threads.advice() is None


def test_a_run_says_it_before_its_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "advice", lambda: "2 threads wait")
    model("qwen3").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"problem": "1 + 1", "solution": "2"}\n')
    options = {
        "model.path": str(tmp_path / "model"), "data.train": str(tmp_path / "train.jsonl"), "optim.steps": 1,
        "optim.batch_size": 1, "rollout.max_new_tokens": 2, "run.device": "cpu", "run.dir": str(tmp_path / "run"),
    }  # fmt: skip
    opsd.train(opsd.load_config(None, options.items()))
    assert "2 threads wait" in "".join(capsys.readouterr())
