"""Data files that are something else than they should be: one line says what they are and what is accepted."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest
from _models import write_model

from opsd.cli import main
from opsd.data import read_rows
from opsd.errors import DataError

LINE = '{"problem": "x", "solution": "y", "answer": "1"}\n'


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("d.csv", b"problem,answer\nx,1\n", "comma-separated values (CSV)"),
        ("d.TSV", b"problem\tanswer\nx\t1\n", "tab-separated values (TSV)"),
        ("d.jsonl.gz", gzip.compress(LINE.encode(), mtime=0), "compressed by gzip"),
        ("d.jsonl", gzip.compress(LINE.encode(), mtime=0), "compressed by gzip"),
        ("d.zip", zipped(LINE), "a zip archive"),
        ("d.bz2", bz2.compress(LINE.encode()), "compressed by bzip2"),
        ("d.xz", lzma.compress(LINE.encode()), "compressed by xz"),
        ("d.zst", b"\x28\xb5\x2f\xfd\x00", "compressed by zstd"),
        ("d.pq", b"PAR1...PAR1", "a Parquet file, whose name has to end with .parquet"),
        ("d.arrow", b"ARROW1\0\0", "an Arrow file"),
        ("d.jsonl", LINE.encode("utf-16"), "text in UTF-16"),
        ("d.jsonl", LINE.encode("utf-16-le"), "text in UTF-16 or a binary file, since it holds NUL bytes"),
        ("d.jsonl", LINE.encode("utf-32-be"), "text in UTF-16 or a binary file"),
        ("d.jsonl", b"", "empty"),
        ("d.jsonl", b"\n \n", "empty"),
        ("d.jsonl", b"\xef\xbb\xbf", "empty"),
        ("d.csv", b"", "empty"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_other_kinds_of_files_are_named_at_once(tmp_path, name, data, kind, skip):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(path, skip_bad_rows=skip)
    assert str(caught.value).startswith(f"{path}: is {kind}")
    assert str(caught.value).endswith(
        "; accepted: JSON lines in UTF-8, a .parquet file, a directory of .jsonl or .parquet parts, "
        "or one saved by datasets"
    )
    assert "\n" not in str(caught.value)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    path = tmp_path / "d.csv"
    path.write_text("problem,answer\nx,1\n")
    model = str(write_model(tmp_path / "m"))
    capsys.readouterr()
    assert main(["train", "--model.path", model, "--data.train", str(path)]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{path}: is comma-separated values (CSV); accepted: JSON lines" in said
    assert "Traceback" not in said
    assert "\n" not in said


def test_lines_of_json_may_have_any_name_and_a_byte_order_mark(tmp_path):
    for name in ("d.csv", "d", "d.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf\n" + LINE.encode() * 2)
        assert [row.source for row in read_rows(tmp_path / name).rows] == [f"{tmp_path / name}:{i}" for i in (2, 3)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            f'{{"problem": "x", "solution": "y", "answer": {"7" * 5000}}}',
            "a number of 5000 digits; accepted: up to 4300",
        ),
        (f'{{"problem": "x", "solution": "y", "level": [-{"7" * 5000}]}}', "a number of 5000 digits; accepted"),
        (
            '{"problem": "x", "problem": "z", "solution": "y"}',
            "the key 'problem' is given twice; accepted: each key once",
        ),
        ('{"problem": "x", "solution": "y", "more": [{"a": 1, "a": 1}]}', "the key 'a' is given twice"),
        (
            '{"problem": [{"role": "user", "content": "x", "name": "\\ud800"}], "solution": "y"}',
            "'problem' is no valid Unicode",
        ),
    ],
)
def test_rows_that_would_lose_something_are_named(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_text(LINE + line + "\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert f"{path}:2: {reason}" in str(caught.value)
    rows, skipped = read_rows(path, skip_bad_rows=True)
    assert len(rows) == len(skipped) == 1


def test_a_number_of_4300_digits_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"problem": "x", "solution": "y", "answer": 10**4299}) + "\n")
    assert read_rows(path).rows[0].answer == "1" + "0" * 4299


def test_places_that_cannot_be_read_are_named(tmp_path):
    for name in ("n" * 300, "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(tmp_path / name)


def test_a_directory_with_a_compressed_part_is_refused(tmp_path):
    (tmp_path / "train-0.jsonl").write_text(LINE)
    (tmp_path / "train-1.jsonl.gz").write_bytes(gzip.compress(LINE.encode(), mtime=0))
    with pytest.raises(DataError, match=r"holds train-1.jsonl.gz, which is compressed; accepted: JSON lines"):
        read_rows(tmp_path)


def test_odd_columns_of_parquet_are_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = arrow.array(["a", "b"])
    broken = arrow.Array.from_buffers(arrow.string(), 2, arrow.array([b"\xff", b"b"]).buffers())
    late = arrow.array([2**62, 5], arrow.timestamp("us"))
    for columns, said in [
        ({"problem": broken, "solution": text}, "d.parquet: cannot be read as Parquet: 'utf-8' codec"),
        ({"problem": text, "solution": text, "answer": late}, "d.parquet: cannot be read as Parquet: "),
        (
            {"problem": text, "solution": text, "answer": arrow.array([b"1", b"2"])},
            "'answer' is bytes, expected text or",
        ),
    ]:
        parquet.write_table(arrow.table(columns), tmp_path / "d.parquet")
        with pytest.raises(DataError) as caught:
            read_rows(tmp_path / "d.parquet")
        assert said in str(caught.value)
    parquet.write_table(arrow.table([text, text, text], ["problem", "solution", "solution"]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="the column 'solution' is there twice; accepted: each column once"):
        read_rows(tmp_path / "d.parquet")


@pytest.mark.parametrize(("names", "said"), [
    (["q", "a\nb", "x" * 900], r"its columns: q, 'a\\nb', 'x+ \.\.\. \(902 characters\) \(data"),
    ([f"c{i}" for i in range(40)], r"its columns: c0, .*, c29, \.\.\. \(data"),
])  # fmt: skip
def test_odd_columns_are_named_in_one_line(names, said, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(dict.fromkeys(names, "v")))
    with pytest.raises(DataError, match=said) as caught:
        read_rows(path)
    assert str(caught.value).count("\n") == 2  # of the title, the row and the columns
