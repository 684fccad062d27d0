"""Samples of the world as problems: to describe and answer, or to judge a part of a response."""

from collections.abc import Sequence
from math import floor

from PIL import Image

from prism.data.problem import Problem
from prism.worlds.shapes.probes import judged
from prism.worlds.shapes.world import ShapesSample, ShapesWorld


class ShapesProblems:
    """A split of the embedded world; problem i is the same however it is reached.

    Args:
        world: the world.
        split: a key of `prism.worlds.shapes.world.SPLITS`.
        count: number of problems.
        judged: share of the problems that ask whether a caption or an answer is right.
    """

    def __init__(self, world: ShapesWorld, split: str, count: int, judged: float = 0.0) -> None:
        self.world, self.split, self.count, self.judged = world, split, count, judged

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> list[Problem]:
        """Returns the problems at these indices."""
        # drawn anew each time, at half a millisecond each: a whole split would take hundreds of megabytes
        return [self._problem(next(self.world.samples(self.split, 1, start=int(index)))) for index in indices]

    def _problem(self, sample: ShapesSample) -> Problem:
        # this spreads any share evenly
        is_judged = floor((sample.index + 1) * self.judged) > floor(sample.index * self.judged)
        return judged_problem(sample) if is_judged else problem_of(sample)


def problem_of(sample: ShapesSample) -> Problem:
    """Returns the problem to describe a sample and answer its question, as the split's teacher does."""
    return Problem(
        name=sample.id,
        prompt=sample.question.text,
        images=(Image.fromarray(sample.image),),
        answer=sample.answer,
        teacher=sample.response.text,
        shape=sample,
    )


def judged_problem(sample: ShapesSample) -> Problem:
    """Returns the problem to judge a part of a response to a sample: the next token is the verdict."""
    part, verdict = judged(sample)
    return Problem(sample.id, sample.question.text, (Image.fromarray(sample.image),), teacher=verdict, said=part)
