"""The loop on a device: its runs are those of the CPU, whatever is trained and how, and go on after a stop."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from _models import model, tokenizer, write_rows

from opsd.cli import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = {
    "whole model": {},
    "padded": {"model.packing": "off"},
    "padding columns": {"vocab": 4099},
    "forward KL": {"objective.beta": 0.0},
    "top k": {"objective.top_k": 8, "objective.tail_bucket": "true"},
    "checkpointing": {"model.gradient_checkpointing": "true"},
    "average": {"teacher.kind": "ema"},
    "adapters": {"lora.enabled": "true", "lora.r": 4},
    "rewards": {"objective.recipe": "rlsd", "rollout.per_prompt": 2},
    "three contexts": {"objective.recipe": "purified"},
    "siblings": {"objective.recipe": "sdpo", "rollout.per_prompt": 2},
    "sampled tokens": {"objective.recipe": "lightning"},
    "vanilla attention": {"model.attn_implementation": "eager"},
}


def words(directory: Path, device: str, **options: object) -> list[str]:
    base = directory / "base"
    if not base.exists():
        model("qwen3", **{"vocab_size": options["vocab"]} if "vocab" in options else {}).save_pretrained(base)
        tokenizer().save_pretrained(base)
    given = {
        "model.path": base,
        "data.train": write_rows(directory / "train.jsonl"),
        "optim.steps": 2,
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "optim.lr": 1e-4,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 12,
        "run.save": "false",
        "run.dir": directory / device,
        "run.device": device,
        **options,
    }
    return ["train", *(f"--{name}={value}" for name, value in given.items() if name != "vocab")]


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    if "lora.enabled" in options and importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft")
    for device in ("cpu", "cuda"):
        assert main(words(tmp_path, device, **options)) == 0
    compared = 0
    for on_cpu, on_gpu in zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "cuda"), strict=True):
        for name in on_cpu.keys() - {"top_k_overlap", "warnings", "tokens_per_second"}:
            if not name.startswith(("seconds", "peak")):
                assert on_gpu[name] == pytest.approx(on_cpu[name], rel=2e-3, abs=1e-5), name
                compared += 1
    assert compared > 2 * 8


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(autocast: str, tmp_path: Path) -> None:
    options = {"model.autocast": autocast, "run.checkpoint_every": 2}
    whole = words(tmp_path, "cuda", **options | {"optim.steps": 4})
    assert main(whole) == 0
    part = tmp_path / "part"
    assert main([*words(tmp_path, "cuda", **options), f"--run.dir={part}"]) == 0
    assert main(["train", f"--resume={part}", "--optim.steps=4"]) == 0
    for one, own in zip(metrics(tmp_path / "cuda"), metrics(part), strict=True):
        for name in ("loss", "divergence", "rollout_length", "lr"):
            assert own[name] == pytest.approx(one[name], rel=1e-2), name
