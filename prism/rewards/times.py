"""Times of day and ratios, which are both two numbers with a colon."""

import re
from fractions import Fraction
from typing import NamedTuple

_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap]\.?\s?m\.?|o'clock)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})\s*([ap]\.?\s?m\.?|o'clock)", re.IGNORECASE)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")


class Clock(NamedTuple):
    """A time of day."""

    seconds: int
    # "a", "p", or "" where it is not said
    half: str

    def agrees(self, other: "Clock") -> bool:
        """Returns whether both may be the same time; where one does not say which half of the day, both readings."""
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
