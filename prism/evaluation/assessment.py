"""Policy and discriminator assessed after each stage, on problems that neither was trained on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from prism.config import Config
from prism.data.drift import drift
from prism.data.problem import Problem
from prism.discriminator.controls import shortcut_controls
from prism.discriminator.model import Discriminator
from prism.discriminator.score import CHANNELS, ScoreLimits, sample_of, score_groups, score_limits
from prism.discriminator.training import ChannelReport, wins
from prism.models.prompts import PromptEncoder
from prism.rewards import score_batch
from prism.rollout.batch import decode, generate
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.worlds.shapes.counters import judge
from prism.worlds.shapes.probes import CHANGES, curated_text, wrong_caption, wrong_conclusion

Figures = dict[str, Any]
# responses to each held-out problem; AUC compares the right ones among them with the wrong ones
GROUP = 8


def assess_policy(
    engine: Engine, problems: Iterable[Problem], encoder: PromptEncoder, config: Config, split: str
) -> Figures:
    """Returns the policy's figures at the configured temperature, and if configured at temperature 1 as `sampled`."""
    settings = config.evaluation
    figures: Figures = {"split": split}
    figures |= evaluate(
        engine, problems, encoder, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature
    ).as_json()
    if settings.sampled:
        warm = evaluate(engine, problems, encoder, max_new_tokens=settings.max_new_tokens, temperature=1.0)
        figures["sampled"] = warm.as_json()
    return figures


def assess_discriminator(
    discriminator: Discriminator,
    engine: Engine,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    config: Config,
) -> dict[str, Figures]:
    """Returns, by view and channel, how well the discriminator tells better texts from worse ones.

    The view `pairs` compares the policy's responses at temperature 1 with their teachers'; its `auc` is how often the
    right one of two responses to a problem outscores the wrong one. `swapped images` shows the same pairs with other
    problems' images. `equal style` compares two texts of the curated teacher, one of which is wrong in one thing.

    Args:
        discriminator: scores the texts.
        engine: generates the policy's responses.
        problems: held-out problems, each with a teacher's response.
        encoder: encodes prompts for both models.
        config: the settings.
    """
    limits = _limits(config)
    sampling = Sampling(group=GROUP, max_new_tokens=config.rollout.align.max_new_tokens)
    batch = generate(engine, problems, encoder, sampling, 0)
    samples = [sample_of(problem, batch.texts_of(index)) for index, problem in enumerate(problems)]
    right: dict[str, torch.Tensor] = {}
    if all(problem.shape is not None for problem in problems):
        shapes = [problem.shape for problem in batch.problems if problem.shape is not None]
        verdicts = [
            judge(text, shapes[rollout.prompt].scene, shapes[rollout.prompt].question)
            for text, rollout in zip(batch.texts, batch.rollouts)
        ]
        for channel in CHANNELS:
            right[channel] = torch.tensor([not getattr(verdict, channel).wrong for verdict in verdicts])
    controls = shortcut_controls(discriminator, samples, encoder, limits, views={}, right=right)
    views = {
        {"as it is": "pairs"}.get(view, view): {channel: _figures(one) for channel, one in by_channel.items()}
        for view, by_channel in controls.items()
    }
    if right:
        views["equal style"] = _equal_style(discriminator, problems, encoder, limits)
    return views


@torch.no_grad()
def _equal_style(
    discriminator: Discriminator, problems: Sequence[Problem], encoder: PromptEncoder, limits: ScoreLimits
) -> dict[str, Figures]:
    """Returns how often a right text outscores the same text with one thing wrong."""
    samples = []
    for problem in problems:
        shape = problem.shape
        assert shape is not None, "only called if all problems are of the embedded world"
        wrong = [*(wrong_caption(shape, change) for change in CHANGES), wrong_conclusion(shape)]
        samples.append(sample_of(problem, wrong, teacher=curated_text(shape)))
    scores = score_groups(discriminator, samples, encoder, limits)
    # a branch reads its segment only: the last text differs in reasoning, the others in perception
    caption = scores.perception.view(len(samples), -1)[:, :-1]
    conclusion = scores.reasoning.view(len(samples), -1)[:, -1:]
    perception = _compared(scores.teacher_perception[:, None], caption)
    perception["by_change"] = {
        change: _compared(scores.teacher_perception, caption[:, index]).get("accuracy")
        for index, change in enumerate(CHANGES)
    }
    return {"perception": perception, "reasoning": _compared(scores.teacher_reasoning[:, None], conclusion)}


def _compared(right: torch.Tensor, wrong: torch.Tensor) -> Figures:
    right, wrong = torch.broadcast_tensors(right.double(), wrong.double())
    # texts that are too long have no score
    known = ~(right.isnan() | wrong.isnan())
    right, wrong = right[known], wrong[known]
    figures: Figures = {"pairs": len(wrong)}
    if len(wrong):
        figures |= {"accuracy": float(wins(right, wrong).mean()), "gap": float((right - wrong).mean())}
    return figures


def _figures(report: ChannelReport) -> Figures:
    """Returns the finite figures of a channel."""
    return {name: value for name, value in asdict(report).items() if math.isfinite(value)}


