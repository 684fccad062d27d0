"""What is known of policy and discriminator between the stages, from problems that nothing was trained on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from prism.config import Config, Sampling
from prism.data.problem import Problem
from prism.discriminator.branches import CHANNELS, ScoreLimits, score_limits
from prism.discriminator.controls import shortcut_controls
from prism.discriminator.metrics import ChannelReport, wins
from prism.discriminator.model import Discriminator
from prism.discriminator.score import sample_of, score_groups
from prism.evaluation.accuracy import evaluate
from prism.models.prompts import PromptEncoder
from prism.rollout.batch import generate
from prism.rollout.engine import Engine
from prism.worlds.shapes.counters import judge
from prism.worlds.shapes.probes import CHANGES, curated_text, wrong_caption, wrong_conclusion

Figures = dict[str, Any]
# responses to a held-out problem, among which right and wrong ones are told apart
GROUP = 8


def assess_policy(
    engine: Engine, problems: Iterable[Problem], encoder: PromptEncoder, config: Config, split: str
) -> Figures:
    """Returns what the policy's responses show, as configured; under `sampled` the same at temperature 1."""
    settings = config.evaluation
    found: Figures = {"split": split}
    found |= evaluate(
        engine, problems, encoder, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature
    ).as_json()
    if settings.sampled:
        warm = evaluate(engine, problems, encoder, max_new_tokens=settings.max_new_tokens, temperature=1.0)
        found["sampled"] = warm.as_json()
    return found


def assess_discriminator(
    discriminator: Discriminator,
    engine: Engine,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    config: Config,
) -> dict[str, Figures]:
    """Returns by view how well the discriminator tells better from worse in each channel.

    `pairs` are the policy's responses at temperature 1 against their teachers'; `auc` is how often of two responses to
    one problem the right one outscores the wrong one. `swapped images` are the same pairs on other problems' images.
    In `equal style` two texts of the curated teacher differ in one thing, which in one of them is wrong.

    Args:
        discriminator: the scorer.
        engine: of the policy.
        problems: held out, each with a teacher.
        encoder: of both models.
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
    found = {
        {"as it is": "pairs"}.get(view, view): {channel: _figures(one) for channel, one in by_channel.items()}
        for view, by_channel in controls.items()
    }
    if right:
        found["equal style"] = _equal_style(discriminator, problems, encoder, limits)
    return found


@torch.no_grad()
def _equal_style(
    discriminator: Discriminator, problems: Sequence[Problem], encoder: PromptEncoder, limits: ScoreLimits
) -> dict[str, Figures]:
    """Returns how often a right text outscores the same one with one thing wrong."""
    samples = []
    for problem in problems:
        shape = problem.shape
        assert shape is not None, "asked for where all are of the embedded world"
        wrong = [*(wrong_caption(shape, change) for change in CHANGES), wrong_conclusion(shape)]
        samples.append(sample_of(problem, wrong, teacher=curated_text(shape)))
    scores = score_groups(discriminator, samples, encoder, limits)
    # a branch sees its own segment: the last text says nothing about perception, the others nothing about reasoning
    caption = scores.perception.view(len(samples), -1)[:, :-1]
    conclusion = scores.reasoning.view(len(samples), -1)[:, -1:]
    perception = _compared(scores.teacher_perception[:, None], caption)
    perception["by_change"] = {
        change: _compared(scores.teacher_perception, caption[:, place]).get("accuracy")
        for place, change in enumerate(CHANGES)
    }
    return {"perception": perception, "reasoning": _compared(scores.teacher_reasoning[:, None], conclusion)}


def _compared(right: torch.Tensor, wrong: torch.Tensor) -> Figures:
    right, wrong = torch.broadcast_tensors(right.double(), wrong.double())
    # a text that is too long has no score
    known = ~(right.isnan() | wrong.isnan())
    right, wrong = right[known], wrong[known]
    found: Figures = {"pairs": len(wrong)}
    if len(wrong):
        found |= {"accuracy": float(wins(right, wrong).mean()), "gap": float((right - wrong).mean())}
    return found


def _figures(report: ChannelReport) -> Figures:
    """Returns what there was to compare."""
    return {name: value for name, value in asdict(report).items() if math.isfinite(value)}


def _limits(config: Config) -> ScoreLimits:
    """Returns the lengths that are scored as configured, with room for a group of this size."""
    limits, prompt = score_limits(config), config.data.prompt_tokens
    response = (config.largest_scored_group - prompt) // (config.rollout.align.group + 1)
    return replace(limits, budget=max(limits.budget, prompt + (GROUP + 1) * response))


def told(found: Figures) -> str:
    """Returns the figures of a stage in a line."""
    parts = [_told(found)] if found["samples"] else []
    if "sampled" in found:
        parts.append(f"at temperature 1: {_told(found['sampled'])}")
    if "test" in found:
        parts.append(f"on test: {_told(found['test'])}")
    for view, by_channel in found.get("discriminator", {}).items():
        shares = [f"{channel} {one['accuracy']:.3f}" for channel, one in by_channel.items() if "accuracy" in one]
        parts.append(f"{view} told apart: {', '.join(shares) or 'none'}")
    return "; ".join(parts) or "nothing held out to measure it by"


def _told(found: Figures) -> str:
    shares = [f"accuracy {found['accuracy']:.3f} ± {found['accuracy_se']:.3f}"]
    for key in ("perception_error", "reasoning_error", "format", "drift_perception", "drift_reasoning"):
        if key in found:
            shares.append(f"{key.replace('_', ' ')} {found[key]:.3f}")
    return f"{', '.join(shares)} ({found['samples']})"
