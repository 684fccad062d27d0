"""Metrics: every step a line of JSON in a file, and a line or a progress bar on the console."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    # the report reads metrics without torch
    from prism.rollout.batch import RolloutBatch

# metrics on the console where the caller names none
_SHOWN = 6


class RunLog:
    """Writes `metrics.jsonl` and tells the console.

    A value that is not finite is written as null, since JSON has no such number, and its name is counted; the line
    lists the names under `non_finite`.

    Args:
        path: of the file, which is appended to.
        console: `auto`: a progress bar on a terminal, elsewhere a line a step; `lines`; `quiet`.
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
        """Names the stage of the steps inside, of which some may have been done before."""
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
            step: counted from 1 in its stage.
            metrics: numbers, texts, and lists or dictionaries of them; a tensor of one element is a number.
            shown: which of them the console shows; None: the first few numbers.
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
        """Tells the console something, above the progress bar where there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the file behind what is on the disk, for a checkpoint: JSON can write it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._file.tell(), "non_finite": dict(self.non_finite)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind a position: what the file has after it is of steps that will be done again, and is cut.

        Without a checkpoint a run begins anew, at `{"bytes": 0, "non_finite": {}}`.
        """
        size = self.path.stat().st_size
        if size < state["bytes"]:
            raise ValueError(
                f"{self.path}: expected at least the {state['bytes']} bytes that it had at the checkpoint, got {size}; "
                "restore the file, or begin in another folder"
            )
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


def write_rollouts(path: Path, batch: "RolloutBatch", columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a step's rollouts as JSON, one a line, with one value of each column per rollout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for index, (rollout, text) in enumerate(zip(batch.rollouts, batch.texts)):
            problem = batch.problems[rollout.prompt]
            values = {name: _finite(column[index]) for name, column in columns.items()}
            line = {"problem": problem.name, "question": str(problem.prompt), "answer": problem.answer}
            file.write(json.dumps({**line, "response": text, "finish": rollout.finish_reason, **values}) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file, without a last line that was not finished when its writer was killed."""
    lines = Path(path).read_bytes().split(b"\n")
    # behind the last newline there is nothing, or a part of a line
    return [json.loads(line) for line in lines[:-1]]


def _plain(name: str, value: Any, bad: list[str]) -> Any:
    """Returns a value as JSON can write it, and notes the names of those that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", inner, bad) for key, inner in value.items()}
    # of a tensor or an array, without importing either's library
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
