"""The policy's update on rollouts and their advantages, shared by alignment and RLVR; and on given responses.

P prompts, S responses, T their tokens.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism.config import MemorySettings, PolicyLoss
from prism.data.problem import Problem
from prism.models.policy import Policy, ResponsePack, pack_responses, response_ids
from prism.models.prompts import EncodedPrompt, PromptEncoder
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Rollout
from prism.runtime.optimiser import StageOptimiser, Update
from prism_kernels import PolicyMetrics, linear_policy_loss, policy_loss

# (S,), or one number per token of each response
Advantages = Tensor | Sequence[Tensor]


def imitate(
    policy: Policy,
    problems: Sequence[Problem],
    encoder: PromptEncoder,
    optimiser: StageOptimiser,
    memory: MemorySettings,
) -> dict[str, float]:
    """Updates the policy once on the teachers' responses; returns metrics.

    The loss is the mean over all response tokens of the batch, independent of how they are packed.
    """
    prompts = [problem.encoded(encoder) for problem in problems]
    responses = response_ids([problem.teacher or "" for problem in problems], encoder)
    owner = range(len(problems))
    tokens = sum(map(len, responses))
    with optimiser.step(lambda: _saved(prompts, responses, owner)) as update:
        for part in pack_responses(prompts, responses, owner, encoder, memory.pack_tokens):
            part = part.to(policy.device)
            out = policy(part.pack, part.pixel_values, part.image_grid_thw, cache_bytes=memory.head_cache_bytes)
            update.backward(-out.logp.sum() / tokens)
    return {
        "loss": update.loss,
        "tokens": tokens,
        "lr": update.lr,
        "grad_norm": update.grad_norm,
        "skipped": int(update.skipped is not None),
    }


def policy_update(
    policy: Policy,
    batch: RolloutBatch,
    advantages: Advantages,
    encoder: PromptEncoder,
    optimiser: StageOptimiser,
    loss: PolicyLoss,
    memory: MemorySettings,
    *,
    temperature: float,
    longest: int,
    responses: int | None = None,
    reference: Policy | None = None,
) -> dict[str, float]:
    """Updates the policy on a step's rollouts; returns metrics.

    The loss is divided by the tokens or sequences of a whole update, so that packing does not change it.

    Args:
        policy: the policy whose weights sampled the rollouts.
        batch: the rollouts.
        advantages: one per response, or one per token of each response.
        encoder: the policy's encoder.
        optimiser: the policy's optimiser.
        loss: the algorithm.
        memory: budget of a pack.
        temperature: temperature of the sampling.
        longest: the most tokens that a response could have had.
        responses: responses of one update; None: all, and the policy is still the one that sampled.
        reference: the policy that the KL term holds on to, if the loss has one.
    """
    rollouts = batch.rollouts
    size = len(rollouts) if responses is None else responses
    parts = [list(range(start, min(start + size, len(rollouts)))) for start in range(0, len(rollouts), size)]
    packs = [_packs(batch, chosen, encoder, memory.pack_tokens) for chosen in parts]
    options = loss.loss_options(longest)
    # the first of several updates is on-policy too, but its ratio of 1 must be exact for all
    old = None
    if len(parts) > 1:
        old = [[_logp(policy, part, temperature) for part in group] for group in packs]
    metrics: PolicyMetrics | None = None
    gaps: list[Tensor] = []
    updates: list[Update] = []
    for index, group in enumerate(packs):
        options["denominator"] = _denominator(rollouts, parts[index], loss.aggregate)
        with optimiser.step(partial(_saved_rollouts, batch, advantages, parts[index])) as update:
            for place, part in enumerate(group):
                before = None if old is None else old[index][place]
                anchor = None if reference is None else _logp(reference, part, temperature)
                value, measured, gap = _loss(
                    policy, part, batch, advantages, before, anchor, options, temperature, memory
                )
                update.backward(value)
                gaps.append(gap)
                metrics = measured if metrics is None else metrics + measured
        updates.append(update)
    return {
        "loss": sum(update.loss for update in updates) / max(1, len(updates)),
        **_means(metrics, loss, entropy=not memory.fused_policy_loss or loss.entropy_coef != 0),
        "engine_gap": float(torch.stack(gaps).max()),
        **_applied(updates),
    }


def _packs(batch: RolloutBatch, chosen: Sequence[int], encoder: PromptEncoder, budget: int) -> list[ResponsePack]:
    responses = [batch.rollouts[s].token_ids for s in chosen]
    owner = [batch.rollouts[s].prompt for s in chosen]
    packs = pack_responses(batch.prompts, responses, owner, encoder, budget)
    return [part._replace(responses=tuple(chosen[s] for s in part.responses)) for part in packs]


def _denominator(rollouts: Sequence[Rollout], chosen: Sequence[int], aggregate: str) -> float:
    if aggregate == "token_mean":
        return float(sum(len(rollouts[s].token_ids) for s in chosen))
    return float(len(chosen))


@torch.no_grad()
def _logp(policy: Policy, part: ResponsePack, temperature: float) -> Tensor:
    part = part.to(policy.device)
    return policy(part.pack, part.pixel_values, part.image_grid_thw, temperature=temperature).logp


def _loss(
    policy: Policy,
    part: ResponsePack,
    batch: RolloutBatch,
    advantages: Advantages,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    options: dict[str, Any],
    temperature: float,
    memory: MemorySettings,
) -> tuple[Tensor, PolicyMetrics, Tensor]:
    """Returns a pack's share of the loss, its metrics, and the largest error of the engine's log-probabilities."""
    part = part.to(policy.device)
    device = policy.device
    inputs = part.pack, part.pixel_values, part.image_grid_thw
    rollouts = [batch.rollouts[s] for s in part.responses]
    sampled = torch.cat([r.log_probs for r in rollouts]).to(device)
    modelled = torch.cat([r.model_log_probs for r in rollouts]).to(device)
    advantage = torch.cat([_of_tokens(batch, advantages, s) for s in part.responses]).to(device)
    options = {**options, "rollout_logp": sampled if options["correction"] else None, "ref_logp": ref_logp}
    columns = old_logp, advantage, part.pack.cu_branch
    if memory.fused_policy_loss:
        hidden, target = policy.predictors(*inputs)
        loss, metrics, logp = linear_policy_loss(
            hidden, policy.head, target, *columns, temperature=temperature, **options
        )
    else:
        out = policy(*inputs, temperature=temperature, entropy=True, cache_bytes=memory.head_cache_bytes)
        loss, metrics = policy_loss(out.logp, *columns, entropy=out.entropy, **options)
        logp = out.logp.detach()
    current = logp if old_logp is None else old_logp
    return loss, metrics, (modelled - current).abs().max()


def _of_tokens(batch: RolloutBatch, advantages: Advantages, response: int) -> Tensor:
    """Returns the advantages of a response's tokens."""
    value = advantages[response]
    return value if value.dim() else value.expand(len(batch.rollouts[response].token_ids))


