"""The jobs of the experiment: each arm of each seed with its settings, in its own folder; finished folders stay."""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.reproduce.arms import Arm, arms, long_steps
from prism.config import STAGES, Config, load_config, to_toml
from prism.runtime.log import read_metrics

SETTINGS, MADE_WITH, FINISHED = "settings.toml", "made_with.json", "evaluations.json"
# settings that change no weight and no figure; models are identified by their weights
_IRRELEVANT = ("run.folder", "model.policy", "model.discriminator", "log.")
# settings that matter to some stages only
_OF_STAGES = {
    **{f"optimiser.{stage}.": {stage} for stage in STAGES},
    "optimiser.discriminator.": {"align"},
    "discriminator.": {"warmup", "align"},
    "algorithm.align.": {"align"},
    "algorithm.rlvr.": {"rlvr"},
    "rollout.align.": {"warmup", "align"},
    "rollout.rlvr.": {"rlvr"},
    "data.shapes.base": {"base"},
    "data.shapes.sft": {"sft"},
    "data.shapes.alignment": {"distill", "warmup", "align"},
    "data.shapes.rl": {"rlvr"},
}


class JobError(Exception):
    """An arm that cannot be run, or whose folder holds something else."""


@dataclass(frozen=True)
class Job:
    """An arm of a seed."""

    seed: int
    arm: Arm


