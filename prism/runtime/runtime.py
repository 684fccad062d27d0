"""A run: its stages one after the other, evaluated between them, going on by itself where an earlier one was ended."""

import json
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import prism_kernels
from prism.config import Config
from prism.config.sections import Adam
from prism.data.problem import Problem
from prism.data.sources import problems_of, step_random
from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample
from prism.discriminator.storage import save_discriminator
from prism.evaluation.assessment import assess_discriminator, assess_policy, told
from prism.models.building import build_discriminator, build_policy
from prism.models.policy import Policy
from prism.models.tiny import save_processor
from prism.report import write_report
from prism.rollout.engine import Engine
from prism.runtime import checkpoint
from prism.runtime.log import RunLog
from prism.runtime.memory import begin_peak, peak_bytes
from prism.runtime.optimiser import Stepper, freeze_vision
from prism.runtime.resuming import check_settings
from prism.stages.align import align_step
from prism.stages.rlvr import Rewarded, informative, joined, reward, rlvr_step, select
from prism.stages.rollouts import answer
from prism.stages.supervised import supervised_step
from prism.stages.warmup import warmup_step

Metrics = dict[str, Any]
# of each stage, what the console shows
SHOWN = {
    "base": ("loss", "grad_norm"),
    "sft": ("loss", "grad_norm"),
    "distill": ("loss", "grad_norm"),
    "warmup": ("d_loss", "d_accuracy_perception", "d_accuracy_reasoning"),
    "align": ("valid", "d_gap_perception", "d_gap_reasoning", "drift_perception", "drift_reasoning", "entropy"),
    "rlvr": ("reward", "accuracy", "format", "length", "entropy"),
}


class InterruptedRunError(Exception):
    """The run was asked to end, and has a checkpoint of the step that it had begun."""