def _means(metrics: PolicyMetrics | None, loss: PolicyLoss, *, entropy: bool) -> dict[str, float]:
    """Returns the means over the tokens of all updates, as far as the loss has them."""
    names = ["entropy"] if entropy else []
    names += ["clipped_low", "clipped_high", "clipped_dual", "approx_kl", "ratio_max", "tokens"]
    names += ["ref_kl"] if loss.kl_coef else []
    names += ["correction_raw", "correction_used", "correction_clipped", "ess"] if loss.correction else []
    means = {} if metrics is None else metrics.means()
    return {name: means[name] for name in names if name in means}


def _applied(updates: Sequence[Update]) -> dict[str, float]:
    """Returns the mean gradient norm of the applied updates, and the number of skipped ones."""
    norms = [update.grad_norm for update in updates if update.skipped is None]
    return {
        "lr": updates[-1].lr,
        "grad_norm": sum(norms) / len(norms) if norms else math.nan,
        "skipped": len(updates) - len(norms),
    }


def _saved(
    prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[int]], owner: Sequence[int]
) -> dict[str, Any]:
    """Returns prompts with their images, and responses with their prompts, to look at after a failed update."""
    return {
        "prompts": [
            {"input_ids": p.input_ids, "pixel_values": p.pixel_values, "image_grid_thw": p.image_grid_thw}
            for p in prompts
        ],
        "responses": [list(response) for response in responses],
        "owner": list(owner),
    }


def _saved_rollouts(batch: RolloutBatch, advantages: Advantages, chosen: Sequence[int]) -> dict[str, Any]:
    rollouts = [batch.rollouts[s] for s in chosen]
    return {
        **_saved(batch.prompts, [r.token_ids for r in rollouts], [r.prompt for r in rollouts]),
        "log_probs": [r.log_probs for r in rollouts],
        "model_log_probs": [r.model_log_probs for r in rollouts],
        "advantage": [_of_tokens(batch, advantages, s) for s in chosen],
    }
