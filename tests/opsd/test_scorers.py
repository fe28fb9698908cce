import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opsd import scorers
from opsd.config import load_config
from opsd.data import Row
from opsd.errors import ConfigError, ScorerError, Undecided
from opsd.scorers import scorer_of


def scorer(name, **options):
    pairs = [("model.path", "m"), ("data.train", "t"), ("eval.scorer", name)]
    return scorer_of(load_config(None, [*pairs, *((f"eval.{k}", v) for k, v in options.items())]).eval)


def row(answer):
    return Row("p", "the solution", answer, None, "rows.jsonl:7")


def own(tmp_path, body, name="score"):
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path / 'mine.py'}:{name}"


def test_exact_compares_the_last_match():
    exact = scorer("exact")
    assert exact("\\boxed{1} no, \\boxed{ 2 }", row(" 2"))
    assert not exact("\\boxed{2} no, \\boxed{1}", row("2"))
    assert not exact("2", row("2"))
    assert not exact("\\boxed{0.5}", row("1/2"))


def test_math_verify_takes_the_answer_from_the_pattern_alone():
    pytest.importorskip("math_verify")
    assert not scorer("math_verify")("it is 5", row("5"))
    assert scorer("math_verify", answer_pattern=r"#(.*)$")("1/4#0.5", row("1/2"))


def test_math_verify_works_off_the_main_thread():
    pytest.importorskip("math_verify")
    math, found = scorer("math_verify"), []
    thread = threading.Thread(target=lambda: found.append(math("\\boxed{\\frac{1}{2}}", row("1/2"))))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("given", "reference", "said"),
    [
        ("9^{9^{9^9}}", "7", "no verdict within 1 s"),
        ("100000!!", "7", "no verdict within 1 s"),
        ("(" * 5000 + "1" + ")" * 5000, "7", "no verdict within 1 s"),
        ("7", "\\frac{1}{0}", "ValueError: Can't evaluate nan or zoo"),
    ],
)
def test_math_verify_says_what_it_could_not_judge(monkeypatch, given, reference, said):
    pytest.importorskip("math_verify")
    monkeypatch.setattr("opsd.scorers.SECONDS", 1)
    with pytest.raises(Undecided, match=f"math-verify: {said}"):
        scorer("math_verify")(f"\\boxed{{{given}}}", row(reference))
    monkeypatch.undo()
    assert scorer("math_verify")("\\boxed{1/2}", row("0.5"))


def test_the_memory_of_a_comparison_is_limited():
    pytest.importorskip("math_verify")
    pytest.importorskip("resource")
    code = "import equality; equality.equal = lambda a, b: len(bytearray(3 << 30)) > 0; equality.main()"
    package = str(Path(scorers.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({package!r}); {code}"],
        input='["1", "2", 5]\n',
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ['"ready"', '"MemoryError: "'], done.stderr


def test_an_interrupted_question_does_not_answer_the_next():
    pytest.importorskip("math_verify")
    math = scorer("math_verify")
    assert not math("\\boxed{1/3}", row("0.5"))
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            math("\\boxed{9^{9^{9^9}}}", row("7"))
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert math("\\boxed{1/2}", row("0.5"))


def test_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"eval.scorer math_verify needs the package math-verify: pip install"):
        scorer("math_verify")


def test_own_function_from_a_file_and_from_a_module(tmp_path, monkeypatch):
    body = "def score(text, row):\n    return len(text) / 4 if row.solution == 'the solution' else 0\n"
    assert scorer(own(tmp_path, body))("abc", row("1")) == 0.75
    monkeypatch.syspath_prepend(tmp_path)
    assert scorer("mine:score")("a", row("1")) == 0.25
    # A file is read anew, as who edits it expects.
    assert (
        scorer(own(tmp_path, "class A:\n    def score(text, row):\n        return True\n", "A.score"))("", row("1"))
        == 1
    )


def test_own_numbers_may_be_those_of_numpy_and_torch(tmp_path):
    body = "import numpy, torch\nvalues = [numpy.bool_(True), numpy.float32(1), torch.tensor(1.0), 1, True]\n"
    body += "def score(text, row):\n    return values[int(text)]\n"
    mine = scorer(own(tmp_path, body))
    assert [mine(str(i), row("1")) for i in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exakt", "accepted: exact, math_verify, module:function, path/to/file.py:function"),
        (":score", "accepted: exact"),
        ("no_such_module:score", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("absent.py:score", "there is no file absent.py"),
        ("math:no_such_name", "math has no 'no_such_name'"),
        ("math:pi", "pi is float, expected a function"),
        ("math:sqrt", "called with (text, row), but too many positional arguments"),
    ],
)
def test_a_scorer_that_is_none_is_named(name, said):
    with pytest.raises(ConfigError) as caught:
        scorer(name)
    assert "eval.scorer" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    for body in ("def score(:\n", "1 / 0\n", "import sys\nsys.exit(1)\n"):
        with pytest.raises(ConfigError, match=r"mine.py cannot be imported: (Syntax|ZeroDivision|SystemExit)"):
            scorer(own(tmp_path, body))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("1 / 0", "failed on an answer to rows.jsonl:7: ZeroDivisionError: division by zero"),
        ("2", "returned 2 for"),
        ("-0.1", "returned -0.1 for"),
        ("float('nan')", "returned nan for"),
        ("None", "returned None for"),
        ("'1'", "returned '1' for"),
        ("__import__('torch').ones(2)", "returned tensor"),
    ],
)
def test_what_is_no_score_ends_the_evaluation(tmp_path, result, said):
    name = own(tmp_path, f"def score(text, row):\n    return {result}\n")
    with pytest.raises(ScorerError) as caught:
        scorer(name)("text", row("1"))
    assert all(part in str(caught.value) for part in (name, said, "rows.jsonl:7"))


def test_own_function_may_be_undecided(tmp_path):
    body = "from opsd.scorers import Undecided\ndef score(text, row):\n    raise Undecided('why')\n"
    with pytest.raises(Undecided, match=r"^why$"):
        scorer(own(tmp_path, body))("text", row("1"))
