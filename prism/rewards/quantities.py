"""Numbers as people write them, with or without a unit, and when two of them are equal."""

import re
from fractions import Fraction
from typing import NamedTuple

from prism.rewards.units import Unit, is_counted_thing, read_unit


class Number(NamedTuple):
    """A number exactly as it is written."""

    value: Fraction
    # how many decimals it was written with: 2 for 3.14; None: an integer or a fraction, exact
    decimals: int | None = None


class Quantity(NamedTuple):
    """A number with its unit."""

    number: Number
    unit: Unit
    percent: bool = False
    # whether a single letter stood right behind the digits, as in 5m: a unit, or a product of algebra
    letter: bool = False


# beyond these nothing is a final answer, and exact arithmetic would grow without bound
_MOST_DIGITS = 400
_MOST_EXPONENT = 400

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+(?![\d/ ])|\d+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = (
    r"10\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<{0}b>[+-]?\s*\d+)\s*\}}|\(\s*(?P<{0}p>[+-]?\s*\d+)\s*\)|(?P<{0}n>[+-]?\d+))"
)
_NUMBER = re.compile(
    rf"""(?P<sign>[+-])?\s*(?:
        (?P<mantissa>{_UNSIGNED})\s*(?:\\times|\\cdot|[×x*·⋅])\s*{_POWER_OF_TEN.format("t")}
      | {_POWER_OF_TEN.format("u")}
      | (?P<e_mantissa>{_UNSIGNED})[eE](?P<e_power>[+-]?\d+)
      | (?:(?P<mixed>\d+)\s*)?\\frac
        \s*(?:\{{\s*(?P<f_above>[+-]?\d+)\s*\}}|(?P<f_short_above>\d))
        \s*(?:\{{\s*(?P<f_below>\d+)\s*\}}|(?P<f_short_below>\d))
      | (?P<mixed_plain>\d+)\s+(?P<m_above>\d+)\s*/\s*(?P<m_below>\d+)
      | (?P<above>{_UNSIGNED})\s*/\s*(?P<below>{_UNSIGNED})
      | (?P<plain>{_UNSIGNED})
    )""",
    re.VERBOSE,
)
_PERCENT = re.compile(r"%|percent(?:age)?\b|per cent\b|pct\b|个百分点", re.IGNORECASE)
_MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MAGNITUDES |= {"dozen": 12, "万": 10**4, "亿": 10**8}
_MAGNITUDE = re.compile(r"\s*(" + "|".join(_MAGNITUDES) + r")(?![a-z])\s*", re.IGNORECASE)
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?P<unit>US\$|[$€£¥₹]|USD|EUR|GBP|CNY|RMB)\s*(?=[\d.+-])")

