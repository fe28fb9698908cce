"""Are two answers equal? The program of the process that `opsd.scorers` starts: lines of JSON in, lines of JSON out.

math-verify compares decimals after rounding, ignores units and takes a pair for a set. So numbers, units, words,
intervals, tuples and sets are read here; it is asked about the expressions in them, and its "equal" is checked.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

if TYPE_CHECKING:
    from opsd.answer_quantities import DECIMAL, WRAPPED, Unit, quantity
else:  # the file beside this one: the package would import torch
    from answer_quantities import DECIMAL, WRAPPED, Unit, quantity

MEMORY = 2 << 30  # bytes of address space
DIGITS = 50  # of the numerical check
TIDY = [
    (r"\\(?:left|right|displaystyle|[Bb]igg?[lr]?)(?![A-Za-z])|\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])| +", " "),
    (r"\{,\}", ","),
    (r"^\\(?:text|math)[a-z]* ?\{([^{}]*\d[^{}]*)\}$", r"\1"),
    (r"\\%", "%"),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree(?![A-Za-z])", "°"),
    (r"(?<=\d) ?(?:\^ ?(?:\{ ?\\prime ?\}|\\prime(?![A-Za-z]))|[′’])", "'"),
    (r"(?<=\d) ?(?:\^ ?\{ ?\\prime ?\\prime ?\}|[″”])", "''"),
    (r"(?<=[°']) (?=\d)", ""),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])|π", r"\\pi "),
    (r"[−–]", "-"),
    (r"\\varnothing(?![A-Za-z])|∅", r"\\emptyset "),
    (r"\\neq?(?![A-Za-z])|≠|\\not ?=", r"\\ne "),
    (r"\\leq?(?:slant)?(?![A-Za-z])|≤|<=", r"\\le "),
    (r"\\geq?(?:slant)?(?![A-Za-z])|≥|>=", r"\\ge "),
    (r"\+?(?:\\infty(?![A-Za-z])|∞)", r"\\infty"),
    (r"\\[dtc]?frac ?(\d)", r"\\frac{\1}"),
    (r"\\[dtc]?frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (rf"^([+-]?(?:\d+ (?=[1-9]))?)({DECIMAL}) ?/ ?({DECIMAL})(?! ?[\d.^!])", r"\1\\frac{\2}{\3}"),
    (r"\^ ?(-?\d+)", r"^{\1}"),
    (r"^([+-]?) ?(\\\$|[€£¥₹]) ?(.*)$", r"\1\3 \2"),  # the mark of a currency goes where other units are
    (r"^\( ?(\d{1,3}(?:,\d{3})*,0\d\d(?:,\d{3})*) ?\)$", r"\1"),  # (1,000) can be no pair, (2,100) can
]
NAME = r"(?:[A-Za-z]|[A-Za-z]{4,}|\\[a-z]+|\\text ?\{[A-Za-z ]+\})(?:_(?:\w|\{\w+\}))?"
ASSIGNED = re.compile(rf"({NAME}(?: ?\([a-z, ]+\))?|\([a-z](?: ?, ?[a-z])+\)) ?(?:=|\\in(?![A-Za-z])) ?([^=<>]+)")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
PRODUCT = re.compile(r"(?<![\\A-Za-z])(?!m ?\\angle)[a-z][A-Za-z]{0,2}(?![A-Za-z]| ?\()")  # one or more variables
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4}")
BUILT = re.compile(rf"\\?\{{ ?({NAME})(?: ?\\in ?\\mathbb ?\{{? ?R ?\}}?)? ?(?::|\||\\mid|\\vert) ?(.+?) ?\\?\}}")
UNEQUAL = re.compile(rf"({NAME}) ?\\ne ?([^=<>]+)")
SIGN = re.compile(r" ?(<|>|\\[lg]e(?![A-Za-z])) ?")
MIRROR = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
CUP, OR, AND = r"\\cup(?![A-Za-z])", r"\\text ?\{ ?or ?\}| or ", r"[,;]|\\text ?\{ ?and ?\}| and "


class Structure(NamedTuple):
    kind: str  # the brackets, or "set" or "union", whose order is of no matter
    parts: list[str]
    name: str = ""  # of the variable, where it was an inequality

    def equals(self, other: "Structure") -> bool:
        if {self.kind, other.kind} == {"set", "()"}:  # x = 1, y = 2 is (1, 2)
            these, those = (s.parts if s.kind == "()" else named(s.parts) for s in (self, other))
            return Structure("()", these).equals(Structure("()", those))
        if self.kind != other.kind or (self.name and other.name and self.name != other.name):
            return False
        if self.kind in ("set", "union"):
            found = [[equal(a, b) for b in other.parts] for a in self.parts]
            return all(map(any, found)) and all(map(any, zip(*found, strict=True)))
        return len(self.parts) == len(other.parts) and all(map(equal, self.parts, other.parts))


def named(parts: list[str]) -> list[str]:
    """The values of parts such as x = 1, ordered by their names; none where one has no name, or two the same."""
    values = {match[1]: match[2] for match in map(ASSIGNED.fullmatch, parts) if match}
    return [values[name] for name in sorted(values)] if len(values) == len(parts) else []


def equal(gold: str, given: str) -> bool:
    """Both, LaTeX or plain, are mathematically the same.

    Numbers are compared exactly: 50 % is 1/2, 1 km is 1000 m, 0.333 is not 1/3. What one side alone has is not held
    against it where it is a unit or a percent sign (5 cm and 5, 50 % and 50) or a name before = or \\in.
    """
    a, b = tidy(gold), tidy(given)
    if a == b:
        return True
    (words, sure), (others, certain) = as_words(a), as_words(b)
    if words and others and (words == others or sure or certain):
        return words == others
    p, q = quantity(a), quantity(b)
    both = Unit() not in (p.unit, q.unit)
    if p.value is not None and q.value is not None:
        same = p.unit.like(q.unit) and p.value * p.unit.scale == q.value * q.unit.scale
        return same or (not both and p.value == q.value)
    these, those = ASSIGNED.fullmatch(a), ASSIGNED.fullmatch(b)
    if these[1] == those[1] if these and those else (these or those) and not ("=" in a and "=" in b):
        return equal(these[2] if these else a, those[2] if those else b)
    first, second = (structure(x) if of.value is None else None for x, of in ((a, p), (b, q)))
    if first and second:
        return first.equals(second)
    if (first and q.value is not None) or (second and p.value is not None):
        return False  # several things, or an interval, and one number
    if both and (not p.unit.like(q.unit) or p.unit.scale != q.unit.scale):
        return False
    for equation, value in ((a, b), (b, a)):
        if "=" in equation and "=" not in value:
            return not names_nothing(equation) and equal(equation.rpartition("=")[2], value)
    return expressions_equal(p.text, q.text)


def names_nothing(equation: str) -> bool:
    """What stands before the first = is an expression in variables, as in xy = 5 or 2x = 10: 5 is no answer to those.
    A variable, a function's value, a segment AB and words are names of what comes after."""
    before, _, _ = equation.partition("=")
    lone = re.fullmatch(NAME, before.strip()) or ASSIGNED.fullmatch(equation) or PROSE.search(before)
    return not lone and PRODUCT.search(before) is not None


