"""Numbers in words: five, one hundred and five, a dozen, two-thirds, two and a half, three point five, 十二."""

import re
from fractions import Fraction
from typing import NamedTuple

_ONE_TO_NINETEEN = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen
"""
_SMALL = {word: value for value, word in enumerate(_ONE_TO_NINETEEN.split())}
_TENS_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * (i + 2) for i, word in enumerate(_TENS_NAMES.split())}
# twentyfive
_JOINED = {ten + one: _TENS[ten] + _SMALL[one] for ten in _TENS for one in list(_SMALL)[1:10]}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# what may follow digits: 2 million, 3 dozen
MAGNITUDES = {"hundred": 100, **_SCALES, "dozen": 12, "万": 10**4, "亿": 10**8}
# counts that need an article or a number before them, or stand alone
_COUNTS = {"hundred": 100, **_SCALES, "dozen": 12, "pair": 2, "couple": 2}
_PART_NAMES = """
third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth
"""
_PARTS = {word: i + 3 for i, word in enumerate(_PART_NAMES.split())}
_PARTS |= {"half": 2, "quarter": 4, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "millionth": 10**6}
_SEVERAL_PARTS = {"halves" if word == "half" else word + "s": below for word, below in _PARTS.items()}
_MANY = {"tens", *(word + "s" for word in MAGNITUDES if word.isascii())}
_ORDINALS = {"first": "1st", "second": "2nd", "third": "3rd", "twentieth": "20th"}
_ORDINALS |= {word: f"{below}th" for word, below in _PARTS.items() if 4 <= below <= 16 and word != "quarter"}
_ORDINALS |= {word + "th": f"{_SMALL[word]}th" for word in ("seventeen", "eighteen", "nineteen")}
_ORDINAL = re.compile(rf"\b(?:{'|'.join(_ORDINALS)})\b")
_ARTICLES = frozenset(("a", "an"))

_PLURALS = {word.removesuffix("y") + "ies" if word in _TENS else word + "s" for word in (*_SMALL, *_TENS)} | {"sixes"}

# no name of a thing that is counted starts with one of these, and none contains one
_NUMBER_WORDS = (*_SMALL, *_TENS, *_JOINED, *_PLURALS, *_COUNTS, *_PARTS, *_SEVERAL_PARTS, *_MANY)
NUMBER_WORDS = frozenset(_NUMBER_WORDS) - {"pair", "couple"}

_CHINESE = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_CHINESE_NUMBER = re.compile(r"([零〇一二两三四五六七八九])|([一二三四五六七八九]?)十([一二三四五六七八九]?)")
_WORD = re.compile(r"(?:[ ]+|-)?([a-z]+)(?![a-z'])")
_AND_FRACTION = re.compile(r"\s+and\s+(?=[a-z])", re.IGNORECASE)


class SpeltNumber(NamedTuple):
    """A number in words at the start of a text."""

    value: Fraction
    # how many decimals were said: 2 for "three point one four"; None: an exact integer or fraction
    decimals: int | None
    # where the rest of the text begins
    end: int


def read_spelt_number(text: str) -> SpeltNumber | None:
    """Returns the number in words at the start of a text, or None."""
    if match := _CHINESE_NUMBER.match(text):
        chinese = _CHINESE[match[1]] if match[1] else 10 * _CHINESE.get(match[2], 1) + _CHINESE.get(match[3], 0)
        return SpeltNumber(Fraction(chinese), None, match.end())
    words = _words(text)
    whole = _integer(words)
    if whole is None:
        part = _part(words, 0)
        return SpeltNumber(part[0], None, _end(words, part[1])) if part else None
    value, used = whole
    following = words[used][0] if used < len(words) else ""
    if following == "point" and (digits := _digits(words[used + 1 :])):
        value += Fraction(int(digits), 10 ** len(digits))
        return SpeltNumber(value, len(digits), _end(words, used + 1 + len(digits)))
    if following == "and" and (part := _part(words, used + 1)):
        return SpeltNumber(value + part[0], None, _end(words, part[1]))
    if value and (below := parts_of_one(following, value)):
        return SpeltNumber(value / below, None, _end(words, used + 1))
    return SpeltNumber(value, None, _end(words, used))


def with_digits_of_ordinals(text: str) -> str:
    """Returns a text in lower case with 3rd for third."""
    return _ORDINAL.sub(lambda match: _ORDINALS[match[0]], text)


def read_and_fraction(text: str) -> tuple[Fraction, str] | None:
    """Returns the fraction that continues a number, as in "2 and a half", and the rest of the text; or None."""
    joint = _AND_FRACTION.match(text)
    words = _words(text[joint.end() :]) if joint else []
    part = _part(words, 0)
    return (part[0], text[joint.end() + _end(words, part[1]) :]) if joint and part else None


def parts_of_one(word: str, count: Fraction) -> int | None:
    """Returns 4 for "quarters", as in three quarters; None for a word that is no part of one or has the wrong form."""
    return _PARTS.get(word) if count == 1 else _SEVERAL_PARTS.get(word)


def _words(text: str) -> list[tuple[str, int]]:
    """Returns the words at the start of a text with their ends, without those after any other sign."""
    lower, words, place = text.lower(), [], 0
    while match := _WORD.match(lower, place):
        place = match.end()
        words.append((match[1], place))
    return words


def _end(words: list[tuple[str, int]], used: int) -> int:
    return words[used - 1][1]


def _digits(words: list[tuple[str, int]]) -> str:
    digits = ""
    for word, _ in words:
        if _SMALL.get(word, 10) > 9:
            break
        digits += str(_SMALL[word])
    return digits


def _integer(words: list[tuple[str, int]]) -> tuple[Fraction, int] | None:
    """Returns the integer in words, and how many words it takes: one hundred and five, a dozen; or None."""
    first = words[0][0] if words else ""
    if first in _ARTICLES and (len(words) < 2 or words[1][0] not in _COUNTS):
        return None
    # current is below the next scale, which must be smaller than the last: two million three thousand
    total = current = used = 0
    scale = 10**15
    for i, (word, _) in enumerate(words):
        value = next((table[word] for table in (_SMALL, _TENS, _JOINED) if word in table), None)
        room = 10 if current % 100 >= 20 and current % 10 == 0 else 100 if current % 100 == 0 else 0
        size = _COUNTS.get(word, 0)
        if i == 0 and word in _ARTICLES:
            current = 1
        elif i and word == "and" and total + current >= 100 and (total + current) % 100 == 0:
            # counted only with the word after it
            continue
        elif i and first == "zero":
            break
        elif value is not None and (i == 0 or 0 < value < room):
            current += value
        elif word in _SCALES and size < scale and (current or i == 0):
            total, current, scale = total + (current or 1) * size, 0, size
        elif word == "hundred" and current < 100 and (current or i == 0):
            current = (current or 1) * size
        elif word == "dozen" and (current or i == 0):
            return Fraction(total + (current or 1) * size), i + 1
        elif word in ("pair", "couple") and (i == 0 or (i == 1 and first in ("a", "one"))):
            # two pairs are counted pairs
            return Fraction(size), i + 1
        else:
            break
        used = i + 1
    return (Fraction(total + current), used) if used else None


def _part(words: list[tuple[str, int]], start: int) -> tuple[Fraction, int] | None:
    """Returns the fraction in words from `start`, and the word after it: a third, three quarters, half a dozen."""
    names = [word for word, _ in words[start : start + 3]] + ["", "", ""]
    if names[0] == "half" and names[1] in ("a", "an") and names[2] in _COUNTS and names[2] not in ("pair", "couple"):
        return Fraction(_COUNTS[names[2]], 2), start + 3
    if names[0] in ("half", "quarter"):
        # half an hour; half the area is none
        return Fraction(1, _PARTS[names[0]]), start + (2 if names[1] in _ARTICLES else 1)
    # a third time is the one after the second
    if names[0] in _ARTICLES and names[1] in _PARTS and (names[1] in ("half", "quarter") or not names[2]):
        return Fraction(1, _PARTS[names[1]]), start + 2
    count = _SMALL.get(names[0], 0)
    if count and (below := parts_of_one(names[1], Fraction(count))):
        return Fraction(count, below), start + 2
    return None
