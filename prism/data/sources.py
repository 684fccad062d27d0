"""The problems of a run, from the embedded world or from data files, behind one interface."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from prism.config import STAGES, Config
from prism.data.files import SCHEMAS, DataError
from prism.data.fingerprint import FilePrint
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, RowStream
from prism.data.problem import Problem, problem_reader
from prism.models.prompts import PromptEncoder
from prism.worlds.shapes.problems import EmbeddedProblems

# the files that each stage reads; warmup reads its own, or else those of alignment
FILES = {"sft": "sft", "rlvr": "rlvr", "distill": "align", "align": "align"}


class Problems(Protocol):
    """The problems that a run learns from and is evaluated on."""

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields up to `most` batches of `count` problems; a step takes as many of them as it needs."""

    def held_out(self, split: str, count: int | None = None) -> Iterable[Problem]:
        """Returns the first problems of a held-out split, the same ones each time; () if it has none.

        Args:
            split: `validation` or `test`.
            count: greatest number of problems; None for all.
        """

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns the figures that a step logs about its data."""

    def position(self, stage: str) -> dict[str, Any]:
        """Returns a stage's position in its data, as JSON can write it."""

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Moves a stage to a position in its data."""

    def reading(self, stage: str) -> str:
        """Returns where a stage is in its data, in words."""


def problems_of(config: Config, encoder: PromptEncoder) -> Problems:
    """Returns the problems that the settings name.

    Args:
        config: the settings.
        encoder: encodes prompts for the policy; the limits of lengths count its tokens.
    """
    return EmbeddedProblems(config) if config.data.source == "shapes" else FileProblems(config, encoder)


class FileProblems:
    """Problems of data files, read in an order that follows from the seed and the stage, over and over.

    A row that a stage cannot use is skipped and recorded in `skipped-STAGE.jsonl` of the run's folder, or stops the
    run. See `prism.config.DataSettings`.

    Args:
        config: the settings.
        encoder: encodes prompts for the policy.
    """

    def __init__(self, config: Config, encoder: PromptEncoder) -> None:
        self.config, self.encoder = config, encoder
        self._streams: dict[str, RowStream] = {}
        self._prints: dict[str, list[FilePrint]] = {}

    def batches(self, stage: str, step: int, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields the next rows; a batch that is not taken is left for the next step."""
        self._contents(stage)
        for _ in range(most):
            yield list(islice(self._stream(stage), count))

    def held_out(self, split: str, count: int | None = None) -> Iterable[Problem]:
        """Returns the first problems of the files; each iteration reads them anew."""
        if not getattr(self.config.data.files, split):
            return ()
        # a shorter reading than the evaluation's would cut rows from the log
        logged = count is None or count >= self.config.evaluation.samples
        options = LoadOptions(buffer=0, skipped=self._log(split) if logged else None)
        return HeldOut(lambda: islice(self._open(split, split, options), count))

    def figures(self, stage: str) -> dict[str, Any]:
        """Returns the number of the epoch, and how many rows were skipped, each counted once."""
        stream = self._stream(stage)
        return {"epoch": stream.epoch + 1, "rows_skipped": stream.distinct_skipped}

    def position(self, stage: str) -> dict[str, Any]:
        """Returns the position in the stage's files, and their content."""
        return {**self._stream(stage).state_dict(), "content": [one.state() for one in self._contents(stage)]}

    def go_to(self, stage: str, position: dict[str, Any]) -> None:
        """Moves to a position; raises `DataError` if it is a position in other files."""
        stream, key = self._stream(stage), f"data.files.{self._files_of(stage)}"
        try:
            stream.load_state_dict(position)
            self._prints[stage] = [
                FilePrint(file, one) for file, one in zip(stream.files, position["content"], strict=True)
            ]
        except DataError as error:
            raise DataError(f"{key}: {error}; put the old files back, or take another run.folder") from None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{key}: expected a position as a checkpoint has it, got {error!r}") from None

    def reading(self, stage: str) -> str:
        """Returns the file and the row that come next."""
        stream = self._streams.get(stage)
        return f"data.files.{self._files_of(stage)}, {'not opened yet' if stream is None else stream.place}"

    def _contents(self, stage: str) -> list[FilePrint]:
        if stage not in self._prints:
            self._prints[stage] = [FilePrint(file) for file in self._stream(stage).files]
        return self._prints[stage]

    def _stream(self, stage: str) -> RowStream:
        if stage not in self._streams:
            # stages that read the same files read them in different orders
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
            use: the stage, or the held-out split.
            files: the key of its files.
            options: how the files are read; settings that all streams share are filled in here.
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
    """Problems that each iteration reads anew, so that they need not fit into memory.

    Args:
        read: starts a new reading.
    """

    def __init__(self, read: Callable[[], Iterator[Problem]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Problem]:
        return self._read()
