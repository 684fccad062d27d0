"""The folder of a run, read whatever the run has reached, and the problems that its rollouts name."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prism.config import STAGES, Config
from prism.data.files import DataError, RowError
from prism.rollout.records import parse_record, step_files
from prism.runtime.log import read_metrics
from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.world import SPLITS, ShapesSample, ShapesWorld

Row = dict[str, Any]
_CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_NAME = re.compile(r"([a-z]+)-(\d+)-(\d{6,})")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run, as its files tell it.

    Args:
        folder: the run's folder.
        settings: the tables of `config.json`.
        steps: by stage, the records of its steps in order.
        evaluations: evaluations in order, each under the stage that it follows.
        rollouts: by stage, the recorded steps and their files in order.
        environment: versions and times that the run noted; None if it did not.
    """

    folder: Path
    settings: Row
    steps: dict[str, list[Row]]
    evaluations: dict[str, Row]
    rollouts: dict[str, list[tuple[int, Path]]]
    environment: Row | None

    def setting(self, key: str) -> Any:
        """Returns a setting by its dotted key; None if the run does not have it."""
        return self._flat.get(key)

    def planned(self, stage: str) -> int:
        """Returns the number of steps that a stage is to take."""
        return int(self.setting(f"optimiser.{stage}.steps") or 0)

    @property
    def stages(self) -> list[str]:
        """The stages of the run, in order."""
        return list(self.setting("run.stages") or [])

    @property
    def unfinished(self) -> list[str]:
        """The stages that have not taken all of their steps or were not evaluated."""
        return [s for s in self.stages if len(self.steps.get(s, ())) < self.planned(s) or s not in self.evaluations]

    @cached_property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """The settings that differ from the defaults: key, value, default."""
        defaults = _flat(Config().model_dump(mode="json"))
        return [(key, value, defaults.get(key)) for key, value in self._flat.items() if value != defaults.get(key)]

    @cached_property
    def _flat(self) -> Row:
        return _flat(self.settings)


def read_run(folder: str | Path) -> RunRecord:
    """Returns the run of a folder; raises `DataError` if the folder is not a run's or a file is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"expected the folder of a run, there is no {str(folder)!r}")
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise DataError(f"expected the folder of a run, got {str(folder)!r} without {name}; name another one")
    steps: dict[str, list[Row]] = {}
    for record in read_rows(folder / "metrics.jsonl"):
        if not (isinstance(record.get("stage"), str) and isinstance(record.get("step"), int)):
            raise DataError(f"{folder / 'metrics.jsonl'}: expected a stage and a step in each line, got {record}")
        steps.setdefault(record["stage"], []).append(record)
    environment = folder / "environment.json"
    return RunRecord(
        folder,
        _table(folder / "config.json"),
        dict(sorted(steps.items(), key=lambda item: STAGES.index(item[0]) if item[0] in STAGES else len(STAGES))),
        _evaluations(folder),
        step_files(folder / "rollouts"),
        _table(environment) if environment.is_file() else None,
    )


def read_rows(path: Path) -> list[Row]:
    """Returns the tables of a JSONL file, without an unfinished last line."""
    try:
        rows = read_metrics(path)
    except ValueError as error:
        raise DataError(f"{path}: expected a line of JSON for each record: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a table, got {type(row).__name__}")
    return rows


def read_rollouts(path: Path) -> list[Row]:
    """Returns the records of a step's rollouts."""
    rows = []
    for number, row in enumerate(read_rows(path), 1):
        # records from before they had a version have the same fields, but fewer
        if "record" in row:
            try:
                row = parse_record(row).model_dump(exclude_unset=True)
            except RowError as error:
                raise DataError(error.at(path, number)) from None
        rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """Returns a value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        # a whole number of hundreds of digits
        return None


def mean(values: list[float | None]) -> float | None:
    """Returns the mean of the numbers; None if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def evaluated(one: Row) -> list[tuple[bool, Row]]:
    """Returns the tables of figures in a stage's evaluation, each with whether it was sampled at temperature 1."""
    tables = []
    for split in (one, one.get("test")):
        if split is not None:
            tables.append((False, split))
            if "sampled" in split:
                tables.append((True, {**split["sampled"], "split": split.get("split")}))
    return tables


def _evaluations(folder: Path) -> dict[str, Row]:
    # a run writes the file when it ends; until then its last checkpoint has the evaluations
    evaluations = _table(folder / "evaluations.json") if (folder / "evaluations.json").is_file() else {}
    states = []
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        if match := _CHECKPOINT.fullmatch(path.parent.name):
            states.append((int(match[1]), int(match[2] or 0), path))
    for _, _, path in sorted(states, reverse=True):
        try:
            return {**evaluations, **json.loads(path.read_text())["extra"]["evaluations"]}
        except (OSError, ValueError, KeyError, TypeError):
            # a checkpoint that is damaged or being removed: the one before has nearly as much
            continue
    return evaluations


def _table(path: Path) -> Row:
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: expected JSON: {error}") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected a table, got {type(table).__name__}")
    return table


def _flat(table: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class RunProblems:
    """The embedded world's problems of a run, drawn again by their names; there are none if the run was on files.

    Args:
        record: the run.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._known: dict[str, ShapesSample] = {}

    @cached_property
    def _world(self) -> ShapesWorld:
        shapes = self.record.settings["data"]["shapes"]
        try:
            return ShapesWorld(shapes["seed"], Carelessness(**shapes["carelessness"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.record.folder / 'config.json'}: expected data.shapes as this version has it, "
                f"got {error}; write the report with the version that made the run"
            ) from error

    def problem(self, row: Row) -> ShapesSample | None:
        """Returns the problem of a recorded response; None if this world does not have it."""
        match = _NAME.fullmatch(str(row.get("problem")))
        if self.record.setting("data.source") != "shapes" or match is None or match[1] not in SPLITS:
            return None
        name = match[0]
        if name not in self._known:
            (self._known[name],) = self._world.samples(match[1], 1, int(match[3]))
        sample = self._known[name]
        # a world of another version would draw an image that the policy never saw
        same = (sample.id, sample.question.text, sample.answer) == (name, row.get("question"), row.get("answer"))
        return sample if same else None