_ONE_TO_NINETEEN = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen
"""
_ONES = _ONE_TO_NINETEEN.split()
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_WORDS |= {
    f"{ten}{joint}{one}": 20 + 10 * i + j + 1
    for i, ten in enumerate(_TENS)
    for j, one in enumerate(_ONES[1:10])
    for joint in "- "
}
_CHINESE = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_CHINESE_NUMBER = re.compile(r"([零〇一二两三四五六七八九])|([一二三四五六七八九]?)十([一二三四五六七八九]?)")
_NUMBER_WORD = re.compile("(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")\b", re.IGNORECASE)

NO_UNIT = Unit((), Fraction(1))


def read_quantity(text: str) -> Quantity | None:
    """Returns the number with its unit that a text is, or None where it is something else.

    Several parts of one kind are one quantity: 1 h 30 min, 5 ft 3 in, 30°30'.
    """
    text = text.strip()
    if len(text) > 2 and text[0] == "(" and text[-1] == ")" and text.count("(") == 1:
        text = text[1:-1].strip()
    if len(text) > _MOST_DIGITS:
        return None
    currency = _CURRENCY.match(text)
    if currency:
        unit = read_unit(currency["unit"])
        amount = _single(currency["sign"] + text[currency.end() :])
        if unit is None or amount is None or amount.percent or amount.unit not in (NO_UNIT, unit):
            return None
        return amount._replace(unit=unit, letter=False)
    return _single(text) or _sum_of_parts(text)


def _single(text: str) -> Quantity | None:
    found = _leading_number(text)
    if found is None:
        return None
    number, rest = found
    spaced = rest[:1].isspace()
    while match := _MAGNITUDE.match(rest):
        number = Number(number.value * _MAGNITUDES[match[1].lower()])
        rest, spaced = rest[match.end() :], True
    rest = rest.strip()
    if match := _PERCENT.match(rest):
        return Quantity(number, NO_UNIT, percent=True) if match.end() == len(rest) else None
    rest = rest.removeprefix("*").removeprefix("\\cdot").strip() if rest[:1] == "*" else rest
    unit = read_unit(rest)
    # 2xy and 五 in 五角星 are no counts
    if unit is None or (is_counted_thing(unit) and not spaced and not (text[0] in "+-.0123456789" and rest[0] > "z")):
        return None
    letter = not spaced and re.fullmatch(r"[a-zA-Z](?![a-zA-Z]).*", rest) is not None
    return Quantity(number, unit, letter=letter)


def _sum_of_parts(text: str) -> Quantity | None:
    parts = re.findall(rf"({_UNSIGNED}\s*(?:°C|°F|[^\W\d]+|°|'|\"))\s*(?:and)?\s*", text)
    if len(parts) < 2 or re.sub(r"\s|and", "", "".join(parts)) != re.sub(r"\s|and", "", text):
        return None
    quantities = [_single(part) for part in parts]
    first = quantities[0]
    if first is None or is_counted_thing(first.unit) or not first.unit.dimension:
        return None
    total, previous = Fraction(0), None
    for quantity in quantities:
        # from the largest to the smallest, or it is a list
        if quantity is None or quantity.unit.dimension != first.unit.dimension:
            return None
        if previous is not None and quantity.unit.size >= previous:
            return None
        total, previous = total + quantity.number.value * quantity.unit.size, quantity.unit.size
    return Quantity(Number(total / first.unit.size), first.unit)


def _leading_number(text: str) -> tuple[Number, str] | None:
    """Returns the number that a text begins with, and what follows it."""
    if match := _NUMBER.match(text):
        number = _value(match)
        rest = text[match.end() :]
        # what goes on as an expression or another number is not this number
        return None if number is None or re.match(r"\s*[\d^/+\-!({\[_]|\.\d|,\d", rest) else (number, rest)
    if match := _NUMBER_WORD.match(text):
        return Number(Fraction(_WORDS[match[1].lower()])), text[match.end() :]
    if match := _CHINESE_NUMBER.match(text):
        if match[1]:
            return Number(Fraction(_CHINESE[match[1]])), text[match.end() :]
        value = 10 * _CHINESE.get(match[2], 1) + _CHINESE.get(match[3], 0)
        return Number(Fraction(value)), text[match.end() :]
    return None


def _value(match: re.Match[str]) -> Number | None:
    sign = -1 if match["sign"] == "-" else 1
    if (mantissa := match["mantissa"] or match["e_mantissa"]) is not None:
        return _scaled(sign, mantissa, match["tb"] or match["tp"] or match["tn"] or match["e_power"])
    if (power := match["ub"] or match["up"] or match["un"]) is not None:
        return _scaled(sign, "1", power)
    above = match["f_above"] or match["f_short_above"] or match["m_above"] or match["above"]
    if above is not None:
        below = match["f_below"] or match["f_short_below"] or match["m_below"] or match["below"]
        whole = match["mixed"] or match["mixed_plain"] or "0"
        over = _decimal(below).value
        return Number(sign * (_decimal(whole).value + _decimal(above).value / over)) if over else None
    number = _decimal(match["plain"])
    return Number(sign * number.value, number.decimals)


def _scaled(sign: int, mantissa: str, power: str) -> Number | None:
    exponent = int(power.replace(" ", ""))
    if abs(exponent) > _MOST_EXPONENT:
        return None
    number = _decimal(mantissa)
    decimals = None if number.decimals is None else number.decimals - exponent
    return Number(sign * number.value * Fraction(10) ** exponent, decimals)


def _decimal(text: str) -> Number:
    text = text.replace(",", "").replace(" ", "").removesuffix(".")
    _, point, part = text.partition(".")
    return Number(Fraction("0" + text if text.startswith(".") else text), len(part) if point else None)


def equal_quantities(gold: Quantity, answer: Quantity) -> bool:
    """Returns whether two quantities are one.

    Units are converted where both have one; where one has none it is taken from the other. A percentage is its
    hundredth, and a bare number above 1 also stands for the same percentage.
    """
    if gold.percent != answer.percent:
        percent, bare = (gold, answer) if gold.percent else (answer, gold)
        if bare.unit != NO_UNIT:
            return False
        hundredth = Number(percent.number.value / 100, _finer(percent.number.decimals))
        same = _equal_numbers(hundredth, bare.number)
        return same or (abs(bare.number.value) > 1 and _equal_numbers(percent.number, bare.number))
    units = gold.unit, answer.unit
    if NO_UNIT in units or units[0] == units[1]:
        # 5m for 5 could be a product
        if units[0] != units[1] and (gold.letter or answer.letter):
            return False
        return _equal_numbers(gold.number, answer.number)
    if units[0].dimension != units[1].dimension:
        return False
    # a conversion is exact, or one side is the other's, rounded to six digits
    scale = units[1].size / units[0].size
    converted = Number(answer.number.value * scale), Number(gold.number.value / scale)
    return _equal_numbers(gold.number, converted[0]) or _equal_numbers(converted[1], answer.number)


def _finer(decimals: int | None) -> int | None:
    return None if decimals is None else decimals + 2


def _equal_numbers(one: Number, other: Number) -> bool:
    """Returns whether two numbers are equal, or one is the other rounded, to six digits or more."""
    if one.value == other.value:
        return True
    rounded = [n for n in (one, other) if n.decimals is not None]
    if not rounded:
        return False
    coarse = min(rounded, key=lambda n: n.decimals or 0)
    fine = other if coarse is one else one
    unit_in_last_place = Fraction(10) ** -(coarse.decimals or 0)
    six_digits = abs(coarse.value) >= 100000 * unit_in_last_place
    return six_digits and abs(coarse.value - fine.value) * 2 <= unit_in_last_place
