"""Dates as people write them: July 4, 2020; the 4th of July; 2020-07-04; 2020年7月4日; July 2020."""

import re
from typing import NamedTuple

_MONTH_NAMES = """
january february march april may june july august september october november december
"""
_MONTHS = {name: i + 1 for i, name in enumerate(_MONTH_NAMES.split())}
_MONTHS |= {name[:3]: month for name, month in _MONTHS.items()} | {"sept": 9}
_DAYS_OF_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_MONTH = rf"(?P<name>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DAY = r"(?:the\s+)?(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
_FORMS = [
    re.compile(rf"(?:on\s+)?{_WEEKDAY}{form}", re.IGNORECASE)
    for form in (
        rf"{_MONTH}\s+{_DAY}(?:\s*,\s*|\s+){_YEAR}",
        rf"{_DAY}(?:\s+of\s+|\s+|-){_MONTH}(?:\s*,\s*|\s+|-){_YEAR}",
        rf"{_MONTH}\s+{_DAY}",
        rf"{_DAY}(?:\s+of\s+|\s+){_MONTH}",
        rf"{_MONTH}(?:\s*,\s*|\s+(?:of\s+)?){_YEAR}",
        r"(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})",
        r"(?P<year>\d{4})/(?P<month>\d{1,2})/(?P<day>\d{1,2})",
        r"(?P<year>\d{4})\.(?P<month>\d{1,2})\.(?P<day>\d{1,2})",
        r"(?P<year>\d{4})\s*年\s*(?P<month>\d{1,2})\s*月(?:\s*(?P<day>\d{1,2})\s*[日号])?",
        r"(?P<month>\d{1,2})\s*月\s*(?P<day>\d{1,2})\s*[日号]",
    )
]
# 25/12/2020 and 12/25/2020; 04/07/2020 may be two dates, so it is none
_DAY_AND_MONTH = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})")


class Date(NamedTuple):
    """A date. Two dates are equal if they say the same: July 4 is not July 4, 2020."""

    year: int | None
    month: int
    day: int | None


def read_date(text: str) -> Date | None:
    """Returns the date that a text is, or None."""
    text = text.strip()
    if match := _DAY_AND_MONTH.fullmatch(text):
        first, second = int(match[1]), int(match[3])
        if first > 12 or first == second:
            return _date(int(match[4]), second, first)
        return _date(int(match[4]), first, second) if second > 12 else None
    for form in _FORMS:
        if match := form.fullmatch(text):
            said = match.groupdict()
            month = _MONTHS[said["name"].lower()] if "name" in said else int(said["month"])
            year, day = said.get("year"), said.get("day")
            return _date(int(year) if year else None, month, int(day) if day else None)
    return None


def _date(year: int | None, month: int, day: int | None) -> Date | None:
    if not 1 <= month <= 12 or (day is not None and not 1 <= day <= _DAYS_OF_MONTH[month - 1]):
        return None
    common = year is not None and (year % 4 != 0 or (year % 100 == 0 and year % 400 != 0))
    return None if day == 29 and month == 2 and common else Date(year, month, day)
