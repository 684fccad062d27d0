"""RLVR: verified rewards, by GRPO, DAPO, GSPO and their kin."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prism.config import Config
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.rewards import Verdict, score_batch
from prism.runtime.optimiser import Stepper
from prism.stages.reinforce import Experience, policy_update
from prism.stages.rollouts import Answered
from prism_kernels import group_advantage
from prism_kernels.shaping import informative_groups, overlong_penalty


class Rewarded(NamedTuple):
    """Responses with their verdicts, and the reward of each, (S,): the verdict's score less what its length costs."""

    answered: Answered
    verdicts: list[Verdict]
    reward: Tensor


def reward(answered: Answered, config: Config) -> Rewarded:
    """Returns the responses' rewards: every problem has its right answer."""
    owners = [rollout.prompt for rollout in answered.rollouts]
    problems = answered.problems
    verdicts = score_batch(
        answered.texts,
        [problems[p].answer or "" for p in owners],
        [problems[p].equivalent_answers for p in owners],
    )
    value = torch.tensor([verdict.score for verdict in verdicts])
    rule = config.algorithm.rlvr.overlong
    if rule is not None:
        limit = config.rollout.rlvr.max_new_tokens
        value = value + overlong_penalty(
            answered.lengths, limit=limit, buffer=config.overlong_buffer, penalty=rule.penalty
        )
    return Rewarded(answered, verdicts, value)


def informative(rewarded: Rewarded, most: int) -> Rewarded:
    """Returns the first `most` problems whose responses' rewards are not all equal, with their responses."""
    keep = informative_groups(rewarded.reward, rewarded.answered.group)
    owners = rewarded.answered.group[keep].unique().tolist()[:most]
    return select(rewarded, owners)


def select(rewarded: Rewarded, chosen: list[int]) -> Rewarded:
    """Returns some problems of a batch, renumbered, with their responses."""
    answered, place = rewarded.answered, {p: n for n, p in enumerate(chosen)}
    kept = [s for s, rollout in enumerate(answered.rollouts) if rollout.prompt in place]
    part = Answered(
        [answered.problems[p] for p in chosen],
        [answered.prompts[p] for p in chosen],
        [replace(answered.rollouts[s], prompt=place[answered.rollouts[s].prompt]) for s in kept],
        [answered.texts[s] for s in kept],
    )
    return Rewarded(part, [rewarded.verdicts[s] for s in kept], rewarded.reward[kept])


def joined(parts: list[Rewarded]) -> Rewarded:
    """Returns several batches as one."""
    whole, verdicts = Answered([], [], [], []), []
    for part in parts:
        shift, own = len(whole.problems), part.answered
        whole = Answered(
            whole.problems + own.problems,
            whole.prompts + own.prompts,
            whole.rollouts + [replace(rollout, prompt=rollout.prompt + shift) for rollout in own.rollouts],
            whole.texts + own.texts,
        )
        verdicts += part.verdicts
    return Rewarded(whole, verdicts, torch.cat([part.reward for part in parts]))


def rlvr_step(
    policy: Policy,
    rewarded: Rewarded,
    encoder: PromptEncoder,
    stepper: Stepper,
    config: Config,
    reference: Policy | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Takes the policy's step on verified rewards; returns what is logged, and the advantages, (S,)."""
    answered = rewarded.answered
    advantage = group_advantage(rewarded.reward, answered.group, **config.algorithm.rlvr.advantage_options())
    logged = policy_update(
        policy,
        Experience(answered.prompts, answered.rollouts, advantage),
        encoder,
        stepper,
        config.algorithm.rlvr,
        config.memory,
        temperature=config.rollout.rlvr.temperature,
        batch=config.optimiser.rlvr.batch,
        longest=config.rollout.rlvr.max_new_tokens,
        reference=reference,
    )
    verdicts = rewarded.verdicts
    live = informative_groups(rewarded.reward, answered.group).float().mean()
    logged |= {
        "reward": float(rewarded.reward.mean()),
        "accuracy": sum(v.accuracy for v in verdicts) / len(verdicts),
        "format": sum(v.format for v in verdicts) / len(verdicts),
        "length": float(answered.lengths.float().mean()),
        "informative": float(live),
    }
    return logged, advantage
