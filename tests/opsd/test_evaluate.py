import json
import math
import os
import random
from dataclasses import asdict, replace
from itertools import combinations

import pytest
import torch
from _models import lora, model, run_of, tokenizer, write_model, write_rows

from opsd.cli import main
from opsd.data import Row
from opsd.errors import DataError
from opsd.evaluate_model import evaluation_config
from opsd.evaluation import Answer, Evaluator, interval, pass_at, summarise, wilson
from opsd.prompts import Example
from opsd.rollouts import Rollout
from opsd.scorers import scorer_of


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(*scores, **changes):
    fields = {"source": "f:1", "problem": "p", "answer": "a", "text": "t", "length": 4, "truncated": False, **changes}
    return [Answer(score=score, **fields) for score in scores]


def example(problem="1+1?", answer="2", number=1):
    ids = tokenizer()(problem)["input_ids"]
    return Example(Row(problem, None, answer, None, f"f:{number}"), ids, [])


def evaluator(run):
    options, length = run.config.eval, run.config.rollout.max_new_tokens
    return Evaluator.of(options, length, run.config.run.seed, run.tokenizer, run.engine, scorer_of(options))


@pytest.fixture
def spoken(monkeypatch):
    """Models say what the test wants: the texts are given out in turn."""

    def says(*texts):
        ids = [tokenizer()(text)["input_ids"] + [1] for text in texts]
        monkeypatch.setattr("opsd.engines.GenerateEngine.write", lambda *_: [Rollout(i, False) for i in ids])

    return says


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            choices = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at(k, n, right) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_is_unbiased():
    n, k, p = 6, 3, 0.3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(chance * pass_at(k, n, c) for c, chance in enumerate(chances))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_refuses_what_has_no_meaning():
    for k, n, right in ((0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)):
        with pytest.raises(ValueError, match=r"accepted: 1 <= k <= n"):
            pass_at(k, n, right)


