"""What a stage learns from, whatever it was read from: a prompt with images, an answer, a teacher's response."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from prism.data import shapes
from prism.models.prompts import EncodedPrompt, Message, PromptEncoder


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt; what is not known of it is None."""

    name: str
    prompt: str | Sequence[Message]
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    equivalent_answers: tuple[str, ...] = ()
    teacher: str | None = None
    # of the embedded world, in which errors can be counted exactly
    shape: shapes.Sample | None = None

    def encoded(self, encoder: PromptEncoder) -> EncodedPrompt:
        """Returns the prompt as the models read it."""
        return encoder.encode(self.prompt, self.images, name=self.name)


class ShapesProblems:
    """A split of the embedded world: problem i is the same however it is reached.

    Args:
        world: the world.
        split: see `prism.data.shapes.SPLITS`.
        count: how many there are.
    """

    def __init__(self, world: shapes.ShapesWorld, split: str, count: int) -> None:
        self.world, self.split, self.count = world, split, count

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _samples(self) -> list[shapes.Sample]:
        # an image is 27 kB: the largest split takes 450 MB of memory drawn whole, the others a tenth of that
        return list(self.world.samples(self.split, self.count))

    def take(self, indices: Sequence[int]) -> list[Problem]:
        """Returns the problems at these indices."""
        return [problem_of(self._samples[index]) for index in indices]


def problem_of(sample: shapes.Sample) -> Problem:
    """Returns a sample of the embedded world as a problem, with its split's teacher."""
    return Problem(
        name=sample.id,
        prompt=sample.question.text,
        images=(Image.fromarray(sample.image),),
        answer=sample.answer,
        teacher=sample.response.text,
        shape=sample,
    )
