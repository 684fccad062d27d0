"""Scores recorded rollouts again, with the built-in reward and custom ones: `prism score`. Needs no torch."""

import heapq
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prism.data.files import DataError, RowError, data_files, read_rows, shown
from prism.rewards import ProblemView, RolloutView, score_batch
from prism.rewards.custom import call_rewards, find_unusable_rewards
from prism.rollout.records import REWARD, RolloutRecord, parse_record
from prism.runtime.disk import write_whole

# rollouts of a batch, and bytes of their lines: whichever is reached first
BATCH, BATCH_BYTES = 256, 16 * 2**20
# differences that are shown
MOST_SHOWN = 10
BUILT_IN = ("accuracy", "format")
# reasons of a verdict with which the verifier failed
FAILED = ("timeout", "crash", "memory", "error")


class Line(NamedTuple):
    """A recorded rollout and where it stands."""

    path: Path
    row: int
    record: RolloutRecord

    @property
    def place(self) -> str:
        """File and line, as editors open them."""
        return f"{self.path}:{self.row}"

    @property
    def old(self) -> dict[str, float | None]:
        """The recorded values that can be measured again; a value that was not recorded is not there."""
        given = self.record.model_fields_set
        old = {name: getattr(self.record, name) for name in BUILT_IN if name in given}
        return old | {f"{REWARD}{name}": value for name, value in self.record.custom_rewards.items()}


class NewScore(NamedTuple):
    """What a rollout is given now."""

    values: dict[str, float | None]
    # "right", "wrong", or why the response is invalid or has no verdict
    reason: str | None
    # cause and detail, by value
    failed: dict[str, tuple[str, str]]


@dataclass
class Compared:
    """Old and new values of one kind, in one stage."""

    old: list[float] = field(default_factory=lambda: [0.0, 0.0])
    new: list[float] = field(default_factory=lambda: [0.0, 0.0])
    # rollouts with an old value, also of None, and how many of these are another value now
    both: int = 0
    changed: int = 0

    def add(self, known: bool, old: float | None, new: float | None) -> None:
        """Counts a rollout; `known`: whether it has an old value."""
        for sums, value in ((self.old, old), (self.new, new)):
            if value is not None:
                sums[0] += value
                sums[1] += 1
        self.both += known
        self.changed += known and old != new


@dataclass
class Summary:
    """What is printed at the end; its size does not grow with the files."""

    lines: int = 0
    values: dict[tuple[str, str], Compared] = field(default_factory=dict)
    # old and new reason of verdicts that changed
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    # number and first message of what failed, and of lines that could not be read, by cause
    failed: dict[str, list[Any]] = field(default_factory=dict)
    skipped: dict[str, list[Any]] = field(default_factory=dict)
    # size, order, text
    largest: list[tuple[float, int, str]] = field(default_factory=list)

    def add(self, line: Line, new: NewScore) -> None:
        """Counts a rollout."""
        self.lines += 1
        old = line.old
        for name, value in new.values.items():
            before = old.get(name)
            self.values.setdefault((line.record.stage, name), Compared()).add(name in old, before, value)
            if name in old and before != value:
                self._difference(line, name, before, value, new)
        if "accuracy" in old and new.reason is not None and line.record.reason != new.reason:
            self.reasons[shown(line.record.reason), shown(new.reason)] += 1
        for name, (cause, detail) in new.failed.items():
            _count(self.failed, f"{name}: {cause}", f"{line.place}: {detail}")

    def _difference(self, line: Line, name: str, old: float | None, new: float | None, score: NewScore) -> None:
        size = abs((new or 0.0) - (old or 0.0))
        text = f"{line.place}: {name} {_short(old)} → {_short(new)}"
        if name == "accuracy":
            text += f", {shown(line.record.reason)} → {shown(score.reason)}, right answer {shown(line.record.answer)}"
        # of equal differences, the first stay
        entry = (size, -self.lines, text)
        if len(self.largest) < MOST_SHOWN:
            heapq.heappush(self.largest, entry)
        else:
            heapq.heappushpop(self.largest, entry)


def rescore(rollouts: str, reward: list[str] | None, out: str | None) -> int:
    """Scores recorded rollouts again, prints old and new values, and returns the exit status.

    The status is 0; 1 if a line could not be read or a reward failed; other problems raise `DataError`.

    Args:
        rollouts: a file of records, or a folder of them.
        reward: import paths of custom rewards. Those that the records name are not imported by themselves: a file of
            data is not to choose what code runs.
        out: a file to write, one line for each rollout with its old and new values.
    """
    files = _files(rollouts)
    paths = {re.split("[.:]", path)[-1]: path for path in reward or ()}
    if len(paths) < len(reward or ()):
        raise DataError(f"--reward: expected functions of different names, got {', '.join(reward or ())}")
    if out is not None:
        target = Path(out)
        if not target.parent.is_dir():
            raise DataError(f"--out: expected a file in a folder that exists, got {out!r}")
        if target.is_dir() or any(target.resolve() == file.resolve() for file in files):
            raise DataError(f"--out: expected another file than the rollouts', got {out!r}")
    if problems := find_unusable_rewards(list(paths.values())):
        raise DataError("\n".join(f"--reward: {problem}" for problem in problems))
    summary, console = Summary(), Console()
    with _progress(console, files) as advance:
        written = _scored(rollouts, _batches(files, summary, advance), paths, summary)
        if out is None:
            # the summary is all that is wanted
            deque(written, maxlen=0)
        else:
            write_whole(Path(out), written)
    _print(console, summary, rollouts, len(files))
    return 1 if summary.skipped or summary.failed else 0


