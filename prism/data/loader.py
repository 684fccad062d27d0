"""Streams of rows: shuffled by seed, resumable, every row validated, none replaced in silence."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from prism.data.files import DataError, Raw, RowError, data_files, parse, read_rows
from prism.data.images import ImageLimits
from prism.data.rows import READERS

# before that a share says little
_MIN_ROWS = 200


@dataclass(frozen=True)
class LoadOptions:
    """How rows are read.

    Args:
        seed: of the order of files and rows.
        buffer: how many rows, not yet decoded, are shuffled at a time; 0: everything in the files' order.
        epochs: how often all files are read; None: without end.
        on_error: `skip` counts a row that cannot be used and goes on, `raise` stops.
        max_skipped: the share of skipped rows above which the stream stops even so: as soon as 200 rows of an epoch
            were read, and at the epoch's end.
        skipped: a JSONL file, of this stream alone, that gets file, row, field, cause and reason of each skipped row,
            once; what an older run left in it is dropped. None: they are only counted.
        image_root: what paths of images are relative to; None: the folder of their data file.
        images: which images are taken.
    """

    seed: int = 0
    buffer: int = 512
    epochs: int | None = 1
    on_error: str = "skip"
    max_skipped: float = 0.05
    skipped: Path | None = None
    image_root: Path | None = None
    images: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"LoadOptions: expected on_error to be 'skip' or 'raise', got {self.on_error!r}")
        if self.buffer < 0 or not 0 <= self.max_skipped <= 1 or (self.epochs is not None and self.epochs < 1):
            raise ValueError(
                "LoadOptions: expected buffer >= 0, max_skipped in [0, 1] and epochs >= 1 or None, got "
                f"{self.buffer}, {self.max_skipped}, {self.epochs}"
            )


class Position(NamedTuple):
    """Where in an epoch reading goes on: the file in its order, rows read of it, where the next one begins."""

    file: int = 0
    row: int = 0
    offset: int = 0


class RowStream:
    """An iterator over validated rows that can go on where another one was.

    Rows are read in blocks of `buffer`, and each block is permuted by seed, epoch and number; so a position is a few
    numbers, and going on reads at most one block again. At any time one block is in memory, its images not decoded.

    Args:
        files: JSONL and parquet files, or folders of them.
        schema: `chat` (SFT), `warmup` or `problem` (alignment, RLVR).
        options: see there.
        take: what is given of a valid row, which it may refuse by a `RowError`; None: the row.
    """

    def __init__(
        self,
        files: Sequence[str | Path] | str | Path,
        schema: str,
        options: LoadOptions | None = None,
        *,
        take: Callable[[Any], Any] | None = None,
    ) -> None:
        if schema not in READERS:
            raise ValueError(f"RowStream: expected schema to be one of {', '.join(map(repr, READERS))}, got {schema!r}")
        self.files = data_files(files)
        self.options = options or LoadOptions()
        self.schema, self.take = schema, take
        # of the current epoch; `different`: how many rows were skipped since the first one, each counted once
        self.read = self.skipped = 0
        self.causes: Counter[str] = Counter()
        self.epoch = self.different = 0
        # of the log: what a run before this one wrote is dropped when the first row is read
        self._log_is_ours = False
        self._last = ""
        self._begin_epoch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._log_is_ours:
            self._cut_log()
        while True:
            if self._next == len(self._block):
                self._next_block()
            path, raw = self._block[self._next]
            self._next += 1
            self.read += 1
            row = self._row(path, raw)
            # before a row is given, so that it does not count as given where this stops
            self._check_share(at_end=False)
            if row is not None:
                return row

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the row given last: numbers and names that JSON can write."""
        return {
            "of": self._identity(),
            "epoch": self.epoch,
            "block": self._number,
            "place": list(self._start),
            "next": self._next,
            "read": self.read,
            "skipped": self.skipped,
            "causes": dict(self.causes),
            "different": self.different,
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position of a stream of the same files, schema, seed and buffer."""
        ours = self._identity()
        for key, value in state["of"].items():
            if ours[key] != value:
                raise DataError(
                    f"load_state_dict: expected the same {key} as when it was saved, {value}, got {ours[key]}"
                )
        self.epoch, self.different, self._last = state["epoch"], state["different"], state["last"]
        self._begin_epoch()
        self.read, self.skipped, self.causes = state["read"], state["skipped"], Counter(state["causes"])
        if state["block"] >= 0:
            # one less: it is about to be read
            self._number, self._end = state["block"] - 1, Position(*state["place"])
            self._rows = self._rows_from(self._end)
            self._fill()
            self._next = state["next"]
        self._cut_log()

    def _identity(self) -> dict[str, Any]:
        options = self.options
        sizes = [[file.name, file.stat().st_size] for file in self.files]
        return {"schema": self.schema, "seed": options.seed, "buffer": options.buffer, "files": sizes}

    def _begin_epoch(self) -> None:
        self.read = self.skipped = 0
        self.causes = Counter()
        self._order = list(range(len(self.files)))
        if self.options.buffer:
            _shuffle(self._order, f"{self.options.seed}/{self.epoch}/files")
        self._number, self._start, self._end = -1, Position(), Position()
        self._rows = self._rows_from(self._end)
        self._block: list[tuple[Path, Raw]] = []
        self._next = 0

    def _rows_from(self, place: Position) -> Iterator[tuple[Position, Path, Raw]]:
        """Yields rows with the place behind each."""
        row, offset = place.row, place.offset
        for file in range(place.file, len(self._order)):
            path = self.files[self._order[file]]
            for raw in read_rows(path, row, offset):
                yield Position(file, raw.row, raw.end), path, raw
            row = offset = 0

    def _fill(self) -> bool:
        """Reads the next block; False: there is none."""
        self._number += 1
        self._start, self._block, self._next = self._end, [], 0
        for place, path, raw in self._rows:
            self._block.append((path, raw))
            self._end = place
            if len(self._block) >= max(self.options.buffer, 1):
                break
        if self.options.buffer:
            _shuffle(self._block, f"{self.options.seed}/{self.epoch}/{self._number}")
        return bool(self._block)

    def _next_block(self) -> None:
        """Reads the next block, of the next epoch where this one is over; raises StopIteration behind the last."""
        if self._fill():
            return
        self._check_share(at_end=True)
        if self.options.epochs is not None and self.epoch + 1 >= self.options.epochs:
            raise StopIteration
        self.epoch += 1
        self._begin_epoch()
        self._fill()

    def _row(self, path: Path, raw: Raw) -> Any:
        """Returns the row, or None where it is skipped."""
        root = self.options.image_root or path.parent
        try:
            row = READERS[self.schema](parse(raw.content), f"{path.stem}-{raw.row}", root, self.options.images)
            return row if self.take is None else self.take(row)
        except RowError as error:
            if self.options.on_error == "raise":
                raise DataError(error.at(path, raw.row)) from None
            self.skipped += 1
            self.causes[error.cause] += 1
            self._log(path, raw.row, error)
            return None

    def _log(self, path: Path, row: int, error: RowError) -> None:
        self._last = error.at(path, row)
        # the same rows are skipped in every epoch
        if self.epoch:
            return
        self.different += 1
        if self.options.skipped is None:
            return
        entry = {"file": str(path), "row": row, "field": error.field, "cause": error.cause, "reason": error.problem}
        self.options.skipped.parent.mkdir(parents=True, exist_ok=True)
        with self.options.skipped.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def _cut_log(self) -> None:
        """Drops from the log what was written behind this position: by a run that was interrupted, or an older one."""
        self._log_is_ours = True
        path = self.options.skipped
        if path is None or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if len(lines) > self.different:
            path.write_text("".join(lines[: self.different]), encoding="utf-8")

    def _check_share(self, at_end: bool) -> None:
        if at_end and self.read == self.skipped:
            why = f": {self._last}" if self.skipped else ""
            raise DataError(
                f"{', '.join(map(str, self.files))}: expected a row that can be used, got none of {self.read}{why}"
            )
        if (at_end or self.read >= _MIN_ROWS) and self.skipped > self.options.max_skipped * self.read:
            causes = ", ".join(f"{cause} {number}" for cause, number in self.causes.most_common())
            raise DataError(
                f"{', '.join(map(str, self.files))}: expected at most {self.options.max_skipped:.0%} of the rows to be "
                f"skipped, got {self.skipped} of {self.read} ({causes}); the last: {self._last}"
            )


@dataclass(frozen=True)
class DryRun:
    """What reading the files would give.

    Args:
        rows: of all files.
        accepted: of them.
        rejected: how many by cause.
        first: of each cause the first row's message.
    """

    rows: int
    accepted: int
    rejected: Mapping[str, int]
    first: Mapping[str, str]


def dry_run(
    files: Sequence[str | Path] | str | Path,
    schema: str,
    options: LoadOptions | None = None,
    *,
    take: Callable[[Any], Any] | None = None,
) -> DryRun:
    """Returns how many rows the files have and how many would be rejected, by cause, having read all of them once.

    Args:
        files: see `RowStream`.
        schema: see `RowStream`.
        options: see `RowStream`; order and logs do not matter here.
        take: see `RowStream`.
    """
    options = options or LoadOptions()
    if schema not in READERS:
        raise ValueError(f"dry_run: expected schema to be one of {', '.join(map(repr, READERS))}, got {schema!r}")
    rejected: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows = 0
    for path in data_files(files):
        for raw in read_rows(path):
            rows += 1
            try:
                row = READERS[schema](parse(raw.content), "", options.image_root or path.parent, options.images)
                if take is not None:
                    take(row)
            except RowError as error:
                rejected[error.cause] += 1
                first.setdefault(error.cause, error.at(path, raw.row))
    return DryRun(rows, rows - sum(rejected.values()), dict(rejected.most_common()), first)


def _shuffle(entries: list[Any], seed: str) -> None:
    """Permutes in place; of Python's generator only `random()` promises the same numbers in every version."""
    rng = Random(seed)
    for last in range(len(entries) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        entries[last], entries[other] = entries[other], entries[last]
