import dataclasses
import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd import tiny

SMALL = dataclasses.replace(
    tiny._Build(), steps=3, batch_size=4, train_problems=20, eval_problems=10, hidden_size=16, layers=1, heads=2
)
PAIRS = [(100, 100), (999, 999), (199, 801), (555, 445), (457, 386), (905, 95 + 100)] + [
    (random.Random(i).randrange(100, 1000), random.Random(-1 - i).randrange(100, 1000)) for i in range(2000)
]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("tiny") / "small", _build=SMALL)


def test_examples_of_the_docstring():
    assert tiny.own_solution(457, 386) == "7+6+0=13;5+8+1=14;4+3+1=8#843"
    assert tiny.reference_solution(457, 386) == "700+130+13#843"
    assert tiny.own_solution(457, 386) in tiny.__doc__
    assert tiny.reference_solution(457, 386) in tiny.__doc__


def test_references_are_right():
    for x, y in PAIRS:
        parts, answer = tiny.reference_solution(x, y).split("#")
        parts = [int(p) for p in parts.split("+")]
        assert sum(parts) == x + y == int(answer)
        assert parts[0] % 100 == parts[1] % 10 == 0
        assert parts[2] <= 18


def test_own_solutions_are_right():
    for x, y in PAIRS:
        columns, answer = tiny.own_solution(x, y).split("#")
        carry = 0
        for i, column in enumerate(columns.split(";")):
            terms, total = column.split("=")
            assert [int(t) for t in terms.split("+")] == [x // 10**i % 10, y // 10**i % 10, carry]
            assert int(total) == sum(int(t) for t in terms.split("+"))
            carry = int(total) // 10
        assert int(answer) == x + y
        assert answer == str(x + y)


def test_guesses_spoil_about_the_expected_share():
    def right(guess):
        rng = random.Random(0)
        solutions = [(tiny.own_solution(x, y, guess=guess, rng=rng), x + y) for x, y in PAIRS]
        return sum(s.split("#")[1] == str(answer) for s, answer in solutions) / len(PAIRS)

    assert right(0.0) == 1.0
    assert right(0.5) == pytest.approx(0.525**3, abs=0.04)
    assert right(1.0) < 0.01


def test_answer_pattern():
    pattern = re.compile(tiny.SETTINGS["eval"]["answer_pattern"])
    assert pattern.groups == 1
    for x, y in PAIRS[:50]:
        for text in (tiny.own_solution(x, y), tiny.reference_solution(x, y)):
            assert pattern.search(text)[1] == str(x + y)
    assert pattern.search("7+6+0=13;5+8") is None


def test_the_demo_is_evaluated_often_enough_for_a_curve():
    every, steps = tiny.SETTINGS["eval"]["every"], tiny.SETTINGS["optim"]["steps"]
    assert 5 <= steps / every <= 10


def test_problems_are_disjoint_in_either_order():
    sets = [{frozenset(pair) for pair in pairs} for pairs in tiny._problems(0, tiny._Build())]
    build = tiny._Build()
    assert [len(s) for s in sets] == [build.steps * build.batch_size, build.train_problems, build.eval_problems]
    assert len(set.union(*sets)) == sum(len(s) for s in sets)


def test_tokenizer_round_trip(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    for row in rows(small / "train.jsonl"):
        for text in (
            tiny.SETTINGS["prompts"]["student"].format(**row),
            tiny.SETTINGS["prompts"]["teacher"].format(**row),
            row["own_solution"],
        ):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(tiny.ALPHABET)) == tiny.ALPHABET
    assert tokenizer.encode("z") == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.bos_token_id is None
    assert tokenizer.chat_template is None


def test_rollout_budget_holds_every_solution():
    longest = max(len(tiny.own_solution(x, y)) for x, y in PAIRS)
    assert longest + 1 <= tiny.SETTINGS["rollout"]["max_new_tokens"]


def test_prepare_gives_a_loadable_model_and_rows(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    model = AutoModelForCausalLM.from_pretrained(small / "model")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["Q:457+386\nA:", "Q:100+100\nR:200+0+0#200\nA:"], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2
    assert out.shape[1] > batch["input_ids"].shape[1]

    train, held_out = rows(small / "train.jsonl"), rows(small / "eval.jsonl")
    assert (len(train), len(held_out)) == (SMALL.train_problems, SMALL.eval_problems)
    assert not {r["problem"] for r in train} & {r["problem"] for r in held_out}
    for row in train + held_out:
        x, y = map(int, row["problem"].split("+"))
        assert row == {
            "problem": f"{x}+{y}",
            "solution": tiny.reference_solution(x, y),
            "answer": str(x + y),
            "own_solution": tiny.own_solution(x, y),
        }


def test_prepare_is_cached_and_keyed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    first = tiny.prepare(_build=SMALL, on_step=lambda *args: calls.append(args))
    assert first.parent == tmp_path / "opsd"
    assert first.name.startswith("tiny-")
    assert first.name.endswith("-seed0")
    assert [c[:2] for c in calls] == [(1, 3), (2, 3), (3, 3)]
    assert all(isinstance(c[2], float) for c in calls)
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert tiny.prepare(_build=SMALL, on_step=lambda *args: pytest.fail("built again")) == first
    assert before == {p: p.stat().st_mtime_ns for p in first.rglob("*")}

    assert tiny.prepare(_build=SMALL, seed=1) != first
    assert tiny.prepare(_build=dataclasses.replace(SMALL, guess=0.25)) != first
    assert len(list((tmp_path / "opsd").iterdir())) == 3  # nothing temporary is left behind


def test_prepare_is_deterministic_and_seeded(small, tmp_path):
    torch.manual_seed(123)
    random.seed(123)
    state, python_state = torch.get_rng_state(), random.getstate()
    again = tiny.prepare(tmp_path / "again", _build=SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert contents(again) == contents(small)
    other = tiny.prepare(tmp_path / "other", seed=1, _build=SMALL)
    ours, theirs = contents(small), contents(other)
    assert all(ours[k] != theirs[k] for k in ours if k.suffix in {".jsonl", ".safetensors"})


def test_prepare_leaves_nothing_after_a_failure(tmp_path):
    def fail(*args):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tiny.prepare(tmp_path / "run", _build=SMALL, on_step=fail)
    assert list(tmp_path.iterdir()) == []


def test_prepare_refuses_a_directory_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not this build"):
        tiny.prepare(tmp_path, _build=SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"
