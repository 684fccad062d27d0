"""Readers of the forms of an answer other than quantities: options, groups and numbered parts, times, ratios."""

import re
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

_LETTERS = "A-J"
_ANY_CASE = _LETTERS + _LETTERS.lower()
_ALONE = re.compile(rf"[(\[]?\s*([{_ANY_CASE}])\s*[)\].:]?")
_WITH_TEXT = re.compile(
    rf"(?:[(\[]\s*([{_ANY_CASE}])\s*[)\]]\s*[.:]?|([{_LETTERS}])\s*[).:]|([{_LETTERS.lower()}])\s*\))\s*(\S.*)",
    re.DOTALL,
)
# B (the blue one); B, because it is blue
_WITH_NOTE = re.compile(rf"([{_LETTERS}])(?:\s+\((.+)\)|(?:,\s*|\s+)((?:because|since)\b.*))", re.DOTALL)
_OPTION_NAME = re.compile(r"(?:option|choice|answer)s?\s+(?=\W?[A-Za-z]\b)|选项\s*", re.IGNORECASE)
_ONE = rf"[(\[]?[{_LETTERS}][)\]]?"
_SEVERAL = re.compile(rf"{_ONE}(?:\s*(?:,\s*and|,|;|/|&|and|和)?\s*{_ONE})+")


class ChosenOption(NamedTuple):
    """An option of multiple choice: its letter in upper case, and its text, which may be empty."""

    letter: str
    text: str


def read_option(text: str) -> ChosenOption | None:
    """Returns the option that a text chooses (B, (b), option B, B) 4 cm), or None."""
    text = _OPTION_NAME.sub("", text, count=1)
    if match := _ALONE.fullmatch(text):
        return ChosenOption(match[1].upper(), "")
    if match := _WITH_TEXT.fullmatch(text):
        return ChosenOption((match[1] or match[2] or match[3]).upper(), match[4].strip())
    if match := _WITH_NOTE.fullmatch(text):
        return ChosenOption(match[1], (match[2] or match[3]).strip())
    return None


