"""What recipes' contexts read: the user's columns and templates, other rollouts of a prompt, other rows' problems."""

import dataclasses
import json

import pytest
import torch
from _models import model, run_of, tokenizer, write_model, write_rows

from opsd import recipes
from opsd.cli import main
from opsd.data import Row
from opsd.errors import ConfigError, DataError
from opsd.options import PromptsConfig
from opsd.prompts import Prompter
from opsd.rewards import Rewards
from opsd.rollouts import Rollout
from opsd.scoring import rollout_hidden, rollout_index, stream_of
from opsd.siblings import readers, siblings
from opsd.step import opsd_step

WORDS = tokenizer()
PLAIN = {"student": "Q {problem}", "teacher": "Q {problem} S {solution}"}


def row(number=1, **record):
    return Row(f"{number}+1?", f"it is {number + 1}", str(number + 1), None, f"file:{number}", record)


def prompter(*contexts, **templates):
    given = {"contexts": json.dumps(templates)} if templates else {}
    return Prompter(WORDS, PromptsConfig(**PLAIN, **given), contexts=contexts)


def text(ids):
    return WORDS.decode(ids)


@pytest.mark.parametrize("name", ["rubric", "feedback", "translation", "construction", "wrong_answer"])
def test_a_named_template_reads_the_column_of_that_name(name):
    own = prompter(teacher=name)
    read = text(own.encode(row(**{name: "the <very> {problem} text"})).teacher)
    assert read.startswith("1+1?\n\n")
    assert "\n\nthe <very> {problem} text\n\n" in read
    assert "it is 2" not in read
    for record in ({}, {name: None}, {name: "  "}):
        with pytest.raises(DataError, match=rf"file:1: '{name}' is missing, which the context 'teacher' reads"):
            own.encode(row(**record))
    with pytest.raises(DataError, match=rf"file:1: '{name}' is list, expected text or a number"):
        own.encode(row(**{name: ["a"]}))
    with pytest.raises(DataError, match="its text has '<end>', which would become the special token"):
        own.encode(row(**{name: "a <end> b"}))
    assert own.for_evaluation().encode(row()).teacher == []  # an evaluation without it leaves the teacher out


def test_a_template_of_the_users_own_reads_any_column():
    own = prompter("positive", "negative", teacher="{problem} F {note} {solution}", negative="{problem} W {gold}")
    example = own.encode(row(note="n", gold=7))
    assert text(example.teacher) == text(example.contexts["positive"]) == "1+1? F n it is 2"
    assert text(example.contexts["negative"]) == "1+1? W 7"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[1]", "accepted: a JSON object of templates"),
        ('{"teacher": 1}', "accepted: a JSON object of templates"),
        ('{"base": "{problem}"}', "prompts.contexts has 'base'; accepted: teacher, positive"),
        ('{"teacher": "rubrik"}', "has 'rubrik' for teacher; accepted: a template with a {column}, or rubric"),
    ],
)
def test_templates_that_cannot_be_are_refused(given, said):
    with pytest.raises(ConfigError, match=said.replace("{", "\\{")):
        Prompter(WORDS, PromptsConfig(**PLAIN, contexts=given))


def test_a_debate_reads_a_transcript_and_a_confidence_for_each_teacher():
    own = prompter("teacher_1", "teacher_2")
    columns = {"transcript_1": "yes", "transcript_2": "no", "confidence_1": 80, "confidence_2": 10.5}
    example = own.encode(row(**columns))
    assert example.confidence == (80.0, 10.5)
    assert "yes" in text(example.contexts["teacher_1"])
    assert "yes" not in text(example.contexts["teacher_2"])
    for wrong in (101, -1, "80", None, float("nan")):
        with pytest.raises(DataError, match=r"'confidence_2' is .*, expected a number from 0 to 100"):
            own.encode(row(**columns | {"confidence_2": wrong}))
    with pytest.raises(DataError, match="'transcript_2' is missing"):
        own.encode(row(**columns | {"transcript_2": ""}))


