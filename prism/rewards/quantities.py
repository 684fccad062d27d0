"""Numbers as people write them, units and their conversion, and when two quantities are equal."""

import re
from fractions import Fraction
from typing import NamedTuple

from prism.rewards.number_words import MAGNITUDES, NUMBER_WORDS, parts_of_one, read_and_fraction, read_spelt_number
from prism.rewards.wording import CONDITIONS, CONTRASTS, FALSE, HEDGES, NEGATIONS, SECOND_THOUGHTS


class Unit(NamedTuple):
    """A unit: its dimension, as powers of base quantities, and its size in base units."""

    # sorted pairs of a base quantity and its power; a counted thing is a base quantity of its own
    dimension: tuple[tuple[str, int], ...]
    size: Fraction


NO_UNIT = Unit((), Fraction(1))


def _unit_table(rows: str) -> dict[str, tuple[str, Fraction]]:
    """Reads rows of `quantity: size name name, size name ...`."""
    table: dict[str, tuple[str, Fraction]] = {}
    for row in rows.strip().splitlines():
        quantity, _, units = row.strip().partition(": ")
        for unit in units.split(", "):
            size, *names = unit.split()
            table.update((name.replace("_", " "), (quantity, Fraction(size))) for name in names)
    return table


# scales of temperature have offsets, so each is a quantity of its own and none is converted
_UNIT_SYMBOLS = _unit_table("""
length: 1 m, 1000 km, 1/10 dm, 1/100 cm, 1/1000 mm, 1/1000000 um μm µm, 1/1000000000 nm
length: 254/10000 in, 3048/10000 ft, 9144/10000 yd, 1609344/1000 mi
mass: 1 kg, 1/1000 g, 1/1000000 mg, 1/1000000000 ug μg µg, 1000 t, 45359237/100000000 lb lbs
mass: 45359237/1600000000 oz
time: 1 s, 1/1000 ms, 60 min mins, 3600 h hr hrs, 1/1000000 μs µs, 1/1000000000 ns, 86400 d
angle: 1 ° deg, 1/60 ', 1/3600 "
current: 1 A, 1/1000 mA
voltage: 1 V, 1/1000 mV, 1000 kV
resistance: 1 Ω ohm Ohm, 1000 kΩ, 1000000 MΩ
force: 1 N, 1000 kN
energy: 1 J, 1000 kJ, 1000000 MJ, 3600000 kWh, 3600 Wh, 4184/1000 cal, 4184 kcal
power: 1 W, 1000 kW, 1000000 MW, 1/1000 mW
pressure: 1 Pa, 1000 kPa, 1000000 MPa, 101325 atm
frequency: 1 Hz, 1000 kHz, 1000000 MHz, 1000000000 GHz
charge: 1 C, 1/1000000 μC µC
substance: 1 mol, 1/1000 mmol
concentration: 1 M
celsius: 1 °C
fahrenheit: 1 °F
kelvin: 1 K
data: 1 B, 1000 KB kB, 1000000 MB, 1000000000 GB
dollar: 1 $ USD US$, 1/100 ¢
euro: 1 € EUR
pound_sterling: 1 £ GBP
yuan: 1 ¥ CNY RMB 元 块 人民币, 1/10 角, 1/100 分
rupee: 1 ₹ INR
""")
_UNIT_WORDS = _unit_table("""
length: 1 meter metre 米, 1000 kilometer kilometre 千米 公里, 1/10 decimeter decimetre 分米
length: 1/100 centimeter centimetre 厘米, 1/1000 millimeter millimetre 毫米, 254/10000 inch inches
length: 3048/10000 foot feet, 9144/10000 yard, 1609344/1000 mile
mass: 1 kilogram kilo 千克 公斤, 1/1000 gram 克, 1/1000000 milligram, 1000 ton tonne 吨
mass: 45359237/100000000 pound, 45359237/1600000000 ounce
time: 1 second sec 秒, 60 minute 分钟, 3600 hour 小时, 86400 day 天, 604800 week 周
angle: 1 degree 度
current: 1 amp ampere
voltage: 1 volt
resistance: 1 ohm
force: 1 newton
energy: 1 joule, 4184/1000 calorie
power: 1 watt
pressure: 1 pascal
frequency: 1 hertz
substance: 1 mole
celsius: 1 degree_celsius degrees_celsius
fahrenheit: 1 degree_fahrenheit degrees_fahrenheit
kelvin: 1 kelvin
dollar: 1 dollar, 1/100 cent
euro: 1 euro
yuan: 1 yuan
month: 1 month 个月, 12 year 年
""")
# units that are products of others
_DERIVED = {
    "L": (("length", 3), Fraction(1, 1000)),
    "mL": (("length", 3), Fraction(1, 1000000)),
    "mph": (("length", 1), ("time", -1), Fraction(1609344, 3600000)),
    "ha": (("length", 2), Fraction(10000)),
}
_DERIVED_NAMES = {
    **dict.fromkeys(("L", "l", "liter", "liters", "litre", "litres", "升"), "L"),
    **dict.fromkeys(("mL", "ml", "milliliter", "milliliters", "millilitre", "millilitres", "毫升", "cc"), "mL"),
    **dict.fromkeys(("mph", "MPH"), "mph"),
    **dict.fromkeys(("ha", "hectare", "hectares"), "ha"),
}
_POWER_WORDS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
# a count of nothing in particular
_NO_UNIT_NAMES = {
    "unit",
    "units",
    "square units",
    "sq units",
    "cubic units",
    "units squared",
    "square unit",
    "unit^2",
    "units^2",
}
_NO_UNIT_NAMES |= {"units^{2}", "unit^{2}", "units^3", "units^{3}", "个", "rad", "radian", "radians"}
# words that change the meaning of a number, so they are in no name of a counted thing
_OTHER_STATEMENTS = """
or and to more less fewer than plus minus times over under at about around approximately nearly almost from until is
are was were percent per by with of out sin cos tan log either both any each except unknown greater between pi sqrt
squared cubed factorial doubled halved twice modulo mod choose root power divided multiplied added subtracted base past
the this that these those
"""
_NOT_A_THING = frozenset(_OTHER_STATEMENTS.split()) | NEGATIONS | CONDITIONS | CONTRASTS | HEDGES | SECOND_THOUGHTS
_UNIT_POWER = re.compile(r"(.+?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|\*\*(-?\d)|(squared|cubed))?")
_LETTER_POWER = re.compile(r"([a-zA-Z]+)([23])")
_THING = re.compile(r"(?:[^\W\d_]{3,}|[^\W\d_a-z]{2,})(?:[ -][^\W\d_]{2,}){0,2}")


