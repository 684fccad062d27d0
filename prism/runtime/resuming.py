"""Where a run resumes, and which of its settings may have changed since the checkpoint.

A setting may change if no finished step has read it: the tables of stages that have not begun, for instance. Settings
that affect memory, output or evaluation but not what is learnt may always change. Each change is recorded.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism.config import STAGES, Config, ConfigError
from prism.runtime import checkpoint
from prism.runtime.checkpoint import CheckpointError, Restored
from prism.runtime.disk import RunFolderError
from prism.runtime.optimiser import rate_factor

Natural = Annotated[int, Field(ge=0)]
ALL = frozenset(STAGES)
DISCRIMINATES = frozenset({"warmup", "align"})
# the stages that read a setting or a table, besides those of _of_stages; the longest key that fits counts
READERS: dict[str, frozenset[str]] = {
    # these change nothing that is learnt, but for rounding
    **dict.fromkeys(("log", "checkpoint", "memory", "evaluation", "run.folder", "run.device"), frozenset()),
    **dict.fromkeys(("rollout.engine", "rollout.cache_tokens"), frozenset()),
    # these decide whether a run stops at a bad row, not which rows are used
    **dict.fromkeys(("data.on_error", "data.max_skipped"), frozenset()),
    **{f"data.{source}.{split}": frozenset() for source in ("files", "shapes") for split in ("validation", "test")},
    **{f"optimiser.{stage}": frozenset({stage}) for stage in STAGES},
    "optimiser.discriminator": frozenset({"align"}),
    "algorithm.align": frozenset({"align"}),
    "algorithm.rlvr": frozenset({"rlvr"}),
    "rollout.rlvr": frozenset({"rlvr"}),
    **dict.fromkeys(("rollout.align.prompts", "rollout.align.group"), frozenset({"align"})),
    "discriminator.steps": frozenset({"align"}),
    **{f"discriminator.{name}": DISCRIMINATES for name in ("aux_coef", "z_coef", "regularisation", "soft_clip")},
    "data.files.sft": frozenset({"sft"}),
    "data.files.warmup": frozenset({"warmup"}),
    "data.files.rlvr": frozenset({"rlvr"}),
    **dict.fromkeys(("data.shapes.base", "data.shapes.judged"), frozenset({"base"})),
    **dict.fromkeys(("data.shapes.sft", "data.shapes.sft_curated"), frozenset({"sft"})),
    "data.shapes.alignment": frozenset({"distill"}) | DISCRIMINATES,
    "data.shapes.rl": frozenset({"rlvr"}),
}
RULE = (
    "take another run.folder, or the old values; what may differ: log, checkpoint, memory, evaluation, run.folder, "
    "run.device, rollout.engine, rollout.cache_tokens, the held-out data, stages after those that have begun, and the "
    "tables that only they read"
)


class LogPosition(BaseModel):
    """The state of `RunLog`."""

    model_config = ConfigDict(strict=True)
    bytes: Natural
    non_finite: dict[str, int]


class RunState(BaseModel):
    """What a checkpoint says about the run, besides weights and optimisers."""

    model_config = ConfigDict(strict=True)
    # finished stages, in order
    done: list[str]
    # the stage that was interrupted, with its finished steps; None: the last of `done` had just ended
    stage: str | None
    step: Natural
    # the stage's position in its data
    data: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    log: LogPosition
    # all settings, and those that earlier resumptions changed
    settings: dict[str, dict[str, Any]]
    changes: list[dict[str, Any]]

    @property
    def begun(self) -> list[str]:
        """The stages that have finished steps, in order."""
        return self.done if self.stage is None else [*self.done, self.stage]

    @property
    def where(self) -> str:
        """How far the run is, in words."""
        return f"the end of {self.done[-1]}" if self.stage is None else f"step {self.step} of {self.stage}"


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from."""

    checkpoint: Restored
    state: RunState
    # of this resumption: key, old and new value
    changed: list[tuple[str, Any, Any]]

    @property
    def changes(self) -> list[dict[str, Any]]:
        """All changes of settings since the run began, for its record."""
        new = [{"after": self.state.where, "key": key, "old": old, "new": value} for key, old, value in self.changed]
        return [*self.state.changes, *new]


def resume(config: Config, *, tell: Callable[[str], object]) -> Resumed | None:
    """Returns the checkpoint from which the run in its folder resumes; None for a new run.

    It raises where the run cannot be resumed: another format, damage, or settings that had to stay.

    Args:
        config: the settings.
        tell: called with a message for each damaged checkpoint.
    """
    folder = Path(config.run.folder)
    last = checkpoint.newest(folder / "checkpoints", tell=tell)
    if last is None:
        if (folder / "evaluations.json").exists():
            raise RunFolderError(
                f"{folder}: expected a new folder or checkpoints to resume from, got a finished run without "
                "checkpoints, which would be written over; take another run.folder"
            )
        return None
    state = state_of(last)
    changed = list(_changed(state.settings, config.model_dump(mode="json"), Config().model_dump(mode="json")))
    lines = [line for key, old, new in changed for line in _problems(key, old, new, config, last, state)]
    if lines:
        raise ConfigError("\n".join([*lines, RULE]))
    return Resumed(last, state, changed)


