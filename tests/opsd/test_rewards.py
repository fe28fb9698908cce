"""Rewards of rollouts in training, and the recipes that ask for them."""

import dataclasses
import json
import math

import pytest
import torch
from _models import examples, model, run_of, write_model, write_rows

from opsd import recipes
from opsd.cli import main
from opsd.errors import ConfigError
from opsd.recipes.in_loop import lacking, why_lacking
from opsd.rewards import advantages
from opsd.rollouts import Rollout
from opsd.scoring import rollout_hidden, rollout_index, stream_of
from opsd.step import opsd_step

IDS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 1], [15, 16], [17, 18, 1], [20, 21, 22]]
REWARDS = {"".join(map(str, ids)): reward for ids, reward in zip(IDS, (1.0, 0.0, 0.25, 0.25, 0.0, 0.75), strict=True)}


def test_advantages():
    rewards = [1.0, 0.0, 0.25, 0.25, 0.0, 0.75]
    assert advantages(rewards, 2, "raw") == rewards
    assert advantages(rewards, 2, "centred") == [0.5, -0.5, 0.0, 0.0, -0.375, 0.375]
    assert advantages(rewards, 2, "normalised") == [1.0, -1.0, 0.0, 0.0, -1.0, 1.0]
    # mean 2, variance (4 + 0 + 4) / 3
    assert advantages([0.0, 2.0, 4.0], 3, "normalised") == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


class Words:
    """Decodes to the ids themselves, in a row."""

    def batch_decode(self, ids, **_):
        return ["".join(map(str, own)) for own in ids]


@pytest.mark.parametrize("name", ["rlsd", "rlrt", "zppo", "temporal", "egrsd", "spear", "ta_opd"])
def test_a_rewarded_recipe_in_the_loop_is_the_mean_of_its_token_losses(monkeypatch, name):
    student = model("qwen3").double().eval()
    rollouts = [Rollout(ids, False, None) for ids in IDS]
    monkeypatch.setattr("opsd.engines.GenerateEngine.rollouts", lambda *_: rollouts)
    options = {"objective__recipe": name, "rollout__per_prompt": 2, "optim__batch_size": 3, "optim__steps": 10}
    chosen = examples()[:3]
    repeated = [example for example in chosen for _ in range(2)]
    rows = rollout_hidden(student, [e.student for e in repeated], IDS)
    teacher = rollout_hidden(student, [e.teacher for e in repeated], IDS).detach()
    targets, sequences = rollout_index(IDS, rows.device)
    spread = [1.0, -1.0, 0.0, 0.0, -1.0, 1.0]
    right = [True, False, False, False, False, True]
    batch = recipes.TokenBatch(
        target_ids=targets,
        sequence_ids=sequences,
        advantage=torch.tensor(spread)[sequences],
        correct=torch.tensor(right)[sequences],
        progress=0.4,
    )
    run = run_of(student, **options, optim__micro_batch_size=6)
    contexts = {"teacher": stream_of(teacher, run.head)}
    losses, stats = recipes.make(name).token_loss(stream_of(rows, run.head), contexts, batch)
    mean = losses.sum() / stats.get("mask", torch.ones_like(losses)).sum()  # TA-OPD's is over the tokens that it keeps
    mean.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    for packed, size in ((False, 6), (True, 6), (True, 2)):
        if size == 2 and name in ("egrsd", "ta_opd"):
            continue  # refused, see below
        student.zero_grad()
        run = run_of(student, **options, optim__micro_batch_size=size)
        reward = lambda text, row: REWARDS[text]  # noqa: E731
        run = dataclasses.replace(run, packed=packed, reward=reward, tokenizer=Words())
        result = opsd_step(run, chosen, 5)
        assert result.metrics["reward"] == pytest.approx(2.25 / 6)
        torch.testing.assert_close(result.loss, mean.detach().to(result.loss), rtol=1e-5, atol=1e-8)
        for n, p in student.named_parameters():
            torch.testing.assert_close(p.grad, expected[n], rtol=0, atol=3e-6 * expected[n].abs().max().item() + 1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective__recipe": "rlsd"}, "rollout.per_prompt must be at least 2, or objective.advantage 'raw'"),
        (
            {"objective__recipe": "egrsd", "rollout__per_prompt": 2, "optim__batch_size": 4},
            "optim.micro_batch_size must be at least 8, optim.batch_size times rollout.per_prompt, not 4",
        ),
    ],
)
def test_what_a_rewarded_recipe_needs_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        run_of(model(), **options)


def test_training_by_a_users_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def length(text, row):\n    return min(1.0, len(text) / 12)\n")
    options = {
        "model.path": write_model(tmp_path / "base"),
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "objective.recipe": "rlsd",
        "eval.scorer": f"{tmp_path / 'mine.py'}:length",
        "rollout.per_prompt": 3,
        "rollout.max_new_tokens": 12,
        "optim.steps": 2,
        "optim.batch_size": 3,
        "optim.lr": 1e-3,
        "run.device": "cpu",
        "run.dir": tmp_path / "out",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["reward"] <= 1 for record in records)


def test_rows_without_an_answer_are_refused_where_answers_are_the_reward(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "solution": "2"}\n')
    words = ["--model.path", write_model(tmp_path / "base"), "--data.train", str(tmp_path / "rows.jsonl")]
    words += ["--objective.recipe", "rlsd", "--rollout.per_prompt", "2", "--run.dir", str(tmp_path / "out")]
    assert main(["train", *map(str, words)]) == 2
    assert "rows.jsonl:1: 'answer' is missing" in capsys.readouterr().err


def test_the_loop_has_all_for_these():
    able = {name for name in recipes.names() if not lacking(recipes.make(name))}
    assert able >= {"purified", "ar_opd", "edge_opd", "rlsd", "rlrt", "egrsd", "cl_egrsd", "npo", "sdpo", "temporal"}
    assert able >= {"zppo", "act_guide", "spear", "ta_opd"}
    assert able >= {"cepo", "credit", "lightning", "mad_opd", "nca"}
    assert sorted({*recipes.names()} - able) == ["anti_sd", "copd", "d_opsd", "omni_opd", "oprd", "pbsd", "tad"]
    for name in {*recipes.names()} - able:
        assert why_lacking(recipes.make(name)), name
    assert not lacking(recipes.make("anti_sd", plain=True))
