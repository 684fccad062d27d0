"""Texts about a sample that are right, or wrong in one thing: for the base to judge, and to probe a discriminator with.

A policy never compares a text with an image, and a discriminator upcycled from it would have to learn that first; it
learns to tell styles apart instead. So the base is taught to judge: parts are written as the discriminator reads them,
and the verdict is the next token, where the discriminator is scored. The probes are pairs of texts of one style, one of
which is wrong as the careless teacher would be; only their content tells them apart.
"""

from dataclasses import replace
from random import Random

from prism.worlds.shapes.questions import infer
from prism.worlds.shapes.scenes import COLOURS, GRID, KINDS, Item, pick
from prism.worlds.shapes.teachers import TEACHERS, mistaken, write, wrong_answer
from prism.worlds.shapes.world import ShapesSample
from prism_kernels.grammar import Sections

VERDICTS = {True: "yes", False: "no"}
# the probed errors of perception
CHANGES = ("colour", "kind", "dropped", "place")


def judged(sample: ShapesSample) -> tuple[str, str]:
    """Returns a part of a response to a sample, in any teacher's style, and the verdict on it.

    The part is a caption, or the thinking with the answer. Half of the captions have one or more wrong items, half of
    the answers are wrong.
    """
    rng = Random(f"judged/{sample.id}")
    items, question, style = sample.scene.items, sample.question, pick(rng, TEACHERS)
    right = rng.random() < 0.5
    right_answers = infer(question, items)
    if rng.random() < 0.5:
        seen = items
        while not right and seen == items:
            # often several wrong items: they are easier to notice, so that learning can begin
            for _ in range(1 + int(rng.random() * len(items))):
                seen = one_wrong(rng, seen)
        return f"<caption>{write(style, rng, seen, question, min(right_answers)).caption}", VERDICTS[right]
    answer = min(right_answers) if right else wrong_answer(rng, question, right_answers)
    written = write(style, rng, items, question, answer)
    return f"<think>{written.think}</think><answer>{written.answer}", VERDICTS[right]


def one_wrong(rng: Random, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Returns the items with one of them changed in colour, kind or place, or left out if it is not the only one."""
    others = list(items)
    item = others.pop(int(rng.random() * len(others)))
    change = pick(rng, ("colour", "kind", "place", "missing") if others else ("colour", "kind", "place"))
    if change == "colour":
        others.append(Item(item.cell, pick(rng, [c for c in COLOURS if c != item.colour]), item.kind))
    elif change == "kind":
        others.append(Item(item.cell, item.colour, pick(rng, [k for k in KINDS if k != item.kind])))
    elif change == "place":
        free = [cell for cell in range(GRID * GRID) if cell not in {other.cell for other in items}]
        others.append(Item(pick(rng, free), item.colour, item.kind))
    return tuple(sorted(others))


def curated_text(sample: ShapesSample) -> str:
    """Returns the curated teacher's response to a sample, the same each time."""
    return _curated(sample).text


def wrong_caption(sample: ShapesSample, change: str) -> str:
    """Returns `curated_text` with a mistake in its caption; its reasoning and answer stay right.

    Args:
        sample: the sample.
        change: the kind of mistake, one of CHANGES. A single item is not dropped, its colour is changed instead.
    """
    if change not in CHANGES:
        raise ValueError(f"wrong_caption: expected change to be one of {', '.join(map(repr, CHANGES))}, got {change!r}")
    seen = mistaken(change, _random(sample, "mistake"), sample.scene.items)
    caption = write("curated", _random(sample, "phrasing"), seen, sample.question, sample.answer).caption
    return replace(_curated(sample), caption=caption).text


def wrong_conclusion(sample: ShapesSample) -> str:
    """Returns `curated_text` with a wrong last step and answer; its caption and evidence stay right."""
    wrong = wrong_answer(_random(sample, "mistake"), sample.question, frozenset({sample.answer}))
    return write("curated", _random(sample, "phrasing"), sample.scene.items, sample.question, wrong).text


def _curated(sample: ShapesSample) -> Sections:
    return write("curated", _random(sample, "phrasing"), sample.scene.items, sample.question, sample.answer)


def _random(sample: ShapesSample, purpose: str) -> Random:
    return Random(f"{sample.id}/0/{purpose}")