class Run:
    """Everything that a run holds.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        check_settings(config)
        # the console is the log's; downloads keep their bars
        transformers_logging.set_tqdm_hook(lambda make, given, options: make(*given, **{**options, "disable": True}))
        self.config = config
        self.folder = Path(config.run.folder)
        self.policy, self.encoder = build_policy(config)
        # a run without these stages does not load a second model
        plays = {"warmup", "align"}.intersection(config.run.stages)
        self._discriminator = build_discriminator(config, self.policy.model) if plays else None
        path = None if config.rollout.engine == "auto" else config.rollout.engine
        tokens = config.rollout.cache_tokens
        self.engine = Engine(self.policy.model, self.encoder.tokenizer, path=path, cache_tokens=tokens)
        self.problems = problems_of(config, self.encoder)
        self.log = RunLog(self.folder / "metrics.jsonl", console=config.log.console)
        self.evaluations: dict[str, Metrics] = {}
        self.reference: Policy | None = None
        self._stop = False

    @property
    def discriminator(self) -> Discriminator:
        """The scorer of a run that has a stage with one."""
        if self._discriminator is None:
            raise RuntimeError("discriminator: expected warmup or align among run.stages, without which there is none")
        return self._discriminator

    # --- what a step draws

    def draw(self, stage: str, step: int, count: int) -> list[Problem]:
        """Returns problems of a step."""
        return next(self.problems.batches(stage, step, count))

    def seed(self, stage: str, step: int) -> int:
        """Returns the seed of a step's sampling."""
        return int(step_random(self.config.run.seed, stage, step).integers(2**62))

    # --- the steps of the stages

    def supervised(self, stage: str, step: int, steppers: list[Stepper]) -> Metrics:
        """Fine-tunes on demonstrations."""
        batch: int = getattr(self.config.optimiser, stage).batch
        return supervised_step(
            self.policy, self.draw(stage, step, batch), self.encoder, steppers[0], self.config.memory
        )

    def warmup(self, stage: str, step: int, steppers: list[Stepper]) -> Metrics:
        """Trains the discriminator on given responses, or else the policy's, against their teachers'."""
        settings = self.config.rollout.align.model_copy(update={"group": 1})
        batch = self.config.optimiser.warmup.batch
        assert batch is not None, "checked with the settings"
        problems = self.draw(stage, step, batch)
        given = [problem.student for problem in problems if problem.student is not None]
        if len(given) == len(problems):
            prompts = [problem.encoded(self.encoder) for problem in problems]
        else:
            found = answer(self.engine, problems, self.encoder, settings, self.seed(stage, step))
            prompts, given = found.prompts, found.texts
        # without images a prompt is encoded afresh
        sees = self.discriminator.images
        samples = [
            Sample(prompt if sees else problem.prompt, [student], teacher=problem.teacher, name=problem.name)
            for problem, prompt, student in zip(problems, prompts, given)
        ]
        return warmup_step(self.discriminator, samples, self.encoder, steppers[0], self.config)

    def align(self, stage: str, step: int, steppers: list[Stepper]) -> Metrics:
        """Lets policy and discriminator play against each other."""
        settings = self.config.rollout.align
        problems = self.draw(stage, step, settings.prompts)
        found = answer(self.engine, problems, self.encoder, settings, self.seed(stage, step))
        done = align_step(
            self.policy,
            self.discriminator,
            found,
            self.encoder,
            (steppers[0], steppers[1]),
            self.config,
            self.reference,
        )
        scores = {"perception": done.scores.perception.tolist(), "reasoning": done.scores.reasoning.tolist()}
        self.record(stage, step, found, {**scores, "advantage": done.advantage.tolist(), "reason": done.scores.reason})
        return done.logged

    def rlvr(self, stage: str, step: int, steppers: list[Stepper]) -> Metrics:
        """Reinforces right answers."""
        taken, tries = self._rewarded(stage, step)
        logged, advantage = rlvr_step(self.policy, taken, self.encoder, steppers[0], self.config, self.reference)
        verdicts = {"reward": taken.reward.tolist(), "reason": [v.reason for v in taken.verdicts]}
        self.record(stage, step, taken.answered, {**verdicts, "advantage": advantage.tolist()})
        return {**logged, "tries": tries}

    def _rewarded(self, stage: str, step: int) -> tuple[Rewarded, int]:
        """Returns a step's rewarded responses, and how many tries dynamic sampling took."""
        settings, rule = self.config.rollout.rlvr, self.config.algorithm.rlvr.dynamic_sampling
        tries = 1 if rule is None else rule.tries
        seed = self.seed(stage, step)
        parts: list[Rewarded] = []
        for index, batch in enumerate(self.problems.batches(stage, step, self.config.dynamic_prompts, tries)):
            found = reward(answer(self.engine, batch, self.encoder, settings, seed + index), self.config)
            if rule is None:
                return found, 1
            parts.append(informative(found, settings.prompts))
            whole = joined(parts)
            if len(whole.answered.problems) >= settings.prompts:
                return select(whole, list(range(settings.prompts))), index + 1
        # too few problems tell anything: the step is taken with what there is, and of nothing with all
        return (whole if len(whole.answered.problems) else found), tries

    def record(self, stage: str, step: int, answered: Any, columns: dict[str, Any]) -> None:
        """Writes a step's rollouts, one a line."""
        every = self.config.log.rollouts_every
        if not every or step % every:
            return
        path = self.folder / "rollouts" / f"{stage}-{step + 1:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for place, (rollout, text) in enumerate(zip(answered.rollouts, answered.texts)):
                problem = answered.problems[rollout.prompt]
                own = {name: _jsonable(values[place]) for name, values in columns.items()}
                line = {"problem": problem.name, "question": str(problem.prompt), "answer": problem.answer}
                file.write(json.dumps({**line, "response": text, "finish": rollout.finish_reason, **own}) + "\n")

    # --- the run

    def go(self) -> None:
        """Runs what is left of the stages."""
        (self.folder / "config.json").parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(self.config.model_dump_json(indent=2) + "\n")
        (self.folder / "environment.json").write_text(json.dumps(_environment(self.policy.device), indent=2) + "\n")
        done, position = self._restore()
        with _on_interrupt(self._ask_to_stop):
            if not self.evaluations:
                for split in ("validation", "test"):
                    if not self.problems.held_out(split):
                        self.log.note(f"data.files.{split} names no files: nothing is measured on it")
                self.assess("start")
            for stage in self.config.run.stages:
                if stage in done:
                    continue
                self._stage(stage, position)
                position = None
                done = [*done, stage]
                self._save(done, None, [])
        self.finish()

    def _stage(self, stage: str, position: checkpoint.Restored | None) -> None:
        settings = getattr(self.config.optimiser, stage)
        steppers = self._steppers(stage)
        self.reference = self._frozen_policy(stage)
        first = 0
        if position is not None and position.extra["stage"] == stage:
            # once more, now with the optimisers that it belongs to
            checkpoint.load(self._checkpoints, self._models(), self._training(steppers))
            first = position.extra["step"]
        step_of: Callable[[str, int, list[Stepper]], Metrics] = {
            "warmup": self.warmup, "align": self.align, "rlvr": self.rlvr
        }.get(stage, self.supervised)  # fmt: skip
        (self.discriminator if stage == "warmup" else self.policy).train()
        often = self.config.evaluation.every
        with self.log.stage(stage, settings.steps, first):
            for step in range(first, settings.steps):
                begin = time.perf_counter()
                begin_peak(self.policy.device)
                metrics = {**step_of(stage, step, steppers), **self.problems.figures(stage)}
                for stepper in steppers:
                    stepper.next_rate()
                spent = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes(self.policy.device)}
                self.log.step(step + 1, {**metrics, **spent}, SHOWN[stage])
                last = step + 1 == settings.steps
                if often and (step + 1) % often == 0 and not last:
                    self.assess(f"{stage} {step + 1}")
                if self._stop or ((step + 1) % self.config.checkpoint.every == 0 and not last):
                    self._save(self._before(stage), (stage, step + 1), steppers)
                if self._stop:
                    raise InterruptedRunError
        self.reference = None
        if stage == "base" and self._discriminator is not None:
            self.discriminator.load_state_dict(build_discriminator(self.config, self.policy.model).state_dict())
        self.assess(stage)

    def assess(self, after: str) -> None:
        """Evaluates the policy on held-out problems, and after the warm-up the discriminator.

        Before and after the last stage it also takes the test split, so that what the stage did is read from there.
        """
        before = next(reversed(self.evaluations.values()), None)
        if before is not None and after.startswith("warmup"):
            # the policy is the one of before
            found: Metrics = {key: value for key, value in before.items() if key not in ("test", "discriminator")}
        else:
            found = self._assess_policy("validation", self.config.evaluation.samples)
        if after in ["start", *self.config.run.stages][-2:] and self.problems.held_out("test"):
            found["test"] = self._assess_policy("test")
        if after in ("warmup", "align"):
            taught = [problem for problem in self.problems.held_out("validation", 64) if problem.teacher is not None]
            if taught:
                found["discriminator"] = assess_discriminator(
                    self.discriminator, self.engine, taught, self.encoder, self.config
                )
        self.evaluations[after] = found
        self.log.note(f"after {after}: {told(found)}")

    def _assess_policy(self, split: str, count: int | None = None) -> Metrics:
        problems = self.problems.held_out(split, count)
        if not problems:
            return {"split": split, "samples": 0}
        return assess_policy(self.engine, problems, self.encoder, self.config, split)

    def finish(self) -> None:
        """Writes policy and discriminator as folders that the next stage takes, and the evaluations."""
        folder = self.folder / "policy"
        self.policy.model.save_pretrained(folder)
        save_processor(folder, self.encoder.tokenizer, self.encoder.image_processor)
        left = f"the policy is in {folder}"
        if self._discriminator is not None:
            left += f", the discriminator in {save_discriminator(self._discriminator, self.folder / 'discriminator')}"
        (self.folder / "evaluations.json").write_text(json.dumps(self.evaluations, indent=2) + "\n")
        self.log.note(f"{left}, the figures in {self.folder / 'evaluations.json'}")
        self.log.close()
        self.log.note(f"the report is {write_report(self.folder)}")

    # --- checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _models(self) -> dict[str, torch.nn.Module]:
        held = {} if self.reference is None else {"reference": self.reference.model}
        scorer = {} if self._discriminator is None else {"discriminator": self._discriminator}
        return {"policy": self.policy.model, **scorer, **held}

    def _steppers(self, stage: str) -> list[Stepper]:
        """Returns the optimisers of a stage, that of what it is named after first."""
        optimisers = self.config.optimiser
        settings = getattr(optimisers, stage)
        trained: list[tuple[torch.nn.Module, Adam]] = []
        if stage != "warmup":
            trained.append((self.policy, settings))
        if stage in ("warmup", "align"):
            trained.append((self.discriminator, settings if stage == "warmup" else optimisers.discriminator))
        found = []
        for model, own in trained:
            freeze_vision(model, own.freeze_vision)
            # the batches of steps that are not taken
            folder = self.folder / "not_finite" / f"{stage}-{'policy' if model is self.policy else 'discriminator'}"
            found.append(Stepper(model, own, settings.steps, inspection=folder))
        return found

    def _training(self, steppers: list[Stepper]) -> dict[str, checkpoint.Stateful]:
        return {f"stepper{index}": stepper for index, stepper in enumerate(steppers)}

    def _before(self, stage: str) -> list[str]:
        stages: list[str] = list(self.config.run.stages)
        return stages[: stages.index(stage)]

    def _save(self, done: list[str], at: tuple[str, int] | None, steppers: list[Stepper]) -> None:
        stage, step = at or (None, 0)
        extra = {
            "done": done,
            "stage": stage,
            "step": step,
            "data": {} if stage is None else self.problems.position(stage),
            "evaluations": self.evaluations,
            "log": self.log.state_dict(),
        }
        steps = sum(getattr(self.config.optimiser, name).steps for name in done) + step
        checkpoint.save(
            self._checkpoints, steps, self._models(), self._training(steppers), extra, keep=self.config.checkpoint.keep
        )

    def _restore(self) -> tuple[list[str], checkpoint.Restored | None]:
        """Returns the stages that are done, and where in another one the run was; loads the models."""
        newest = checkpoint.newest(self._checkpoints, tell=self.log.note)
        if newest is None:
            # what a run wrote that was killed before its first checkpoint will be done again
            self.log.load_state_dict({"bytes": 0, "non_finite": {}})
            return [], None
        stage = newest.extra["stage"]
        self.reference = None if stage is None else self._frozen_policy(stage)
        found = checkpoint.load(
            self._checkpoints, self._models(), self._training([] if stage is None else self._steppers(stage))
        )
        assert found is not None
        self.evaluations = dict(found.extra["evaluations"])
        if stage is not None:
            self.problems.go_to(stage, found.extra["data"])
        self.log.load_state_dict(found.extra["log"])
        where = f"step {found.extra['step']} of {stage}" if stage else f"the end of {found.extra['done'][-1]}"
        self.log.note(f"going on from {where} ({found.path})")
        return list(found.extra["done"]), found if stage else None

    def _frozen_policy(self, stage: str) -> Policy | None:
        """Returns the policy as it is now, where a stage's loss has a KL term that holds on to it."""
        if stage not in ("align", "rlvr") or not getattr(self.config.algorithm, stage).kl_coef:
            return None
        reference, _ = build_policy(self.config)
        reference.model.load_state_dict(self.policy.model.state_dict())
        return reference.requires_grad_(False)

    def _ask_to_stop(self) -> None:
        self._stop = True
        self.log.note("ending after this step; once more ends at once")


@contextmanager
def _on_interrupt(ask: Callable[[], None]) -> Iterator[None]:
    """Lets the first Ctrl-C ask, and the second one end at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        ask()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment(device: torch.device) -> Metrics:
    """Returns what the run is made with, for the report."""
    versions = {"python": platform.python_version(), "prism": prism_kernels.__version__}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    return {"last_started": begun, "device": str(device), "versions": versions}


def run(config: Config) -> int:
    """Runs all stages; returns the exit status."""
    one = Run(config)
    try:
        one.go()
    except InterruptedRunError:
        one.log.note(f"ended with a checkpoint; the same command goes on from it ({one.folder})")
        return 130
    return 0
