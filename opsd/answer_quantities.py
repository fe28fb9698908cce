"""Numbers with their units, as an answer has them: percent signs, mixed numbers, powers of ten, other bases."""

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from sympy.physics import units
from sympy.physics.units.systems import SI

DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?!,?\d)(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:"
    rf"(?:(?P<whole>\d+) ?)?\\frac ?\{{ ?(?P<over>-?{DECIMAL}) ?\}} ?\{{ ?(?P<under>-?{DECIMAL}) ?\}}"
    r"|(?P<digits>\d+)_(?:\{ ?(?P<base>\d+) ?\}|(?P<base1>\d))"
    rf"|(?:(?P<factor>{DECIMAL}) ?(?:\\times|\\cdot|[×*x]) ?)?10 ?\^ ?\{{ ?(?P<power>[+-]?\d{{1,4}}) ?\}}"
    rf"|(?P<decimal>{DECIMAL})(?:\\overline ?\{{(?P<period>\d+)\}}|[eE](?P<exponent>[+-]?\d{{1,4}}))?)"
)
WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mathit|mbox|operatorname) ?\{([^{}]*)\}")
FACTOR = (
    r" ?(/|per |\\cdot |\*)? ?(square |sq |cubic )?(° ?[CF]?(?![A-Za-z])|[A-Za-z]+|[%€£¥₹]|\\\$|''?)"
    r"\.?(?: ?\^ ?\{? ?(-?\d) ?\}?)? ?"
)
TAIL = re.compile(rf"{WRAPPED.pattern}|[°%]| (?=[A-Za-z]{{2}})")
ALIASES = {"%": "percent", "°": "degree", "deg": "degree", "\\$": "dollar", "min": "minute", "sec": "second",
           "hr": "hour", "lb": "pound", "in": "inch", "'": "prime", "''": "double prime"}  # fmt: skip
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


class Unit(NamedTuple):
    scale: Fraction = Fraction(1)  # in the base units of `dimensions`
    dimensions: frozenset[tuple[str, int]] = frozenset()
    words: frozenset[tuple[str, int]] = frozenset()  # that name no unit of physics: apples, dollars

    def like(self, other: "Unit") -> bool:
        """Of one kind. 6 red apples are 6 apples."""
        subset = self.words <= other.words or other.words <= self.words
        return subset and self.dimensions == other.dimensions


class Quantity(NamedTuple):
    text: str  # without the unit
    value: Fraction | None  # of a plain number
    unit: Unit = Unit()


def quantity(text: str) -> Quantity:
    match = NUMBER.match(text)
    if match and (unit := unit_of(text[match.end() :])) and (value := number(match)) is not None:
        value *= unit[0]
        return Quantity(f"\\frac{{{value.numerator}}}{{{value.denominator}}}", value, unit[1])
    for tail in TAIL.finditer(text, 1):
        unit = unit_of(text[tail.start() :])
        if unit and unit[0] == 1:
            return Quantity(text[: tail.start()].strip(), None, unit[1])
    return Quantity(text, None)


def number(match: re.Match[str]) -> Fraction | None:
    """The value of a match of NUMBER. None: it is no number after all."""
    part = {name: re.sub("[ ,]", "", text) for name, text in match.groupdict().items() if text}
    sign = -1 if part.get("sign") == "-" else 1
    if "under" in part:
        whole, over, under = (Fraction(part.get(name, 0)) for name in ("whole", "over", "under"))
        return sign * (whole + over / under) if under and (not whole or 0 < over / under < 1) else None
    if "digits" in part:
        base = int(part.get("base") or part["base1"])
        digits = "0123456789"[:base]
        return (
            Fraction(sign * int(part["digits"], base)) if 1 < base < 37 and not part["digits"].strip(digits) else None
        )
    if "power" in part:
        return sign * Fraction(part.get("factor", "1")) * Fraction(10) ** int(part["power"])
    value = Fraction(part["decimal"]) * Fraction(10) ** int(part.get("exponent", 0))
    if "period" in part:
        places = len(part["decimal"].partition(".")[2])
        value += Fraction(int(part["period"]), (10 ** len(part["period"]) - 1) * 10**places)
    return sign * value


def unit_of(text: str) -> tuple[int, Unit] | None:
    """What stands after a number: how many times it is meant (million), and its unit. None where it is something else.

    A lone letter, or a short word that sympy does not know as a unit, is a variable unless it is wrapped in \\text{}.
    """
    bare = " ".join(WRAPPED.sub(r" \1 ", text).split())
    if not re.fullmatch(f"(?:{FACTOR})* ?", bare):
        return None
    times, scale, dimensions, words = 1, Fraction(1), Counter[str](), Counter[str]()
    for over, area, name, power in re.findall(FACTOR, bare):
        exponent = int(power or {"square ": 2, "sq ": 2, "cubic ": 3}.get(area, 1))
        exponent *= -1 if over in ("/", "per ") else 1
        name = ALIASES.get(name, name.replace(" ", ""))
        if name in MULTIPLES:
            times *= MULTIPLES[name]
            continue
        found = vars(units).get(name) or vars(units).get(name.lower())
        known = isinstance(found, units.Quantity) and found.scale_factor.is_Rational
        lone = len(name) == 1 and not (name in "mgshlL" and text[0] == " ")
        if not WRAPPED.search(text) and (lone if known else len(name) < 4):
            return None
        if known:
            scale *= Fraction(str(found.scale_factor)) ** exponent
            base = SI.get_dimension_system().get_dimensional_dependencies(found.dimension)
            dimensions.update({str(dimension.name): n * exponent for dimension, n in base.items()})
        else:
            words[name.lower().rstrip("s")] += exponent
    return times, Unit(scale, frozenset(item for item in dimensions.items() if item[1]), frozenset(words.items()))