def tidy(text: str) -> str:
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # else the first is a currency's
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"^\s*\$", r"\\$", text)
    for pattern, replacement in TIDY:
        text = re.sub(pattern, replacement, " ".join(text.split()))
    return text.rstrip("., ;")


def as_words(text: str) -> tuple[str, bool]:
    """The words that `text` consists of, "" for anything else; and that they cannot be a product of variables."""
    bare = WRAPPED.sub(r" \1 ", text)
    words = re.sub(r"^\((.*)\)$", r"\1", " ".join(bare.lower().split()).strip("."))
    found = re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", words)
    return (words, bare != text or len(words) > 3) if found else ("", False)


def structure(text: str) -> Structure | None:
    """A tuple, interval, set, union, list (which is a set) or inequality; None for anything else."""
    if built := BUILT.fullmatch(text):  # of values of a variable whose name is of no matter
        found = structure(built[2])
        return found and found._replace(name="")
    if found := interval(text):
        return found
    if apart := UNEQUAL.fullmatch(text):
        return Structure("union", [f"(-\\infty,{apart[2]})", f"({apart[2]},\\infty)"], apart[1])
    for separator in (CUP, OR, AND + "|" + OR):
        parts = [part for part in split(text, separator) if part]
        if len(parts) > 1:
            union = separator is CUP or (separator is OR and all(map(interval, parts)))
            return Structure("union" if union else "set", parts)
    match = re.fullmatch(r"(\(|\[|\\?\{)(.+?)(\)|\]|\\?\})", text)
    parts = split(match[2], "[,;]") if match else []
    return Structure("set" if text[0] in "\\{" else text[0] + text[-1], parts) if len(parts) > 1 else None


