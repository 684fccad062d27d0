"""Rollout records: a line of JSON for each response of a step, to look at, to replay and to score again.

The fields are in docs/training.md, "Rollout records". Reading and scoring need no torch.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prism.config import STAGES
from prism.data.files import RowError, parse, shown
from prism.models.vocabulary import PLACEHOLDER
from prism.rollout.options import Sampling
from prism.runtime.disk import ASIDE, delete, write_whole

if TYPE_CHECKING:
    from prism.models.prompts import EncodedPrompt
    from prism.rollout.batch import RolloutBatch

VERSION: Final = "prism.rollout/1"
# prefix of the values of custom rewards
REWARD = "reward_"
_FILE = re.compile(rf"({'|'.join(STAGES)})-(\d{{6,}})\.jsonl")


def _whole_characters(value: Any) -> Any:
    """Returns a text with U+FFFD in place of halves of surrogate pairs, which UTF-8 cannot express."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _finite(value: Any) -> Any:
    """Returns None for a number that is not finite, or too large to be."""
    try:
        return None if isinstance(value, (int, float)) and not math.isfinite(value) else value
    except OverflowError:
        return None


def _sampling(value: Any) -> Any:
    try:
        return Sampling(**value) if isinstance(value, dict) else value
    except TypeError as error:
        # pydantic takes a ValueError for a wrong value
        raise ValueError(error) from None


Text = Annotated[str, BeforeValidator(_whole_characters)]
Value = Annotated[float | None, BeforeValidator(_finite)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class ModelVersion(_Part):
    """A model of the run, after a number of steps of a stage."""

    # the setting that the run began with: model.policy or model.discriminator
    model: Text
    stage: Text
    step: Count


class RewardVersion(_Part):
    """The function that computed a reward."""

    # "package.module:function"
    function: Text
    # of its distribution; None: it is not installed as one
    version: Text | None
    # of its file
    sha256: Text | None
    # its factor in the total reward
    weight: Value


class ImageReference(_Part):
    """An image, as the policy read it."""

    # of its patches, as little-endian fp32
    sha256: Text
    # patches in time, height and width
    patches: list[Count]


class RecordedTurn(_Part):
    """A message of the prompt, with `<image>` where an image goes."""

    role: Text
    content: Text


class RolloutRecord(_Part):
    """One response. Further fields are `reward_NAME`, a custom reward's value each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value]

    record: Literal["prism.rollout/1"]
    stage: Annotated[str, Field(pattern="^[a-z]+$")]
    step: Count
    # how it was sampled
    policy: ModelVersion
    sampling: Annotated[Sampling, BeforeValidator(_sampling)]
    seed: Count | None
    key: Count | None
    index: Count
    # of which problem
    problem: Text
    data_source: Text
    question: Text
    prompt: list[RecordedTurn]
    images: list[ImageReference]
    answer: Text | None
    equivalent_answers: list[Text]
    # the response
    response: Text
    token_ids: list[Count]
    finish: Literal["stop", "length"]
    # what was measured, and by what
    perception: Value = None
    reasoning: Value = None
    accuracy: Value = None
    format: Value = None
    reason: Text | None = None
    reward: Value = None
    advantage: Value = None
    scored_by: dict[str, ModelVersion | RewardVersion]

    @property
    def custom_rewards(self) -> dict[str, float | None]:
        """The values of custom rewards, by name."""
        return {key.removeprefix(REWARD): value for key, value in self.__pydantic_extra__.items()}


class StepHeader(NamedTuple):
    """What the rollouts of a step share."""

    stage: str
    # from 1
    step: int
    policy: Mapping[str, Any]
    sampling: Sampling
    scored_by: Mapping[str, Mapping[str, Any]]


def records_of(
    batch: "RolloutBatch", header: StepHeader, columns: Mapping[str, Sequence[Any]]
) -> Iterator[RolloutRecord]:
    """Yields the record of each rollout.

    Args:
        batch: the rollouts.
        header: what they share.
        columns: further fields, with a value for each rollout.
    """
    # it imports torch
    from prism.models.prompts import chat_messages

    about: dict[int, dict[str, Any]] = {}
    for index, (rollout, text) in enumerate(zip(batch.rollouts, batch.texts)):
        if rollout.prompt not in about:
            problem, images = batch.problems[rollout.prompt], _images(batch.prompts[rollout.prompt])
            turns = [
                {
                    "role": message["role"],
                    "content": "".join(item.get("text", PLACEHOLDER) for item in message["content"]),
                }
                for message in chat_messages(problem.prompt, len(images))
            ]
            about[rollout.prompt] = {
                "problem": problem.name,
                "data_source": problem.data_source,
                "question": problem.question,
                "prompt": turns,
                "images": images,
                "answer": problem.answer,
                "equivalent_answers": list(problem.equivalent_answers),
            }
        yield RolloutRecord(
            record=VERSION,
            **header._asdict(),
            seed=rollout.seed,
            key=rollout.key,
            index=rollout.index,
            **about[rollout.prompt],
            response=text,
            token_ids=rollout.token_ids,
            finish=rollout.finish_reason,
            **{name: column[index] for name, column in columns.items()},
        )


def _images(prompt: "EncodedPrompt") -> list[dict[str, Any]]:
    if prompt.pixel_values is None or prompt.image_grid_thw is None:
        return []
    patches = prompt.pixel_values.cpu().float().split(prompt.image_grid_thw.prod(-1).tolist())
    return [
        {"sha256": hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest(), "patches": grid}
        for part, grid in zip(patches, prompt.image_grid_thw.tolist())
    ]


def records_file(folder: Path, stage: str, step: int) -> Path:
    """Returns the file of a step's records in a run's folder."""
    return folder / "rollouts" / f"{stage}-{step:06d}.jsonl"


def write_records(path: Path, records: Iterable[RolloutRecord]) -> None:
    """Writes records; a kill leaves the whole file, the file from before, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(one.model_dump(exclude_unset=True), allow_nan=False) + "\n" for one in records))