def test_siblings_are_the_next_ones_and_never_the_rollout_itself():
    texts, correct = ["a", "b", "c", "d"], [True, False, True, False]
    found = [tuple(siblings(texts, correct, number).values()) for number in range(4)]
    assert found == [("c", "b"), ("c", "d"), ("a", "d"), ("a", "b")]
    assert siblings(["a"], [True], 0) == {"right_rollout": None, "wrong_rollout": None}
    assert siblings(["a", "b"], [True, False], 0)["right_rollout"] is None


ROLLOUTS = [[5, 6, 1], [8, 1], [9, 10, 1], [15, 1], [17, 1], [20, 1]]
REWARDS = Rewards([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0, -1.0, 0.0, 0.0, 0.5, 0.5])


def given_run(student, name, prompts=None, **options):
    run = run_of(student, objective__recipe=name, rollout__per_prompt=2, optim__batch_size=3, **options)
    return dataclasses.replace(run, prompter=prompts, reward=lambda text, row: 0.0)


def test_what_a_context_reads_of_the_step():
    own = prompter("teacher", "negative", teacher="{problem} R {right_rollout}", negative="{problem} W {wrong_rollout}")
    examples = [own.encode(row(number)) for number in (1, 2, 3)]
    assert text(examples[0].teacher) == "Q 1+1? S it is 2"  # what an evaluation of the teacher reads
    run = given_run(model(), "cepo", own)
    found = readers(run, examples, [Rollout(ids, False) for ids in ROLLOUTS], REWARDS)
    plain = "Q 1+1?"
    first, second = (text(example.teacher) for example in found.examples[:2])
    assert first == plain  # no other one is right
    assert second == f"1+1? R {text(ROLLOUTS[0][:-1])}"  # without the end token
    assert text(found.examples[0].contexts["negative"]) == f"1+1? W {text(ROLLOUTS[1][:-1])}"
    assert text(found.examples[1].contexts["negative"]) == plain
    assert found.complete == [False] * 6
    right = prompter(teacher="right_rollout")
    found = readers(dataclasses.replace(run, prompter=right), examples, [Rollout(i, False) for i in ROLLOUTS], REWARDS)
    assert found.complete == [False, True, False, False, True, True]
    assert readers(dataclasses.replace(run, prompter=prompter()), examples, [], REWARDS) is None


def test_shuffled_contexts_have_the_problems_of_the_next_rows():
    own = prompter("shuffled_1", "shuffled_2")
    examples = [own.encode(row(number)) for number in (1, 2, 3)]
    found = readers(given_run(model(), "credit", own), examples, [Rollout(ids, False) for ids in ROLLOUTS], None)
    assert text(found.examples[0].contexts["shuffled_1"]) == "Q 2+1? S it is 2"
    assert text(found.examples[0].contexts["shuffled_2"]) == "Q 3+1? S it is 2"
    assert text(found.examples[5].contexts["shuffled_1"]) == "Q 1+1? S it is 4"
    assert found.complete == [True] * 6
    with pytest.raises(DataError, match="its teacher_prompt cannot be shown with another problem"):
        own.encode(dataclasses.replace(row(), teacher_prompt="T"))


