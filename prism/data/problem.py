"""What a stage learns from, whatever it was read from: a prompt with images, an answer, a teacher's response."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from PIL import Image

from prism.models.prompts import EncodedPrompt, Message, PromptEncoder
from prism.worlds.shapes import world as shapes
from prism.worlds.shapes.judging import judged


@dataclass(frozen=True, eq=False)
class Problem:
    """One prompt; what is not known of it is None."""

    name: str
    prompt: str | Sequence[Message]
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    equivalent_answers: tuple[str, ...] = ()
    teacher: str | None = None
    # a response that is compared with the teacher's; None: the policy gives one
    student: str | None = None
    # what `encoded` gives, where it is known already
    encoding: EncodedPrompt | None = None
    # what the assistant has said already: the response comes behind it
    said: str | None = None
    # of the embedded world, in which errors can be counted exactly
    shape: shapes.Sample | None = None

    def encoded(self, encoder: PromptEncoder) -> EncodedPrompt:
        """Returns the prompt as the models read it."""
        if self.encoding is not None:
            return self.encoding
        prompt = encoder.encode(self.prompt, self.images, name=self.name)
        return prompt if self.said is None else encoder.behind(prompt, self.said)


class ShapesProblems:
    """A split of the embedded world: problem i is the same however it is reached.

    Args:
        world: the world.
        split: see `prism.worlds.shapes.world.SPLITS`.
        count: how many there are.
        judged: the share of them that ask whether a description or an answer is right.
    """

    def __init__(self, world: shapes.ShapesWorld, split: str, count: int, judged: float = 0.0) -> None:
        self.world, self.split, self.count, self.judged = world, split, count, judged

    def __len__(self) -> int:
        return self.count

    def take(self, indices: Sequence[int]) -> list[Problem]:
        """Returns the problems at these indices."""
        # drawn afresh: half a millisecond each, and a split held whole would take hundreds of megabytes
        return [self._problem(next(self.world.samples(self.split, 1, start=int(index)))) for index in indices]

    def _problem(self, sample: shapes.Sample) -> Problem:
        # spread evenly, whatever the share
        judged = floor((sample.index + 1) * self.judged) > floor(sample.index * self.judged)
        return judged_problem(sample) if judged else problem_of(sample)


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


def judged_problem(sample: shapes.Sample) -> Problem:
    """Returns the question whether a part of a response to a sample is right, and the verdict."""
    part, verdict = judged(sample)
    return Problem(sample.id, sample.question.text, (Image.fromarray(sample.image),), teacher=verdict, said=part)
