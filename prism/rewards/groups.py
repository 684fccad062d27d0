r"""Answers of several parts: lists, sets, tuples, intervals, ranges, and the two values of a ±."""

import re
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from prism.rewards.spelling import closes_at_end


class Kind(Enum):
    """What holds the parts together."""

    # "2, 3", "2 and 3": no order, as the solutions of an equation
    LIST = "list"
    # \{2, 3\}
    SET = "set"
    # (2, 3), a point or an open interval; [2, 3], a closed interval or a sequence; [2, 3) and (2, 3]
    TUPLE = "()"
    CLOSED = "[]"
    RIGHT_OPEN = "[)"
    LEFT_OPEN = "(]"
    # 2 to 3, 2–3, 2~3
    RANGE = "range"


class Group(NamedTuple):
    """An answer's parts."""

    kind: Kind
    parts: tuple[str, ...]


_BRACKETS = {kind.value: kind for kind in (Kind.TUPLE, Kind.CLOSED, Kind.RIGHT_OPEN, Kind.LEFT_OPEN)}
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
    """Returns the parts of an answer that has several, or None where it has one."""
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}"):
        return _group(Kind.SET, text[2:-2], alone=True)
    if text[:1] == "{" and text[-1:] == "}" and closes_at_end(text):
        return _group(Kind.SET, text[1:-1], alone=True)
    kind = _BRACKETS.get(text[:1] + text[-1:])
    if kind is not None and closes_at_end(text):
        return _group(kind, text[1:-1])
    if match := _BETWEEN.fullmatch(text) or _TO.fullmatch(text):
        return Group(Kind.RANGE, (match[1], match[2]))
    if match := _DASH.fullmatch(text):
        low, high = float(match[1].rstrip("%")), float(match[2].rstrip("%"))
        if low < high:
            return Group(Kind.RANGE, (match[1] + match[3], match[2] + match[3]))
    return _group(Kind.LIST, text)


def both_signs(text: str) -> Group | None:
    """Returns the two values of an answer with one ±, or None."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return None
    plus = re.sub(r"^\s*\+|(?<=[=(])\s*\+", "", _PLUS_MINUS.sub("+", text))
    return Group(Kind.LIST, (plus, _PLUS_MINUS.sub("-", text)))


def _group(kind: Kind, inside: str, alone: bool = False) -> Group | None:
    parts = _split(inside, kind is Kind.LIST)
    if len(parts) == 1 and kind is Kind.LIST:
        return None
    if (len(parts) == 1 and not alone and kind is not Kind.CLOSED) or len(parts) > _MOST_PARTS or not all(parts):
        return None
    return Group(kind, tuple(parts))


def _split(text: str, joints: bool) -> list[str]:
    """Returns what stands between the separators outside all brackets: semicolons, if there are any, or commas."""
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
    # the comma of "1, 2, and 3" stands beside its joint
    return [part for place, part in enumerate(parts) if part or not joints or place in (0, len(parts) - 1)]


def _outside(text: str, change: Callable[[str], str], drop: bool = False) -> str:
    """Returns the text with its pieces outside all brackets changed; drop leaves out what is inside."""
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
