"""The embedded world: samples of coloured shapes with questions, right answers and teachers' responses, by seed.

A sample follows from the world's seed, the split's name and its index. The split of a scene depends on the scene alone:
no scene is in two splits, whatever the seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.questions import Question, ask, infer
from prism.worlds.shapes.scenes import Bytes, Scene, draw, random_scene
from prism.worlds.shapes.teachers import TEACHERS, TeacherResponse, respond

# by split: its share of the scenes in percent, its teacher, and the default number of samples
SPLITS = {
    "base": (30, "base", 131072),
    "sft": (25, "public", 8192),
    "alignment": (15, "curated", 2048),
    "rl": (15, "curated", 2048),
    "validation": (5, "curated", 512),
    "test": (10, "curated", 1024),
}
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class ShapesSample:
    """A question about an image, its right answer, and a teacher's response."""

    id: str
    split: str
    index: int
    # [96, 96, 3], read-only
    image: Bytes
    scene: Scene
    question: Question
    answer: str
    response: TeacherResponse


@dataclass(frozen=True)
class ShapesWorld:
    """All splits for one seed; worlds of equal seed and carelessness are equal.

    Args:
        seed: seed of scenes, questions and texts.
        carelessness: how often the public teacher errs.
    """

    seed: int = 0
    carelessness: Carelessness = field(default_factory=Carelessness)

    def samples(self, split: str, count: int | None = None, start: int = 0) -> Iterator[ShapesSample]:
        """Yields the samples `start`, `start` + 1, ... of a split; every index exists and always gives the same sample.

        Args:
            split: a key of SPLITS; `alignment` has the curated demonstrations.
            count: number of samples; None for all up to the split's default.
            start: index of the first sample.
        """
        _check(split)
        stop = SPLITS[split][2] if count is None else start + count
        for begin in range(start, stop, _CHUNK):
            scenes, questions = zip(*(self._asked(split, i) for i in range(begin, min(begin + _CHUNK, stop))))
            images = draw(scenes)
            images.setflags(write=False)
            for offset, (scene, question, image) in enumerate(zip(scenes, questions, images)):
                index = begin + offset
                (answer,) = infer(question, scene.items)
                response = self._respond(SPLITS[split][1], split, index, scene, question)
                name = f"{split}-{self.seed}-{index:06d}"
                # a copy, so that a kept sample does not keep the images of its chunk alive
                yield ShapesSample(name, split, index, _frozen(image), scene, question, answer, response)

    def respond(self, teacher: str, sample: ShapesSample, draw: int = 0) -> TeacherResponse:
        """Returns a teacher's response to a sample; each number of the draw gives another phrasing and other errors."""
        return self._respond(teacher, sample.split, sample.index, sample.scene, sample.question, draw)

    def texts(self, count: int) -> Iterator[str]:
        """Yields the questions and all teachers' tagged responses of the first samples of the base's split.

        A tokenizer that learns from them knows this world's words and tags. No image is drawn.
        """
        for index in range(count):
            scene, question = self._asked("base", index)
            yield question.text
            for teacher in TEACHERS:
                yield self._respond(teacher, "base", index, scene, question).sections.text

    def _asked(self, split: str, index: int) -> tuple[Scene, Question]:
        rng = Random(f"{self.seed}/{split}/{index}")
        while True:
            scene = random_scene(rng)
            if split_of(scene) == split:
                return scene, ask(rng, scene)

    def _respond(
        self, teacher: str, split: str, index: int, scene: Scene, question: Question, draw: int = 0
    ) -> TeacherResponse:
        rng = Random(f"{self.seed}/{split}/{index}/{teacher}/{draw}")
        return respond(teacher, rng, scene, question, self.carelessness)


def split_of(scene: Scene) -> str:
    """Returns the one split that a scene belongs to."""
    percentile = scene.digest[0] * 100 // 256
    for split, (share, _, _) in SPLITS.items():
        percentile -= share
        if percentile < 0:
            return split
    raise AssertionError("the shares of the splits sum to 100")


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"samples: expected split to be one of {', '.join(map(repr, SPLITS))}, got {split!r}")


def _frozen(image: Bytes) -> Bytes:
    copy = image.copy()
    copy.setflags(write=False)
    return copy
