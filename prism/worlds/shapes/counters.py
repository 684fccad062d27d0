"""Exact counters: what a caption says against the scene, and an answer against what the caption says.

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
# what may stand in an item besides its colour, kind and place
_FILLERS = frozenset({"a", "an", "the", "in", "at", "is", "there", "it", "of", "corner", "cell", "shape"})
_REMARKS = frozenset({REMARK, f"{REMARK}.", "the background is white", "the background is white."})
_NUMBER = re.compile(r"[0-9]{1,4}")


class UnreadableError(ValueError):
    """A caption or answer whose content cannot be read, and why."""


@dataclass(frozen=True)
class PerceptionError:
    """How many errors of each kind a caption has; an unreadable one has none that could be counted, but is wrong."""

    missing: int = 0
    invented: int = 0
    wrong_colour: int = 0
    wrong_kind: int = 0
    wrong_place: int = 0
    unreadable: str | None = None

    @property
    def count(self) -> int:
        """All errors together; an unreadable caption is one."""
        told = self.missing + self.invented + self.wrong_colour + self.wrong_kind + self.wrong_place
        return 1 if self.unreadable is not None else told

    @property
    def wrong(self) -> bool:
        """True where there is any error."""
        return self.count > 0


@dataclass(frozen=True)
class ReasoningError:
    """Whether an answer does not follow from the caption; unreadable: the answer, or the caption it is held against."""

    wrong: bool
    unreadable: str | None = None


@dataclass(frozen=True)
class Judgement:
    """A response of the shapes world, judged; one without a valid form is unreadable in both."""

    valid: bool
    correct: bool
    perception: PerceptionError
    reasoning: ReasoningError


def read_caption(caption: str) -> tuple[Item, ...]:
    """Returns the items that a caption names, one a line, in any teacher's style.

    A line is a colour, a kind and a place in any order, a bullet before and a few small words between them, or the
    remark on the background. Anything else raises `UnreadableError`: nothing is guessed.
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
    """Returns an answer as the questions write it, without capitals, article or full stop; else `UnreadableError`."""
    text = answer.strip().lower().removesuffix(".").removeprefix("the ").removeprefix("more ").strip()
    if question.kind in ("count", "sum"):
        if not _NUMBER.fullmatch(text):
            raise UnreadableError(f"expected a number, got {answer!r}")
        return str(int(text))
    if text not in answers(question):
        raise UnreadableError(f"expected one of {', '.join(answers(question))}, got {answer!r}")
    return text


def perception_error(caption: str, scene: Scene) -> PerceptionError:
    """Returns how a caption differs from the scene.

    Items are compared cell by cell; of those left over, a caption's and a scene's that are alike but for the cell are
    one wrong place, the others are invented and missing.
    """
    try:
        told = list(read_caption(caption))
    except UnreadableError as why:
        return PerceptionError(unreadable=str(why))
    left, colour, kind, place = [], 0, 0, 0
    for item in scene.items:
        here = [other for other in told if other.cell == item.cell]
        if not here:
            left.append(item)
            continue
        # of two in a cell the better one is meant, the other is invented
        best = min(here, key=lambda other: (other.colour != item.colour) + (other.kind != item.kind))
        told.remove(best)
        colour += best.colour != item.colour
        kind += best.kind != item.kind
    for item in tuple(left):
        alike = [other for other in told if (other.colour, other.kind) == (item.colour, item.kind)]
        if alike:
            told.remove(alike[0])
            left.remove(item)
            place += 1
    return PerceptionError(len(left), len(told), colour, kind, place)


def reasoning_error(answer: str, caption: str, question: Question) -> ReasoningError:
    """Returns whether an answer does not follow from what the caption says, whether or not that is so in the scene.

    Where the caption does not have what is asked about, `none` follows; where it has several, any of them does.
    """
    try:
        items = read_caption(caption)
        given = read_answer(answer, question)
    except UnreadableError as why:
        return ReasoningError(True, str(why))
    return ReasoningError(given not in infer(question, items))


def judge(response: str, scene: Scene, question: Question) -> Judgement:
    """Returns everything about a response: its form, whether its answer is right, and its errors of both kinds."""
    sections = split_response(response)
    if sections is None:
        broken = "the response has not the three sections"
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