def read_unit(text: str) -> Unit | None:
    """Returns the unit or counted thing that a text names, or None."""
    text = text.strip().strip(".")
    if not text or text in _NO_UNIT_NAMES:
        return NO_UNIT
    known = _product_of_units(text)
    if known is not None:
        return known
    words = text.lower()
    if _THING.fullmatch(words) and _names_a_thing(words):
        return Unit(((_singular(words), 1),), Fraction(1))
    return None


def _names_a_thing(text: str) -> bool:
    words = text.split()
    # 5 wrong answers are counted, "5 wrong" is not
    if _NOT_A_THING & set(re.split("[ -]", text)) or words[-1] in FALSE:
        return False
    # so are four-sided shapes, but not thirty-one
    return not any(word in NUMBER_WORDS or set(word.split("-")) <= NUMBER_WORDS for word in words)


def is_counted_thing(unit: Unit) -> bool:
    """Returns whether a unit is a counted thing, not a unit of measure."""
    return len(unit.dimension) == 1 and unit.dimension[0][0] not in _QUANTITIES


_QUANTITIES = {quantity for quantity, _ in [*_UNIT_SYMBOLS.values(), *_UNIT_WORDS.values()]}


def _product_of_units(text: str) -> Unit | None:
    """Returns the product and quotient of known units: m/s^2, kg*m, square centimetres, miles per hour."""
    text = re.sub(r"\\(?:cdot|times)|[·⋅×]", "*", re.sub(r"\s+per\s+|每", "/", text))
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    powers: dict[str, int] = {}
    size = Fraction(1)
    for i, part in enumerate(text.split("/")):
        for name in part.split("*"):
            unit = _unit_power(name.strip())
            if unit is None:
                return None
            sign = -1 if i else 1
            size *= unit.size**sign
            for quantity, power in unit.dimension:
                powers[quantity] = powers.get(quantity, 0) + sign * power
    return Unit(tuple(sorted((q, p) for q, p in powers.items() if p)), size)


