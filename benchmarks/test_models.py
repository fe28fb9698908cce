"""The table of models: what its verdicts rest on."""

import math
import os
import time

import pytest

from benchmarks import models

FINE, NO = {"error": 1e-7}, {"reason": "model X cannot run on packed rows: it is odd"}


@pytest.mark.parametrize(
    ("head", "two", "joint", "padded", "verdict"),
    [
        (FINE, FINE, FINE, FINE, "packed"),
        (FINE, FINE, NO, FINE, "two passes"),
        (FINE, NO, NO, FINE, "padded"),
        (FINE, NO, NO, {"error": 0.3}, "refused"),
        (NO, FINE, FINE, FINE, "refused"),
        (FINE, FINE, {"error": 1e-3}, FINE, "wrong"),
        (FINE, {"error": math.inf}, NO, FINE, "wrong"),
        ({"error": math.nan}, FINE, FINE, FINE, "wrong"),
    ],
)
def test_a_figure_that_is_off_is_never_called_working(head, two, joint, padded, verdict):
    found = {"head": head, "two": two, "joint": joint, "padded": padded}
    assert models.verdict(found) == verdict
    assert verdict == "packed" or models.reason({"verdict": verdict, **found})
    row = models.table({"models": {"x": {"verdict": verdict}}})
    assert f"| {models.VERDICTS[verdict]} | 1 | x |" in row


def test_a_process_that_ends_badly_or_never_is_a_result(monkeypatch):
    monkeypatch.setattr(models, "examine", lambda _: os._exit(3))
    assert models.in_a_process("x", 30)["reason"] == "its process ended with code 3"
    monkeypatch.setattr(models, "examine", lambda _: time.sleep(60))
    assert models.in_a_process("x", 0.5) == {"verdict": "not built", "reason": "took more than 0.5 s"}


def test_a_model_is_examined():
    found = models.examine("qwen3")
    assert found["verdict"] == "packed"
    assert all(found[k]["error"] <= models.LIMIT for k in ("head", "two", "joint", "padded"))
    refused = models.examine("electra")
    assert found["written alone"] is None
    assert models.examine("rwkv")["written alone"].startswith("RwkvForCausalLM continues padded prompts otherwise")
    assert refused["verdict"] == "refused"
    assert "not understood" in refused["head"]["reason"]
