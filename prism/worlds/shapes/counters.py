"""Exact counters of errors: a caption is compared with the scene (perception), an answer with the caption (reasoning).

The two kinds of error are independent: a right inference from a wrong caption is an error of perception alone.
"""

import re
from dataclasses import dataclass

from prism.worlds.shapes.questions import Question, answers, infer
from prism.worlds.shapes.scenes import COLOURS, KINDS, PLACES, Item, Scene
from prism.worlds.shapes.teachers import REMARK
from prism_kernels.grammar import split_response

_BULLET = re.compile(r"^\s*(?:(?:[-*•–]|\d+[.)])\s+)?")
_WORDS = re.compile(r"[a-z]+|[^a-z\s,.;:()]")
# words that an item may have besides its colour, kind and place
_FILLERS = frozenset({"a", "an", "the", "in", "at", "is", "there", "it", "of", "corner", "cell", "shape"})
_REMARKS = frozenset({REMARK, f"{REMARK}.", "the background is white", "the background is white."})
_NUMBER = re.compile(r"[0-9]{1,4}")


class UnreadableError(ValueError):
    """The reason why a caption or an answer cannot be read."""


@dataclass(frozen=True)
class PerceptionError:
    """The errors of a caption by kind. An unreadable caption counts as one error."""

    missing: int = 0
    invented: int = 0
    wrong_colour: int = 0
    wrong_kind: int = 0
    wrong_place: int = 0
    unreadable: str | None = None

    @property
    def count(self) -> int:
        """The number of errors; an unreadable caption is one."""
        total = self.missing + self.invented + self.wrong_colour + self.wrong_kind + self.wrong_place
        return 1 if self.unreadable is not None else total

    @property
    def wrong(self) -> bool:
        """Whether there is any error."""
        return self.count > 0


@dataclass(frozen=True)
class ReasoningError:
    """Whether an answer fails to follow from the caption; `unreadable` says why the answer or caption is unreadable."""

    wrong: bool
    unreadable: str | None = None


@dataclass(frozen=True)
class Judgement:
    """The judgement of a response; one without the three sections is unreadable in perception and reasoning."""

    valid: bool
    correct: bool
    perception: PerceptionError
    reasoning: ReasoningError


def read_caption(caption: str) -> tuple[Item, ...]:
    """Returns the items that a caption names, one per line, in any teacher's style.

    A line has a colour, a kind and a place in any order, and may have a bullet and a few small words; or it is the
    remark on the background. Any other line raises `UnreadableError`: nothing is guessed.
    """
    lines = [_BULLET.sub("", line, count=1).strip() for line in caption.lower().splitlines() if line.strip()]
    if not lines:
        raise UnreadableError("the caption is empty")
    return tuple(_read_item(line) for line in lines if line not in _REMARKS)


def _read_item(line: str) -> Item:
    words = [word for word in _WORDS.findall(line) if word not in _FILLERS]
    parts = [[word for word in words if word in known] for known in (COLOURS, KINDS, PLACES)]
    if len(words) != 3 or any(len(part) != 1 for part in parts):
        raise UnreadableError(f"expected one colour, one kind and one place, got {line!r}")
    (colour,), (kind,), (place,) = parts
    return Item(PLACES.index(place), colour, kind)


def read_answer(answer: str, question: Question) -> str:
    """Returns an answer in its standard spelling: lower case, no article, no full stop; or raises `UnreadableError`."""
    text = answer.strip().lower().removesuffix(".").removeprefix("the ").removeprefix("more ").strip()
    if question.kind in ("count", "sum"):
        if not _NUMBER.fullmatch(text):
            raise UnreadableError(f"expected a number, got {answer!r}")
        return str(int(text))
    if text not in answers(question):
        raise UnreadableError(f"expected one of {', '.join(answers(question))}, got {answer!r}")
    return text


def perception_error(caption: str, scene: Scene) -> PerceptionError:
    """Returns the differences between a caption and the scene.

    Items in the same cell are compared first. Of the rest, two items of one colour and kind are one wrong place; other
    items of the caption are invented, other items of the scene are missing.
    """
    try:
        named = list(read_caption(caption))
    except UnreadableError as why:
        return PerceptionError(unreadable=str(why))
    missing, colour, kind, place = [], 0, 0, 0
    for item in scene.items:
        here = [other for other in named if other.cell == item.cell]
        if not here:
            missing.append(item)
            continue
        # of two items in a cell the closer one is meant, the other is invented
        best = min(here, key=lambda other: (other.colour != item.colour) + (other.kind != item.kind))
        named.remove(best)
        colour += best.colour != item.colour
        kind += best.kind != item.kind
    for item in tuple(missing):
        alike = [other for other in named if (other.colour, other.kind) == (item.colour, item.kind)]
        if alike:
            named.remove(alike[0])
            missing.remove(item)
            place += 1
    return PerceptionError(len(missing), len(named), colour, kind, place)


def reasoning_error(answer: str, caption: str, question: Question) -> ReasoningError:
    """Returns whether an answer fails to follow from the caption, right or wrong as the caption may be.

    If the caption lacks the thing asked about, `none` follows; if it has several, any of them follows.
    """
    try:
        items = read_caption(caption)
        given = read_answer(answer, question)
    except UnreadableError as why:
        return ReasoningError(True, str(why))
    return ReasoningError(given not in infer(question, items))


def judge(response: str, scene: Scene, question: Question) -> Judgement:
    """Returns whether a response has the three sections and the right answer, and its errors of both kinds."""
    sections = split_response(response)
    if sections is None:
        broken = "the response does not have the three sections"
        return Judgement(False, False, PerceptionError(unreadable=broken), ReasoningError(True, broken))
    try:
        correct = read_answer(sections.answer, question) in infer(question, scene.items)
    except UnreadableError:
        correct = False
    return Judgement(
        True,
        correct,
        perception_error(sections.caption, scene),
        reasoning_error(sections.answer, sections.caption, question),
    )