def _scored(
    rollouts: str, batches: Iterable[list[Line]], rewards: Mapping[str, str], summary: Summary
) -> Iterator[str]:
    """Scores all rollouts, counts them in the summary, and yields a line of JSON for each; raises if there are none."""
    for lines in batches:
        for line, new in zip(lines, score_lines(lines, rewards)):
            summary.add(line, new)
            record = line.record
            about = {"file": str(line.path), "line": line.row, "stage": record.stage, "step": record.step}
            values = {"old": {**line.old, "reason": record.reason}, "new": {**new.values, "reason": new.reason}}
            failed = {name: f"{cause}: {detail}" for name, (cause, detail) in new.failed.items()}
            yield json.dumps({**about, "problem": record.problem, **values, "failed": failed}) + "\n"
    if not summary.lines:
        first = next((message for _, message in summary.skipped.values()), "there is no line")
        raise DataError(f"{rollouts}: expected records of rollouts that can be scored, got none: {first}")


def score_lines(lines: Sequence[Line], rewards: Mapping[str, str]) -> list[NewScore]:
    """Returns the new score of each rollout.

    Args:
        lines: recorded rollouts.
        rewards: the import path of each custom reward, by its name.
    """
    names = [f"{REWARD}{name}" for name in rewards]
    none = dict.fromkeys([*BUILT_IN, *names])
    scores = [NewScore(none, None, {"accuracy": ("no right answer", "nothing was scored")}) for _ in lines]
    golds = [_right_answers(line.record) for line in lines]
    # the built-in reward refuses others
    kept = [i for i, answers in enumerate(golds) if answers and all(map(str.strip, answers))]
    records = [lines[i].record for i in kept]
    verdicts = score_batch(
        [record.response for record in records], [golds[i][0] for i in kept], [golds[i][1:] for i in kept]
    )
    samples = [
        (
            RolloutView(one.response, len(one.token_ids), verdict.accuracy),
            ProblemView(one.problem, one.question, golds[i][0], golds[i][1:], one.data_source),
        )
        for i, one, verdict in zip(kept, records, verdicts)
    ]
    answered = call_rewards(list(rewards.values()), samples) if rewards else []
    for place, (i, verdict) in enumerate(zip(kept, verdicts)):
        failed = {"accuracy": (verdict.reason, "no verdict")} if verdict.reason in FAILED else {}
        values: dict[str, float | None] = {"accuracy": verdict.accuracy, "format": verdict.format}
        for name, answers in zip(names, answered):
            values[name], cause, detail = answers[place]
            if cause:
                failed[name] = (cause, detail.strip().rpartition("\n")[2])
        scores[i] = NewScore(values, verdict.reason, failed)
    return scores


def _right_answers(record: RolloutRecord) -> tuple[str, ...]:
    return () if record.answer is None else (record.answer, *record.equivalent_answers)


def _files(rollouts: str) -> tuple[Path, ...]:
    path = Path(rollouts)
    if (path / "rollouts").is_dir():
        inside = str(path / "rollouts")
        raise DataError(
            f"--rollouts: expected a file or folder of rollouts, got {rollouts!r}; did you mean {inside!r}?"
        )
    try:
        files = data_files(path)
    except DataError as error:
        raise DataError(f"--rollouts: {error}") from None
    if other := next((file for file in files if file.suffix != ".jsonl"), None):
        raise DataError(f"--rollouts: expected files ending in .jsonl, got {str(other)!r}")
    return files


def _batches(files: Sequence[Path], summary: Summary, advance: Callable[[int], None]) -> Iterator[list[Line]]:
    """Yields the records in order, and counts the lines that are none."""
    batch: list[Line] = []
    size = 0
    for path in files:
        before = 0
        for raw in read_rows(path):
            try:
                batch.append(Line(path, raw.row, parse_record(raw.content)))
            except RowError as error:
                _count(summary.skipped, error.cause, error.at(path, raw.row))
            size += raw.end - before
            advance(raw.end - before)
            before = raw.end
            if len(batch) >= BATCH or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _count(counts: dict[str, list[Any]], cause: str, message: str) -> None:
    entry = counts.setdefault(cause, [0, message])
    entry[0] += 1


@contextmanager
def _progress(console: Console, files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("scoring"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(file.stat().st_size for file in files))
        yield lambda amount: bar.advance(task, amount)


def _print(console: Console, summary: Summary, rollouts: str, files: int) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{rollouts}: {summary.lines} rollouts of {files} {'file' if files == 1 else 'files'}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("stage", "value"):
        table.add_column(name, overflow="fold")
    for name in ("n", "old mean", "new mean", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    for (stage, name), one in sorted(summary.values.items()):
        means = [f"{total / count:.4g}" if count else "-" for total, count in (one.old, one.new)]
        table.add_row(stage, name, f"{one.new[1]:.0f}", *means, f"{one.changed} of {one.both}" if one.both else "-")
    console.print(table)
    verdicts = [one for (_, name), one in summary.values.items() if name == "accuracy" and one.both]
    if verdicts:
        total, changed = sum(one.both for one in verdicts), sum(one.changed for one in verdicts)
        say(f"accuracy agrees with the recorded one for {total - changed} of {total} ({1 - changed / total:.2%})")
    for (old, new), count in summary.reasons.most_common():
        say(f"{count} x {old} → {new}")
    if summary.largest:
        say("the largest differences:")
    for _, _, text in sorted(summary.largest, reverse=True):
        say(f"  {text}")
    for what, counts in (("without a value", summary.failed), ("lines left out", summary.skipped)):
        for cause, (count, message) in counts.items():
            say(f"{count} {what}, {cause}; the first: {message}")


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
