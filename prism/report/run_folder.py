"""The folder of a run, read whatever the run has reached, and the problems that its rollouts name."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from prism.config import STAGES, Config
from prism.data.files import DataError, RowError
from prism.rollout.records import parse_record, step_files
from prism.runtime.log import read_metrics
from prism.worlds.shapes.carelessness import Carelessness
from prism.worlds.shapes.world import SPLITS, ShapesSample, ShapesWorld

Row = dict[str, Any]
_CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_NAME = re.compile(r"([a-z]+)-(\d+)-(\d{6,})")


# settings that the report computes with, and their types; the first three are in every run
_KINDS: dict[str, type | tuple[type, ...]] = {
    "run.stages": list,
    "model.policy": str,
    "data.source": str,
    "rollout.align.prompts": int,
    "rollout.align.group": int,
    "discriminator.experts": int,
    "evaluation.temperature": (int, float),
    **{f"optimiser.{stage}.steps": int for stage in STAGES},
}
_NEEDED = ("run.stages", "model.policy", "data.source")


class _Read(BaseModel):
    """The parts of a record that the report computes with; it may have others."""

    model_config = ConfigDict(strict=True, extra="allow")


class StepRow(_Read):
    """A line of `metrics.jsonl`."""

    stage: str
    step: int
    non_finite: list[str] = []
    d_expert_load: dict[str, list[Any]] | None = None


class SplitFigures(_Read):
    """The figures on one split."""

    sampled: dict[str, Any] = {}


class StageFigures(SplitFigures):
    """An entry of `evaluations.json`."""

    test: SplitFigures | None = None
    discriminator: dict[str, dict[str, dict[str, Any]]] = {}


class SettingChange(_Read):
    """An entry of `changes.json`: a setting that differed when the run was resumed."""

    after: str
    key: str
    old: Any
    new: Any


_EVALUATIONS, _CHANGES = TypeAdapter(dict[str, StageFigures]), TypeAdapter(list[SettingChange])


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
        changes: settings that differed when the run was resumed.
        finished: whether the run has written its last policy.
    """

    folder: Path
    settings: Row
    steps: dict[str, list[Row]]
    evaluations: dict[str, Row]
    rollouts: dict[str, list[tuple[int, Path]]]
    environment: Row | None
    changes: list[SettingChange]
    finished: bool

    def setting(self, key: str) -> Any:
        """Returns a setting by its dotted key; None if the run does not have it."""
        return self._flat.get(key)

    def planned(self, stage: str) -> int:
        """Returns the number of steps that a stage is to take."""
        return self.setting(f"optimiser.{stage}.steps") or 0

    @property
    def stages(self) -> list[str]:
        """The stages of the run, in order."""
        return list(self.setting("run.stages"))

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
        _checked(StepRow.model_validate, record, folder / "metrics.jsonl", "a stage and a step in each line")
        steps.setdefault(record["stage"], []).append(record)
    settings = _settings(folder / "config.json")
    written = _table(folder / "evaluations.json") if (folder / "evaluations.json").is_file() else {}
    _checked(_EVALUATIONS.validate_python, written, folder / "evaluations.json", "figures by stage")
    return RunRecord(
        folder,
        settings,
        dict(sorted(steps.items(), key=lambda item: STAGES.index(item[0]) if item[0] in STAGES else len(STAGES))),
        _evaluations(folder, written),
        step_files(folder / "rollouts"),
        _environment(folder / "environment.json"),
        _setting_changes(folder / "changes.json"),
        # written after the policy; stages that were added since are not in it
        set(settings["run"]["stages"]) <= written.keys(),
    )


def _settings(path: Path) -> Row:
    settings = _table(path)
    for key, kind in _KINDS.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if (value is None and key in _NEEDED) or not (value is None or isinstance(value, kind)):
            raise DataError(f"{path}: expected {key} as a run writes it, got {json.dumps(value)}")
    if not all(isinstance(stage, str) for stage in settings["run"]["stages"]):
        raise DataError(f"{path}: expected run.stages to be names, got {json.dumps(settings['run']['stages'])}")
    return settings


def _environment(path: Path) -> Row | None:
    if not path.is_file():
        return None
    environment = _table(path)
    if not isinstance(environment.get("versions", {}), dict):
        raise DataError(f"{path}: expected versions to be a table, got {json.dumps(environment['versions'])}")
    return environment


def _setting_changes(path: Path) -> list[SettingChange]:
    # runs of earlier versions have none
    return _checked(_CHANGES.validate_python, _json(path), path, "changes of settings") if path.is_file() else []


def _checked(validate: Callable[[Any], Any], value: Any, path: Path, wanted: str) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: expected {wanted}, got {where}: {first['msg']}") from None


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


def _evaluations(folder: Path, written: dict[str, Row]) -> dict[str, Row]:
    # a run writes the file when it ends; until then its last checkpoint has the evaluations
    states = []
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        if match := _CHECKPOINT.fullmatch(path.parent.name):
            states.append((int(match[1]), int(match[2] or 0), path))
    for _, _, path in sorted(states, reverse=True):
        try:
            newer = json.loads(path.read_text())["extra"]["evaluations"]
            _EVALUATIONS.validate_python(newer)
            return {**written, **newer}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # a checkpoint that is damaged or being removed: the one before has nearly as much
            continue
    return written


def _table(path: Path) -> Row:
    table = _json(path)
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected a table, got {type(table).__name__}")
    return table


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {error}") from error


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
        try:
            shapes = self.record.settings["data"]["shapes"]
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
