"""`opsd compare`: what it trains, what it makes of it, and that nothing is done twice."""

import json

import pytest
from _models import write_model, write_rows

from opsd import compare, trainer
from opsd.cli import main
from opsd.compare import estimate
from opsd.errors import ConfigError, Interrupted
from opsd.evaluation import Evaluation


def evaluated(accuracy, problems=1000):
    return {"accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01, "problems": problems}


@pytest.fixture
def options(tmp_path):
    return {
        "model.path": write_model(tmp_path / "base"),
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "data.eval": write_rows(tmp_path / "eval.jsonl", 3),
        "optim.steps": 2,
        "optim.batch_size": 3,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 6,
        "eval.every": 1,
        "run.device": "cpu",
        "run.checkpoint_every": 1,
    }


def run(options, tmp_path, names, seeds=2, output="out", **changed):
    words = [f"--{name}={value}" for name, value in {**options, **changed}.items()]
    return main(["compare", "--recipes", names, "--seeds", str(seeds), "--output", str(tmp_path / output), *words])


def of_steps(directory):
    return {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}


def test_intervals_are_those_of_the_seeds_or_of_the_problems_whichever_says_less():
    # 0.6 ± t(0.975, 2) · 0.1 / √3
    apart = estimate([evaluated(0.5), evaluated(0.6), evaluated(0.7)])
    assert (apart.value, apart.low, apart.high) == pytest.approx((0.6, 0.3516, 0.8484), abs=1e-4)
    # scipy.stats.binomtest(150, 300).proportion_ci(method="wilson")
    alike = estimate([evaluated(0.5, 100)] * 3)
    assert (alike.low, alike.high) == pytest.approx((0.4437, 0.5563), abs=1e-4)
    assert estimate([evaluated(0.5)]) == compare.Estimate(0.5, 0.49, 0.51)
    certain = estimate([evaluated(1.0, 10)] * 3)
    assert certain.high == 1.0
    assert certain.low < 0.9


def test_each_method_trains_from_the_same_seeds_with_its_own_loss(options, tmp_path, capsys):
    assert run(options, tmp_path, "full,sampled_token,sdft") == 0
    out = tmp_path / "out"
    result = json.loads((out / "compare.json").read_text())
    assert list(result["methods"]) == ["full", "sampled_token", "sdft"]
    losses = {}
    for name, found in result["methods"].items():
        for seed, one in enumerate(found["runs"]):
            directory = out / f"{name}-seed-{seed}"
            summary = json.loads((directory / "summary.json").read_text())
            trained = Evaluation.of(summary["evaluations"]["trained"])
            assert (one["seed"], one["accuracy"], one["low"]) == (seed, trained.accuracy, trained.low)
            assert [step for step, _ in one["curve"]] == [0, 1, 2]
            first = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
            losses[name, seed] = first["loss"], first["rollout_length"]
        assert found["value"] == pytest.approx(sum(one["accuracy"] for one in found["runs"]) / 2)
    for seed in (0, 1):  # the first rollouts are the same, what is made of them is not
        assert len({losses[name, seed][1] for name in result["methods"]}) == 1
        assert len({losses[name, seed][0] for name in result["methods"]}) == 3
    assert losses["full", 0] != losses["full", 1]
    shown = capsys.readouterr().out
    assert "[6/6] sdft, seed 1" in shown
    lines = (out / "compare.md").read_text().splitlines()
    assert len(lines) == 2 + 2 + 3
    assert (out / "compare.png").stat().st_size > 10_000


def test_what_is_there_is_kept_and_what_was_stopped_goes_on(options, tmp_path, monkeypatch):
    out, began, train = tmp_path / "out", [], trainer.train

    def stopped(config, **rest):
        began.append(config.run.dir)
        if len(began) == 2:
            rest["evaluate"] = lambda *_: 1 / 0  # after nothing was trained, as a kill would
            with pytest.raises(ZeroDivisionError):
                train(config, **rest)
            raise Interrupted(15, "stopped")
        return train(config, **rest)

    monkeypatch.setattr(trainer, "train", stopped)
    with pytest.raises(Interrupted):
        compare.compare(["full"], 2, out, overrides=options.items(), quiet=True, say=lambda _: None)
    kept = of_steps(out)
    assert list(kept) == ["full-seed-0"]
    assert run(options, tmp_path, "full,sampled_token", 2) == 0
    assert of_steps(out)["full-seed-0"] == kept["full-seed-0"]
    kept = of_steps(out)
    assert len(kept) == 4
    before = (out / "compare.json").read_text()
    assert run(options, tmp_path, "full,sampled_token", 2) == 0
    assert of_steps(out) == kept
    assert (out / "compare.json").read_text() == before
    # alone, the run that was stopped comes out the same
    assert run(options, tmp_path, "full", 1, "other", **{"run.seed": 1}) == 0
    again = json.loads((tmp_path / "other/compare.json").read_text())["methods"]["full"]["runs"][0]
    assert again["curve"] == json.loads(before)["methods"]["full"]["runs"][1]["curve"]


@pytest.mark.parametrize(
    ("names", "changed", "said"),
    [
        ("full,nothing", {}, "'nothing'; accepted: full, sampled_token, act_guide"),
        ("oprd", {}, "oprd, which the loop cannot train with: it has no 'layers'"),
        ("full,rlsd", {}, "objective.recipe rlsd compares the rollouts of a prompt: rollout.per_prompt must be"),
        ("full,full", {}, "each once"),
        ("full", {"objective.form": "full"}, "--objective.form has no meaning"),
        ("full", {"run.dir": "x"}, "--run.dir has no meaning"),
        ("full", {"data.eval": ""}, "data.eval"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(options, tmp_path, capsys, names, changed, said):
    assert run(options, tmp_path, names, **changed) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comparison_keeps_its_options(options, tmp_path, capsys):
    with pytest.raises(ConfigError, match="accepted: 1 to 10"):
        compare.compare(["full"], 11, tmp_path / "out", overrides=options.items())
    assert run(options, tmp_path, "full", 1) == 0
    assert run(options, tmp_path, "full", 1, **{"optim.lr": 2e-3}) == 2
    assert "optim.lr is 0.002, the comparison in" in capsys.readouterr().err
