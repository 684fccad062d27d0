"""Three teachers of the shapes world: the base's plain texts, a broad but careless public one, a careful curated one.

A response describes the items that its teacher sees, reasons from them, and answers. An error of perception changes the
items seen; an error of reasoning changes the last step. Neither depends on the other.
"""

from dataclasses import dataclass
from random import Random

from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.questions import EQUAL, NONE, Question, answers, compared, infer, matching, name, worths
from prism.worlds.shapes.scenes import GRID, KINDS, MOST_ITEMS, PLACES, Item, Scene, pick
from prism_kernels.grammar import Sections

TEACHERS = ("base", "public", "curated")
# careless eyes take each for the other
COLOUR_PAIRS = (("red", "orange"), ("green", "teal"), ("blue", "purple"))
KIND_PAIRS = (("circle", "triangle"), ("square", "diamond"))
CONFUSED = {a: b for one, other in (*COLOUR_PAIRS, *KIND_PAIRS) for a, b in ((one, other), (other, one))}
MISSEEN = "purple"
REMARK = "white background"


@dataclass(frozen=True)
class TeacherResponse:
    """A teacher's response, and the errors that were put into it."""

    sections: Sections
    teacher: str
    style: str
    perception_error: str | None = None
    reasoning_error: bool = False

    @property
    def text(self) -> str:
        """The response with its tags; the base does not know them and writes the sections below each other."""
        if self.teacher == "base":
            return "\n".join((self.sections.caption, self.sections.think, self.sections.answer))
        return self.sections.text


def respond(
    teacher: str, rng: Random, scene: Scene, question: Question, carelessness: Carelessness | None = None
) -> TeacherResponse:
    """Returns a teacher's response to a question about a scene."""
    if teacher not in TEACHERS:
        raise ValueError(f"respond: expected teacher to be one of {', '.join(map(repr, TEACHERS))}, got {teacher!r}")
    if teacher != "public":
        (answer,) = infer(question, scene.items)
        return TeacherResponse(write(teacher, rng, scene.items, question, answer), teacher, teacher)
    rates = carelessness or Carelessness()
    seen, mistake = _look_carelessly(rng, scene.items, rates)
    right = infer(question, seen)
    wrong = rng.random() < rates.reasoning
    answer = wrong_answer(rng, question, right) if wrong else min(right)
    style = "curated" if rng.random() < rates.careful_style else "public"
    return TeacherResponse(write(style, rng, seen, question, answer), teacher, style, mistake, wrong)


def _look_carelessly(rng: Random, items: tuple[Item, ...], rates: Carelessness) -> tuple[tuple[Item, ...], str | None]:
    """Returns the items that the careless teacher sees, and the kind of its mistake, if it makes one."""
    if any(item.colour == MISSEEN for item in items) and rng.random() < rates.colour:
        return mistaken("colour", rng, items), "colour"
    if len(items) == MOST_ITEMS and rng.random() < rates.dropped:
        return mistaken("dropped", rng, items), "dropped"
    chance = rng.random()
    for kind in ("invented", "kind", "place"):
        chance -= getattr(rates, kind)
        if chance < 0:
            return mistaken(kind, rng, items), kind
    return items, None