def _unit_power(text: str) -> Unit | None:
    """Returns a known unit, or a power of one."""
    first, _, rest = text.partition(" ")
    if rest and first.lower() in _POWER_WORDS:
        return _raised(_named_unit(rest), _POWER_WORDS[first.lower()])
    for word in ("平方", "立方"):
        if text.startswith(word):
            return _raised(_named_unit(text.removeprefix(word)), _POWER_WORDS[word])
    match = _UNIT_POWER.fullmatch(text)
    if match is None:
        return None
    power = int(match[2] or match[3] or {"squared": 2, "cubed": 3}.get(match[4], 1))
    if power == 1 and (plain := _LETTER_POWER.fullmatch(text)):
        return _raised(_named_unit(plain[1]), int(plain[2]))
    return _raised(_named_unit(match[1]), power)


def _raised(unit: Unit | None, power: int) -> Unit | None:
    if unit is None or power == 0:
        return None
    return Unit(tuple((quantity, p * power) for quantity, p in unit.dimension), unit.size**power)


def _named_unit(name: str) -> Unit | None:
    name = name.strip().replace("° ", "°")
    lower = name.lower()
    derived = _DERIVED_NAMES.get(name) or (_DERIVED_NAMES.get(lower) if len(name) > 1 else None)
    if derived:
        *dimension, size = _DERIVED[derived]
        return Unit(tuple(dimension), size)  # type: ignore[arg-type]
    known = (
        _UNIT_SYMBOLS.get(name)
        or _UNIT_WORDS.get(lower)
        or _UNIT_WORDS.get(lower.removesuffix("s"))
        or _UNIT_WORDS.get(_singular(lower))
    )
    # KM and Kg are read too; one letter, and pairs that differ in case alone (MW, mW), are not
    if known is None and len(name) > 1 and sum(symbol.lower() == lower for symbol in _UNIT_SYMBOLS) == 1:
        known = next(value for symbol, value in _UNIT_SYMBOLS.items() if symbol.lower() == lower)
    return None if known is None else Unit(((known[0], 1),), known[1])


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


class Number(NamedTuple):
    """A number, exactly as written."""

    value: Fraction
    # how many decimals were written: 2 for 3.14; None: an exact integer or fraction
    decimals: int | None = None


class Quantity(NamedTuple):
    """A number with its unit."""

    number: Number
    unit: Unit
    percent: bool = False
    # whether a single letter follows the digits directly, as in 5m: a unit, or a product of algebra
    letter: bool = False


# longer numbers are no final answers, and exact arithmetic would grow without bound
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
_MAGNITUDE = re.compile(r"\s*(" + "|".join(MAGNITUDES) + r")(?![a-z])\s*", re.IGNORECASE)
_MINUS = re.compile(r"(?:minus|negative)\s+", re.IGNORECASE)
# "in the box", "long": where and how a counted or measured thing is
_WHERE = re.compile(
    r"(?<=\w)\s+(?:(?:in|on|at|inside)\s+(?:the|this|that|total|all|length|width|height|area|volume)\b[\w\s]*"
    r"|long|wide|tall|high|deep|thick|old|apart|away|across|altogether|overall)$",
    re.IGNORECASE,
)
_PAIR = re.compile(r".*(?:pair|couple|dozen)\b", re.IGNORECASE)
_PART_OF_ONE = re.compile(r"\s+([a-z]+)(?![a-z])", re.IGNORECASE)
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?P<unit>US\$|[$€£¥₹]|USD|EUR|GBP|CNY|RMB)\s*(?=[\d.+-])")