def _limits(config: Config) -> ScoreLimits:
    """Returns the configured limits of scoring, with a budget for a group of GROUP responses."""
    limits, prompt = score_limits(config), config.data.prompt_tokens
    response = (config.largest_scored_group - prompt) // (config.rollout.align.group + 1)
    return replace(limits, budget=max(limits.budget, prompt + (GROUP + 1) * response))


def figures_line(figures: Figures) -> str:
    """Returns the figures after a stage as one line of text."""
    parts = [_policy_line(figures)] if figures["samples"] else []
    if "sampled" in figures:
        parts.append(f"at temperature 1: {_policy_line(figures['sampled'])}")
    if "test" in figures:
        parts.append(f"on test: {_policy_line(figures['test'])}")
    for view, by_channel in figures.get("discriminator", {}).items():
        shares = [f"{channel} {one['accuracy']:.3f}" for channel, one in by_channel.items() if "accuracy" in one]
        parts.append(f"{view} told apart: {', '.join(shares) or 'none'}")
    return "; ".join(parts) or "no held-out problems to measure it on"


def _policy_line(figures: Figures) -> str:
    shares = [f"accuracy {figures['accuracy']:.3f} ± {figures['accuracy_se']:.3f}"]
    for key in ("perception_error", "reasoning_error", "format", "drift_perception", "drift_reasoning"):
        if key in figures:
            shares.append(f"{key.replace('_', ' ')} {figures[key]:.3f}")
    return f"{', '.join(shares)} ({figures['samples']})"


@dataclass(frozen=True)
class PolicyReport:
    """Figures of a policy, as shares of the samples unless said otherwise.

    The errors are NaN outside the embedded world, drift is NaN without teachers. An answer that follows from a wrong
    caption is an error of perception alone. A response without a valid form counts as wrong in everything.
    """

    samples: int
    accuracy: float
    format: float
    # mean number of tokens of a response
    length: float
    perception_error: float
    reasoning_error: float
    # Wasserstein distances to the teachers, in caption items and in reasoning steps
    drift_perception: float
    drift_reasoning: float

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.samples)

    def as_json(self) -> dict[str, float]:
        """Returns the finite figures, with the accuracy's standard error."""
        figures = {**asdict(self), "accuracy_se": self.standard_error}
        return {name: value for name, value in figures.items() if math.isfinite(value)}


def evaluate(
    engine: Engine,
    problems: Iterable[Problem],
    encoder: PromptEncoder,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch: int = 128,
) -> PolicyReport:
    """Returns the figures of a policy from one response to each problem.

    Args:
        engine: generates the policy's responses.
        problems: problems with answers; the images of only one batch are in memory at a time.
        encoder: encodes prompts for the policy.
        max_new_tokens: length of the longest response.
        temperature: sampling temperature; 0 is greedy.
        batch: number of problems answered at a time.
    """
    responses: list[JudgedResponse] = []
    teachers: list[str | None] = []
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    source = iter(problems)
    while part := list(islice(source, batch)):
        responses += judge_responses(engine, part, encoder, sampling, first=len(responses))
        teachers += [problem.teacher for problem in part]

    def mean(name: str) -> float:
        values = [getattr(response, name) for response in responses]
        return math.nan if None in values else sum(values) / len(values)

    drifted = drift([response.text for response in responses], teachers)
    return PolicyReport(
        samples=len(responses),
        accuracy=mean("accuracy"),
        format=mean("format"),
        length=mean("length"),
        perception_error=mean("perception_error"),
        reasoning_error=mean("reasoning_error"),
        drift_perception=drifted["drift_perception"],
        drift_reasoning=drifted["drift_reasoning"],
    )


@dataclass(frozen=True)
class JudgedResponse:
    """One response to a problem. The errors are None outside the embedded world."""

    text: str
    accuracy: float
    format: float
    # number of tokens
    length: int
    # 1 if the response reached max_new_tokens without ending
    cut: float
    perception_error: float | None = None
    reasoning_error: float | None = None


def judge_responses(
    engine: Engine,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    sampling: Sampling,
    *,
    seed: int = 0,
    first: int = 0,
) -> list[JudgedResponse]:
    """Generates one response to each problem, and judges it.

    Args:
        engine: generates the policy's responses.
        problems: problems with answers, which are one batch.
        encoder: encodes prompts for the policy.
        sampling: length and temperature.
        seed: seed of the sampling.
        first: number of the first problem among those of all batches, so that each problem has its own draws.
    """
    keys = range(first, first + len(problems))
    prompts = [problem.encoded(encoder) for problem in problems]
    rollouts = engine.generate(prompts, sampling, seed=seed, keys=keys)
    texts = decode(rollouts, encoder)
    verdicts = score_batch(
        texts, [problem.answer or "" for problem in problems], [problem.equivalent_answers for problem in problems]
    )
    responses = []
    for problem, rollout, text, verdict in zip(problems, rollouts, texts, verdicts):
        errors: dict[str, float] = {}
        if (shape := problem.shape) is not None:
            judgement = judge(text, shape.scene, shape.question)
            errors = {
                "perception_error": float(judgement.perception.wrong),
                "reasoning_error": float(judgement.reasoning.wrong),
            }
        cut = float(rollout.finish_reason == "length")
        responses.append(JudgedResponse(text, verdict.accuracy, verdict.format, len(rollout.token_ids), cut, **errors))
    return responses