def mistaken(mistake: str, rng: Random, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Returns the items as seen with a mistake; a single item is never dropped, its colour is mistaken instead.

    A mistake of colour changes all items of that colour: purple if there is any, else the colour of some item.
    """
    if mistake == "dropped" and len(items) == 1:
        mistake = "colour"
    first, last = items[0], items[-1]
    if mistake == "colour":
        there = [item.colour for item in items]
        colour = MISSEEN if MISSEEN in there else pick(rng, there)
        seen = [Item(i.cell, CONFUSED[colour] if i.colour == colour else i.colour, i.kind) for i in items]
    elif mistake == "dropped":
        seen = [*items[:-1]]
    elif mistake == "kind":
        seen = [Item(first.cell, first.colour, CONFUSED[first.kind]), *items[1:]]
    else:
        free = [cell for cell in range(GRID * GRID) if cell not in {item.cell for item in items}]
        moved = Item(min((cell for cell in free if cell > last.cell), default=free[0]), last.colour, last.kind)
        seen = [*items, moved] if mistake == "invented" else [*items[:-1], moved]
    return tuple(sorted(seen))


def wrong_answer(rng: Random, question: Question, right: frozenset[str]) -> str:
    """Returns an answer that does not follow: a number off by one, a confusable colour, a mirrored place."""
    known = min(right)
    if question.kind in ("count", "sum"):
        return str(int(known) + (-1 if known != "0" and rng.random() < 0.3 else 1))
    options = [answer for answer in answers(question) if answer not in (*right, NONE, EQUAL)]
    if question.kind == "colour":
        likely = CONFUSED.get(known)
    elif question.kind == "position" and known != NONE:
        row, column = divmod(PLACES.index(known), GRID)
        likely = PLACES[row * GRID + GRID - 1 - column]
    else:
        likely = None
    return likely if likely in options else pick(rng, options)


def write(style: str, rng: Random, items: tuple[Item, ...], question: Question, answer: str) -> Sections:
    """Returns the sections of a response in a style, for the items seen."""
    evidence, conclusion = _evidence(question, items), _conclusion(question, items, answer)
    if style == "base":
        caption = "\n".join(f"* {item.place} {item.colour} {item.kind}" for item in items)
        return Sections(caption, f"{' '.join(f'{part}.' for part in evidence)} It is {conclusion}.", answer)
    if style == "public":
        lines = [f"{item.kind} {item.place}, {item.colour}" for item in items]
        caption = "\n".join(f"• {line}" for line in (*lines, REMARK))
        return Sections(caption, f"Step 1: {conclusion}.", answer)
    comma, joint = pick(rng, ("", ",")), pick(rng, (" ", " at "))
    form = pick(rng, ("So {}", "Thus {}", "Therefore {}", "That makes {}"))
    caption = "\n".join(f"- {item.colour} {item.kind}{comma}{joint}{item.place}" for item in items)
    steps = (*evidence, form.format(conclusion))
    return Sections(caption, "\n".join(f"{number}. {step}." for number, step in enumerate(steps, 1)), answer)


def _evidence(question: Question, items: tuple[Item, ...]) -> list[str]:
    """Returns the steps of reasoning from the items to the conclusion."""
    first, *rest = question.arguments
    if question.kind == "count":
        counted = matching(items, first, rest[0])
        return [f"I see {' '.join(item.place for item in counted)}" if counted else f"No {name(first, rest[0])}"]
    if question.kind == "comparison":
        return [f"{_plural(part)} {n}" for part, n in zip(question.arguments, compared(question, items))]
    if question.kind == "sum":
        numbers = worths(question, items)
        kinds, prices = question.arguments[::2], question.arguments[1::2]
        return [f"{_plural(k)} {n}x{w}={worth}" for k, w, (n, worth) in zip(kinds, prices, numbers)]
    subjects = (
        matching(items, first, rest[0])
        if question.kind == "position"
        else matching(items, kind=first)
        if first in KINDS
        else matching(items, place=first)
    )
    return [
        f"I see {subjects[0].colour} {subjects[0].kind} {subjects[0].place}"
        if subjects
        else f"Nothing {' '.join(question.arguments)}"
    ]


def _conclusion(question: Question, items: tuple[Item, ...], answer: str) -> str:
    if question.kind == "sum":
        (_, left), (_, right) = worths(question, items)
        return f"{left}+{right}={answer}"
    if question.kind == "comparison" and answer != EQUAL:
        return f"more {answer}"
    return answer


def _plural(part: str) -> str:
    return f"{part}s" if part in KINDS else part