def test_of_right_and_wrong_alone_the_interval_is_wilsons():
    for right, n in ((0, 7), (3, 10), (10, 10), (250, 500)):
        values = [1.0] * right + [0.0] * (n - right)
        assert interval(values) == pytest.approx(wilson(right / n, n), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_interval_is_never_empty_and_holds_the_mean(n, value):
    low, high = interval([value] * n)
    assert 0 <= low <= value <= high <= 1
    assert high - low > 1 / (n + 1) ** 1.1


def test_answers_of_one_problem_do_not_count_as_several():
    values = [1.0] * 12 + [0.0] * 28
    alike = summarise([a for v in values for a in answers(*[v] * 8)], 8)
    assert (alike.low, alike.high) == pytest.approx(wilson(0.3, 40), abs=1e-12)
    mixed = summarise([a for i in range(40) for a in answers(*[float((i + j) % 10 < 3) for j in range(10)])], 10)
    assert mixed.accuracy == pytest.approx(0.3)
    assert mixed.high - mixed.low < 0.4 * (alike.high - alike.low)


@pytest.mark.parametrize("problems", [15, 60])
@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("spread", [(0.3, 0.3), (0.2, 2.0), (0.5, 1.5), (8.0, 2.0)])
def test_the_interval_covers_the_truth(problems, samples, spread):
    rng, (a, b) = random.Random(0), spread
    covered, repeats = 0, 600
    for _ in range(repeats):
        chances = [rng.betavariate(a, b) for _ in range(problems)]
        low, high = interval([sum(rng.random() < p for _ in range(samples)) / samples for p in chances])
        covered += low <= a / (a + b) <= high
    assert 0.92 <= covered / repeats <= 0.999


def test_a_summary_counts_what_it_says():
    given = answers(1.0, 0.0, 0.5, 0.5) + answers(0.0, 0.0, 0.0, 0.0, truncated=True, length=8, undecided="why")
    e = summarise(given, 4)
    assert (e.accuracy, e.problems, e.samples, e.mean_length, e.truncated, e.undecided) == (0.25, 2, 4, 6, 0.5, 4)
    assert [p.k for p in e.pass_at] == [1, 2, 4]
    assert [p.value for p in e.pass_at] == [0.125, 0.25, 0.5]  # a half is not right
    assert (e.pass_at[-1].low, e.pass_at[-1].high) == pytest.approx(wilson(0.5, 2))
    read = json.loads(json.dumps(asdict(e)))
    assert read["pass_at"][1] == {"k": 2, "value": 0.25, "low": e.pass_at[1].low, "high": e.pass_at[1].high}
    assert str(e).startswith("25.0% (95 % interval ")
    assert str(e).endswith("2 problems of 4 answers), pass@4 50.0%, 4 answers could not be judged")


@pytest.mark.parametrize(("samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_k_doubles_up_to_the_samples(samples, expected):
    assert [p.k for p in summarise(answers(*[1.0] * samples), samples).pass_at] == expected


def test_an_incomplete_set_of_answers_is_refused():
    for given in ([], answers(1, 1, 1)):
        with pytest.raises(ValueError, match=r"positive multiple of samples, 2"):
            summarise(given, 2)


def test_answers_stay_with_their_problem(spoken):
    run = run_of(model(), eval__samples=2, eval__temperature=1.0)
    spoken("\\boxed{2}", "it is 2", "\\boxed{2}", "\\boxed{4}")
    found = evaluator(run).answers(run.model, [example(), example("2+2?", "4", 2)], "student")
    assert [(a.source, a.problem, a.answer, a.score, a.text) for a in found] == [
        ("f:1", "1+1?", "2", 1.0, "\\boxed{2}"),
        ("f:1", "1+1?", "2", 0.0, "it is 2"),
        ("f:2", "2+2?", "4", 0.0, "\\boxed{2}"),
        ("f:2", "2+2?", "4", 1.0, "\\boxed{4}"),
    ]
    assert found[0].length == len("\\boxed{2}") + 1
    spoken("\\boxed{2}", "it is 2")
    half = replace(evaluator(run), scorer=lambda text, row: 0.5 * (text == "it is 2"))
    given = half(run, run.model, [example()], "student")
    assert given.accuracy == 0.25


def test_answers_are_sampled_with_the_cut_offs_of_the_options():
    options = {"eval__temperature": 50.0, "eval__samples": 2, "eval__max_new_tokens": 8}
    student = model()
    greedy = run_of(student, eval__max_new_tokens=8)
    (expected,) = evaluator(greedy).answers(student, [example()], "student")
    free = evaluator(run_of(student, **options)).answers(student, [example()], "student")
    assert all(a.text != expected.text for a in free)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        run = run_of(student, **options, **{f"eval__{name}": value for name, value in cut.items()})
        assert {a.text for a in evaluator(run).answers(student, [example()], "student")} == {expected.text}, cut


def test_the_scorer_of_the_options_is_used_and_the_undecided_are_counted(tmp_path, spoken):
    body = "from opsd.scorers import Undecided\ndef score(text, row):\n"
    body += "    if text == 'what':\n        raise Undecided('not a number')\n    return text == row.answer\n"
    (tmp_path / "mine.py").write_text(body)
    run = run_of(model(), eval__scorer=f"{tmp_path / 'mine.py'}:score")
    spoken("2", "what")
    found = evaluator(run).answers(run.model, [example(), example()], "student")
    assert [(a.score, a.undecided) for a in found] == [(1.0, None), (0.0, "not a number")]


def test_an_example_without_the_prompt_or_the_answer_is_named():
    run = run_of(model())
    with pytest.raises(DataError, match=r"f:1: .*no solution or teacher_prompt"):
        evaluator(run)(run, run.model, [example()], "teacher")
    with pytest.raises(DataError, match=r"f:3: 'answer' is missing"):
        evaluator(run)(run, run.model, [example(), example(answer=None, number=3)], "student")


@pytest.fixture
def words(tmp_path):
    """The words of an evaluation that takes a second."""
    found = ["eval", "--model", write_model(tmp_path / "base"), "--data", write_rows(tmp_path / "rows.jsonl", 5)]
    found += ["--rollout.max-new-tokens=12", "--run.device=cpu"]
    return list(map(str, found))


def test_command_prints_a_table_and_writes_every_answer(words, tmp_path, capsys):
    # Any text right after the pattern is the answer, so that a random model is sometimes right.
    options = ["--eval.samples=4", "--eval.temperature=1", "--eval.answer_pattern=^(.)", "--eval.max_problems", "3"]
    options += ["--output", str(tmp_path / "new" / "e.json"), "--eval.scorer", f"{tmp_path / 'mine.py'}:score"]
    (tmp_path / "mine.py").write_text("def score(text, row):\n    return len(text) % 2 == 0\n")
    assert main([*words, *options]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("avg@4", "pass@1", "pass@2", "pass@4", "95 %", "truncated", "3 problems"))
    summary, written = json.loads((tmp_path / "new/e.json").read_text()), lines(tmp_path / "new/e.answers.jsonl")
    assert (summary["problems"], summary["samples"], len(written)) == (3, 4, 12)
    assert summary["options"]["eval"]["temperature"] == 1
    assert summary["options"]["rollout"] == {"max_new_tokens": 12}
    assert "optim" not in summary["options"]
    assert summary["accuracy"] == pytest.approx(sum(a["score"] for a in written) / 12)
    again = summarise([Answer(**a) for a in written], 4)
    assert json.loads(json.dumps(asdict(again)))["pass_at"] == summary["pass_at"]
    assert written[4]["source"] == f"{tmp_path / 'rows.jsonl'}:2"
    assert f"avg@4       │ {summary['accuracy']:.1%}" in shown
    assert all(0 < a["length"] <= 12 for a in written)


def test_command_never_overwrites_and_says_so_before_the_model_is_loaded(words, tmp_path, capsys):
    (tmp_path / "e.answers.jsonl").write_text("precious")
    words[2] = str(tmp_path / "no-model")
    assert main([*words, "--output", str(tmp_path / "e.json")]) == 2
    assert "e.answers.jsonl exists" in capsys.readouterr().err
    assert (tmp_path / "e.answers.jsonl").read_text() == "precious"


def test_teacher_context_reads_the_other_prompt(words, tmp_path, monkeypatch):
    from opsd.engines import GenerateEngine

    seen, real = [], GenerateEngine.write
    monkeypatch.setattr(GenerateEngine, "write", lambda e, m, p, *a: seen.append(p) or real(e, m, p, *a))
    assert main([*words, "--context", "teacher", "--output", str(tmp_path / "e.json")]) == 0
    assert "A correct solution" in tokenizer().decode(seen[-1][0])
    assert json.loads((tmp_path / "e.json").read_text())["context"] == "teacher"


def test_an_adapter_is_loaded_onto_its_base(words, tmp_path, capsys):
    adapted = lora(model())
    adapted.peft_config["default"].base_model_name_or_path = words[2]
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    directory = tmp_path / "adapter"
    adapted.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    assert main([*words[:2], str(directory), *words[3:], "--output", str(tmp_path / "a.json")]) == 0
    assert main([*words, "--output", str(tmp_path / "b.json")]) == 0
    of_adapter, of_base = (lines(tmp_path / f"{name}.answers.jsonl") for name in "ab")
    assert [a["text"] for a in of_adapter] != [a["text"] for a in of_base]
    rows = [example(f"{i}+{i}?", str(2 * i), i + 1) for i in range(5)]
    config, _ = evaluation_config(words[2], words[4], overrides=[("rollout.max_new_tokens", 12)])
    rendered = [config.prompts.student.replace("{problem}", e.row.problem) for e in rows]
    rows = [Example(e.row, tokenizer()(text)["input_ids"], []) for e, text in zip(rows, rendered, strict=True)]
    expected = evaluator(run_of(adapted)).answers(adapted, rows, "student")
    assert [a["text"] for a in of_adapter] == [a.text for a in expected]

    described = json.loads((directory / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "gone")
    (directory / "adapter_config.json").write_text(json.dumps(described))
    capsys.readouterr()
    assert main([*words[:2], str(directory), *words[3:]]) == 2
    error = capsys.readouterr().err
    assert "adapter_config.json names a base model that cannot be loaded" in error
    assert "gone" in error


@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_of_a_run_is_evaluated_as_in_the_run(words, tmp_path, capsys, adapted):
    options = {
        "model.path": words[2],
        "data.train": words[4],
        "data.eval": words[4],
        "lora.enabled": adapted,
        "prompts.student": "Say {problem} ",
        "prompts.teacher": "Say {problem} {solution}",
        "rollout.max_new_tokens": 8,
        "eval.max_new_tokens": 10,
        "eval.samples": 4,
        "eval.temperature": 1.0,
        "eval.answer_pattern": "([0-9])",
        "eval.max_problems": 4,
        "optim.steps": 1,
        "optim.batch_size": 2,
        "optim.lr": 1e-3,
        "run.seed": 3,
        "run.device": "cpu",
        "run.dir": tmp_path / "out",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    expected = json.loads((tmp_path / "out/summary.json").read_text())["evaluations"]["trained"]
    command = ["eval", "--model", str(tmp_path / "out/model"), "--data", words[4], "--run.device=cpu"]
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "e.json")]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"defaults from {tmp_path / 'out/config.yaml'}: prompts.student 'Say {{problem}} '")
    assert "eval.samples 4" in said
    summary = json.loads((tmp_path / "e.json").read_text())
    assert {name: summary[name] for name in expected} == expected

    # Only what the user gives differs, from a file or from the command line.
    (tmp_path / "c.yaml").write_text("eval: {max_new_tokens: 5, max_problems: 2}\noptim: {lr: 1}\n")
    given = ["--config", str(tmp_path / "c.yaml"), "--eval.max-problems=3", "--output", str(tmp_path / "f.json")]
    assert main([*command, *given]) == 0
    assert "eval.max_new_tokens" not in capsys.readouterr().out
    changed = json.loads((tmp_path / "f.json").read_text())["options"]
    assert changed["eval"] == {**summary["options"]["eval"], "max_new_tokens": 5, "max_problems": 3}
    assert changed["prompts"] == summary["options"]["prompts"]


def test_a_config_may_be_a_pipe(words):
    reading, writing = os.pipe()
    os.write(writing, b"eval: {max_problems: 2}")
    os.close(writing)
    config, _ = evaluation_config(words[2], words[4], f"/dev/fd/{reading}")
    os.close(reading)
    assert config.eval.max_problems == 2


def test_a_config_of_another_program_is_not_a_runs(words, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("server: {port: 80}\n")
    assert main(words) == 0
    assert "defaults of opsd, since above the model is no run: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--model", "/nowhere/at-all"], ["model.path: there is no directory /nowhere/at-all"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl: cannot be read"]),
        (["--optim.lr", "1"], ["optim.lr changes nothing in an evaluation"]),
        (["--rollout.top-p", "0.9"], ["rollout.top-p changes nothing"]),
        (["--eval.samples", "2"], ["eval.samples > 1 with eval.temperature 0"]),
        (["--eval.sample", "2"], ["unknown option 'eval.sample'", "eval.samples"]),
        (["--eval.scorer", "absent.py:f"], ["eval.scorer", "absent.py"]),
        (["--eval.scorer", "math:isfinite"], ["called with (text, row)"]),
        (["--eval.max_new_tokens", "5000"], ["eval.max_new_tokens adds 5000", "2048"]),
        (["--run.device", "cuda"], ["run.device is cuda"] if not torch.cuda.is_available() else []),
        (["--config", "absent.yaml"], ["absent.yaml: cannot be read as YAML"]),
    ],
)
def test_unusable_input_ends_with_code_2_and_says_why(words, capsys, changes, parts):
    assert main([*words, *changes]) == 2 or not parts
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("has", "said"),
    [(("model", "best"), "its model is {0}/model or {0}/best"), (("best",), "{0}/best"), ((), "--resume {0} goes on")],
)
def test_a_run_directory_and_a_checkpoint_are_no_models(words, tmp_path, capsys, has, said):
    run = tmp_path / "out"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    for name in has:
        (run / name).mkdir()
    (run / "run.json").write_text("{}")
    assert main([*words[:2], str(run), *words[3:]]) == 2
    error = capsys.readouterr().err
    assert f"model.path '{run}' is a run directory; " in error
    assert said.format(run) in error
    assert main([*words[:2], str(run / "checkpoints" / "step-00000002"), *words[3:]]) == 2
    assert f"is a checkpoint, which is no model; opsd train --resume {run} finishes" in capsys.readouterr().err


