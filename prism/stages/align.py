"""Alignment: the policy plays against the discriminator, which is trained on the same rollouts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism.config import Config
from prism.data.sections import caption_items, reasoning_steps, split_response
from prism.discriminator.branches import ScoreLimits
from prism.discriminator.metrics import channel_report
from prism.discriminator.model import Discriminator
from prism.discriminator.score import GroupScores, Sample, prepare_groups
from prism.discriminator.training import StepResult, StepSettings, discriminator_step
from prism.models.prompts import PromptEncoder
from prism.optimisation import Stepper
from prism.policy import Policy
from prism.stages.reinforce import Experience, policy_update
from prism.stages.rollouts import Answered
from prism_kernels import group_advantage, prism_advantage
from prism_kernels.packing import Kind
from prism_kernels.segments import find_segments
from prism_kernels.shaping import token_advantage


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
        Sample(prompt, answered.of(place), teacher=problem.teacher, name=problem.name)
        for place, (problem, prompt) in enumerate(zip(answered.problems, answered.prompts))
    ]
    prepared = prepare_groups(samples, encoder, score_limits(config), images=discriminator.images)
    steppers[1].begin()
    result = discriminator_step(discriminator, prepared, steppers[1].optimiser, step_settings(config))
    for _ in range(config.discriminator.steps - 1):
        discriminator_step(discriminator, prepared, steppers[1].optimiser, step_settings(config))
    scores = result.scores
    advantage = advantages(scores, answered, config)
    credit = _token_credit(scores, answered, encoder, advantage) if config.algorithm.align.token_credit else advantage
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
    skipped = {"d_skipped": int(result.skipped is not None)}
    return Aligned({**logged, **discriminator_figures(result), **skipped, **drift(answered)}, scores, advantage)


def advantages(scores: GroupScores, answered: Answered, config: Config) -> Tensor:
    """Returns the advantage of each response, (S,), on the CPU."""
    valid = torch.tensor([reason is None for reason in scores.reason])
    columns = (scores.perception.cpu().nan_to_num(), scores.reasoning.cpu().nan_to_num())
    return prism_advantage(*columns, answered.group, format_ok=valid, **config.algorithm.align.advantage_options())


def _token_credit(scores: GroupScores, answered: Answered, encoder: PromptEncoder, mixed: Tensor) -> list[Tensor]:
    """Returns for each response one advantage a token: perception's in the caption, reasoning's behind it.

    Tags and invalid responses have `mixed`, that of both.
    """
    valid = torch.tensor([reason is None for reason in scores.reason])
    channels = torch.stack(
        [
            group_advantage(column.cpu().nan_to_num(), answered.group, valid=valid)
            for column in (scores.perception, scores.reasoning)
        ]
    )
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), answered.lengths.cumsum(0)))
    tokens = torch.tensor([token for rollout in answered.rollouts for token in rollout.token_ids])
    found = find_segments(tokens, bounds, encoder.token_bytes)
    channel = torch.full_like(tokens, -1)
    for s in (found.reason == 0).nonzero()[:, 0].tolist():
        for k, row in ((0, 0), (1, 1), (2, 1)):
            channel[found.start[s, k] : found.end[s, k]] = row
    credit = token_advantage(channels, channel, bounds.to(torch.int32))
    spread = mixed.repeat_interleave(answered.lengths)
    whole = torch.where(channel >= 0, credit.to(spread.dtype), spread)
    return list(whole.split(answered.lengths.tolist()))


def drift(answered: Answered) -> dict[str, float]:
    """Returns how far the policy's captions and thoughts are from the teachers' in their numbers of items and steps.

    Wasserstein distances over the same prompts, of the valid responses.
    """
    student = [sections for text in answered.texts if (sections := split_response(text)) is not None]
    teacher = [split_response(problem.teacher) for problem in answered.problems if problem.teacher is not None]
    found = {"valid": len(student) / max(1, len(answered.texts))}
    for name, count in (
        ("drift_perception", lambda sections: caption_items(sections.caption)),
        ("drift_reasoning", lambda sections: reasoning_steps(sections.think)),
    ):
        ours = torch.tensor([float(count(sections)) for sections in student])
        theirs = torch.tensor([float(count(sections)) for sections in teacher if sections is not None])
        found[name] = wasserstein(ours, theirs)
    return found


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Returns the distance of two empirical distributions on the line; NaN if one is empty."""
    if not (len(a) and len(b)):
        return float("nan")
    at = torch.cat((a, b)).sort().values
    below = [torch.searchsorted(x.sort().values, at[:-1], right=True) / len(x) for x in (a, b)]
    return float(((below[0] - below[1]).abs() * at.diff()).sum())


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
