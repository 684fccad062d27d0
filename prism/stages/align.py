"""Alignment: the policy plays against the discriminator, which is trained on the same rollouts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism.config import Config
from prism.discriminator.branches import ScoreLimits
from prism.discriminator.metrics import channel_report
from prism.discriminator.model import Discriminator
from prism.discriminator.score import GroupScores, PreparedGroups, Sample, prepare_groups
from prism.discriminator.training import NO_PAIR, StepResult, StepSettings, discriminator_step
from prism.evaluation.drift import drift
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.runtime.inspection import of_groups
from prism.runtime.optimiser import Stepper
from prism.stages.credit import token_credit
from prism.stages.reinforce import Experience, policy_update
from prism.stages.rollouts import Answered
from prism_kernels import prism_advantage
from prism_kernels.packing import Kind


class Aligned(NamedTuple):
    """What a step of alignment gave: for the log, and of each response for the record of rollouts."""

    logged: dict[str, Any]
    scores: GroupScores
    advantage: Tensor


def step_settings(config: Config) -> StepSettings:
    """Returns the discriminator's loss as configured."""
    found = config.discriminator
    return StepSettings(
        aux_coef=found.aux_coef,
        z_coef=found.z_coef,
        regularisation=found.regularisation,
        soft_clip=found.soft_clip,
        max_grad_norm=config.optimiser.discriminator.clip_norm,
    )


def score_limits(config: Config) -> ScoreLimits:
    """Returns the lengths that are scored as configured."""
    data = config.data
    return ScoreLimits(config.score_pack_tokens, data.prompt_tokens, data.response_tokens)


def train_discriminator(
    discriminator: Discriminator, prepared: PreparedGroups, stepper: Stepper, config: Config, steps: int = 1
) -> tuple[StepResult, int]:
    """Takes optimiser steps on the same pairs; returns what the first one did, and how many were not taken."""
    results = []
    for _ in range(steps):
        stepper.begin()
        result = discriminator_step(discriminator, prepared, stepper.optimiser, step_settings(config))
        # without a pair nothing is wrong with the numbers
        if result.skipped != NO_PAIR:
            stepper.count(result.skipped, of_groups(prepared))
        results.append(result)
    return results[0], sum(result.skipped is not None for result in results)


def align_step(
    policy: Policy,
    discriminator: Discriminator,
    answered: Answered,
    encoder: PromptEncoder,
    steppers: tuple[Stepper, Stepper],
    config: Config,
    reference: Policy | None = None,
) -> Aligned:
    """Trains the discriminator on the rollouts against their teachers, and the policy on the scores from before.

    Args:
        policy: which answered.
        discriminator: the other player.
        answered: the step's rollouts; each problem has a teacher.
        encoder: of both models.
        steppers: the policy's and the discriminator's.
        config: the settings.
        reference: see `policy_update`.
    """
    samples = [
        Sample(
            prompt if discriminator.images else problem.prompt,
            answered.of(place),
            teacher=problem.teacher,
            name=problem.name,
        )
        for place, (problem, prompt) in enumerate(zip(answered.problems, answered.prompts))
    ]
    prepared = prepare_groups(samples, encoder, score_limits(config), images=discriminator.images)
    result, skipped = train_discriminator(discriminator, prepared, steppers[1], config, config.discriminator.steps)
    scores = result.scores
    advantage = advantages(scores, answered, config)
    credit: Tensor | list[Tensor] = advantage
    if config.algorithm.align.token_credit:
        credit = token_credit(scores, answered, encoder.token_bytes, advantage)
    logged = policy_update(
        policy,
        Experience(answered.prompts, answered.rollouts, credit),
        encoder,
        steppers[0],
        config.algorithm.align,
        config.memory,
        temperature=config.rollout.align.temperature,
        batch=config.optimiser.align.batch,
        longest=config.rollout.align.max_new_tokens,
        reference=reference,
    )
    drifted = drift(answered.texts, [problem.teacher for problem in answered.problems])
    return Aligned({**logged, **discriminator_figures(result), "d_skipped": skipped, **drifted}, scores, advantage)


def advantages(scores: GroupScores, answered: Answered, config: Config) -> Tensor:
    """Returns the advantage of each response, (S,), on the CPU."""
    valid = torch.tensor([reason is None for reason in scores.reason])
    # those without a score alone: one that is not finite is to be seen in the loss
    perception, reasoning = (torch.where(valid, score.cpu(), 0.0) for score in (scores.perception, scores.reasoning))
    return prism_advantage(
        perception, reasoning, answered.group, format_ok=valid, **config.algorithm.align.advantage_options()
    )


def discriminator_figures(result: StepResult) -> dict[str, Any]:
    """Returns what is logged of a step of the discriminator."""
    found: dict[str, Any] = {
        "d_loss": float(result.pair_loss),
        "d_aux": float(result.aux_loss),
        "d_grad_norm": result.grad_norm,
    }
    for channel, report in channel_report(result.scores).items():
        found[f"score_{channel}"] = float(getattr(result.scores, channel).nanmean())
        found |= {f"d_accuracy_{channel}": report.accuracy, f"d_gap_{channel}": report.gap}
    if result.expert_counts is not None:
        # over the layers whose tokens all have their kind: the share of each kind's choices that its top expert has
        counts = result.expert_counts[:-1].sum(0)
        found["d_expert_load"] = {k.name.lower(): (counts[k] / counts[k].sum().clamp(min=1)).tolist() for k in Kind}
        for name, kind in (("perception", Kind.PERCEPTION), ("reasoning", Kind.REASONING)):
            row = counts[kind]
            found[f"d_top_expert_{name}"] = float(row.max() / row.sum().clamp(min=1))
    return found