def split(text: str, separator: str) -> list[str]:
    """`text` at each `separator` that is within no brackets; nothing where a bracket is closed that is not open."""
    depth, start, parts = 0, 0, []
    for token in re.finditer(rf"(?P<cut>{separator})|[(\[{{]|[)\]}}]", text):
        if token["cut"] is None:
            depth += 1 if token[0] in "([{" else -1
        elif not depth:
            parts.append(text[start : token.start()].strip())
            start = token.end()
        if depth < 0:
            return []
    return [*parts, text[start:].strip()]


def interval(text: str) -> Structure | None:
    """The interval of x > 3 or 1 < x \\le 2."""
    found = SIGN.split(text)
    if len(found) == 3:
        found = found if re.fullmatch(NAME, found[0]) else [found[2], MIRROR.get(found[1], ""), found[0]]
        found = ["-\\infty", "<", *found] if found[1] in ("<", "\\le") else ["\\infty", ">", *found]
    if len(found) != 5 or not re.fullmatch(NAME, found[2]) or VARIABLE.search(f"{found[0]} {found[4]}"):
        return None
    low, left, name, right, high = found if found[1] in ("<", "\\le") else (MIRROR.get(x, x) for x in reversed(found))
    if MIRROR[right] in ("<", "\\le"):
        return None  # 1 < x > 2
    return Structure(("[" if left == "\\le" else "(") + ("]" if right == "\\le" else ")"), [low, high], name)


def expressions_equal(gold: str, given: str) -> bool:
    """By math-verify, on the trees of both where it could read them, else on the texts it made of them."""
    pairs = [(x, y) for x in read(gold) for y in read(given) if isinstance(x, str) is isinstance(y, str)]
    trees = [pair for pair in pairs if not isinstance(pair[0], str)]
    return any(verify(*p, timeout_seconds=None, raise_on_error=True) and confirmed(*p) for p in trees or pairs)


def read(text: str) -> list[Any]:
    rules = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    boxed = f"\\boxed{{{text}}}"  # in a box a bare expression is found, too
    return parse(boxed, [LatexExtractionConfig(normalization_config=rules)], parsing_timeout=None, raise_on_error=True)


def confirmed(a: Any, b: Any) -> bool:
    """The values of two expressions, at two points where they have variables, agree to nearly `DIGITS` digits."""
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(confirmed, a.flat(), b.flat()))
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return True
    # Decimals are meant exactly.
    a, b = (e.xreplace({f: sympy.Rational(str(f)) for f in e.atoms(sympy.Float)}) for e in (a, b))
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    for start in (7, 13):
        point = {name: sympy.Rational(start + 3 * i, 11) for i, name in enumerate(names)}
        x, y = (e.subs({s: point[str(s)] for s in e.free_symbols}).evalf(DIGITS) for e in (a, b))
        if all(value.is_number and value.is_finite for value in (x, y)):
            # A value of which no digit is known is a zero that evaluation cannot tell from one.
            x, y = (0 if getattr(value, "_prec", 2) == 1 else value for value in (x, y))
            if abs(x - y) > sympy.Float(10) ** (10 - DIGITS) * max(abs(x), abs(y)):
                return False
    return True


def main() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair; it closes our input
    logging.disable()
    sys.set_int_max_str_digits(0)
    answers, alarm = sys.stdout, getattr(signal, "alarm", int)
    print(json.dumps("ready"), file=answers, flush=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for line in filter(str.strip, sys.stdin):
            gold, given, seconds = json.loads(line)
            alarm(seconds + 1)  # for when the parent, which ends us before that, is gone
            try:
                verdict: bool | str = equal(gold, given)
            except (Exception, MemoryError) as error:
                verdict = f"{type(error).__name__}: {error}"[:500]
            alarm(0)
            print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
