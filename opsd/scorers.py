"""Is an answer right? The scorers of `eval.scorer`: exact, math_verify, or a function of the user's."""

import contextlib
import importlib
import importlib.util
import inspect
import operator
import sys
import threading
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from opsd.answers import extract
from opsd.data import Row
from opsd.errors import ConfigError, ScorerError, Undecided
from opsd.options import EvalConfig


class Scorer(Protocol):
    """What says whether an answer is right: a function of (text, row)."""

    def __call__(self, text: str, row: Row, /) -> bool | float:
        """The score of `text`, all that the model wrote, from 0 to 1; True and 1 are right.

        It may raise `Undecided` for an answer that it cannot judge; any other exception ends the evaluation.
        """


SECONDS = 5  # for math_verify to read or to compare one expression


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

    Both are LaTeX or plain; dollar signs around either and a \\boxed{} around the row's do no harm. The whole text is
    not searched, since math-verify finds some number in nearly any text. Where math-verify fails, or takes longer than
    `SECONDS`, the answer is `Undecided`. The time limit is a signal, which exists in the main thread alone: elsewhere
    there is none.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError as error:
        raise ConfigError(
            f"eval.scorer math_verify needs the package math-verify: pip install 'opsd[math]' ({error})"
        ) from error

    def read(text: str, seconds: int | None) -> list[Any]:
        bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "$" else text
        # In a box a bare expression, a number or a word is found just as well as one between dollar signs.
        boxed = text if "\\boxed" in text else f"\\boxed{{{bare}}}"
        return parse(boxed, parsing_timeout=seconds, raise_on_error=True)

    def score(text: str, row: Row) -> bool:
        found, answer = extract(text, pattern), (row.answer or "").strip()
        if found is None or found == answer:  # without a parser that may fail
            return found is not None
        seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
        failure: BaseException | None = None
        pairs: list[tuple[Any, Any]] = []
        try:
            pairs = [(gold, given) for gold in read(answer, seconds) for given in read(found, seconds)]
        except (Exception, TimeoutException) as error:  # its timeout is no Exception
            failure = error
        for gold, given in pairs:
            try:
                if verify(gold, given, timeout_seconds=seconds, raise_on_error=True):
                    return True
            except (Exception, TimeoutException) as error:
                failure = error
        if failure is not None:
            raise Undecided(f"math-verify: {type(failure).__name__}: {failure}") from failure
        return False

    return score


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
