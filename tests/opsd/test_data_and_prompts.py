import json
import sys
from dataclasses import replace
from itertools import islice

import pytest
from _models import tokenizer, write_rows

from opsd.contexts import first_half
from opsd.data import Row, batches, read_rows
from opsd.errors import ConfigError, DataError
from opsd.options import DataConfig, PromptsConfig
from opsd.prompts import Prompter, encode_rows, fill, read_examples

ROW = Row("1+1?", "it is 2", "2", None, "f.jsonl:1")
PLAIN = PromptsConfig(student="Q {problem}", teacher="Q {problem} S {solution}")
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path, *records):
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=2)
    return path


def dataset(*records):
    return pytest.importorskip("datasets").Dataset.from_list(list(records))


def saved(path, *records):
    dataset(*records).save_to_disk(str(path))
    return path


WRITERS = {"jsonl": jsonl, "parquet": parquet, "dataset": saved}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Writes a data file of each kind and gives its path."""
    name = {"jsonl": "rows.jsonl", "parquet": "rows.parquet", "dataset": "rows"}[request.param]
    return lambda *records: WRITERS[request.param](tmp_path / name, *records)


def named(path, number):
    return f"{path}:{number}" if path.suffix == ".jsonl" else f"{path}:row {number}"


# Reading


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"problem": "x"', "not JSON"),
        ('{"problem": "x",, "y": 1}', "not JSON: Expecting property name enclosed in double quotes, column 17"),
        ('["problem"]', "expected a JSON object, got list; accepted: one object per line (JSONL), no array"),
        ("[", "not JSON: Expecting value, column 2; accepted: one object per line (JSONL), no array around them"),
        ("[" * 100_000, "not JSON"),
        ('{"problem": "x"}', "'solution' is missing"),
        ('{"problem": "x", "solution": null}', "'solution' is missing"),
        ('{"problem": "  ", "solution": "y"}', "'problem' is empty"),
        ('{"problem": 3, "solution": "y"}', "'problem' is int"),
        ('{"problem": "x", "solution": ["y"]}', "'solution' is list, expected text"),
        ('{"problem": "x", "solution": "y", "answer": true}', "'answer' is bool"),
        ('{"problem": "x", "solution": "y", "answer": Infinity}', "'answer' is inf"),
        ('{"problem": "\\ud800", "solution": "y"}', "'problem' is no valid Unicode"),
        ('{"problem": "x", "prompt": "z", "solution": "y"}', "'problem' and 'prompt' differ"),
        ('{"problem": "x", "solution": "y", "teacher_prompt": ["z"]}', "'teacher_prompt': message 1 is str"),
        ('{"prompt": [], "solution": "y"}', "'prompt' has no user message"),
        ('{"prompt": [{"role": "user"}], "solution": "y"}', "'prompt': the content of message 1 is missing"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "solution": "y"}',
            "'prompt': the content of message 1 is list, expected text",
        ),
        (
            '{"problem": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "solution": "y"}',
            "'problem' ends with the assistant's message",
        ),
    ],
)
def test_bad_row_is_named_or_skipped_with_its_reason(tmp_path, line, reason):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    path.write_text(path.read_text() + "\n" + line + "\n")  # line 3 is blank, line 4 is bad
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"{path}:4: {reason}" in str(caught.value)
    assert "line 1" not in str(caught.value)
    rows, skipped = read_rows(path, skip_bad_rows=True)
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:2"]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{path}:4: {reason}")


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
    assert read_rows(path).rows[0].problem == "a\u2028b"


def test_every_kind_of_file_gives_the_same_rows(write):
    records = [{"problem": f"p{i}", "solution": f"s{i}", "answer": i, "level": 7 + i} for i in range(5)]
    path = write(*records)
    rows, skipped = read_rows(path)
    assert [(row.problem, row.solution, row.answer) for row in rows] == [(f"p{i}", f"s{i}", str(i)) for i in range(5)]
    assert [row.source for row in rows] == [named(path, i) for i in range(1, 6)]
    assert [row.record for row in rows] == records
    assert skipped == []


def test_bad_rows_of_every_kind_of_file_are_named(write):
    path = write(
        {"problem": "a", "solution": "b"}, {"problem": "c", "solution": None}, {"problem": "e", "solution": "f"}
    )
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"{named(path, 2)}: 'solution' is missing" in str(caught.value)
    assert "its columns: problem, solution" in str(caught.value)
    rows, skipped = read_rows(path, skip_bad_rows=True)
    assert [row.source for row in rows] == [named(path, 1), named(path, 3)]
    assert skipped == [f"{named(path, 2)}: 'solution' is missing"]


def test_synonyms_and_chat_messages_of_every_kind_of_file(write):
    rows, _ = read_rows(
        write(
            {"prompt": CHAT, "privileged_context": "four", "teacher_prompt": [{"role": "user", "content": "t"}]},
            {"prompt": CHAT[:2], "privileged_context": "two", "teacher_prompt": None},
        )
    )
    assert [row.problem for row in rows] == [CHAT, CHAT[:2]]
    assert [row.solution for row in rows] == ["four", "two"]
    assert [row.teacher_prompt for row in rows] == [[{"role": "user", "content": "t"}], None]


def test_messages_keep_their_own_keys_only(write):
    named = [{"role": "user", "content": "x", "name": "ann"}]
    path = write({"prompt": named, "solution": "s"}, {"prompt": CHAT, "solution": "s"})
    assert [row.problem for row in read_rows(path).rows] == [named, CHAT]


def test_equal_synonyms_are_no_contradiction_and_null_counts_as_absent(tmp_path):
    record = {"problem": "x", "prompt": "x", "solution": None, "privileged_context": "y"}
    (row,), _ = read_rows(jsonl(tmp_path / "rows.jsonl", record))
    assert (row.problem, row.solution) == ("x", "y")


def test_required_fields(tmp_path):
    (row,), _ = read_rows(jsonl(tmp_path / "a.jsonl", {"problem": "x", "answer": 4}), required=("problem", "answer"))
    assert (row.answer, row.solution) == ("4", None)
    # A teacher's prompt of its own needs no solution; blank text where none is required is no text.
    record = {"problem": "x", "teacher_prompt": "t", "answer": ""}
    (row,), _ = read_rows(jsonl(tmp_path / "b.jsonl", record))
    assert (row.teacher_prompt, row.solution, row.answer) == ("t", None, None)
    path = jsonl(tmp_path / "c.jsonl", {"problem": "x", "solution": "y", "teacher_prompt": " "})
    assert read_rows(path).rows[0].teacher_prompt is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12"), (-3.0, "-3"), (0.5, "0.5"), (100.0, "100"), (1e22, "1" + "0" * 22), (1e-7, "0.0000001")],
)
def test_numbers_as_answers(tmp_path, number, text):
    path = jsonl(tmp_path / "rows.jsonl", {"problem": "x", "answer": number})
    assert read_rows(path, required=("problem", "answer")).rows[0].answer == text


def test_integers_stored_as_floats_with_gaps(tmp_path):
    records = [{"problem": "x", "solution": "s", "answer": value} for value in (4.0, float("nan"), None)]
    rows, _ = read_rows(parquet(tmp_path / "rows.parquet", *records))
    assert [row.answer for row in rows] == ["4", None, None]


def test_parquet_rows_are_numbered_over_row_groups_and_damage_is_an_error(tmp_path):
    path = parquet(tmp_path / "rows.parquet", *({"problem": str(i), "solution": "s"} for i in range(7)))
    assert [row.source.rpartition(" ")[2] for row in read_rows(path).rows] == [str(i) for i in range(1, 8)]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as Parquet"):
        read_rows(path)
    with pytest.raises(DataError, match=r"absent.parquet: cannot be read"):
        read_rows(tmp_path / "absent.parquet")


def test_a_saved_dataset_is_read_whatever_format_it_remembers(tmp_path):
    data = dataset({"problem": "a", "solution": "b", "answer": 3}).with_format("torch", columns=["answer"])
    data.save_to_disk(str(tmp_path / "rows"))
    (row,), _ = read_rows(tmp_path / "rows")
    assert (row.problem, row.answer, row.record["answer"]) == ("a", "3", 3)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    published = tmp_path / "org" / "name"  # in the form of a repository, which datasets loads from here as from there
    for split, problems in (("train", "abc"), ("test", "de")):
        for config in ("easy", "hard"):
            (published / config).mkdir(parents=True, exist_ok=True)
            rows = [{"problem": f"{config} {each}", "solution": "s", "answer": 1} for each in problems]
            (published / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (published / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_dir: {c}\n  default: {d}\n" for c, d in (("easy", "true"), ("hard", "false"))
        )
        + "---\n"
    )
    monkeypatch.chdir(tmp_path)

    def problems(path, **options):
        return [row.problem for row in read_rows(path, **options).rows]

    assert problems("hub:org/name") == ["easy a", "easy b", "easy c"]
    assert problems("hub:org/name", required=("problem", "answer")) == ["easy d", "easy e"]
    assert problems("hub:org/name:test") == ["easy d", "easy e"]
    assert problems("hub:org/name:hard:train") == ["hard a", "hard b", "hard c"]
    assert read_rows("hub:org/name:hard:test").rows[1].source == "hub:org/name:hard:test:row 2"
    with pytest.raises(DataError, match=r'hub:org/name:dev: cannot be read by datasets: .*"dev"'):
        read_rows("hub:org/name:dev")
    for wrong in ("hub:", "hub:org/name:", "hub:org/name:a:b:c"):
        with pytest.raises(ConfigError, match="accepted: hub:org/name, hub:org/name:SPLIT or"):
            read_rows(wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hub:org/name: a data set of the hub needs the package datasets: pip"):
        read_rows("hub:org/name")


def test_splits_of_a_saved_dataset_dict(tmp_path):
    datasets = pytest.importorskip("datasets")

    def save(name, *splits):
        rows = {split: dataset({"problem": split, "solution": "s", "answer": "1"}) for split in splits}
        datasets.DatasetDict(rows).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    evaluation = ("problem", "answer")
    both = save("both", "train", "test")
    (row,), _ = read_rows(both)
    assert (row.problem, row.source) == ("train", f"{both / 'train'}:row 1")
    assert read_rows(both, required=evaluation).rows[0].problem == "test"
    one = save("one", "main")
    assert read_rows(one).rows[0].problem == read_rows(one, required=evaluation).rows[0].problem == "main"
    none = save("none", "easy", "hard")
    with pytest.raises(DataError, match=r"none: has the splits easy, hard; for data.train exactly one of train is"):
        read_rows(none)
    several = save("several", "train", "validation", "test")
    with pytest.raises(DataError, match=r"the splits train, validation, test; for data.eval exactly one"):
        read_rows(several, required=evaluation)
    assert read_rows(several / "validation", required=evaluation).rows[0].problem == "validation"


def test_directories_of_parts(tmp_path):
    with pytest.raises(DataError, match=r"neither a directory saved by datasets nor"):
        read_rows(tmp_path)
    for i in (1, 0):
        jsonl(tmp_path / f"train-0000{i}-of-00002.jsonl", {"problem": str(i), "solution": "s"})
    rows, _ = read_rows(tmp_path)
    assert [row.problem for row in rows] == ["0", "1"]
    assert rows[1].source == f"{tmp_path / 'train-00001-of-00002.jsonl'}:1"
    jsonl(tmp_path / "test-00000-of-00001.jsonl", {"problem": "held out", "solution": "s"})
    with pytest.raises(DataError, match=r"different data sets: test, train"):
        read_rows(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"rows.parquet: Parquet needs the package pyarrow"):
        read_rows(path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"saved: this directory needs the package datasets"):
        read_rows(tmp_path / "saved")


def test_columns_are_read_under_their_own_names(write):
    record = {"question": "q", "gold": "g", "final": 3, "prompt": "not this", "solution": "nor this"}
    path = write(record)
    (row,), _ = read_rows(path, columns=("problem=question", "privileged_context = gold", "answer=final"))
    assert (row.problem, row.solution, row.answer) == ("q", "g", "3")
    assert row.record == record


def test_a_row_as_gsm8k_has_it(write):
    text = "They have 2 * 540 = <<2*540=1080>>1080 eggs.\n#### 1,080"
    columns = ("problem=question", "solution=answer", "answer=answer")
    (row,), _ = read_rows(write({"question": "q", "answer": text}), columns=columns)
    assert (row.problem, row.solution, row.answer) == ("q", text, "1,080")
    for wrong, answer in (("a #### 5", "a #### 5"), ("##### 5", "##### 5"), ("#### 4\n####5\n", "5")):
        (row,), _ = read_rows(write({"question": "q", "answer": wrong}), columns=columns)
        assert row.answer == answer
    with pytest.raises(DataError, match=r"'answer' \(answer\) is empty"):
        read_rows(write({"question": "q", "answer": "so\n#### "}), columns=columns, required=("answer",))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("problem",), "'problem'; accepted: field=column"),
        (("problem=",), "'problem='; accepted: field=column"),
        (("question=problem",), "'question=problem'; the fields are problem, solution"),
        (("problem=a", "problem=b"), "problem twice: 'a' and 'b'"),
        (("problem=a", "prompt=b"), "problem twice: 'a' and 'b'"),
        (("solution=gold",), "solution=gold, but no row of .* its columns: problem, solution, answer"),
        (("teacher_prompt=hint",), "teacher_prompt=hint, but no row of"),
    ],
)
def test_unusable_columns_are_named(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=f"data.columns (has|gives) {message}"):
        read_rows(write_rows(tmp_path / "rows.jsonl", 2), columns=columns, skip_bad_rows=True)


def test_one_mapping_serves_files_that_lack_what_is_not_read_from_them(tmp_path):
    columns = ("problem=q", "solution=gold", "answer=final")
    (row,), _ = read_rows(jsonl(tmp_path / "train.jsonl", {"q": "x", "gold": "y"}), columns=columns)
    assert (row.solution, row.answer) == ("y", None)
    path = jsonl(tmp_path / "eval.jsonl", {"q": "x", "final": "1"}, {"q": "z"})
    with pytest.raises(DataError, match=r"eval.jsonl:2: 'final' \(answer\) is missing"):
        read_rows(path, columns=columns, required=("problem", "answer"))


def test_the_problem_as_text():
    assert ROW.problem_text == "1+1?"
    assert Row(CHAT[1:2], None, None, None, "f:1").problem_text == "1+1?"
    assert Row(CHAT[:2], None, None, None, "f:1").problem_text == "system: be brief\n\nuser: 1+1?"
    assert ROW.record == {}
    assert hash(ROW) == hash(Row("1+1?", "it is 2", "2", None, "f.jsonl:1"))


def test_epochs_are_reproducible_and_cover_every_row():
    first, again, other = batches(5, 3, 0), batches(5, 3, 0), batches(5, 3, 1)
    drawn = [next(first) for _ in range(5)]
    assert drawn == [next(again) for _ in range(5)] != [next(other) for _ in range(5)]
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(flat[10:]) == list(range(5))
    assert flat[:5] != flat[5:10]


@pytest.mark.parametrize(("count", "size"), [(5, 3), (3, 5), (4, 4), (1, 2), (6, 2)])
def test_batches_from_a_later_one_on_are_those_of_the_whole_sequence(count, size):
    whole = list(islice(batches(count, size, 7), 12))
    for start in range(8):
        assert list(islice(batches(count, size, 7, start=start), 4)) == whole[start : start + 4]
    assert len(next(batches(count, size, 7, start=10**12))) == size  # far away is as cheap


def test_batches_of_nothing_are_refused():
    for arguments in ((0, 3, 0), (3, 0, 0), (3, 3, 0, -1)):
        with pytest.raises(ValueError, match="no batches of"):
            batches(*arguments)


# Prompts


def decoded(prompter, ids):
    return prompter.tokenizer.decode(ids)


def test_braces_in_the_data_survive_and_nothing_is_filled_twice():
    text = fill("{problem} | {other} | {solution}", problem="f{x}={solution}", solution="{problem} {0} \\1")
    assert text == "f{x}={solution} | {other} | {problem} {0} \\1"


def test_prompts_hold_what_each_may_see():
    prompter = Prompter(tokenizer(), PLAIN)
    example = prompter.encode(ROW)
    assert decoded(prompter, example.student) == "Q 1+1?"
    assert decoded(prompter, example.teacher) == "Q 1+1? S it is 2"
    own = prompter.encode(Row("1+1?", "it is 2", None, "only {this}", "f:1"))
    assert decoded(prompter, own.teacher) == "only {this}"
    assert prompter.encode(Row("1+1?", None, "2", None, "f:1")).teacher == []


def test_other_contexts_read_what_their_names_say():
    config = PromptsConfig(student="Q {problem}", teacher="Q {problem} R {solution}", reference="only {solution}")
    names = ("base", "plain", "reference", "partial")
    prompter = Prompter(tokenizer(), config, contexts=names)
    row = Row("1+1?", "one and one are two", None, None, "file:1")
    example = prompter.encode(row)
    assert tuple(example.contexts) == names
    assert example.contexts["base"] == example.contexts["plain"] == example.student
    assert decoded(prompter, example.contexts["reference"]) == "only one and one are two"
    assert decoded(prompter, example.contexts["partial"]) == "Q 1+1? R one and one"
    assert example.read_as("teacher") == example.teacher
    assert first_half("1000+60+8#1068") == "1000+60"
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    prompter = Prompter(tokenizer(chat=True), config, contexts=["reference"])
    text = decoded(prompter, prompter.encode(replace(row, problem=chat)).contexts["reference"])
    assert "be brief" in text
    assert "1+1?" not in text
    with pytest.raises(DataError, match=r"file:1: 'solution' is missing, which the context 'reference' reads"):
        prompter.encode(Row("1+1?", None, None, "T", "file:1"))
    wide = Prompter(
        tokenizer(), config.model_copy(update={"reference": "x" * 40 + "{solution}"}), contexts=["reference"]
    )
    with pytest.raises(DataError, match="the prompt of the context reference has 59 tokens"):
        encode_rows(wide, [row], DataConfig(max_prompt_tokens=50))


def test_chat_template_wraps_when_there_is_one():
    config = PromptsConfig(student="Q {problem}", teacher="{problem}{solution}")
    with_template, without = tokenizer(chat=True), tokenizer()
    text = with_template.decode(Prompter(with_template, config).encode(ROW).student)
    assert text == "[user]Q 1+1?[assistant]"
    off = PromptsConfig(student="Q {problem}", teacher="{problem}{solution}", chat="off")
    assert with_template.decode(Prompter(with_template, off).encode(ROW).student) == "Q 1+1?"
    with pytest.raises(ConfigError, match=r"chat"):
        Prompter(without, PromptsConfig(chat="on"))


def test_templates_make_the_last_user_message_and_the_chat_before_it_stays():
    prompter = Prompter(tokenizer(chat=True), PLAIN)
    before = "[system]be brief[user]1+1?[assistant]2"
    chat = [dict(message) for message in CHAT]
    example = prompter.encode(Row(chat, "it is 4", None, None, "f:1"))
    assert decoded(prompter, example.student) == before + "[user]Q 2+2?[assistant]"
    assert decoded(prompter, example.teacher) == before + "[user]Q 2+2? S it is 4[assistant]"
    assert chat == CHAT  # the row's own messages are not written to
    own = prompter.encode(Row(chat, "it is 4", None, "only this", "f:1"))
    assert decoded(prompter, own.teacher) == before + "[user]only this[assistant]"
    messages = [{"role": "system", "content": "{problem}"}, {"role": "user", "content": "as it is"}]
    own = prompter.encode(Row(chat, "it is 4", None, messages, "f:1"))
    assert decoded(prompter, own.teacher) == "[system]{problem}[user]as it is[assistant]"
    tool = [*CHAT[1:2], {"role": "tool", "content": "42"}]
    assert decoded(prompter, prompter.encode(Row(tool, "s", None, None, "f:1")).student) == (
        "[user]Q 1+1?[tool]42[assistant]"
    )


def test_chats_without_a_chat_template_are_an_error_but_for_one_user_message():
    off = PromptsConfig(student="Q {problem}", teacher="Q {problem} S {solution}", chat="off")
    for prompter, why in (
        (Prompter(tokenizer(), PLAIN), "the tokenizer has none"),
        (Prompter(tokenizer(chat=True), off), "prompts.chat is 'off'"),
    ):
        assert prompter.encode(Row(CHAT[1:2], "it is 2", None, None, "f:1")).teacher == prompter.encode(ROW).teacher
        with pytest.raises(DataError, match=f"f:7: a chat of more .* needs a chat template, and {why}"):
            prompter.encode(Row(CHAT, "it is 4", None, None, "f:7"))
        with pytest.raises(DataError, match="f:8: a chat of more"):
            prompter.encode(Row("2+2?", None, None, CHAT[:2], "f:8"))


def test_the_analysis_joins_the_teachers_text():
    config = PromptsConfig(
        student="Q {problem}",
        teacher="Q {problem} S {solution}",
        reason="{problem} WHY {solution}",
        analysis="{teacher} NOTES {analysis}",
    )
    prompter = Prompter(tokenizer(chat=True), config)
    row = Row("{solution}?", "{analysis}", None, None, "f:1")
    assert decoded(prompter, prompter.reason(row)) == "[user]{solution}? WHY {analysis}[assistant]"
    example = prompter.encode(row, "so {teacher}")
    assert decoded(prompter, example.teacher) == "[user]Q {solution}? S {analysis} NOTES so {teacher}[assistant]"
    assert decoded(prompter, example.student) == "[user]Q {solution}?[assistant]"
    own = prompter.encode(Row("p", "s", None, CHAT, "f:1"), "n")
    assert decoded(prompter, own.teacher).endswith("[assistant]2[user]2+2? NOTES n[assistant]")
    chat = Row(CHAT, "s", None, None, "f:1")
    assert (
        decoded(prompter, prompter.reason(chat)) == "[system]be brief[user]1+1?[assistant]2[user]2+2? WHY s[assistant]"
    )
    bare = Row("p", None, "a", None, "f:4")
    for call in (lambda: prompter.reason(bare), lambda: prompter.encode(bare, "n")):
        with pytest.raises(DataError, match="f:4: "):
            call()


THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]{{ '(think)' if thinking }}"


def test_chat_arguments_reach_each_template():
    words = tokenizer()
    words.chat_template = THINKING
    config = PromptsConfig(
        student="{problem}",
        teacher="{problem}{solution}",
        student_chat_args='{"thinking": true}',
        teacher_chat_args='{"thinking": false}',
    )
    prompter = Prompter(words, config)
    example = prompter.encode(ROW)
    assert decoded(prompter, example.student) == "[user]1+1?[assistant](think)"
    assert decoded(prompter, example.teacher) == "[user]1+1?it is 2[assistant]"
    assert decoded(prompter, prompter.reason(ROW)).endswith("[assistant]")


@pytest.mark.parametrize("option", ["student_chat_args", "teacher_chat_args"])
@pytest.mark.parametrize(
    ("template", "chat", "text", "message"),
    [
        (THINKING, "auto", "{thinking: true}", "accepted: a JSON object"),
        (THINKING, "auto", "[1]", "accepted: a JSON object"),
        (THINKING, "auto", '{"thinkng": true}', "'thinkng', which the tokenizer's chat template does not read"),
        (THINKING, "auto", '{"tokenize": true}', "'tokenize', which is not for the chat template"),
        (THINKING, "off", '{"thinking": true}', "but prompts.chat is 'off'"),
        (None, "auto", '{"thinking": true}', "but the tokenizer has no chat template"),
    ],
)
def test_unusable_chat_arguments_are_named(option, template, chat, text, message):
    words = tokenizer()
    words.chat_template = template
    with pytest.raises(ConfigError, match=f"prompts.{option} .*{message}"):
        Prompter(words, PromptsConfig(chat=chat, **{option: text}))


def test_a_chat_template_that_writes_the_bos_gives_one():
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 1)])
    assert words("ab")["input_ids"][0] == 1
    words.chat_template = "<end>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    ids = Prompter(words, PLAIN).encode(ROW).student
    assert ids.count(1) == 1
    message = [{"role": "user", "content": "Q 1+1?"}]
    assert ids == words.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    # Without the chat template the tokenizer adds its own.
    plain = Prompter(words, PromptsConfig(student="{problem}", teacher="{problem}{solution}", chat="off"))
    assert plain.encode(ROW).student == [1, *words("1+1?", add_special_tokens=False)["input_ids"]]


def test_a_role_that_the_chat_template_refuses_names_the_row():
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    rows = [ROW, Row(CHAT[:2], "it is 2", None, None, "f:3")]
    reason = r"f:3: the chat template refuses the student's messages \(system, user\): no system role"
    with pytest.raises(DataError, match=reason):
        encode_rows(Prompter(words, PLAIN), rows, DataConfig(max_prompt_tokens=100, too_long="drop"))
    encoded = encode_rows(
        Prompter(words, PLAIN), rows, DataConfig(max_prompt_tokens=100, too_long="drop", skip_bad_rows=True)
    )
    assert [example.row.source for example in encoded.examples] == ["f.jsonl:1"]
    assert encoded.too_long == []
    assert len(encoded.skipped) == 1
    assert encoded.skipped[0].startswith("f:3: ")


@pytest.mark.parametrize(
    "row",
    [
        Row("what is <end>?", "s", None, None, "f:2"),
        Row("p", "first <end>[assistant]then", None, None, "f:2"),
        Row("p", "s", None, "<end>", "f:2"),
        Row([{"role": "system", "content": "<end>"}, *CHAT], "s", None, None, "f:2"),
    ],
)
def test_text_that_spells_a_special_token_never_becomes_one(row):
    prompter = Prompter(tokenizer(chat=True), PLAIN)
    assert 1 in prompter.tokenizer("<end>")["input_ids"]  # which is what there is to guard against
    with pytest.raises(DataError, match="f:2: its text has '<end>'"):
        prompter.encode(row)
    with pytest.raises(DataError, match="f:9: its text has '<end>'"):
        prompter.reason(Row("p", "<end>", None, None, "f:9"))


@pytest.mark.parametrize("chat", ["auto", "off"])
def test_special_tokens_that_an_analysis_spells_are_left_out(chat):
    config = PromptsConfig(
        student="{problem}", teacher="{problem}{solution}", analysis="{teacher} / {analysis}", chat=chat
    )
    prompter = Prompter(tokenizer(chat=True), config)
    example = prompter.encode(Row("p", "s", None, None, "f:1"), "so<pad> it <e<end>nd>is <b>2")
    assert "ps / so it is <b>2" in decoded(prompter, example.teacher)
    assert not {0, 1} & set(example.teacher)


def test_the_teachers_analysis_is_prepared_for_with_the_rows():
    config = PromptsConfig(student="{problem}", teacher="{problem}{solution}", reason="{problem}:{solution} why?")
    prompter = Prompter(tokenizer(), config)
    row, bare = Row("1", "2", None, None, "f:1"), Row("1", None, None, "only this", "f:2")
    of_evaluation, long = Row("1", None, "2", None, "f:3"), Row("1", "2345", None, None, "f:4")
    encoded = encode_rows(
        prompter, [row, of_evaluation], DataConfig(max_prompt_tokens=8, too_long="error"), reason=True
    )
    assert [decoded(prompter, example.reason) for example in encoded.examples] == ["1:2 why?", ""]
    with pytest.raises(DataError, match=r"f:2: teacher.reason_first needs a solution"):
        encode_rows(prompter, [row, bare], DataConfig(max_prompt_tokens=20, too_long="error"), reason=True)
    encoded = encode_rows(
        prompter, [row, bare], DataConfig(max_prompt_tokens=20, too_long="error", skip_bad_rows=True), reason=True
    )
    assert (len(encoded.examples), len(encoded.skipped)) == (1, 1)
    encoded = encode_rows(prompter, [row, long], DataConfig(max_prompt_tokens=10, too_long="drop"), reason=True)
    assert encoded.too_long == [
        "f:4: the prompt for the teacher's analysis has 11 tokens, data.max_prompt_tokens is 10"
    ]
    assert not encode_rows(prompter, [bare], DataConfig(max_prompt_tokens=20, too_long="error")).examples[0].reason


def test_rows_are_read_for_analyses_where_the_teacher_writes_them(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", {"problem": "1", "teacher_prompt": "only this", "answer": "2"})
    options, prompter = DataConfig(train=path), Prompter(tokenizer(), PLAIN)
    assert read_examples(options, prompter, str(path), required=("problem", "solution")).examples
    for required in (("problem", "solution"), ("problem", "answer")):
        with pytest.raises(DataError, match=r"rows.jsonl:1: teacher.reason_first needs a solution"):
            read_examples(options, prompter, str(path), required=required, reason=True)
    assert read_examples(options, prompter, str(path), required=("problem", "answer")).examples


def test_special_tokens_are_meant_in_templates_and_in_text_that_is_rendered_already():
    words = tokenizer(chat=True)
    config = PromptsConfig(student="<end>{problem}", teacher="{problem}{solution}", chat="off")
    assert Prompter(words, config).encode(Row("a<end>", "s", None, None, "f:1")).student.count(1) == 2
    config = PromptsConfig(student="<end>{problem}", teacher="{problem}{solution}")
    assert Prompter(words, config).encode(ROW).student.count(1) == 1
    # Added tokens that are not special are ordinary text, whatever they look like.
    words.add_tokens("<think>")
    assert (
        words.convert_tokens_to_ids("<think>")
        in Prompter(words, PLAIN).encode(Row("p", "<think>", None, None, "f:1")).teacher
    )


def test_too_long_prompts_are_named_and_dropped_or_an_error_but_never_cut():
    prompter = Prompter(tokenizer(), PromptsConfig(student="{problem}", teacher="{problem}{solution}"))
    rows = [Row("12345", "67890", None, None, f"f:{i}") for i in (1, 2)] + [Row("1", "2" * 20, None, None, "f:3")]
    rows.append(Row("1" * 11, "2", None, None, "f:4"))
    examples, too_long, skipped = encode_rows(prompter, rows, DataConfig(max_prompt_tokens=10, too_long="drop"))
    assert too_long == [
        "f:3: the teacher's prompt has 21 tokens, data.max_prompt_tokens is 10",
        "f:4: the student's prompt has 11 tokens and the teacher's prompt has 12 tokens, data.max_prompt_tokens is 10",
    ]
    assert skipped == []
    assert [len(example.teacher) for example in examples] == [10, 10]
    with pytest.raises(DataError, match=r"f:3: the teacher's prompt has 21 tokens, data.max_prompt_tokens is 10\nf:4"):
        encode_rows(prompter, rows, DataConfig(max_prompt_tokens=10, too_long="error"))
    with pytest.raises(DataError, match=r"no row is left:\nf:1"):
        encode_rows(prompter, rows, DataConfig(max_prompt_tokens=4, too_long="drop"))
