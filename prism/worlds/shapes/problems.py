"""Samples of the world as problems: to describe and answer, or to judge whether a description or an answer is right.

A discriminator that is upcycled from a model which never compared a text with an image has that to learn first, and
learns to tell styles apart instead. A part is written as the discriminator reads it, and the verdict is the next token:
it is known where the discriminator is scored.
"""

from collections.abc import Sequence
from math import floor
from random import Random

from PIL import Image

from prism.data.problem import Problem
from prism.worlds.shapes.questions import infer
from prism.worlds.shapes.scenes import COLOURS, GRID, KINDS, Item, pick
from prism.worlds.shapes.teachers import TEACHERS, write, wrong_answer
from prism.worlds.shapes.world import ShapesSample, ShapesWorld

VERDICTS = {True: "yes", False: "no"}


class ShapesProblems:
    """A split of the embedded world: problem i is the same however it is reached.

    Args:
        world: the world.
        split: see `prism.worlds.shapes.world.SPLITS`.
        count: how many there are.
        judged: the share of them that ask whether a description or an answer is right.
    """

    def __init__(self, world: ShapesWorld, split: str, count: int, judged: float = 0.0) -> None:
        self.world, self.split, self.count, self.judged = world, split, count, judged

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> list[Problem]:
        """Returns the problems at these indices."""
        # drawn afresh: half a millisecond each, and a split held whole would take hundreds of megabytes
        return [self._problem(next(self.world.samples(self.split, 1, start=int(index)))) for index in indices]

    def _problem(self, sample: ShapesSample) -> Problem:
        # spread evenly, whatever the share
        judged = floor((sample.index + 1) * self.judged) > floor(sample.index * self.judged)
        return judged_problem(sample) if judged else problem_of(sample)


def problem_of(sample: ShapesSample) -> Problem:
    """Returns a sample of the embedded world as a problem, with its split's teacher."""
    return Problem(
        name=sample.id,
        prompt=sample.question.text,
        images=(Image.fromarray(sample.image),),
        answer=sample.answer,
        teacher=sample.response.text,
        shape=sample,
    )


def judged_problem(sample: ShapesSample) -> Problem:
    """Returns the question whether a part of a response to a sample is right, and the verdict."""
    part, verdict = judged(sample)
    return Problem(sample.id, sample.question.text, (Image.fromarray(sample.image),), teacher=verdict, said=part)


def judged(sample: ShapesSample) -> tuple[str, str]:
    """Returns a part of a response to a sample, in any teacher's style, and the verdict on it.

    The part is a caption, of which half have one item wrong or more, or the thinking with the answer, of which half end
    wrong.
    """
    rng = Random(f"judged/{sample.id}")
    items, question, style = sample.scene.items, sample.question, pick(rng, TEACHERS)
    right = rng.random() < 0.5
    known = infer(question, items)
    if rng.random() < 0.5:
        told = items
        while not right and told == items:
            # several as well: who does not see one wrong item yet learns from those
            for _ in range(1 + int(rng.random() * len(items))):
                told = one_wrong(rng, told)
        return f"<caption>{write(style, rng, told, question, min(known)).caption}", VERDICTS[right]
    answer = min(known) if right else wrong_answer(rng, question, known)
    written = write(style, rng, items, question, answer)
    return f"<think>{written.think}</think><answer>{written.answer}", VERDICTS[right]


def one_wrong(rng: Random, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Returns the items but for one, which has another colour, kind or place, or is left out if not alone."""
    left = list(items)
    item = left.pop(int(rng.random() * len(left)))
    how = pick(rng, ("colour", "kind", "place", "missing") if left else ("colour", "kind", "place"))
    if how == "colour":
        left.append(Item(item.cell, pick(rng, [c for c in COLOURS if c != item.colour]), item.kind))
    elif how == "kind":
        left.append(Item(item.cell, item.colour, pick(rng, [k for k in KINDS if k != item.kind])))
    elif how == "place":
        free = [cell for cell in range(GRID * GRID) if cell not in {other.cell for other in items}]
        left.append(Item(pick(rng, free), item.colour, item.kind))
    return tuple(sorted(left))
