"""What a unit measures and its size, so that 1 m is 100 cm and 5 kg is not 5 lb."""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit: what it measures, as powers of base quantities, and how many of the base unit it is."""

    # sorted pairs of a base quantity and its power; a thing that is counted is a base quantity of its own
    dimension: tuple[tuple[str, int], ...]
    size: Fraction


def _table(rows: str) -> dict[str, tuple[str, Fraction]]:
    """Reads rows of `quantity: size name name, size name ...`."""
    table: dict[str, tuple[str, Fraction]] = {}
    for row in rows.strip().splitlines():
        quantity, _, units = row.strip().partition(": ")
        for unit in units.split(", "):
            size, *names = unit.split()
            table.update((name.replace("_", " "), (quantity, Fraction(size))) for name in names)
    return table


# temperatures have an offset, so each scale is a quantity of its own and is not converted
_SYMBOLS = _table("""
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
_WORDS = _table("""
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
# units of volume and speed that are products of others
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
_NO_UNIT = {
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
_NO_UNIT |= {"units^{2}", "unit^{2}", "units^3", "units^{3}", "个", "rad", "radian", "radians"}
# words that make another statement of a number, so that none of them begins or is in the name of a counted thing
_OTHER_STATEMENTS = """
or and to not no more less fewer than but plus minus times over under at about around approximately nearly almost from
until if is are was were half quarter hundred hundreds thousand million billion dozen percent per by with without of
sin cos tan log either neither both any each except unknown maybe greater between pi sqrt
"""
_NOT_A_THING = frozenset(_OTHER_STATEMENTS.split())
_FACTOR = re.compile(r"(.+?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|\*\*(-?\d)|(squared|cubed))?")
_LETTER_POWER = re.compile(r"([a-zA-Z]+)([23])")
_THING = re.compile(r"(?:[^\W\d_]{3,}|[^\W\d_a-z]{2,})(?:[ -][^\W\d_]{2,}){0,2}")


def read_unit(text: str) -> Unit | None:
    """Returns the unit that a text names, the name of a counted thing among them, or None where it names neither."""
    text = text.strip().strip(".")
    if not text or text in _NO_UNIT:
        return Unit((), Fraction(1))
    known = _compound(text)
    if known is not None:
        return known
    words = text.lower()
    if _THING.fullmatch(words) and not _NOT_A_THING & set(re.split("[ -]", words)):
        return Unit(((_singular(words), 1),), Fraction(1))
    return None


def is_counted_thing(unit: Unit) -> bool:
    """Returns whether a unit is the name of a thing, and no unit of measure."""
    return len(unit.dimension) == 1 and unit.dimension[0][0] not in _QUANTITIES


_QUANTITIES = {quantity for quantity, _ in [*_SYMBOLS.values(), *_WORDS.values()]}


def _compound(text: str) -> Unit | None:
    """Returns the product and quotient of known units: m/s^2, kg*m, square centimetres, miles per hour."""
    text = re.sub(r"\\(?:cdot|times)|[·⋅×]", "*", re.sub(r"\s+per\s+|每", "/", text))
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    powers: dict[str, int] = {}
    size = Fraction(1)
    for place, part in enumerate(text.split("/")):
        for name in part.split("*"):
            unit = _factor(name.strip())
            if unit is None:
                return None
            sign = -1 if place else 1
            size *= unit.size**sign
            for quantity, power in unit.dimension:
                powers[quantity] = powers.get(quantity, 0) + sign * power
    return Unit(tuple(sorted((q, p) for q, p in powers.items() if p)), size)


def _factor(text: str) -> Unit | None:
    """Returns a known unit, or a power of one."""
    first, _, rest = text.partition(" ")
    if rest and first.lower() in _POWER_WORDS:
        return _raised(_simple(rest), _POWER_WORDS[first.lower()])
    for word in ("平方", "立方"):
        if text.startswith(word):
            return _raised(_simple(text.removeprefix(word)), _POWER_WORDS[word])
    match = _FACTOR.fullmatch(text)
    if match is None:
        return None
    power = int(match[2] or match[3] or {"squared": 2, "cubed": 3}.get(match[4], 1))
    if power == 1 and (plain := _LETTER_POWER.fullmatch(text)):
        return _raised(_simple(plain[1]), int(plain[2]))
    return _raised(_simple(match[1]), power)


def _raised(unit: Unit | None, power: int) -> Unit | None:
    if unit is None or power == 0:
        return None
    return Unit(tuple((quantity, p * power) for quantity, p in unit.dimension), unit.size**power)


def _simple(name: str) -> Unit | None:
    name = name.strip().replace("° ", "°")
    lower = name.lower()
    derived = _DERIVED_NAMES.get(name) or (_DERIVED_NAMES.get(lower) if len(name) > 1 else None)
    if derived:
        *dimension, size = _DERIVED[derived]
        return Unit(tuple(dimension), size)  # type: ignore[arg-type]
    found = (
        _SYMBOLS.get(name) or _WORDS.get(lower) or _WORDS.get(lower.removesuffix("s")) or _WORDS.get(_singular(lower))
    )
    # KM and Kg are read too; one letter, and pairs that differ in case alone (MW, mW), are not
    if found is None and len(name) > 1 and sum(symbol.lower() == lower for symbol in _SYMBOLS) == 1:
        found = next(value for symbol, value in _SYMBOLS.items() if symbol.lower() == lower)
    return None if found is None else Unit(((found[0], 1),), found[1])


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
