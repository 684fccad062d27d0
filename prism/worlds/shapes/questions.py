"""Questions about scenes, and the answers that follow from a list of items, be it a scene's or a caption's."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from prism.worlds.shapes.scenes import COLOURS, KINDS, PLACES, Item, Scene, pick

QUESTION_KINDS = ("count", "colour", "position", "comparison", "sum")
# the right answer if the thing asked about is not there
NONE = "none"
EQUAL = "equal"
WORTHS = ("1", "2", "3", "4")


@dataclass(frozen=True)
class Question:
    """A question and its subjects; `arguments` depend on the kind, and an empty one stands for anything."""

    kind: str
    arguments: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question in words."""
        first, *rest = self.arguments
        if self.kind == "count":
            return f"How many {name(first, rest[0])}s are there?"
        if self.kind == "colour":
            return f"What colour is the {first}?" if first in KINDS else f"What colour is the shape in the {first}?"
        if self.kind == "position":
            return f"Where is the {first} {rest[0]}?"
        if self.kind == "comparison":
            things = f"{first}s or {rest[0]}s" if first in KINDS else f"{first} or {rest[0]} shapes"
            return f"Are there more {things}?"
        return f"If a {first} is worth {rest[0]} and a {rest[1]} {rest[2]}, what is the sum?"


def name(colour: str, kind: str) -> str:
    """Returns the name of items of a colour and a kind; either may be empty."""
    return f"{colour} {kind or 'shape'}".strip()


def matching(items: Iterable[Item], colour: str = "", kind: str = "", place: str = "") -> list[Item]:
    """Returns the items of a colour, a kind and a place; an empty argument matches all."""
    return [i for i in items if colour in ("", i.colour) and kind in ("", i.kind) and place in ("", i.place)]


def infer(question: Question, items: Iterable[Item]) -> frozenset[str]:
    """Returns the right answers given the items; more than one if several items are asked about."""
    items = tuple(items)
    first, *rest = question.arguments
    if question.kind == "count":
        return frozenset({str(len(matching(items, first, rest[0])))})
    if question.kind == "colour":
        subjects = matching(items, kind=first) if first in KINDS else matching(items, place=first)
        return frozenset(item.colour for item in subjects) or frozenset({NONE})
    if question.kind == "position":
        return frozenset(item.place for item in matching(items, first, rest[0])) or frozenset({NONE})
    if question.kind == "comparison":
        left, right = compared(question, items)
        winner = EQUAL if left == right else first if left > right else rest[0]
        return frozenset({winner + "s" if winner in KINDS else winner})
    (_, left), (_, right) = worths(question, items)
    return frozenset({str(left + right)})


def compared(question: Question, items: Iterable[Item]) -> tuple[int, int]:
    """Returns the numbers of the two things that a comparison is about."""
    numbers = Counter(part for item in items for part in (item.colour, item.kind))
    return numbers[question.arguments[0]], numbers[question.arguments[1]]


def worths(question: Question, items: Iterable[Item]) -> list[tuple[int, int]]:
    """Returns the number and the total worth of each of the two kinds of a sum."""
    items, (kind_a, worth_a, kind_b, worth_b) = tuple(items), question.arguments
    numbers = [(len(matching(items, kind=kind)), int(worth)) for kind, worth in ((kind_a, worth_a), (kind_b, worth_b))]
    return [(number, number * worth) for number, worth in numbers]


def answers(question: Question) -> tuple[str, ...]:
    """Returns all answers that a question may have; numbers go up to 99."""
    if question.kind == "colour":
        return (*COLOURS, NONE)
    if question.kind == "position":
        return (*PLACES, NONE)
    if question.kind == "comparison":
        return (*(part + "s" if part in KINDS else part for part in question.arguments), EQUAL)
    return tuple(map(str, range(100)))


def ask(rng: Random, scene: Scene) -> Question:
    """Returns a question with exactly one right answer in the scene; all kinds that can be asked are equally likely."""
    items = scene.items
    named = Counter((item.colour, item.kind) for item in items)
    kinds = Counter(item.kind for item in items)
    unique = [pair for pair, number in named.items() if number == 1]
    asked = pick(rng, [kind for kind in QUESTION_KINDS if kind != "position" or unique])
    item = pick(rng, items)
    if asked == "count":
        # one time in four the colour and kind may be absent from the scene
        subject = item if rng.random() < 0.75 else Item(0, pick(rng, tuple(COLOURS)), pick(rng, KINDS))
        form = pick(rng, ((subject.colour, ""), ("", subject.kind), (subject.colour, subject.kind), ("", "")))
        return Question(asked, form)
    if asked == "colour":
        by_kind = kinds[item.kind] == 1 and rng.random() < 0.5
        return Question(asked, (item.kind if by_kind else item.place,))
    if asked == "position":
        return Question(asked, pick(rng, unique))
    first, options = (item.kind, KINDS) if asked == "sum" or rng.random() < 0.5 else (item.colour, tuple(COLOURS))
    other = pick(rng, [option for option in options if option != first])
    pair = (first, other) if rng.random() < 0.5 else (other, first)
    if asked == "comparison":
        return Question(asked, pair)
    return Question(asked, (pair[0], pick(rng, WORTHS), pair[1], pick(rng, WORTHS)))