def state_of(last: Restored) -> RunState:
    """Returns what a checkpoint says about its run."""
    path = last.path / checkpoint.STATE
    try:
        state = RunState.model_validate(last.extra)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("extra", *first["loc"])))
        raise CheckpointError(
            f"{path}: expected {key} as a run writes it: {first['msg']}; use another folder"
        ) from None
    if not state.begun or not ALL.issuperset(state.begun):
        raise CheckpointError(f"{path}: expected stages among {', '.join(STAGES)}, got {state.begun}")
    return state


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any], parents: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yields keys with their old and new values; a key that an older version did not have had its default."""
    for name, new in now.items():
        usual = default.get(name, new)
        old = before.get(name, usual)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changed(old, new, usual if isinstance(usual, dict) else {}, (*parents, name))
        elif old != new:
            yield ".".join((*parents, name)), old, new


def _problems(key: str, old: Any, new: Any, config: Config, last: Restored, state: RunState) -> Iterator[str]:
    """Yields why a setting cannot change."""
    begun, folder = state.begun, config.run.folder
    if key == "run.stages":
        yield from _stage_problems(old, new, last, state)
        return
    _, _, stage = key.removesuffix(".steps").rpartition(".")
    if key == f"optimiser.{stage}.steps" and stage in begun:
        if stage != state.stage:
            yield (
                f"{key}: expected {old}, this stage is finished, got {new}; to train on, take another run.folder with "
                f"the policy of this one as model.policy ({Path(folder) / 'policy'!s}, or `prism export`)"
            )
        elif problem := _steps_problem(stage, old, config, state.step):
            yield f"{key}: {problem}, got {new}"
        return
    if _readers(key, state.settings, last).intersection(begun):
        wanted = f"{json.dumps(old)}, with which the run in {folder!r} began"
        yield f"{key}: expected {wanted}, got {json.dumps(new)}"


def _readers(key: str, settings: Mapping[str, Any], last: Restored) -> frozenset[str]:
    """Returns the stages that read a setting."""
    parts = key.split(".")
    if key == "model.discriminator" or (parts[0] == "discriminator" and key not in READERS):
        # the discriminator is made before the first stage
        return ALL if "discriminator" in last.models else frozenset()
    if key == "data.files.align" or (parts[:2] == ["rollout", "align"] and key not in READERS):
        # without files of its own, warm-up lets the policy answer alignment's prompts
        files = settings.get("data", {}).get("files")
        stages = frozenset({"align"}) if isinstance(files, dict) and files.get("warmup") else DISCRIMINATES
        return stages | {"distill"} if key == "data.files.align" else stages
    for count in range(len(parts), 0, -1):
        if (table := ".".join(parts[:count])) in READERS:
            return READERS[table]
    return ALL


def _stage_problems(old: Any, new: list[str], last: Restored, state: RunState) -> Iterator[str]:
    begun = state.begun
    if new[: len(begun)] != begun:
        wanted = f"stages that begin with {json.dumps(begun)}, which have begun"
        yield f"run.stages: expected {wanted}, got {json.dumps(new)}"
    added = DISCRIMINATES.intersection(new) and "discriminator" not in last.models
    # the discriminator is made from the policy after `base`, which is known only at that moment
    if added and "base" in state.done and (state.stage is not None or state.done[-1] != "base"):
        yield (
            f"run.stages: expected no stage with a discriminator after {json.dumps(old)}, which began without one and "
            f"with base, got {json.dumps(new)}"
        )


def _steps_problem(stage: str, old: int, config: Config, done: int) -> str | None:
    """Returns why the number of steps of a stage cannot change after `done` of them; None if it can.

    The finished steps, and the next, whose rate is in the checkpoint, must keep their learning rates.
    """
    steps = getattr(config.optimiser, stage).steps
    if steps < done:
        return f"expected at least the {done} steps that are done"
    for name in (stage, "discriminator") if stage == "align" else (stage,):
        adam = getattr(config.optimiser, name)
        before, now = (
            rate_factor(adam.schedule, warmup_steps=adam.warmup_steps(total), steps=total) for total in (old, steps)
        )
        if any(before(step) != now(step) for step in range(min(done + 1, steps))):
            rate = f"{adam.schedule} with warmup {adam.warmup:g}"
            return f"expected {old}, by which optimiser.{name} ({rate}) set the rates of the {done} steps that are done"
    return None
