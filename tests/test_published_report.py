"""The table of a published model's training, on made-up runs."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import published_report
from benchmarks.published_report import DATA, chosen, plot, table
from benchmarks.published_tasks import final_number


def run(lr, seed, dev, test, kl=0.01, method="opsd"):
    curve = [[10, "0" * 100], [20, "1" * dev + "0" * (100 - dev)]]
    return {
        "task": "sums", "method": method, "lr": lr, "seed": seed, "curve": curve,
        "test": {"right": "1" * test + "0" * (200 - test)}, "text": {"kl": kl},
    }  # fmt: skip


@pytest.fixture
def data():
    base = {"task": "sums", "method": "", "lr": 0.0, "seed": 0, "base_dev": "0" * 100, "teacher_dev": "1" * 100}
    base |= {"base_test": {"right": "0" * 200}, "teacher_test": {"right": "1" * 180 + "0" * 20}}
    runs = [run(2e-5, 0, 50, 100), run(4e-5, 0, 60, 90, 0.01), run(4e-5, 1, 10, 70, 0.03)]
    found = {"runs": [base, *runs, run(1e-5, 0, 5, 10, method="sft")], "package": "p", "threads": 1, "processor": "c"}
    found |= {"date": "d", "versions": {"torch": "2", "transformers": "5"}}
    return found | {"options": {"steps": 20, "optim.batch_size": 16}}


def test_the_best_rate_on_dev_is_shown_with_its_seeds_and_their_interval(data):
    assert [(method, [one["seed"] for one in runs]) for _, method, runs in chosen(data["runs"])] == [
        ("opsd", [0, 1]),
        ("sft", [0]),
    ]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table(data).splitlines()[2:6]]
    assert rows == [
        ["untrained", "", "", "0.0% (0.0% to 1.9%)", ""],
        ["untrained, shown the solution", "", "", "90.0% (85.1% to 93.4%)", ""],
        # t of one degree of freedom, 12.7, times 5 % of the mean of 45 % and 35 %
        ["OPSD, JSD (β = 0.5)", "4e-05 (2e-05, 4e-05)", "2", "40.0% (0.0% to 100.0%)", "0.0200"],
        ["SFT on the worked solutions", "1e-05 (1e-05)", "1", "5.0% (2.7% to 9.0%)", "0.0100"],
    ]


def test_there_is_a_plot(data, tmp_path, monkeypatch):
    monkeypatch.setattr(published_report, "PLOT", tmp_path / "plot.png")
    plot(data)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.skipif(not DATA.is_file(), reason="nothing is measured yet")
def test_the_documents_table_is_that_of_the_data():
    found = json.loads(DATA.read_text(encoding="utf-8"))
    readme = (DATA.parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"<!-- published -->\n{table(found)}\n<!-- /published -->" in readme


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("34 + 69 = 103, and 103 + 33 = 136.\n\nThe answer is 136.\n\nThe answer is 1", True),  # cut
        ("The answer is 1", False),
        ("The answer is $136.00 in all", True),
        ("The answer is 14.\n\nThe answer is 136.", True),
        ("The answer is 136.\n\nThe answer is 14.", False),
        ("so 13 of 20 are left: 1,36", True),
        ("The answer is", False),
        ("none", False),
    ],
)
def test_the_number_that_a_text_ends_with(text, right):
    assert final_number(text, SimpleNamespace(answer="136")) == right