def test_reason_first_in_a_file_changes_nothing(words, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1?", "teacher_prompt": "look", "answer": "2"}\n')
    (tmp_path / "c.yaml").write_text("teacher: {reason_first: true}\n")
    assert main([*words, "--config", str(tmp_path / "c.yaml")]) == 0


def test_help_lists_what_is_accepted_and_nothing_else(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}  [" in shown for name in ("eval.top-p", "rollout.max-new-tokens", "run.seed", "model.path"))
    absent = ("optim", "lora", "teacher.", "rollout.temperature", "eval.every", "data.train", "run.dir")
    assert not any(f"--{name}" in shown for name in absent)
    assert "optim:" not in shown


def test_the_version_is_told(capsys, monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    for version, expected in ((lambda name: f"1.2 of {name}", "opsd 1.2 of opsd\n"), (absent, "opsd unknown\n")):
        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(SystemExit) as stopped:
            main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out == expected


def test_model_and_data_are_asked_for(capsys):
    assert main(["eval", "--data", "f"]) == 2
    assert main(["eval", "--model", "m"]) == 2
    error = capsys.readouterr().err
    assert "model.path is not given" in error
    assert "data.eval is not given" in error


def test_rows_without_answers_and_without_solutions_are_named(words, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+2?", "solution": "3"}\n')
    assert main(words) == 2
    assert "rows.jsonl:2: 'answer' is missing" in capsys.readouterr().err
    path.write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert main([*words, "--context", "teacher"]) == 2
    assert "rows.jsonl:1: has nothing that the teacher may read" in capsys.readouterr().err


def test_a_fault_of_the_users_scorer_shows_before_the_model_is_loaded(words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(text, row):\n    return text\n")
    words[2] = str(tmp_path / "no-model")
    tokenizer().save_pretrained(words[2])
    assert main([*words, "--eval.scorer", f"{tmp_path / 'mine.py'}:score"]) == 2
    assert "mine.py:score' returned ''" in capsys.readouterr().err