def step_files(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Returns by stage the files of steps in a folder, such as `align-000001.jsonl`, with their steps in order."""
    by_stage: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.jsonl"):
        if match := _FILE.fullmatch(path.name):
            by_stage.setdefault(match[1], []).append((int(match[2]), path))
    return {stage: sorted(by_stage[stage]) for stage in sorted(by_stage)}


def drop_records(folder: Path, done: Sequence[str], stage: str | None, step: int) -> None:
    """Deletes the records of steps that a resumed run repeats, and files that a kill left unfinished.

    Args:
        folder: a folder of files of steps.
        done: the finished stages.
        stage: the stage that goes on; None: there is none.
        step: the number of its finished steps.
    """
    for name, files in step_files(folder).items():
        for number, path in files:
            if name not in done and not (name == stage and number <= step):
                path.unlink()
    for path in folder.glob(f"{ASIDE}*"):
        delete(path)


def parse_record(content: bytes | dict[str, Any] | RowError) -> RolloutRecord:
    """Returns the record of a line, or raises `RowError`."""
    row = parse(content)
    if "record" not in row:
        advice = "it was written by a version of prism without them"
        raise RowError("no version", "record", f"expected {VERSION}, got none: {advice}")
    if row["record"] != VERSION:
        problem = f"expected {VERSION}, got {shown(row['record'])}; use the version of prism that wrote it"
        raise RowError("another version", "record", problem)
    known = {key: value for key, value in row.items() if key in RolloutRecord.model_fields or key.startswith(REWARD)}
    try:
        return RolloutRecord.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        raise RowError("missing field", field, "expected this field, it is not there")
    problem = first["msg"].removeprefix("Value error, ")
    raise RowError("wrong type", field, f"expected another value: {problem}, got {shown(first['input'])}")