class Experiment:
    """The folders and settings of the arms.

    Args:
        config: the file of the base settings.
        overrides: changes of the base settings, by dotted key.
        algorithm: the algorithm of RLVR.
        out: the folder that gets a folder for each seed.
        replace: whether an arm that was made with other settings or weights is removed and run again.
    """

    def __init__(
        self, config: str | Path, overrides: Mapping[str, Any], algorithm: str, out: Path, replace: bool = False
    ) -> None:
        self.algorithm, self.out, self.replace = algorithm, out.resolve(), replace
        self.base = load_config(config, overrides)
        # read once, because the file may be edited while arms run
        self.tables = {**dotted(tomllib.loads(Path(config).read_text())), **overrides}
        if self.base.data.source != "shapes":
            raise JobError(
                f"data.source: expected 'shapes', whose errors can be counted, got {self.base.data.source!r}"
            )
        self.arms = arms(self.base, algorithm)

    def folder(self, job: Job) -> Path:
        """Returns the folder of an arm; an arm without RLVR serves all algorithms."""
        own = f"{job.arm.name}-{self.algorithm}" if job.arm.reinforces else job.arm.name
        return self.out / f"seed-{job.seed}" / own

    def base_folder(self, seed: int) -> Path:
        """Returns the folder of the policy before the first stage."""
        return self.out / f"seed-{seed}" / "base"

    def settings(self, job: Job, planned: bool = False) -> Config:
        """Returns the validated settings of an arm.

        Args:
            job: the arm.
            planned: whether the arms that it needs may be unfinished; settings that follow from them are left out.
        """
        seed, arm = job.seed, job.arm
        given: dict[str, Any] = {
            **self.tables,
            **arm.changes,
            "run.folder": str(self.folder(job)),
            "run.seed": seed,
            "run.stages": list(arm.stages),
            # problems and demonstrations are drawn anew too, because they are part of the variation between two tries
            "data.shapes.seed": self.base.data.shapes.seed + seed,
            "evaluation.temperature": 0.0,
            "evaluation.sampled": True,
            "evaluation.every": 0,
            "log.console": "lines",
        }
        if arm.parent is not None and not planned:
            given["model.policy"] = str(self._of(job, arm.parent) / "policy")
            if "align" in arm.stages and self.base.model.discriminator == "policy":
                given["model.discriminator"] = str(self.base_folder(seed))
            if arm.pace is not None:
                given["optimiser.rlvr.steps"] = self._affordable(job, arm.pace)
        return load_config(None, given)

    def finished(self, job: Job) -> bool:
        """Returns whether an arm has its figures."""
        return (self.folder(job) / FINISHED).exists()

    def made_with(self, job: Job, settings: Config) -> dict[str, Any]:
        """Returns everything that determines an arm's figures: its settings and its initial weights."""
        policy = self.base_folder(job.seed) if job.arm.parent is None else self._of(job, job.arm.parent) / "policy"
        begins = {"policy": policy, "base": self.base_folder(job.seed)}
        flat = {
            key: value
            for key, value in dotted(settings.model_dump(mode="json")).items()
            if not key.startswith(_IRRELEVANT)
            and all(stages & {*job.arm.stages} for start, stages in _OF_STAGES.items() if key.startswith(start))
        }
        return {"settings": flat, "weights": {name: _checksum(path) for name, path in begins.items()}}

    def check(self, job: Job) -> None:
        """Raises `JobError` if an arm's folder was made with other settings or weights than today's."""
        path = self.folder(job) / MADE_WITH
        if not path.exists():
            if self.finished(job):
                raise JobError(
                    f"{self.folder(job)}: expected {MADE_WITH} beside {FINISHED}, got none; remove the folder"
                )
            return
        for name in job.arm.after:
            before = Job(job.seed, self.arms[name])
            if not self.finished(before):
                raise JobError(f"{self.folder(job)}: expected the arm {name}, which it needs, to be finished")
            self.check(before)
        was, now = json.loads(path.read_text()), json.loads(json.dumps(self.made_with(job, self.settings(job))))
        defaults = dotted(Config().model_dump(mode="json"))
        differences = [
            f"{key} {_short(was[part].get(key))}, now {_short(now[part].get(key))}"
            for part in ("settings", "weights")
            for key in {**was[part], **now[part]}
            # a setting of a later version changes nothing at its default
            if was[part].get(key, defaults.get(key)) != now[part].get(key)
        ]
        if differences:
            raise JobError(
                f"{self.folder(job)}: expected a run with these settings and weights, got one with others "
                f"({'; '.join(differences[:5])}); --replace runs it again, --out names another folder"
            )

    def settle(self, job: Job) -> None:
        """Checks an arm's folder; removes a folder with other settings if it may be replaced."""
        try:
            self.check(job)
        except JobError:
            if not self.replace:
                raise
            shutil.rmtree(self.folder(job))

    def prepare(self, job: Job) -> Path:
        """Checks an arm's folder, writes the settings into it and returns their file."""
        self.settle(job)
        settings = self.settings(job)
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MADE_WITH).write_text(json.dumps(self.made_with(job, settings), indent=1) + "\n")
        (folder / SETTINGS).write_text(to_toml(settings))
        return folder / SETTINGS

    def write_base(self, seed: int) -> None:
        """Writes the policy before the first stage, from which every discriminator is upcycled, as a folder."""
        # imported here, so that bad flags are reported at once
        from transformers.utils.logging import disable_progress_bar

        from prism.models.building import build_policy
        from prism.models.tiny import save_tiny

        disable_progress_bar()
        sft = next(arm for arm in self.arms.values() if arm.parent is None)
        policy, encoder = build_policy(self.settings(Job(seed, sft)))
        save_tiny(self.base_folder(seed), policy.model, encoder.tokenizer, encoder.image_processor)

    def _of(self, job: Job, name: str) -> Path:
        return self.folder(Job(job.seed, self.arms[name]))

    def _affordable(self, job: Job, pace: str) -> int:
        """Returns the number of steps of RLVR that fit into the seconds of the arms in `spends`."""
        spent = sum(sum(time_of(self._of(job, name))[0].values()) for name in job.arm.spends)
        seconds, steps = time_of(self._of(job, pace))
        return long_steps(spent, seconds["rlvr"], steps["rlvr"])


def time_of(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the seconds in the steps, and the number of steps, for each stage of a run."""
    seconds: dict[str, float] = {}
    steps: dict[str, int] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        stage = record["stage"]
        seconds[stage] = seconds.get(stage, 0.0) + record["seconds"]
        steps[stage] = steps.get(stage, 0) + 1
    return seconds, steps


def dotted(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of nested tables by dotted key."""
    values: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping) and value:
            values |= {f"{name}.{key}": inner for key, inner in dotted(value).items()}
        else:
            values[name] = value
    return values


def _checksum(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