@pytest.mark.parametrize("name", ["cepo", "mad_opd", "credit", "nca", "lightning", "sdpo"])
def test_in_the_loop_it_is_the_mean_of_its_token_losses(monkeypatch, name):
    """Against single passes over each context's own prompt, in float64; packed and not, in one micro-batch and more."""
    student = model("qwen3").double().eval()
    recipe = recipes.make(name)
    templates = {"teacher": "right_rollout"} if name == "sdpo" else {}
    own = prompter(*(context for context in recipe.contexts if context != "teacher"), **templates)
    columns = {"transcript_1": "yes", "transcript_2": "no", "confidence_1": 90, "confidence_2": 5}
    examples = [own.encode(row(number, **columns)) for number in (1, 2, 3)]
    rollouts = [Rollout(ids, False, [-1.0] * len(ids)) for ids in ROLLOUTS]
    monkeypatch.setattr("opsd.engines.GenerateEngine.rollouts", lambda *_: rollouts)
    monkeypatch.setattr("opsd.step.rewarded", lambda *_: REWARDS)
    run = given_run(student, name, own, optim__micro_batch_size=6)
    read = readers(run, examples, rollouts, REWARDS)
    each = [example for example in examples for _ in range(2)] if read is None else read.examples
    rows = rollout_hidden(student, [example.student for example in each], ROLLOUTS)
    streams = {}
    for context in {"teacher", *recipe.contexts}:
        hidden = rollout_hidden(student, [example.read_as(context) for example in each], ROLLOUTS)
        streams[context] = stream_of(hidden if context == "privileged_student" else hidden.detach(), run.head)
    targets, sequences = rollout_index(ROLLOUTS, rows.device)
    confidence = torch.tensor([example.confidence for example in each])[sequences] if each[0].confidence else None
    batch = recipes.TokenBatch(
        target_ids=targets,
        sequence_ids=sequences,
        advantage=torch.tensor(REWARDS.advantage)[sequences],
        sampler_logprobs=torch.full(targets.shape, -1.0),
        has_feedback=torch.tensor([True] * 6 if read is None else read.complete)[sequences],
        confidence=confidence,
        teacher_logprobs=recipe._statistics({"t": streams["teacher"]}, recipes.TokenBatch(targets, sequences))["t"][
            "logprob"
        ],
        step=2,
    )
    mean = recipe.token_loss(stream_of(rows, run.head), streams, batch)[0].mean()
    mean.backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 0
    for packed, size in ((False, 6), (True, 6), (True, 2)):
        student.zero_grad()
        run = dataclasses.replace(given_run(student, name, own, optim__micro_batch_size=size), packed=packed)
        result = opsd_step(run, examples, 3)
        torch.testing.assert_close(result.loss, mean.detach().to(result.loss), rtol=1e-5, atol=1e-8)
        for n, p in student.named_parameters():
            torch.testing.assert_close(p.grad, expected[n], rtol=0, atol=3e-6 * expected[n].abs().max().item() + 1e-12)
        if name in ("sdpo", "cepo"):
            assert result.metrics["read_siblings"] == 0.5


@pytest.mark.parametrize(
    ("name", "contexts", "columns"),
    [
        ("rgsd", {"teacher": "rubric"}, {"rubric": "be brief"}),
        ("cepo", {}, {}),
        ("cepo", {"negative": "wrong_answer"}, {"wrong_answer": "3"}),
        ("rlrt", {"teacher": "right_rollout"}, {}),
        ("credit", {}, {}),
        ("nca", {}, {}),
        ("lightning", {}, {}),
        ("mad_opd", {}, {"transcript_1": "a", "transcript_2": "b", "confidence_1": 90, "confidence_2": 20}),
    ],
)
def test_training_with_the_users_columns(tmp_path, name, contexts, columns):
    (tmp_path / "mine.py").write_text("def length(text, row):\n    return float(len(text) % 2)\n")
    options = {
        "model.path": write_model(tmp_path / "base"),
        "data.train": write_rows(tmp_path / "train.jsonl", **columns),
        "objective.recipe": name,
        "prompts.contexts": json.dumps(contexts),
        "eval.scorer": f"{tmp_path / 'mine.py'}:length",
        "rollout.per_prompt": 3,
        "rollout.max_new_tokens": 8,
        "optim.steps": 2,
        "optim.batch_size": 3,
        "run.device": "cpu",
        "run.dir": tmp_path / "out",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    reads_step = not columns and name in ("cepo", "rlrt", "credit")
    assert ("read_siblings" in records[0]) == reads_step


def test_an_absent_column_is_refused_before_any_work(tmp_path, capsys):
    words = ["--model.path", write_model(tmp_path / "base"), "--data.train", write_rows(tmp_path / "rows.jsonl")]
    words += ["--objective.recipe", "rgsd", "--prompts.contexts", '{"teacher": "rubric"}']
    assert main(["train", *map(str, words), "--run.dir", str(tmp_path / "out")]) == 2
    assert "rows.jsonl:1: 'rubric' is missing, which the context 'teacher' reads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
