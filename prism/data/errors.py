"""What is wrong with a row or a file, worded in one way."""

from pathlib import Path
from typing import Any

# long enough to recognise a value, short enough for a log
_SHOWN = 60


class DataError(ValueError):
    """A file that cannot be used, or too many rows that cannot."""


class RowError(DataError):
    """A row that cannot be used.

    Args:
        cause: a few words, the same for all rows with this defect: what `dry_run` counts.
        field: where in the row, as `messages.1.content`; empty: the whole row.
        problem: what was expected and what came.
    """

    def __init__(self, cause: str, field: str, problem: str):
        super().__init__(f"{field}: {problem}" if field else problem)
        self.cause, self.field, self.problem = cause, field, problem

    def at(self, path: Path, row: int) -> str:
        """Returns the message with file and row."""
        return f"{path}, row {row}: {self}"


def shown(value: Any) -> str:
    """Returns a value as messages show it: short."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
