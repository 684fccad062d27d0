"""RLVR: verified rewards, by GRPO, DAPO, GSPO and their kin."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prism.config import Config
from prism.rewards import ProblemView, Rewards, join_rewards, reward_versions, rewards_of
from prism.rollout.batch import RolloutBatch
from prism.runtime.runtime import Runtime, Step
from prism.stages.update import policy_update
from prism_kernels import group_advantage
from prism_kernels.shaping import informative_groups, overlong_penalty

SHOW = ("reward", "accuracy", "format", "length", "entropy")


class Rewarded(NamedTuple):
    """Rollouts with their rewards."""

    batch: RolloutBatch
    rewards: Rewards
    # (S,), the total reward of each less the penalty for its length
    total: Tensor
    # (S,), what differs in the groups that dynamic sampling keeps
    compared: Tensor


def rlvr(rt: Runtime) -> None:
    """Reinforces responses with right answers."""
    config, sampling, algorithm = rt.config, rt.config.rollout.rlvr, rt.config.algorithm.rlvr
    settings = config.optimiser.rlvr
    for step in rt.steps("rlvr", policy=settings, reference=bool(algorithm.kl_coef), show=SHOW):
        rewarded, tries = sample(rt, step)
        batch, rewards, total, compared = rewarded
        verdicts = rewards.verdicts
        advantage = group_advantage(total, batch.group, **algorithm.advantage_options())
        metrics = policy_update(
            rt.policy,
            batch,
            advantage,
            rt.encoder,
            rt.policy_optimiser,
            algorithm,
            config.memory,
            temperature=sampling.temperature,
            longest=sampling.max_new_tokens,
            responses=settings.batch,
            reference=rt.reference,
        )
        metrics |= {
            "reward": float(total.mean()),
            "accuracy": sum(v.accuracy for v in verdicts) / len(verdicts),
            "format": sum(v.format for v in verdicts) / len(verdicts),
            "length": float(batch.lengths.float().mean()),
            "informative": float(informative_groups(compared, batch.group).float().mean()),
            "tries": tries,
            **rewards.metrics(),
        }
        columns = {
            "reward": total.tolist(),
            "reason": [verdict.reason for verdict in verdicts],
            "accuracy": [verdict.accuracy for verdict in verdicts],
            "format": [verdict.format for verdict in verdicts],
            "advantage": advantage.tolist(),
            **{f"reward_{name}": values for name, values in rewards.by_name.items()},
        }
        if rewards.failures:
            rewards.write_failures(rt.folder / "failed_rewards" / f"rlvr-{step.index + 1:06d}.jsonl")
        step.finish(metrics, batch, columns, reward_versions(algorithm.custom_rewards, algorithm.verifier_weight))


def sample(rt: Runtime, step: Step) -> tuple[Rewarded, int]:
    """Returns a step's rewarded rollouts, and the number of tries that dynamic sampling took."""
    config, sampling = rt.config, rt.config.rollout.rlvr
    if config.algorithm.rlvr.dynamic_sampling is None:
        return reward_rollouts(rt.generate(step.problems(sampling.prompts), sampling, step.seed), config), 1
    tries = config.algorithm.rlvr.dynamic_sampling.tries
    parts: list[Rewarded] = []
    for index, problems in enumerate(step.batches(config.dynamic_prompts, tries)):
        newest = reward_rollouts(rt.generate(problems, sampling, step.seed + index), config)
        parts.append(informative(newest, sampling.prompts))
        whole = join(parts)
        if len(whole.batch.problems) >= sampling.prompts:
            return select(whole, list(range(sampling.prompts))), index + 1
    # too few groups are informative: take those, or without any the last try's
    taken = whole if len(whole.batch.problems) else newest
    return taken._replace(rewards=taken.rewards._replace(failures=whole.rewards.failures)), tries


def reward_rollouts(batch: RolloutBatch, config: Config) -> Rewarded:
    """Rewards the responses."""
    settings = config.algorithm.rlvr
    views = [ProblemView.of(problem) for problem in batch.problems]
    rewards = rewards_of(
        batch.texts,
        batch.lengths.tolist(),
        [views[rollout.prompt] for rollout in batch.rollouts],
        settings.custom_rewards,
        verifier_weight=settings.verifier_weight,
    )
    value = torch.tensor(rewards.total)
    # format and length tell responses apart where all are right or all are wrong; without the built-in reward, accuracy
    # says nothing about the custom ones
    accuracy = torch.tensor([verdict.accuracy for verdict in rewards.verdicts])
    compared = accuracy if settings.verifier_weight else value
    rule = settings.overlong
    if rule is not None:
        limit = config.rollout.rlvr.max_new_tokens
        value = value + overlong_penalty(
            batch.lengths, limit=limit, buffer=config.overlong_buffer, penalty=rule.penalty
        )
    return Rewarded(batch, rewards, value, compared)


def informative(rewarded: Rewarded, most: int) -> Rewarded:
    """Returns the first `most` problems with right and wrong responses, and these responses."""
    keep = informative_groups(rewarded.compared, rewarded.batch.group)
    owners = rewarded.batch.group[keep].unique().tolist()[:most]
    return select(rewarded, owners)


def select(rewarded: Rewarded, chosen: list[int]) -> Rewarded:
    """Returns some problems of a batch, renumbered, with their responses."""
    batch, place = rewarded.batch, {p: n for n, p in enumerate(chosen)}
    kept = [s for s, rollout in enumerate(batch.rollouts) if rollout.prompt in place]
    part = RolloutBatch(
        [batch.problems[p] for p in chosen],
        [batch.prompts[p] for p in chosen],
        [replace(batch.rollouts[s], prompt=place[batch.rollouts[s].prompt]) for s in kept],
        [batch.texts[s] for s in kept],
    )
    return Rewarded(part, rewarded.rewards.select(kept), rewarded.total[kept], rewarded.compared[kept])


def join(parts: list[Rewarded]) -> Rewarded:
    """Joins several batches into one."""
    whole = RolloutBatch([], [], [], [])
    for part in parts:
        shift, batch = len(whole.problems), part.batch
        whole = RolloutBatch(
            whole.problems + batch.problems,
            whole.prompts + batch.prompts,
            whole.rollouts + [replace(rollout, prompt=rollout.prompt + shift) for rollout in batch.rollouts],
            whole.texts + batch.texts,
        )
    rewards = join_rewards([part.rewards for part in parts])
    total, compared = (torch.cat([getattr(part, name) for part in parts]) for name in ("total", "compared"))
    return Rewarded(whole, rewards, total, compared)
