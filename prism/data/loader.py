"""Streams of rows: shuffled by seed, resumable, every row validated, none replaced silently."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from prism.data.files import MAX_BYTES, DataError, Raw, RowError, data_files, parse, read_rows
from prism.data.images import ImageLimits
from prism.data.rows import COLUMNS, READERS

# the size at which a block of rows ends before it has `buffer` rows
BLOCK_BYTES = 512 * 2**20
# after fewer rows the share of skipped ones says little
_MIN_ROWS = 200


@dataclass(frozen=True)
class LoadOptions:
    """How rows are read.

    Args:
        seed: seed of the order of files and rows.
        buffer: number of rows, not yet decoded, that are shuffled together, fewer if they are large (512 MiB together);
            0 keeps the order of the files.
        epochs: how often all files are read; None for no end.
        on_error: `skip` counts an unusable row and reads on, `raise` stops.
        max_skipped: greatest share of skipped rows; the stream stops above it. It is checked from the 200th row of an
            epoch on, and at the epoch's end.
        skipped: a JSONL file, written by this stream only, that records file, row, field, cause and reason of each
            skipped row once. Lines of an older run are dropped. None records nothing.
        max_bytes: greatest size of a row, without images that it names by their paths.
        image_root: the folder to which paths of images are relative; None for the folder of the data file.
        images: which images are accepted.
    """

    seed: int = 0
    buffer: int = 512
    epochs: int | None = 1
    on_error: str = "skip"
    max_skipped: float = 0.05
    skipped: Path | None = None
    max_bytes: int = MAX_BYTES
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
    """Where reading resumes in an epoch: index in the order of files, rows read of that file, start of the next row."""

    file: int = 0
    row: int = 0
    offset: int = 0


class RowStream:
    """An iterator over validated rows that can resume where another one stopped.

    Rows are read in blocks of `buffer`. The permutation of a block follows from the seed, the epoch and the block's
    number, so a position is a few numbers, and resuming reads at most one block again. One block is in memory at a
    time, its images not decoded.

    Args:
        files: JSONL and parquet files, or folders of them.
        schema: `chat` (SFT), `warmup` or `problem` (alignment, RLVR).
        options: how rows are read.
        take: converts a valid row, or rejects it by raising `RowError`; None yields the row itself.
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
        # counts of the current epoch
        self.read = self.skipped = 0
        self.causes: Counter[str] = Counter()
        # the same rows are skipped in every epoch; this counts each of them once
        self.distinct_skipped = 0
        self.epoch = 0
        # lines of an earlier run are dropped when the first row is read
        self._log_is_cut = False
        self._last = ""
        self._begin_epoch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._log_is_cut:
            self._cut_log()
        while True:
            if self._next == len(self._block):
                self._next_block()
            path, raw = self._block[self._next]
            self._next += 1
            self.read += 1
            row = self._row(path, raw)
            # before the row is returned: a row does not count as returned where this raises
            self._check_share(at_end=False)
            if row is not None:
                return row

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last row returned, as JSON can write it."""
        return {
            "of": self._identity(),
            "epoch": self.epoch,
            "block": self._number,
            "place": list(self._start),
            "next": self._next,
            "read": self.read,
            "skipped": self.skipped,
            "causes": dict(self.causes),
            "different": self.distinct_skipped,
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a position of a stream with the same files, schema, seed and buffer."""
        identity = self._identity()
        for key, value in state["of"].items():
            if identity[key] != value:
                raise DataError(
                    f"load_state_dict: expected the same {key} as when it was saved, {value}, got {identity[key]}"
                )
        self.epoch, self.distinct_skipped, self._last = state["epoch"], state["different"], state["last"]
        self._begin_epoch()
        self.read, self.skipped, self.causes = state["read"], state["skipped"], Counter(state["causes"])
        if state["block"] >= 0:
            # `_fill` reads this block and counts it
            self._number, self._end = state["block"] - 1, Position(*state["place"])
            self._rows = self._rows_from(self._end)
            self._fill()
            self._next = state["next"]
        self._cut_log()

    @property
    def place(self) -> str:
        """The file and the row after the last row returned; a block of rows is read at once."""
        if self._next < len(self._block):
            path, raw = self._block[self._next]
            return f"{path}, row {raw.row}"
        if self._end.file < len(self._order):
            return f"{self.files[self._order[self._end.file]]}, after row {self._end.row}"
        return "the end of all files"

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

    def _rows_from(self, position: Position) -> Iterator[tuple[Position, Path, Raw]]:
        """Yields the rows from a position on, each with the position after it."""
        row, offset = position.row, position.offset
        for file in range(position.file, len(self._order)):
            path = self.files[self._order[file]]
            for raw in _read(path, self.schema, self.options, row, offset):
                yield Position(file, raw.row, raw.end), path, raw
            row = offset = 0

    def _fill(self) -> bool:
        """Reads the next block and returns whether there was one."""
        self._number += 1
        self._start, self._block, self._next = self._end, [], 0
        size = 0
        for position, path, raw in self._rows:
            self._block.append((path, raw))
            self._end = position
            size += raw.size
            if len(self._block) >= max(self.options.buffer, 1) or size >= BLOCK_BYTES:
                break
        if self.options.buffer:
            _shuffle(self._block, f"{self.options.seed}/{self.epoch}/{self._number}")
        return bool(self._block)

    def _next_block(self) -> None:
        """Reads the next block, if need be of the next epoch; raises StopIteration after the last epoch."""
        if self._fill():
            return
        self._check_share(at_end=True)
        if self.options.epochs is not None and self.epoch + 1 >= self.options.epochs:
            raise StopIteration
        self.epoch += 1
        self._begin_epoch()
        self._fill()

    def _row(self, path: Path, raw: Raw) -> Any:
        """Returns the row, or None if it is skipped."""
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
        if self.epoch:
            return
        self.distinct_skipped += 1
        if self.options.skipped is None:
            return
        entry = {"file": str(path), "row": row, "field": error.field, "cause": error.cause, "reason": error.problem}
        self.options.skipped.parent.mkdir(parents=True, exist_ok=True)
        with self.options.skipped.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def _cut_log(self) -> None:
        """Drops the lines of the log that an interrupted or older run wrote past this position."""
        self._log_is_cut = True
        path = self.options.skipped
        if path is None or not path.exists():
            return
        # as bytes: whatever is in it, the run needs only its lines
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > self.distinct_skipped:
            path.write_bytes(b"".join(lines[: self.distinct_skipped]))

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
    """The outcome of reading all files once.

    Args:
        rows: number of rows.
        accepted: number of usable rows.
        rejected: number of unusable rows, by cause.
        first: the first message of each cause.
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
    at: Callable[[Path, Raw], None] | None = None,
) -> DryRun:
    """Reads all files once and returns how many rows they have, and how many would be rejected, by cause.

    Args:
        files: see `RowStream`.
        schema: see `RowStream`.
        options: see `RowStream`; those of order and log have no effect.
        take: see `RowStream`.
        at: is called with each row that was checked, and its file.
    """
    options = options or LoadOptions()
    if schema not in READERS:
        raise ValueError(f"dry_run: expected schema to be one of {', '.join(map(repr, READERS))}, got {schema!r}")
    rejected: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows = 0
    for path in data_files(files):
        for raw in _read(path, schema, options):
            rows += 1
            try:
                row = READERS[schema](parse(raw.content), "", options.image_root or path.parent, options.images)
                if take is not None:
                    take(row)
            except RowError as error:
                rejected[error.cause] += 1
                first.setdefault(error.cause, error.at(path, raw.row))
            if at is not None:
                at(path, raw)
    return DryRun(rows, rows - sum(rejected.values()), dict(rejected.most_common()), first)


def _read(path: Path, schema: str, options: LoadOptions, row: int = 0, offset: int = 0) -> Iterator[Raw]:
    return read_rows(path, row, offset, columns=COLUMNS[schema], max_bytes=options.max_bytes)


def _shuffle(entries: list[Any], seed: str) -> None:
    """Permutes in place. Only `random()` of Python's generator gives the same numbers in every Python version."""
    rng = Random(seed)
    for last in range(len(entries) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        entries[last], entries[other] = entries[other], entries[last]
