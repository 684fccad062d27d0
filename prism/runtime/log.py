"""Metrics: one line of JSON per step in a file, and a line or a progress bar on the console."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from prism.runtime.disk import RunFolderError

# metrics on the console where the caller names none
_SHOWN = 6


class RunLog:
    """Writes `metrics.jsonl` and prints to the console.

    JSON has no non-finite numbers: they are written as null and counted, and the line lists their names under
    `non_finite`.

    Args:
        path: the file, which is appended to.
        console: `auto` shows a progress bar on a terminal and one line per step elsewhere; `lines`; `quiet`.
        stream: the console.
    """

    def __init__(self, path: str | Path, *, console: str = "auto", stream: TextIO | None = None) -> None:
        if console not in ("auto", "lines", "quiet"):
            raise ValueError(f"RunLog: expected console to be 'auto', 'lines' or 'quiet', got {console!r}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.non_finite: Counter[str] = Counter()
        self._file = self.path.open("ab")
        self._stream = stream or sys.stdout
        self._quiet = console == "quiet"
        self._bar: Progress | None = None
        if console == "auto" and self._stream.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=Console(file=self._stream))
        self._task: TaskID | None = None
        self._stage, self._total = "", 0

    @contextmanager
    def stage(self, name: str, steps: int, done: int = 0) -> Iterator[None]:
        """Names the stage of the steps inside; `done` of them were finished before."""
        self._stage, self._total = name, steps
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=steps, completed=done, metrics="")
            self._bar.start()
        try:
            yield
        finally:
            self._stop_bar()
            self._task, self._stage, self._total = None, "", 0

    def step(self, step: int, metrics: Mapping[str, Any], shown: Sequence[str] | None = None) -> None:
        """Writes a step's metrics.

        Args:
            step: number of the step in its stage, from 1.
            metrics: numbers, texts, and lists or dictionaries of them; a tensor of one element is a number.
            shown: names of the metrics that the console shows; None: the first few numbers.
        """
        bad: list[str] = []
        values = {name: _plain(name, value, bad) for name, value in metrics.items()}
        record = {"stage": self._stage, "step": step, **values}
        if bad:
            self.non_finite.update(bad)
            record["non_finite"] = bad
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._quiet:
            return
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) or value is None}
        names = [name for name in shown if name in numbers] if shown is not None else list(numbers)[:_SHOWN]
        text = "  ".join(f"{name} {_short(numbers[name])}" for name in names)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, metrics=text)
        else:
            width = len(str(self._total))
            print(f"{self._stage} {step:>{width}}/{self._total}  {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints a message on the console, above a progress bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Writes the file to disk and returns its position for a checkpoint, as JSON values."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "non_finite": dict(self.non_finite)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cuts the file at a position: the steps after it will be repeated.

        A run without a checkpoint begins at `{"bytes": 0, "non_finite": {}}`.
        """
        kept = self.path.read_bytes()[: state["bytes"]]
        advice = "restore the file, or use another folder"
        if len(kept) < state["bytes"]:
            raise RunFolderError(
                f"{self.path}: expected at least the {state['bytes']} bytes that it had at the checkpoint, got "
                f"{len(kept)}; {advice}"
            )
        try:
            records = _records(kept)
        except ValueError as error:
            raise RunFolderError(f"{self.path}: expected a line of JSON for each step: {error}; {advice}") from None
        if (kept and not kept.endswith(b"\n")) or not all(isinstance(record, dict) for record in records):
            raise RunFolderError(f"{self.path}: expected a table in each line; {advice}")
        self._file.truncate(state["bytes"])
        self._file.seek(0, os.SEEK_END)
        self.non_finite = Counter(state["non_finite"])

    def close(self) -> None:
        """Closes the file, and ends a progress bar that an error left."""
        self._stop_bar()
        self._file.close()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file; a last line that a killed run left unfinished is dropped."""
    return _records(Path(path).read_bytes())


def _records(content: bytes) -> list[Any]:
    # after the last newline there is nothing, or an unfinished line
    lines = content.split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except RecursionError as error:
        raise ValueError(error) from None


def _plain(name: str, value: Any, bad: list[str]) -> Any:
    """Returns a value that JSON can write, and appends the names of non-finite numbers to `bad`."""
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", inner, bad) for key, inner in value.items()}
    # a tensor or an array; torch and numpy need not be imported
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(name, inner, bad) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        if name not in bad:
            bad.append(name)
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(
        f"RunLog.step: expected {name} to be a number, a text, a list or a dictionary, got {type(value).__name__}"
    )


def _short(value: float | None) -> str:
    return "not finite" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
