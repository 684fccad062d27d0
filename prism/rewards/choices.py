"""Multiple choice: the letter of an option, a letter with its option's text, several letters."""

import re
from typing import NamedTuple

_LETTERS = "A-J"
_ANY_CASE = _LETTERS + _LETTERS.lower()
_ALONE = re.compile(rf"[(\[]?\s*([{_ANY_CASE}])\s*[)\].:]?")
_WITH_TEXT = re.compile(rf"(?:[(\[]\s*([{_ANY_CASE}])\s*[)\]]\s*[.:]?|([{_LETTERS}])\s*[).:])\s*(\S.*)", re.DOTALL)
_NAME = re.compile(r"(?:option|choice|answer)s?\s+(?=\W?[A-Za-z]\b)|选项\s*", re.IGNORECASE)
_ONE = rf"[(\[]?[{_LETTERS}][)\]]?"
_SEVERAL = re.compile(rf"{_ONE}(?:\s*(?:,\s*and|,|;|/|&|and|和)?\s*{_ONE})+")


class Option(NamedTuple):
    """An option: its letter in upper case, and its text where there is one."""

    letter: str
    text: str


def read_option(text: str) -> Option | None:
    """Returns the option that a text chooses: B, (b), option B, B) 4 cm; or None."""
    text = _NAME.sub("", text, count=1)
    if match := _ALONE.fullmatch(text):
        return Option(match[1].upper(), "")
    if match := _WITH_TEXT.fullmatch(text):
        return Option((match[1] or match[2]).upper(), match[3].strip())
    return None


def read_options(text: str) -> frozenset[str] | None:
    """Returns the letters of several options, in whatever order: A, C; AC; A and C; or None."""
    text = _NAME.sub("", text, count=1)
    if not _SEVERAL.fullmatch(text):
        return None
    letters = re.findall(f"[{_LETTERS}]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else None
