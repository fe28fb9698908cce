"""Is an answer right? The scorers of `eval.scorer`: exact, math_verify, or a function of the user's."""

import contextlib
import importlib
import importlib.util
import inspect
import json
import operator
import os
import subprocess
import sys
import threading
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from opsd.answers import extract, last_box
from opsd.data import Row
from opsd.errors import ConfigError, ScorerError, Undecided
from opsd.options import EvalConfig


class Scorer(Protocol):
    """What says whether an answer is right: a function of (text, row)."""

    def __call__(self, text: str, row: Row, /) -> bool | float:
        """The score of `text`, all that the model wrote, from 0 to 1; True and 1 are right.

        It may raise `Undecided` for an answer that it cannot judge; any other exception ends the evaluation.
        """


SECONDS = 5  # for one comparison of the scorer math_verify


def scorer_of(options: EvalConfig) -> Scorer:
    """The scorer that `eval.scorer` names. Needs no model, so call it before one is loaded.

    - "exact": the answer found by `eval.answer_pattern` equals `row.answer`, blanks around either aside.
    - "math_verify": the two are mathematically equal, by the package math-verify; see `math_verify_scorer`.
    - "module:function" or "path/to/file.py:function": a `Scorer` of the user's. The file is run anew at each call of
      `scorer_of`, its neighbours are not importable from it. What it returns is checked: a `bool`, or a finite number
      from 0 to 1 (of NumPy or torch, too).

    Raises:
        ConfigError: the name is none of these, math-verify is not installed, or there is no such function, or it cannot
            be called with (text, row). The scorer itself raises `ScorerError` for a fault in the user's function.
    """
    name, pattern = options.scorer, options.answer_pattern
    if name == "exact":
        return lambda text, row: extract(text, pattern) == (row.answer or "").strip()
    if name == "math_verify":
        return math_verify_scorer(pattern)
    return _own_scorer(name)


def math_verify_scorer(pattern: str) -> Scorer:
    """A scorer that compares the answer found by `pattern` with `row.answer` as mathematics: 1/2 is \\frac{1}{2}.

    Both are LaTeX or plain; dollar signs around either and a \\boxed{} around the row's do no harm. `equal` in
    opsd/equality.py says what is equal. Where it fails, or needs over `SECONDS` or 2 GiB, the answer is `Undecided`.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(
            f"eval.scorer math_verify needs the package math-verify: pip install 'opsd[math]' ({error})"
        ) from error

    def score(text: str, row: Row) -> bool:
        found, answer = extract(text, pattern), (row.answer or "").strip()
        if found is None or found == answer:
            return found is not None
        return _JUDGE.equal(last_box(answer) or answer, found)

    return score


class _Judge:
    """A process that runs opsd/equality.py: no signal ends a large power or a factorial, but a process can be killed.

    It is started at the first question, and anew after one that it did not survive.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, gold: str, given: str) -> bool:
        with self._lock:
            # Given back after its reply alone: one that was interrupted before would give it to the next question.
            alive = self._process and self._process.poll() is None
            process, self._process = self._process if self._process and alive else self._start(), None
            reply = _ask(process, json.dumps((gold, given, SECONDS)), SECONDS)
            if reply is not None:
                self._process = process
        if not isinstance(reply, bool):
            raise Undecided(f"math-verify: {reply or f'no verdict within {SECONDS} s and 2 GiB'}")
        return reply

    def _start(self) -> "subprocess.Popen[str]":
        # Not as a module of opsd, which would import torch; with the paths of this process, wherever they are from.
        code = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
        program = Path(__file__).with_name("equality.py")
        command = [sys.executable, "-c", code, str(program), *sys.path, str(program.parent)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONUTF8": "1"},
        )
        if _ask(process, "", 60) != "ready":
            raise ScorerError(f"eval.scorer math_verify: its process did not start (exit status {process.returncode})")
        return process


_JUDGE = _Judge()


def _ask(process: "subprocess.Popen[str]", line: str, seconds: float) -> bool | str | None:
    """The reply to a line of JSON, or None from a process that died, which one that takes longer does."""
    assert process.stdin
    assert process.stdout
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    reply = ""
    try:
        with contextlib.suppress(OSError):
            print(line, file=process.stdin, flush=True)
            reply = process.stdout.readline()
    finally:
        timer.cancel()
        timer.join()
        if not reply:
            process.kill()
            process.wait()
    verdict: bool | str | None = json.loads(reply) if reply else None
    return verdict


def _own_scorer(name: str) -> Scorer:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(
            f"eval.scorer is {name!r}; accepted: exact, math_verify, module:function, path/to/file.py:function"
        )
    try:
        function = operator.attrgetter(attribute)(_module(place))
    except AttributeError:
        raise ConfigError(f"eval.scorer {name!r}: {place} has no {attribute!r}") from None
    if not callable(function):
        raise ConfigError(f"eval.scorer {name!r}: {attribute} is {type(function).__name__}, expected a function")
    try:
        inspect.signature(function).bind("", None)
    except TypeError as error:
        raise ConfigError(f"eval.scorer {name!r}: it is called with (text, row), but {error}") from None
    except ValueError:
        pass  # some functions written in C have no signature

    def score(text: str, row: Row) -> float:
        where = f"an answer to {row.source}"
        try:
            value = function(text, row)
        except Undecided:
            raise
        except Exception as error:
            raise ScorerError(f"eval.scorer {name!r} failed on {where}: {type(error).__name__}: {error}") from error
        number = value
        if not isinstance(value, Real) and hasattr(value, "item"):  # a scalar of NumPy or torch
            with contextlib.suppress(RuntimeError, ValueError):
                number = value.item()
        if not isinstance(number, Real) or not 0 <= float(number) <= 1:
            accepted = "accepted: a bool, or a number from 0 to 1"
            raise ScorerError(f"eval.scorer {name!r} returned {value!r} for {where}; {accepted}")
        return float(number)

    return score


def _module(place: str) -> Any:
    """The module called `place`, or the one in the file `place`."""
    in_file = place.endswith(".py")
    if in_file and not Path(place).is_file():
        raise ConfigError(f"eval.scorer: there is no file {place}")
    try:
        if not in_file:
            return importlib.import_module(place)
        name = f"opsd_scorer_{Path(place).stem}"
        spec: Any = importlib.util.spec_from_file_location(name, place)
        # Dataclasses and pickles look their module up there.
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        hint = "" if in_file else "; a file is named by its path: path/to/file.py:function"
        raise ConfigError(f"eval.scorer: {place} cannot be imported: {type(error).__name__}: {error}{hint}") from error
