"""Models whose result depends on the batch they are in: found at set-up, and run so that it does not matter."""

import json
from unittest import mock

import pytest
import torch
from test_faults_model import command, refused, write
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama

from opsd.cli import main, parse_overrides
from opsd.config import load_config
from opsd.plugins import Parts
from opsd.setup import set_up

PROMPTS = ["--prompts.student={problem}", "--prompts.teacher={problem} {solution}"]


def peaked(directory, kind, **changes):
    """A model whose tokens depend on those before them."""
    model = AutoModelForCausalLM.from_pretrained(write(directory, kind, **changes))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "A_log" not in name and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


def rows(directory, lengths):
    lines = [json.dumps({"problem": "x1+" * n, "solution": "s", "answer": "1"}) + "\n" for n in lengths]
    (directory / "d.jsonl").write_text("".join(lines))
    return directory / "d.jsonl"


def prepared(model, data, *options):
    return set_up(load_config(None, parse_overrides([*command(model, data)[1:], *PROMPTS, *options])), Parts())


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 1e4}
KINDS = {
    "longrope": ("phi3", {"bos_token_id": 3, "max_position_embeddings": 512, "original_max_position_embeddings": 30,
                          "rope_parameters": LONGROPE}),
    "window": ("mistral", {"sliding_window": 16}),
    "mask only": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 16}),
    "chunks": ("mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "state_size": 8}),
    "recurrent": ("rwkv", {"attention_hidden_size": 16}),
    "state": ("mamba", {}),
    "conv": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "hybrid": ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 16}),
    "local": ("gpt_neo", {"attention_types": [[["local", "global"], 1]], "window_size": 8, "num_layers": 2,
                          "num_heads": 2, "bos_token_id": 1}),
}  # fmt: skip
ALONE = {"longrope": (True, True), "recurrent": (False, True), "hybrid": (False, True)}  # whether scored and written so


@pytest.mark.parametrize("kind", KINDS)
def test_neither_answers_nor_losses_depend_on_the_batch(kind, tmp_path):
    name, changes = KINDS[kind]
    model, data = peaked(tmp_path / "m", name, **changes), rows(tmp_path, [1, 15, 3, 9])
    losses = []
    for size in (1, 4):
        out = tmp_path / str(size)
        options = [f"--run.dir={out}", "--optim.batch-size=4", f"--optim.micro-batch-size={size}"]
        options += [f"--rollout.batch-size={size}", "--rollout.max-new-tokens=6"]
        assert main([*command(model, data), *PROMPTS, *options]) == 0
        losses.append(json.loads((out / "metrics.jsonl").read_text())["loss"])
    assert losses[0] > 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    texts = []
    for size in (1, 4):
        out = tmp_path / f"eval{size}.json"
        options = [f"--eval.batch-size={size}", "--rollout.max-new-tokens=6", f"--output={out}", PROMPTS[0]]
        assert main(command(model, data, *options, evaluate=True)) == 0
        texts.append([json.loads(line)["text"] for line in out.with_suffix(".answers.jsonl").read_text().splitlines()])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_set_up_says_what_runs_alone(kind, tmp_path):
    name, changes = KINDS[kind]
    setup = prepared(peaked(tmp_path / "m", name, **changes), rows(tmp_path, [1, 15]))
    scored, written = ALONE.get(kind, (False, False))
    assert setup.run.packed == (kind == "window")
    assert setup.run.alone == scored
    assert (setup.run.engine.alone is not None) == written
    assert len(setup.notes) == 1 + written
    assert setup.notes[0].startswith("scoring: one rollout at a time, since " if scored else "scoring: pa")
    if written:
        assert setup.notes[1].startswith("writing: one prompt at a time, since ")


def test_a_rotary_embedding_changes_for_no_run_below_its_border(tmp_path, capsys):
    name, changes = KINDS["longrope"]
    model = peaked(tmp_path / "m", name, **changes)
    below = prepared(model, rows(tmp_path, [1, 8]), "--rollout.max-new-tokens=4")  # 24 + 2 + 4 tokens
    assert below.run.packed
    assert len(below.notes) == 1
    above = prepared(model, rows(tmp_path, [1, 8]), "--rollout.max-new-tokens=5")
    assert not above.run.packed
    assert "longer than 30, and one has 31 tokens" in above.notes[0]
    said = refused([*command(model, rows(tmp_path, [1, 9])), *PROMPTS, "--model.packing=on"], capsys)
    assert "longer than 30, and one has 31 tokens" in said
    assert not (tmp_path / "out").exists()


def test_a_window_in_the_mask_alone_is_found_by_a_trial_beyond_it(tmp_path, monkeypatch):
    def windowed(config, **given):
        with mock.patch.object(config, "sliding_window", config.mask_window, create=True):
            return create_sliding_window_causal_mask(config, **given)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    model = peaked(tmp_path / "m", "llama", mask_window=20)
    short, long = (prepared(model, rows(tmp_path, [n])) for n in (3, 15))
    assert short.run.packed  # no context reaches the end of the window
    assert not long.run.packed
    assert "on a few tokens the student's packed rows are not those of a plain pass" in long.notes[0]


def test_a_model_that_reads_what_comes_later_is_refused(tmp_path, capsys):
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "bos_token_id": 3}
    model, data = peaked(tmp_path / "m", "xlnet", **sizes), rows(tmp_path, [3])
    said = refused(command(model, data), capsys)
    assert "what XLNetLMHeadModel computes for a token depends on the tokens after it" in said
    assert not (tmp_path / "out").exists()


def test_other_teachers_are_tried_too(tmp_path):
    model, data = peaked(tmp_path / "m", "mamba"), rows(tmp_path, [1, 15])
    name, changes = KINDS["recurrent"]
    teacher = peaked(tmp_path / "t", name, **changes)
    setup = prepared(model, data, "--teacher.kind=model", f"--teacher.path={teacher}")
    assert setup.notes[1:] == ["writing: one prompt at a time, since RwkvForCausalLM continues padded prompts "
                               "otherwise than single ones"]  # fmt: skip
