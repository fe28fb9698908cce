import json

import pytest
from _models import tokenizer, write_rows

from opsd.config import ConfigError, PromptsConfig
from opsd.data import DataError, Row, batches, read_rows
from opsd.prompts import Prompter, encode_rows, fill

ROW = Row("1+1?", "it is 2", "2", None, "f.jsonl:1")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"problem": "x"', "not JSON"),
        ('["problem"]', "expected a JSON object, got list"),
        ('{"problem": "x"}', "'solution' is missing"),
        ('{"problem": "x", "solution": null}', "'solution' is missing"),
        ('{"problem": "  ", "solution": "y"}', "'problem' is empty"),
        ('{"problem": 3, "solution": "y"}', "'problem' is int"),
        ('{"problem": "x", "solution": "y", "teacher_prompt": ["z"]}', "'teacher_prompt' is list"),
    ],
)
def test_bad_row_is_named_or_counted(tmp_path, line, reason):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    path.write_text(path.read_text() + "\n" + line + "\n")  # line 3 is blank, line 4 is bad
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"{path}:4: {reason}" in str(caught.value)
    rows, skipped = read_rows(path, skip_bad_rows=True)
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:2"]
    assert skipped == 1


def test_bad_bytes_and_missing_file_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"problem": "\xff", "solution": "y"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        read_rows(path)
    with pytest.raises(DataError, match=r"no usable row"):
        read_rows(path, skip_bad_rows=True)
    with pytest.raises(DataError, match=r"absent.jsonl: cannot be read"):
        read_rows(tmp_path / "absent.jsonl")


def test_line_separators_within_text_do_not_split_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "a\u2028b", "solution": "c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path)[0][0].problem == "a\u2028b"


def test_required_fields_and_integer_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "x", "answer": 4}\n')
    (row,), _ = read_rows(path, required=("problem", "answer"))
    assert row.answer == "4"
    assert row.solution is None


def test_epochs_are_reproducible_and_cover_every_row():
    first, again, other = batches(5, 3, 0), batches(5, 3, 0), batches(5, 3, 1)
    drawn = [next(first) for _ in range(5)]
    assert drawn == [next(again) for _ in range(5)] != [next(other) for _ in range(5)]
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(flat[10:]) == list(range(5))
    assert flat[:5] != flat[5:10]


def test_braces_in_the_data_survive_and_nothing_is_filled_twice():
    text = fill("{problem} | {other} | {solution}", problem="f{x}={solution}", solution="{problem} {0} \\1")
    assert text == "f{x}={solution} | {other} | {problem} {0} \\1"


def test_prompts_hold_what_each_may_see():
    prompter = Prompter(tokenizer(), PromptsConfig(student="Q {problem}", teacher="Q {problem} S {solution}"))
    example = prompter.encode(ROW)
    assert prompter.tokenizer.decode(example.student) == "Q 1+1?"
    assert prompter.tokenizer.decode(example.teacher) == "Q 1+1? S it is 2"
    own = prompter.encode(Row("1+1?", "it is 2", None, "only {this}", "f:1"))
    assert prompter.tokenizer.decode(own.teacher) == "only {this}"
    assert prompter.encode(Row("1+1?", None, "2", None, "f:1")).teacher == []


def test_chat_template_wraps_when_there_is_one():
    config = PromptsConfig(student="Q {problem}", teacher="{problem}{solution}")
    with_template, without = tokenizer(chat=True), tokenizer()
    decoded = with_template.decode(Prompter(with_template, config).encode(ROW).student)
    assert decoded == "[user]Q 1+1?[assistant]"
    off = PromptsConfig(student="Q {problem}", teacher="{problem}{solution}", chat="off")
    assert with_template.decode(Prompter(with_template, off).encode(ROW).student) == "Q 1+1?"
    with pytest.raises(ConfigError, match=r"chat"):
        Prompter(without, PromptsConfig(chat="on"))


def test_too_long_prompts_are_dropped_or_an_error_but_never_cut():
    prompter = Prompter(tokenizer(), PromptsConfig(student="{problem}", teacher="{problem}{solution}"))
    rows = [Row("12345", "67890", None, None, f"f:{i}") for i in (1, 2)] + [Row("1", "2" * 20, None, None, "f:3")]
    examples, dropped = encode_rows(prompter, rows, limit=10, too_long="drop")
    assert dropped == 1
    assert [len(example.teacher) for example in examples] == [10, 10]
    with pytest.raises(DataError, match=r"f:3: the teacher's prompt has 21 tokens, data.max_prompt_tokens is 10"):
        encode_rows(prompter, rows, limit=10, too_long="error")
    with pytest.raises(DataError, match=r"no row is left"):
        encode_rows(prompter, rows, limit=4, too_long="drop")
