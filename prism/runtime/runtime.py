"""What a stage stands on: the models of a run, its data and rollouts, and the steps of a stage.

`Runtime.steps` yields the steps of a stage: it builds the optimisers, and after each step it logs, evaluates, saves and
stops where the run was asked to.
"""

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from transformers.utils import logging as transformers_logging

import prism_kernels
from prism.config import Adam, Config
from prism.data.problem import Problem, step_random
from prism.data.sources import problems_of
from prism.discriminator.model import Discriminator
from prism.discriminator.storage import save_discriminator
from prism.evaluation.assessment import assess_discriminator, assess_policy, figures_line
from prism.models.building import build_discriminator, build_policy
from prism.models.policy import Policy
from prism.models.tiny import save_processor
from prism.report import write_report
from prism.rollout.batch import RolloutBatch, generate
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.rollout.records import StepHeader, drop_records, records_file, records_of, write_records
from prism.runtime import checkpoint
from prism.runtime.disk import write_whole
from prism.runtime.log import RunLog
from prism.runtime.memory import begin_peak, peak_bytes
from prism.runtime.optimiser import StageOptimiser, freeze_vision
from prism.runtime.resuming import DISCRIMINATES, resume
from prism.runtime.signals import InterruptedRunError
from prism.runtime.stalls import waiting_for

Metrics = dict[str, Any]


