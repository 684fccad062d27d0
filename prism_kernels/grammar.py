"""The grammar of a response, written once: its tags, white space, reasons of invalidity, and the parser of a text.

`prism_kernels.segments` reads the same grammar in tokens. Neither torch nor NumPy is imported here: the worker
processes of the rewards load neither.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

# the sections of PRISM in their order: perception, reasoning, answer
TAGS = ("caption", "think", "answer")

# ASCII's alone, so that bytes and characters agree
SPACE = " \t\n\r\v\f"

_TAG = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
_IN_ORDER = [(slash, name) for name in TAGS for slash in ("", "/")]
_BULLET = re.compile(r"^[ \t]*(?:[-*•–]|\d+[.)])[ \t]+\S", re.MULTILINE)
_STEP = re.compile(r"^[ \t]*(?:step[ \t]*)?\d+[.):][ \t]*\S", re.MULTILINE | re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Reason(IntEnum):
    """Why a response is invalid. Of several reasons the smallest is given."""

    VALID = 0
    # an opening or closing tag is missing, as in an empty response
    MISSING_TAG = 1
    # no tag is missing, one occurs more than once
    REPEATED_TAG = 2
    # each tag occurs once, one of them inside another's section
    NESTED = 3
    # not nested, but in another order: a section before its turn, or closed before it opens
    WRONG_ORDER = 4
    # text other than white space before, between or after the sections
    TEXT_OUTSIDE = 5
    # a section without text, or of white space alone
    EMPTY_SEGMENT = 6
    # reserved, no longer given: a section with text has tokens, wherever they are cut
    NO_TOKEN = 7


@dataclass(frozen=True)
class Sections:
    """A response's caption, reasoning and answer, without tags and without white space at their ends."""

    caption: str
    think: str
    answer: str

    @property
    def text(self) -> str:
        """The response."""
        return f"<caption>\n{self.caption}\n</caption>\n<think>\n{self.think}\n</think>\n<answer>{self.answer}</answer>"


class ParsedResponse(NamedTuple):
    """The sections of a valid response, or the reason why it has none."""

    sections: Sections | None
    reason: Reason


def parse_response(text: str) -> ParsedResponse:
    """Returns the sections of a text that is `<caption>…</caption><think>…</think><answer>…</answer>`, or the reason.

    A valid response has each tag once, in this order, no section that is empty or white space, and nothing but white
    space around the sections.
    """
    marks = list(_TAG.finditer(text))
    reason = _order([(mark[1], mark[2]) for mark in marks])
    if reason is not Reason.VALID:
        return ParsedResponse(None, reason)
    edges = [0, *(edge for mark in marks for edge in mark.span()), len(text)]
    # outside, tag, inside, tag, outside, ...: the pieces between the tags
    pieces = [text[begin:end].strip(SPACE) for begin, end in zip(edges[::2], edges[1::2])]
    outside, (caption, think, answer) = pieces[::2], pieces[1::2]
    if any(outside):
        return ParsedResponse(None, Reason.TEXT_OUTSIDE)
    if not (caption and think and answer):
        return ParsedResponse(None, Reason.EMPTY_SEGMENT)
    return ParsedResponse(Sections(caption, think, answer), Reason.VALID)


def split_response(text: str) -> Sections | None:
    """Returns the sections of a response, or None where it is invalid."""
    return parse_response(text).sections


def caption_items(caption: str) -> int:
    """Returns the number of a caption's items: its bullets; without any, its lines that are not empty."""
    return len(_BULLET.findall(caption)) or sum(bool(line.strip()) for line in caption.splitlines())


def reasoning_steps(think: str) -> int:
    """Returns the number of a reasoning's steps: its numbered lines; without any, its sentences."""
    return len(_STEP.findall(think)) or sum(bool(part.strip()) for part in _SENTENCE_END.split(think))


def _order(tags: list[tuple[str, str]]) -> Reason:
    """Returns the first fault in the sequence of tags, each ("" or "/", name); VALID where it has none."""
    if tags == _IN_ORDER:
        return Reason.VALID
    if set(tags) != set(_IN_ORDER):
        return Reason.MISSING_TAG
    if len(tags) > len(_IN_ORDER):
        return Reason.REPEATED_TAG
    for name in TAGS:
        if any(other != name for _, other in tags[tags.index(("", name)) : tags.index(("/", name))]):
            return Reason.NESTED
    return Reason.WRONG_ORDER
