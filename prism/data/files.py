"""Data files, read one row at a time from any position, and the errors that name a file and a row."""

import json
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

# the greatest size of a row: of a line, or of the values of a parquet row. longer ones are skipped
MAX_BYTES = 64 * 2**20
# the greatest number of values of a line; each takes up to 250 bytes once it is parsed
MAX_VALUES = 10**6
# files are read in pieces of this size
PIECE = 2**20
_SUFFIXES = (".jsonl", ".parquet")
# long enough to recognise a value, short enough for a log
_SHOWN = 60
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 2 * _SHOWN
# the schema of the files under each key of data.files
SCHEMAS = {"sft": "chat", "warmup": "warmup"} | dict.fromkeys(("align", "rlvr", "validation", "test"), "problem")
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


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
    # a value may have millions of parts
    text = repr(value[:_SHOWN]) if isinstance(value, str) else _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class Raw(NamedTuple):
    """A row as it stands in the file."""

    # counted from 1
    row: int
    # where the next row begins: a byte of a JSONL file, a row of a parquet file
    end: int
    # a line, a parsed row, or the reason why there is neither
    content: bytes | dict[str, Any] | RowError
    # in bytes, about
    size: int


def data_files(paths: Sequence[str | Path] | str | Path) -> tuple[Path, ...]:
    """Returns the data files that the paths name; a folder stands for the data files in it."""
    files: list[Path] = []
    for path in [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
            if not inside:
                raise DataError(f"{path}: expected files ending in {' or '.join(_SUFFIXES)}, got none")
            files += inside
        elif not path.exists():
            raise DataError(f"{path}: expected a data file, there is none")
        elif path.suffix not in _SUFFIXES:
            hint = "; write one object a line, as .jsonl" if path.suffix == ".json" else ""
            raise DataError(f"{path}: expected a file ending in {' or '.join(_SUFFIXES)}, got {path.suffix!r}{hint}")
        else:
            files.append(path)
    if not files:
        raise DataError("data files: expected at least one, got none")
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: {_not_a_file(path.stat().st_mode)}")
    return tuple(files)


def open_regular(path: Path) -> BufferedReader:
    """Opens a file to read; raises `OSError` for anything else, such as a FIFO, which could keep the reader waiting."""
    # opening a FIFO waits for its writer without O_NONBLOCK, which Windows does not have
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(_not_a_file(mode))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _not_a_file(mode: int) -> str:
    return f"expected a regular file, got a {_KINDS.get(stat.S_IFMT(mode), 'special file')}"


def extent(path: Path) -> int:
    """Returns where the last row ends, in the unit of `Raw.end`."""
    if path.suffix == ".jsonl":
        return path.stat().st_size
    from prism.data.parquet_rows import number_of_rows

    return number_of_rows(path)


def read_rows(
    path: Path, row: int = 0, offset: int = 0, *, columns: Collection[str] | None = None, max_bytes: int = MAX_BYTES
) -> Iterator[Raw]:
    """Yields the rows of a file after the first `row` rows, which end at `offset`.

    Args:
        path: the file.
        row: number of rows before.
        offset: where they end, see `Raw`.
        columns: the columns that a parquet file is read for; None: all of them.
        max_bytes: the greatest size of a row; a longer one is a `RowError`.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _lines(path, row, offset, max_bytes)
        else:
            from prism.data.parquet_rows import parquet_rows

            yield from parquet_rows(path, row, offset, columns, max_bytes)
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read: {error.strerror or error}") from None


def parse(content: bytes | dict[str, Any] | RowError) -> dict[str, Any]:
    """Returns a row as a dictionary, or raises the reason why it is not one."""
    if isinstance(content, RowError):
        raise content
    if isinstance(content, dict):
        return content
    if content.count(b",") > MAX_VALUES:
        raise RowError("too long", "", f"expected a row of at most {MAX_VALUES} values")
    try:
        # json itself also accepts UTF-16, and halves of surrogate pairs as bytes
        value = json.loads(content.decode("utf-8-sig"))
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


def _lines(path: Path, row: int, offset: int, max_bytes: int) -> Iterator[Raw]:
    with open_regular(path) as file:
        file.seek(offset)
        while line := file.readline(max_bytes + 1):
            row += 1
            content: bytes | RowError = line
            if len(line) > max_bytes:
                content = RowError("too long", "", f"expected a line of at most {max_bytes} bytes")
                while not line.endswith(b"\n") and (line := file.readline(PIECE)):
                    pass
            # an empty line is not a lost row
            if isinstance(content, RowError) or content.strip():
                yield Raw(row, file.tell(), content, 0 if isinstance(content, RowError) else len(content))
