"""The embedded world as problems, which stages draw by the run's seed."""

from collections.abc import Iterator, Sequence
from math import floor
from typing import TYPE_CHECKING, Any

from PIL import Image

from prism.data.problem import Problem, step_random
from prism.worlds.shapes.probes import judged
from prism.worlds.shapes.world import ShapesSample, ShapesWorld

if TYPE_CHECKING:
    from prism.config import Config

# the split of the embedded world that each stage draws from
SPLIT_OF = {"base": "base", "sft": "sft", "rlvr": "rl"} | dict.fromkeys(("distill", "warmup", "align"), "alignment")


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


class EmbeddedProblems:
    """Problems of the embedded world. A step draws by the seed, the stage and its number, so there is no position.

    Args:
        config: the settings.
    """

    def __init__(self, config: "Config") -> None:
        self.settings, self.seed = config.data.shapes, config.run.seed
        self.world = ShapesWorld(self.settings.seed, self.settings.carelessness)

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields batches of distinct problems, or with repeats if the split is smaller than all of them together."""
        split, curated = self._split(SPLIT_OF[stage]), self._split("alignment")
        total = len(split) + (self.settings.sft_curated if stage == "sft" else 0)
        rng = step_random(self.seed, stage, step)
        chosen = rng.choice(total, count * most, replace=count * most > total)
        for start in range(0, len(chosen), count):
            part = chosen[start : start + count].tolist()
            drawn = split.take([i for i in part if i < len(split)])
            yield drawn + curated.take([i - len(split) for i in part if i >= len(split)])

    def held_out(self, split: str, count: int | None = None) -> list[Problem]:
        """Returns the first problems of a split."""
        problems = self._split(split)
        return problems.take(range(len(problems) if count is None else min(count, len(problems))))

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns no figures: no row is ever skipped."""
        return {}

    def position(self, stage: str) -> dict[str, Any]:
        """Returns an empty position: a step draws without one."""
        return {}

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Does nothing: a step draws without a position."""

    def reading(self, stage: str) -> str:
        """Returns the name of the split."""
        return f"data.shapes, {SPLIT_OF[stage]}"

    def _split(self, name: str) -> ShapesProblems:
        judged = self.settings.judged if name == "base" else 0.0
        return ShapesProblems(self.world, name, getattr(self.settings, name), judged)


def problem_of(sample: ShapesSample) -> Problem:
    """Returns the problem to describe a sample and answer its question, as the split's teacher does."""
    return Problem(
        name=sample.id,
        prompt=sample.question.text,
        images=(Image.fromarray(sample.image),),
        answer=sample.answer,
        teacher=sample.response.text,
        shape=sample,
        data_source=f"shapes/{sample.question.kind}",
    )


def judged_problem(sample: ShapesSample) -> Problem:
    """Returns the problem to judge a part of a response to a sample: the next token is the verdict."""
    part, verdict = judged(sample)
    return Problem(sample.id, sample.question.text, (Image.fromarray(sample.image),), teacher=verdict, prefix=part)
