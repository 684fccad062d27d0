"""Alignment: the policy plays against the discriminator, which is trained on the same rollouts.

S responses, T their tokens.
"""

from typing import Any

import torch
from torch import Tensor

from prism.data.drift import drift
from prism.discriminator.score import CHANNELS, GroupScores, prepare_groups, sample_of, score_limits
from prism.discriminator.training import discriminator_step
from prism.rollout.batch import RolloutBatch
from prism.runtime.runtime import Runtime
from prism.stages.update import policy_update
from prism_kernels import group_advantage, prism_advantage
from prism_kernels.segments import TokenBytes, find_segments
from prism_kernels.shaping import token_advantage

SHOW = ("valid", "d_gap_perception", "d_gap_reasoning", "drift_perception", "drift_reasoning", "entropy")
# the channel of caption, think and answer
CHANNEL = (0, 1, 1)


def align(rt: Runtime) -> None:
    """Trains policy and discriminator against each other.

    The discriminator's scores of a step, from before its update, are the policy's reward.
    """
    config, sampling = rt.config, rt.config.rollout.align
    algorithm, optimisers, discriminator = config.algorithm.align, config.optimiser, rt.discriminator
    limits, mixing = score_limits(config), algorithm.advantage_options()
    for step in rt.steps(
        "align",
        policy=optimisers.align,
        discriminator=optimisers.discriminator,
        reference=bool(algorithm.kl_coef),
        show=SHOW,
    ):
        batch = rt.generate(step.problems(sampling.prompts), sampling, step.seed)
        samples = [
            sample_of(problem, batch.texts_of(index), batch.prompts[index] if discriminator.images else None)
            for index, problem in enumerate(batch.problems)
        ]
        groups = prepare_groups(samples, rt.encoder, limits, images=discriminator.images)
        results = [
            discriminator_step(discriminator, groups, rt.discriminator_optimiser, config.discriminator)
            for _ in range(config.discriminator.steps)
        ]
        scores = results[0].scores
        mixture = mixed_advantages(scores, batch, mixing)
        metrics = policy_update(
            rt.policy,
            batch,
            token_credit(scores, batch, rt.encoder.token_bytes, mixture) if algorithm.token_credit else mixture,
            rt.encoder,
            rt.policy_optimiser,
            algorithm,
            config.memory,
            temperature=sampling.temperature,
            longest=sampling.max_new_tokens,
            responses=optimisers.align.batch,
            reference=rt.reference,
        )
        metrics |= results[0].metrics()
        metrics["d_skipped"] = sum(result.skipped is not None for result in results)
        metrics |= drift(batch.texts, [problem.teacher for problem in batch.problems])
        columns = {
            "perception": scores.perception.tolist(),
            "reasoning": scores.reasoning.tolist(),
            "advantage": mixture.tolist(),
            "reason": scores.reason,
        }
        step.finish(metrics, batch, columns, dict.fromkeys(CHANNELS, step.version("discriminator")))


def mixed_advantages(scores: GroupScores, batch: RolloutBatch, mixing: dict[str, Any]) -> Tensor:
    """Returns one advantage per response, (S,), on the CPU: the mixture of both channels.

    Args:
        scores: scores of the responses.
        batch: the rollouts.
        mixing: options of `prism_advantage`.
    """
    valid = torch.tensor([reason is None for reason in scores.reason])
    # zero only unscored responses; let real NaNs surface in the loss
    perception, reasoning = (torch.where(valid, score.cpu(), 0.0) for score in (scores.perception, scores.reasoning))
    return prism_advantage(perception, reasoning, batch.group, format_ok=valid, **mixing)


def token_credit(scores: GroupScores, batch: RolloutBatch, table: TokenBytes, mixture: Tensor) -> list[Tensor]:
    """Returns one advantage per token: perception's in the caption, reasoning's in thinking and answer.

    A token with bytes of a tag and of a section's text is the section's. Tags, tokens of both channels, and invalid
    responses get the mixture.

    Args:
        scores: scores of the responses.
        batch: the rollouts.
        table: bytes of the policy's tokens.
        mixture: (S,), advantages of whole responses.
    """
    valid = torch.tensor([reason is None for reason in scores.reason])
    advantages = torch.stack(
        [
            group_advantage(torch.where(valid, column.cpu(), 0.0), batch.group, valid=valid)
            for column in (scores.perception, scores.reasoning)
        ]
    )
    lengths = batch.lengths
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    channel = _channels([token for rollout in batch.rollouts for token in rollout.token_ids], bounds, table)
    credit = token_advantage(advantages, channel, bounds.to(torch.int32))
    spread = mixture.repeat_interleave(lengths)
    # a response may be unscored although it has sections, as one that is too long
    credited = (channel >= 0) & valid.repeat_interleave(lengths)
    return list(torch.where(credited, credit.to(spread.dtype), spread).split(lengths.tolist()))


def _channels(token_ids: list[int], bounds: Tensor, table: TokenBytes) -> Tensor:
    """Returns the channel whose sections each token belongs to, (T,); -1 for a token of none or of both."""
    sections = find_segments(token_ids, bounds, table)
    member = torch.zeros(max(CHANNEL) + 1, len(token_ids), dtype=torch.bool)
    for section, row in enumerate(CHANNEL):
        for start, end in zip(sections.start[:, section].tolist(), sections.end[:, section].tolist()):
            member[row, start:end] = True
    return torch.where(member.sum(0) == 1, member.int().argmax(0), -1)
