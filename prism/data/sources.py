"""Where a run's problems come from: the embedded world, or data files. A run asks both in the same way."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prism.config import STAGES, Config
from prism.data.files import DataError
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, RowStream
from prism.data.problem import Problem, problem_reader
from prism.models.prompts import PromptEncoder
from prism.worlds.shapes.problems import ShapesProblems
from prism.worlds.shapes.world import ShapesWorld

# which split of the embedded world a stage takes its problems from
SPLITS = {"base": "base", "sft": "sft", "rlvr": "rl"} | dict.fromkeys(("distill", "warmup", "align"), "alignment")
# which files a stage reads; warmup has its own, or does with the prompts of alignment
FILES = {"sft": "sft", "rlvr": "rlvr", "distill": "align", "align": "align"}
SCHEMAS = {"sft": "chat", "warmup": "warmup"} | dict.fromkeys(("align", "rlvr", "validation", "test"), "problem")


class Problems(Protocol):
    """What a run learns from and is measured by."""

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields at most `most` batches of so many problems, of which a step takes as many as it wants."""

    def held_out(self, split: str, count: int | None = None) -> Iterable[Problem]:
        """Returns the first problems of `validation` or `test`, the same each time; () where there are none.

        Args:
            split: which.
            count: of problems, at most; None: all.
        """

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns what a step logs of its data."""

    def position(self, stage: str) -> dict[str, Any]:
        """Returns where in its data a stage is, as JSON can write it."""

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Goes on with a stage from a position."""


def problems_of(config: Config, encoder: PromptEncoder) -> Problems:
    """Returns the problems that the settings name.

    Args:
        config: the settings.
        encoder: of the policy, which says how long a prompt is.
    """
    return EmbeddedProblems(config) if config.data.source == "shapes" else FileProblems(config, encoder)


def step_random(seed: int, stage: str, step: int) -> np.random.Generator:
    """Returns the random numbers of a step, which follow from these alone: a resumed run draws the same."""
    return np.random.default_rng([seed, STAGES.index(stage), step])


class EmbeddedProblems:
    """The embedded world's: a step draws by the seed, the stage and its number, so that there is no position.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self.settings, self.seed = config.data.shapes, config.run.seed
        self.world = ShapesWorld(self.settings.seed, self.settings.carelessness)

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields batches; a problem is in at most one where there are enough."""
        split, curated = self._split(SPLITS[stage]), self._split("alignment")
        total = len(split) + (self.settings.sft_curated if stage == "sft" else 0)
        rng = step_random(self.seed, stage, step)
        chosen = rng.choice(total, count * most, replace=count * most > total)
        for start in range(0, len(chosen), count):
            part = chosen[start : start + count].tolist()
            own = split.take([i for i in part if i < len(split)])
            yield own + curated.take([i - len(split) for i in part if i >= len(split)])

    def held_out(self, split: str, count: int | None = None) -> list[Problem]:
        """Returns the first problems of a split."""
        found = self._split(split)
        return found.take(range(len(found) if count is None else min(count, len(found))))

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns nothing: there is nothing to skip."""
        return {}

    def position(self, stage: str) -> dict[str, Any]:
        """Returns nothing: a step draws without one."""
        return {}

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Does nothing."""

    def _split(self, name: str) -> ShapesProblems:
        judged = self.settings.judged if name == "base" else 0.0
        return ShapesProblems(self.world, name, getattr(self.settings, name), judged)


class FileProblems:
    """Those of data files, in an order that follows from the seed and the stage, again and again.

    What a stage cannot use of its files is skipped, and named in `skipped-STAGE.jsonl` of the run's folder; or it stops
    the run. See `prism.config.DataSettings`.

    Args:
        config: the settings.
        encoder: of the policy.
    """

    def __init__(self, config: Config, encoder: PromptEncoder) -> None:
        self.config, self.encoder = config, encoder
        self._streams: dict[str, RowStream] = {}

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields the next rows; those of batches that are not asked for are the next step's."""
        for _ in range(most):
            yield list(islice(self._stream(stage), count))

    def held_out(self, split: str, count: int | None = None) -> Iterable[Problem]:
        """Returns the first problems of the files, read anew each time that they are gone through."""
        if not getattr(self.config.data.files, split):
            return ()
        # a reading that is shorter than the evaluation's would leave fewer rows in the log
        logged = count is None or count >= self.config.evaluation.samples
        options = LoadOptions(buffer=0, skipped=self._log(split) if logged else None)
        return HeldOut(lambda: islice(self._open(split, split, options), count))

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns how often the files were read, and how many of their rows were skipped, each counted once."""
        stream = self._stream(stage)
        return {"epoch": stream.epoch + 1, "rows_skipped": stream.different}

    def position(self, stage: str) -> dict[str, Any]:
        """Returns the position of the stage's files."""
        return self._stream(stage).state_dict()

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Goes on from a position; raises `DataError` where the files are not those that it is of."""
        try:
            self._stream(stage).load_state_dict(position)
        except DataError as error:
            advice = "put the old files back, or take another run.folder"
            raise DataError(f"data.files.{self._files_of(stage)}: {error}; {advice}") from None

    def _stream(self, stage: str) -> RowStream:
        if stage not in self._streams:
            # so that stages that read the same files have orders of their own
            seed = self.config.run.seed * len(STAGES) + STAGES.index(stage)
            options = LoadOptions(seed=seed, buffer=self.config.data.buffer, epochs=None, skipped=self._log(stage))
            self._streams[stage] = self._open(stage, self._files_of(stage), options)
        return self._streams[stage]

    def _log(self, use: str) -> Path:
        return Path(self.config.run.folder) / f"skipped-{use}.jsonl"

    def _files_of(self, stage: str) -> str:
        return FILES.get(stage) or ("warmup" if self.config.data.files.warmup else "align")

    def _open(self, use: str, files: str, options: LoadOptions) -> RowStream:
        """Returns a stream of problems.

        Args:
            use: the stage, or the split that is held out.
            files: the key of its files.
            options: how they are read, but for what the settings say for all.
        """
        data = self.config.data
        options = replace(
            options,
            on_error=data.on_error,
            max_skipped=data.max_skipped,
            image_root=None if data.image_root is None else Path(data.image_root),
            images=ImageLimits(allow_remote=data.allow_remote_images),
        )
        take = problem_reader(use, self.encoder, data)
        return RowStream(getattr(data.files, files), SCHEMAS[files], options, take=take)


class HeldOut:
    """Problems that are read each time that they are gone through: they need not fit into memory.

    Args:
        read: begins to read.
    """

    def __init__(self, read: Callable[[], Iterator[Problem]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Problem]:
        return self._read()