class Step:
    """One step of a stage.

    Args:
        rt: the run.
        stage: name of the stage.
        index: number of the step, from 0.
    """

    def __init__(self, rt: "Runtime", stage: str, index: int) -> None:
        self._rt, self.stage, self.index = rt, stage, index
        # seed of the step's rollouts
        self.seed = int(step_random(rt.config.run.seed, stage, index).integers(2**62))
        # set by `finish`
        self.metrics: Metrics | None = None

    def problems(self, count: int | None) -> list[Problem]:
        """Returns the step's problems."""
        assert count is not None, "the settings were checked"
        return next(self.batches(count))

    def batches(self, count: int, most: int = 1) -> Iterator[list[Problem]]:
        """Yields at most `most` batches of `count` problems; the step may leave some of them."""
        batches = self._rt.data.batches(self.stage, self.index, count, most)
        while True:
            with waiting_for(lambda: f"problems, {self._rt.data.reading(self.stage)}"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def version(self, model: str) -> dict[str, Any]:
        """Returns the version of the policy or the discriminator as the step began, for its records."""
        return {"model": getattr(self._rt.config.model, model), "stage": self.stage, "step": self.index}

    def finish(
        self,
        metrics: Metrics,
        batch: RolloutBatch | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scored_by: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Takes the metrics of the step, and writes the records of its rollouts.

        Args:
            metrics: what the log shows.
            batch: the rollouts.
            columns: fields of the records, with a value for each rollout.
            scored_by: the version of the model or the function that gave the values of a column.
        """
        self.metrics = metrics
        config = self._rt.config
        every = config.log.rollouts_every
        if batch is not None and every and self.index % every == 0:
            settings = getattr(config.rollout, self.stage)
            sampling = Sampling(**{field.name: getattr(settings, field.name) for field in fields(Sampling)})
            header = StepHeader(self.stage, self.index + 1, self.version("policy"), sampling, scored_by or {})
            path = records_file(self._rt.folder, self.stage, self.index + 1)
            write_records(path, records_of(batch, header, columns or {}))


class Runtime:
    """The models of a run, its data, its log and its checkpoints.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        # messages from before there is a log
        self._told: list[str] = []
        self._resumed = resume(config, tell=self._told.append)
        # the console belongs to the log; downloads keep their progress bars
        transformers_logging.set_tqdm_hook(lambda make, given, options: make(*given, **{**options, "disable": True}))
        self.config = config
        self.folder = Path(config.run.folder)
        self.policy, self.encoder = build_policy(config)
        # a run without these stages does not load a second model, unless its checkpoint has one
        saved = () if self._resumed is None else self._resumed.checkpoint.models
        plays = DISCRIMINATES.intersection(config.run.stages) or "discriminator" in saved
        self._discriminator = build_discriminator(config, self.policy.model) if plays else None
        path = None if config.rollout.engine == "auto" else config.rollout.engine
        self.engine = Engine(
            self.policy.model, self.encoder.tokenizer, path=path, cache_tokens=config.rollout.cache_tokens
        )
        self.data = problems_of(config, self.encoder)
        self.log = RunLog(self.folder / "metrics.jsonl", console=config.log.console)
        self.evaluations: dict[str, Metrics] = {}
        # the frozen policy of before the stage, where the stage's loss has a KL term
        self.reference: Policy | None = None
        self._policy_optimiser: StageOptimiser | None = None
        self._discriminator_optimiser: StageOptimiser | None = None
        # finished stages, and whether the checkpoint is inside the next one
        self.done: list[str] = []
        self._inside = False
        # the signal that asked the run to stop
        self._stop: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    # --- what a stage uses

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator of a run that has a stage with one."""
        if self._discriminator is None:
            raise RuntimeError("discriminator: expected warmup or align among run.stages; only these stages have one")
        return self._discriminator

    @property
    def policy_optimiser(self) -> StageOptimiser:
        """The policy's optimiser in a stage that trains it."""
        assert self._policy_optimiser is not None, "the stage trains the policy"
        return self._policy_optimiser

    @property
    def discriminator_optimiser(self) -> StageOptimiser:
        """The discriminator's optimiser in a stage that trains it."""
        assert self._discriminator_optimiser is not None, "the stage trains the discriminator"
        return self._discriminator_optimiser

    def generate(self, problems: Sequence[Problem], sampling: Sampling, seed: int) -> RolloutBatch:
        """Samples the policy's responses to problems."""
        with waiting_for(lambda: f"{sampling.group} rollouts of each of {_names(problems)}"):
            return generate(self.engine, problems, self.encoder, sampling, seed)

    def rebuild_discriminator(self) -> None:
        """Makes the discriminator anew from the policy as it is now."""
        if self._discriminator is not None:
            self.discriminator.load_state_dict(build_discriminator(self.config, self.policy.model).state_dict())

    def steps(
        self,
        stage: str,
        *,
        policy: Adam | None = None,
        discriminator: Adam | None = None,
        reference: bool = False,
        show: Sequence[str] = (),
    ) -> Iterator[Step]:
        """Yields the steps of a stage that are left; each must be finished before the next is asked for.

        Args:
            stage: name of the stage.
            policy: settings of the policy's optimiser; None: the stage does not train the policy.
            discriminator: settings of the discriminator's optimiser; None: the stage does not train it.
            reference: whether to freeze a copy of the policy as it is now.
            show: the metrics that the console shows.
        """
        total: int = getattr(self.config.optimiser, stage).steps
        self.reference = self._frozen_policy() if reference else None
        if policy is not None:
            self.policy.train()
            self._policy_optimiser = self._optimiser(self.policy, policy, total, f"{stage}-policy")
        if discriminator is not None:
            # in alignment too: layers are computed again in the backward pass in training mode only
            self.discriminator.train()
            folder = f"{stage}-discriminator"
            self._discriminator_optimiser = self._optimiser(self.discriminator, discriminator, total, folder)
        first = self._load_inside() if self._inside else 0
        with self.log.stage(stage, total, first):
            # a stop may have come during this evaluation
            self._assess_inside(stage, first, total)
            for index in range(first, total):
                began = time.perf_counter()
                begin_peak(self.policy.device)
                step = Step(self, stage, index)
                with waiting_for(f"step {index + 1} of {stage}"):
                    yield step
                if step.metrics is None:
                    raise RuntimeError(f"{stage}: expected each step to be finished, step {index + 1} was not")
                metrics = {**step.metrics, **self.data.figures(stage)}
                for optimiser in self._training().values():
                    optimiser.next_rate()
                metrics["seconds"] = time.perf_counter() - began
                metrics["peak_bytes"] = peak_bytes(self.policy.device)
                self.log.step(index + 1, metrics, show)
                self._between(stage, index + 1, total)
        self.reference = self._policy_optimiser = self._discriminator_optimiser = None

    def _between(self, stage: str, step: int, total: int) -> None:
        """Evaluates, saves and stops after a step, where it is time for it."""
        try:
            self._assess_inside(stage, step, total)
        except InterruptedRunError:
            self._save((stage, step))
            raise
        if self._stop or (step % self.config.checkpoint.every == 0 and step < total):
            self._save((stage, step))
        self._stop_if_asked()

    def _assess_inside(self, stage: str, step: int, total: int) -> None:
        """Evaluates after a step if it is time for it and was not done yet; the last step is the stage's end."""
        every, name = self.config.evaluation.every, f"{stage} {step}"
        if every and 0 < step < total and step % every == 0 and name not in self.evaluations:
            self.assess(name)

    def _stop_if_asked(self) -> None:
        if self._stop is not None:
            raise InterruptedRunError(self._stop)

    def _optimiser(self, model: torch.nn.Module, settings: Adam, steps: int, folder: str) -> StageOptimiser:
        freeze_vision(model, settings.freeze_vision)
        return StageOptimiser(model, settings, steps, failures=self.folder / "not_finite" / folder)

    def _frozen_policy(self) -> Policy:
        frozen, _ = build_policy(self.config)
        frozen.model.load_state_dict(self.policy.model.state_dict())
        return frozen.requires_grad_(False)

    # --- the run around its stages

    def restore(self) -> None:
        """Restores the newest checkpoint; one inside a stage is loaded when that stage has built its optimisers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = self._resumed
        write_whole(self.folder / "config.json", self.config.model_dump_json(indent=2) + "\n")
        write_whole(self.folder / "environment.json", json.dumps(_environment(self.policy.device), indent=2) + "\n")
        write_whole(self.folder / "changes.json", json.dumps(resumed.changes if resumed else [], indent=2) + "\n")
        for text in self._told:
            self.log.note(text)
        if resumed is None:
            # no checkpoint yet: discard the stopped run's metrics
            self.log.load_state_dict({"bytes": 0, "non_finite": {}})
            self._drop_records([], None, 0)
            return
        state = resumed.state
        for key, old, new in resumed.changed:
            self.log.note(f"changed since {state.where}: {key}, {json.dumps(old)} → {json.dumps(new)}")
        self.log.load_state_dict(state.log.model_dump())
        self.done, self.evaluations = list(state.done), dict(state.evaluations)
        if state.stage is not None:
            self._inside = True
            self.data.go_to(state.stage, state.data)
        else:
            self._load()
            if self.done[-1] == "base" and "discriminator" not in resumed.checkpoint.models:
                self.rebuild_discriminator()
        self._drop_records(state.done, state.stage, state.step)

    def _drop_records(self, done: Sequence[str], stage: str | None, step: int) -> None:
        # the settings may differ now: what is not written again would be of a step that never was
        for name in ("rollouts", "failed_rewards"):
            drop_records(self.folder / name, done, stage, step)

    def start(self) -> None:
        """Evaluates the policy of a new run, or after the stage in whose evaluation the run was stopped."""
        if not self.evaluations:
            for split in ("validation", "test"):
                if not self.data.held_out(split):
                    self.log.note(f"data.files.{split} names no files: nothing is measured on it")
            self.assess("start")
        if self.done and self.done[-1] not in self.evaluations and not self._inside:
            self.assess(self.done[-1])
            self._save()
            self._stop_if_asked()

    def finish_stage(self, stage: str) -> None:
        """Evaluates and saves after a stage."""
        self.done.append(stage)
        try:
            self.assess(stage)
        except InterruptedRunError:
            # `start` evaluates when the run resumes
            self._save()
            raise
        self._save()
        if self.done != list(self.config.run.stages):
            self._stop_if_asked()

    def finish(self) -> None:
        """Writes policy and discriminator as folders that the next stage takes, the evaluations and the report."""
        folder = self.folder / "policy"
        self.policy.model.save_pretrained(folder)
        save_processor(folder, self.encoder)
        written = f"the policy is in {folder}"
        if self._discriminator is not None:
            path = save_discriminator(self._discriminator, self.folder / "discriminator")
            written += f", the discriminator in {path}"
        write_whole(self.folder / "evaluations.json", json.dumps(self.evaluations, indent=2) + "\n")
        self.log.note(f"{written}, the figures in {self.folder / 'evaluations.json'}")
        self.log.close()
        self.log.note(f"the report is {write_report(self.folder)}")

    def ask_to_stop(self, number: int = signal.SIGINT) -> None:
        """Stops the run after its present step, with a checkpoint.

        Args:
            number: the signal that asks for it.
        """
        self._stop = number
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step; once more, or Ctrl-C, stops at once"
        # from a thread: this may be a signal's handler that interrupted a print, and a print inside a print raises
        threading.Thread(target=self.log.note, args=(text,)).start()

    # --- evaluation

    def assess(self, after: str) -> None:
        """Evaluates the policy on held-out problems, and after warm-up and alignment the discriminator.

        Before and after the last stage the test split is evaluated too, so that it shows what this stage did.
        """
        with waiting_for(f"the evaluation after {after}"):
            figures = self._figures(after)
        self.evaluations[after] = figures
        self.log.note(f"after {after}: {figures_line(figures)}")

    def _figures(self, after: str) -> Metrics:
        before = next(reversed(self.evaluations.values()), None)
        if before is not None and after.startswith("warmup"):
            # warm-up does not change the policy
            figures: Metrics = {key: value for key, value in before.items() if key not in ("test", "discriminator")}
        else:
            figures = self._assess_policy("validation", self.config.evaluation.samples)
        if after in ["start", *self.config.run.stages][-2:] and self.data.held_out("test"):
            figures["test"] = self._assess_policy("test")
        if after in ("warmup", "align"):
            taught = [problem for problem in self.data.held_out("validation", 64) if problem.teacher is not None]
            if taught:
                figures["discriminator"] = assess_discriminator(
                    self.discriminator, self.engine, taught, self.encoder, self.config
                )
        return figures

    def _assess_policy(self, split: str, count: int | None = None) -> Metrics:
        problems = self.data.held_out(split, count)
        if not problems:
            return {"split": split, "samples": 0}
        return assess_policy(self.engine, _Until(problems, self._stop_if_asked), self.encoder, self.config, split)

    # --- checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _models(self) -> dict[str, torch.nn.Module]:
        reference = {} if self.reference is None else {"reference": self.reference.model}
        discriminator = {} if self._discriminator is None else {"discriminator": self._discriminator}
        return {"policy": self.policy.model, **discriminator, **reference}

    def _training(self) -> dict[str, StageOptimiser]:
        """Returns the optimisers of the stage, by the model that they train."""
        optimisers = {"policy": self._policy_optimiser, "discriminator": self._discriminator_optimiser}
        return {name: optimiser for name, optimiser in optimisers.items() if optimiser is not None}

    def _save(self, inside: tuple[str, int] | None = None) -> None:
        """Writes a checkpoint, after a stage or inside one: its name and the number of its steps that are done."""
        stage, step = inside or (None, 0)
        extra = {
            "done": self.done,
            "stage": stage,
            "step": step,
            "data": {} if stage is None else self.data.position(stage),
            "evaluations": self.evaluations,
            "log": self.log.state_dict(),
            "settings": self.config.model_dump(mode="json"),
            "changes": [] if self._resumed is None else self._resumed.changes,
        }
        steps = sum(getattr(self.config.optimiser, name).steps for name in self.done) + step
        with waiting_for(f"a checkpoint in {self._checkpoints}"):
            checkpoint.save(
                self._checkpoints, steps, self._models(), self._training(), extra, keep=self.config.checkpoint.keep
            )

    def _load(self) -> None:
        """Loads the checkpoint that the run resumes from."""
        assert self._resumed is not None, "only called if there is one"
        last, models = self._resumed.checkpoint, self._models()
        if "discriminator" not in last.models:
            # stages with a discriminator were added: it is the one that was just made
            models.pop("discriminator", None)
        checkpoint.load_from(last.path, models, self._training(), tell=self.log.note)
        self.log.note(f"resuming after {self._resumed.state.where} ({last.path})")

    def _load_inside(self) -> int:
        """Loads a checkpoint inside a stage, and returns the number of the stage's finished steps."""
        assert self._resumed is not None, "only called if there is one"
        self._load()
        self._inside = False
        return self._resumed.state.step


class _Until:
    """Problems that end with an error when the run is asked to stop.

    Args:
        problems: the problems.
        check: raises if the run is to stop.
    """

    def __init__(self, problems: Iterable[Problem], check: Callable[[], None]) -> None:
        self._problems, self._check = problems, check

    def __iter__(self) -> Iterator[Problem]:
        for problem in self._problems:
            self._check()
            yield problem


def _names(problems: Sequence[Problem]) -> str:
    first = ", ".join(problem.name for problem in problems[:3])
    return f"{len(problems)} problems ({first}{', …' if len(problems) > 3 else ''})"


def _environment(device: torch.device) -> Metrics:
    """Returns the versions and the device of the run, for the report."""
    versions = {"python": platform.python_version(), "prism": prism_kernels.__version__}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    return {"last_started": begun, "device": str(device), "versions": versions}
