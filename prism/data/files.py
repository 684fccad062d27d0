"""Data files, read one row at a time from any position, and the errors that name a file and a row."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# longer lines are skipped and never held in memory
MAX_LINE = 64 * 2**20
# rows of a parquet file that are decoded at once
_BATCH = 64
# long enough to recognise a value, short enough for a log
_SHOWN = 60
# the schema of the files under each key of data.files
SCHEMAS = {"sft": "chat", "warmup": "warmup"} | dict.fromkeys(("align", "rlvr", "validation", "test"), "problem")


class DataError(ValueError):
    """A file that cannot be used, or a file with too many unusable rows."""


class RowError(DataError):
    """A row that cannot be used.

    Args:
        cause: a few words, the same for every row with this defect; `dry_run` counts by them.
        field: the path inside the row, such as `messages.1.content`; empty for the whole row.
        problem: what was expected and what came.
    """

    def __init__(self, cause: str, field: str, problem: str):
        super().__init__(f"{field}: {problem}" if field else problem)
        self.cause, self.field, self.problem = cause, field, problem

    def at(self, path: Path, row: int) -> str:
        """Returns the message with the file and the row."""
        return f"{path}, row {row}: {self}"


def shown(value: Any) -> str:
    """Returns a value as error messages show it, shortened."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class Raw(NamedTuple):
    """A row as it stands in the file."""

    # counted from 1
    row: int
    # where the next row begins: a byte of a JSONL file, a row of a parquet file
    end: int
    # a line, a parsed row, or the reason why there is neither
    content: bytes | dict[str, Any] | RowError


def data_files(paths: Sequence[str | Path] | str | Path) -> tuple[Path, ...]:
    """Returns the data files that the paths name; a folder stands for the data files in it."""
    files: list[Path] = []
    for path in [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in _READERS)
            if not inside:
                raise DataError(f"{path}: expected files ending in {' or '.join(_READERS)}, got none")
            files += inside
        elif not path.exists():
            raise DataError(f"{path}: expected a data file, there is none")
        elif path.suffix not in _READERS:
            hint = "; write one object a line, as .jsonl" if path.suffix == ".json" else ""
            raise DataError(f"{path}: expected a file ending in {' or '.join(_READERS)}, got {path.suffix!r}{hint}")
        else:
            files.append(path)
    if not files:
        raise DataError("data files: expected at least one, got none")
    return tuple(files)


def read_rows(path: Path, row: int = 0, offset: int = 0) -> Iterator[Raw]:
    """Yields the rows of a file after the first `row` rows, which end at `offset`."""
    return _READERS[path.suffix](path, row, offset)


def parse(content: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    """Returns a row as a dictionary, or raises the reason why it is not one."""
    if isinstance(content, RowError):
        raise content
    if isinstance(content, dict):
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError
        raise RowError("not JSON", "", f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise RowError("not JSON", "", f"expected a JSON object, got {type(value).__name__}")
    if b"\\ud" in content.lower():
        # JSON can spell half of a surrogate pair, which no tokenizer and no file accepts
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RowError("broken text", "", f"expected whole characters: {error}") from None
    return value


def _jsonl(path: Path, row: int, offset: int) -> Iterator[Raw]:
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(MAX_LINE + 1):
            row += 1
            content: bytes | RowError = line
            if len(line) > MAX_LINE:
                content = RowError("too long", "", f"expected a line of at most {MAX_LINE} bytes")
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                    pass
            # an empty line is not a lost row
            if isinstance(content, RowError) or content.strip():
                yield Raw(row, file.tell(), content)


def _parquet(path: Path, row: int, offset: int) -> Iterator[Raw]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: expected pyarrow, to read parquet: pip install pyarrow ({error})") from None
    try:
        with parquet.ParquetFile(path) as file:
            groups, skip = _groups_from(file.metadata, offset)
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups):
                kept = batch.slice(skip)
                skip -= batch.num_rows - kept.num_rows
                for content in kept.to_pylist():
                    row, offset = row + 1, offset + 1
                    yield Raw(row, offset, content)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a parquet file, row {row + 1} cannot be read: {error}") from None


def _groups_from(metadata: Any, offset: int) -> tuple[list[int], int]:
    """Returns the row groups from the one with row `offset` on, and how many rows of it to skip."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if offset < rows:
            return list(range(group, metadata.num_row_groups)), offset
        offset -= rows
    return [], 0


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}