def read_options(text: str) -> frozenset[str] | None:
    """Returns the letters of several options (A, C; AC; A and C), or None."""
    text = _OPTION_NAME.sub("", text, count=1)
    if not _SEVERAL.fullmatch(text):
        return None
    letters = re.findall(f"[{_LETTERS}]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else None


class GroupKind(Enum):
    """How the parts of a group are written."""

    # "2, 3", "2 and 3": no order, as the solutions of an equation
    LIST = "list"
    # \{2, 3\}
    SET = "set"
    # (2, 3): a point or an open interval
    TUPLE = "()"
    # [2, 3]: a closed interval or a sequence
    CLOSED = "[]"
    # [2, 3) and (2, 3]
    RIGHT_OPEN = "[)"
    LEFT_OPEN = "(]"
    # 2 to 3, 2–3, 2~3
    RANGE = "range"


class Group(NamedTuple):
    """An answer's parts."""

    kind: GroupKind
    parts: tuple[str, ...]


_IN_BRACKETS = (GroupKind.TUPLE, GroupKind.CLOSED, GroupKind.RIGHT_OPEN, GroupKind.LEFT_OPEN)
_BRACKETS = {kind.value: kind for kind in _IN_BRACKETS}
_NUMBER = r"[+-]?\d+(?:\.\d+)?%?"
_UNITS = r"(?:\s*[^\W\d]+)?"
_BETWEEN = re.compile(rf"(?:between|from)\s+({_NUMBER}{_UNITS})\s+(?:and|to)\s+({_NUMBER}{_UNITS})", re.IGNORECASE)
_TO = re.compile(rf"({_NUMBER}{_UNITS})\s*(?:~|\bto\b|至|到)\s*({_NUMBER}{_UNITS})", re.IGNORECASE)
# a hyphen with a space before it is a minus
_DASH = re.compile(rf"(\d+(?:\.\d+)?%?)-(\d+(?:\.\d+)?%?)({_UNITS})")
_JOINT = re.compile(r",?\s+(?:and|or)\s+|\s*(?:&|和|或|与)\s*", re.IGNORECASE)
_PLUS_MINUS = re.compile(r"±|\\pm(?![a-zA-Z])")
_MOST_PARTS = 64


def read_group(text: str) -> Group | None:
    """Returns the parts of an answer that has several, or None."""
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        return _group(GroupKind.SET, text[2:-2], alone=True)
    if text[:1] == "{" and text[-1:] == "}" and closes_at_end(text):
        return _group(GroupKind.SET, text[1:-1], alone=True)
    kind = _BRACKETS.get(text[:1] + text[-1:])
    if kind is not None and closes_at_end(text):
        return _group(kind, text[1:-1])
    if match := _BETWEEN.fullmatch(text) or _TO.fullmatch(text):
        return Group(GroupKind.RANGE, (match[1], match[2]))
    if match := _DASH.fullmatch(text):
        low, high = float(match[1].rstrip("%")), float(match[2].rstrip("%"))
        if low < high:
            return Group(GroupKind.RANGE, (match[1] + match[3], match[2] + match[3]))
    return _group(GroupKind.LIST, text)


_LABELS = (
    re.compile(r"(?:(?<!\S)|(?<=[;,.]))\(\s*(\d{1,2}|[a-jA-J]|[ivx]{1,4})\s*\)"),
    re.compile(r"(?:(?<!\S)|(?<=[;,.]))(\d{1,2}|[a-jA-J]|[ivx]{1,4})\)"),
    re.compile(r"(?<!\S)(\d{1,2})\.(?=\s)"),
)
_ROMAN = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"]
_PART_JOINT = re.compile(r"[\s,;.]*(?:\band\b)?[\s,;.]*\Z")


def read_numbered_parts(text: str) -> tuple[str, ...] | None:
    """Returns the texts of parts with labels 1, 2 ..., a, b ... or i, ii ... in the labels' order, or None."""
    for pattern in _LABELS:
        labels = list(pattern.finditer(text))
        if not 2 <= len(labels) <= _MOST_PARTS or text[: labels[0].start()].strip():
            continue
        names = [label[1] for label in labels]
        for numerals in ([str(i + 1) for i in range(len(names))], _ROMAN, "abcdefghij", "ABCDEFGHIJ"):
            expected = list(numerals[: len(names)])
            # labels with points are in order, so that decimals are none
            if names != expected and (pattern is _LABELS[-1] or sorted(names) != sorted(expected)):
                continue
            ends = [label.start() for label in labels[1:]] + [len(text)]
            pieces = [_PART_JOINT.sub("", text[label.end() : end]).strip(" :") for label, end in zip(labels, ends)]
            parts = dict(zip(names, pieces))
            return tuple(parts[name] for name in expected) if all(pieces) else None
    return None


def both_signs(text: str) -> Group | None:
    """Returns the two values of an answer with one ±, or None."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return None
    plus = re.sub(r"^\s*\+|(?<=[=(])\s*\+", "", _PLUS_MINUS.sub("+", text))
    return Group(GroupKind.LIST, (plus, _PLUS_MINUS.sub("-", text)))


def _group(kind: GroupKind, inside: str, alone: bool = False) -> Group | None:
    parts = _split(inside, kind is GroupKind.LIST)
    if len(parts) == 1 and kind is GroupKind.LIST:
        return None
    if (len(parts) == 1 and not alone and kind is not GroupKind.CLOSED) or len(parts) > _MOST_PARTS or not all(parts):
        return None
    return Group(kind, tuple(parts))


def _split(text: str, joints: bool) -> list[str]:
    """Returns the pieces between separators outside all brackets: semicolons if there are any, otherwise commas."""
    if joints:
        text = _outside(text, lambda piece: _JOINT.sub(", ", piece))
    separator = ";" if ";" in _outside(text, lambda piece: piece, drop=True) else ","
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    parts = [part.strip() for part in parts]
    # "1, 2, and 3" has a comma beside the joint, and so an empty piece
    return [part for i, part in enumerate(parts) if part or not joints or i in (0, len(parts) - 1)]


def _outside(text: str, change: Callable[[str], str], drop: bool = False) -> str:
    """Returns the text with `change` applied to its pieces outside all brackets; drop removes the insides."""
    result, piece, depth = "", "", 0
    for character in text:
        if character in "([{":
            if depth == 0:
                result, piece = result + change(piece), ""
            depth += 1
        if depth == 0:
            piece += character
        elif not drop:
            result += character
        if character in ")]}" and depth:
            depth -= 1
    return result + change(piece)


def closes_at_end(text: str) -> bool:
    """Returns whether the bracket that opens a text is closed by its last character and not before."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap]\.?\s?m\.?|o'clock)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*([ap]\.?\s?m\.?|o'clock)", re.IGNORECASE)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")


class Clock(NamedTuple):
    """A time of day."""

    seconds: int
    # "a" or "p"; "" if not given
    half: str

    def agrees(self, other: "Clock") -> bool:
        """Returns whether both may be the same time; a time without its half of the day has two readings."""
        if bool(self.half) == bool(other.half):
            return self == other or self._in_day() == other._in_day()
        return self.seconds == other.seconds or self._in_day() == other._in_day()

    def _in_day(self) -> int:
        if not self.half:
            return self.seconds
        return self.seconds % (12 * 3600) + (12 * 3600 if self.half == "p" else 0)


def read_clock(text: str) -> Clock | None:
    """Returns the time of day that a text is, or None."""
    if match := _CLOCK.fullmatch(text):
        hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
        half = match[4]
    elif match := _HOUR.fullmatch(text):
        hour, minute, second, half = int(match[1]), 0, 0, match[2]
    else:
        return None
    said = half[0].lower() if half and half[0].lower() in "ap" else ""
    if hour > (12 if said else 24) or minute > 59 or second > 59:
        return None
    return Clock(hour * 3600 + minute * 60 + second, said)


def read_ratio(text: str) -> Fraction | None:
    """Returns the quotient of a ratio such as 3:4, or None."""
    match = _RATIO.fullmatch(text)
    return Fraction(match[1]) / Fraction(match[2]) if match and Fraction(match[2]) else None