def read_quantity(text: str) -> Quantity | None:
    """Returns the number and unit of a text, or None where the text is something else.

    Several parts of one kind are one quantity: 1 h 30 min, 5 ft 3 in, 30°30'.
    """
    text = _MINUS.sub("-", text.strip())
    if len(text) > 2 and text[0] == "(" and text[-1] == ")" and text.count("(") == 1:
        text = text[1:-1].strip()
    if len(text) > _MOST_DIGITS:
        return None
    currency = _CURRENCY.match(text)
    if currency:
        unit = read_unit(currency["unit"])
        amount = _one_quantity(currency["sign"] + text[currency.end() :])
        if unit is None or amount is None or amount.percent or amount.unit not in (NO_UNIT, unit):
            return None
        return amount._replace(unit=unit, letter=False)
    return _one_quantity(text) or _sum_of_parts(text)


def _one_quantity(text: str) -> Quantity | None:
    leading = _leading_number(text)
    if leading is None:
        return None
    number, rest = leading
    spaced = rest[:1].isspace()
    while match := _MAGNITUDE.match(rest):
        number = Number(number.value * MAGNITUDES[match[1].lower()])
        rest, spaced = rest[match.end() :], True
    if fraction := read_and_fraction(rest):
        number, rest, spaced = Number(number.value + fraction[0]), fraction[1], True
    elif (match := _PART_OF_ONE.match(rest)) and (below := parts_of_one(match[1].lower(), number.value)):
        number, rest = Number(number.value / below), rest[match.end() :]
    rest = _WHERE.sub("", rest.strip())
    # a pair of shoes
    rest = rest.removeprefix("of ") if _PAIR.match(text) else rest
    if match := _PERCENT.match(rest):
        return Quantity(number, NO_UNIT, percent=True) if match.end() == len(rest) else None
    rest = rest.removeprefix("*").removeprefix("\\cdot").strip() if rest[:1] == "*" else rest
    unit = read_unit(rest)
    # 2xy counts nothing, nor does 五 in 五角星
    if unit is None or (is_counted_thing(unit) and not spaced and not (text[0] in "+-.0123456789" and rest[0] > "z")):
        return None
    letter = not spaced and re.fullmatch(r"[a-zA-Z](?![a-zA-Z]).*", rest) is not None
    return Quantity(number, unit, letter=letter)


def _sum_of_parts(text: str) -> Quantity | None:
    parts = re.findall(rf"({_UNSIGNED}\s*(?:°C|°F|[^\W\d]+|°|'|\"))\s*(?:and)?\s*", text)
    if len(parts) < 2 or re.sub(r"\s|and", "", "".join(parts)) != re.sub(r"\s|and", "", text):
        return None
    quantities = [_one_quantity(part) for part in parts]
    first = quantities[0]
    if first is None or is_counted_thing(first.unit) or not first.unit.dimension:
        return None
    total, previous = Fraction(0), None
    for quantity in quantities:
        # units that do not fall in size make a list
        if quantity is None or quantity.unit.dimension != first.unit.dimension:
            return None
        if previous is not None and quantity.unit.size >= previous:
            return None
        total, previous = total + quantity.number.value * quantity.unit.size, quantity.unit.size
    return Quantity(Number(total / first.unit.size), first.unit)


def _leading_number(text: str) -> tuple[Number, str] | None:
    """Returns the number at the start of a text, and the rest."""
    if match := _NUMBER.match(text):
        number = _value(match)
        rest = text[match.end() :]
        # a text that continues as an expression or another number is not this number
        return None if number is None or re.match(r"\s*[\d^/+\-!({\[_]|\.\d|,\d", rest) else (number, rest)
    sign = text[:1] == "-"
    if spelt := read_spelt_number(text[sign:]):
        return Number(-spelt.value if sign else spelt.value, spelt.decimals), text[sign + spelt.end :]
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
    """Returns whether two quantities are equal.

    If both have a unit, one is converted; otherwise a missing unit is taken from the other. A percentage equals its
    hundredth, and also a bare number above 1 of the same value.
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
        # 5m against 5 may be a product
        if units[0] != units[1] and (gold.letter or answer.letter):
            return False
        return _equal_numbers(gold.number, answer.number)
    if units[0].dimension != units[1].dimension:
        return False
    # conversions are exact; a rounded one needs six digits
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
