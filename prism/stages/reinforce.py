"""The policy's step on rollouts, whatever gave their advantages: alignment and RLVR share it.

P prompts, S responses, T their tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism.config.algorithms import PolicyLoss
from prism.config.sections import Memory
from prism.models.batches import ResponsePack, pack_responses
from prism.models.policy import Policy
from prism.models.prompts import EncodedPrompt, PromptEncoder
from prism.rollout.engine import Rollout
from prism.runtime.inspection import of_responses
from prism.runtime.optimiser import Stepped, Stepper
from prism_kernels import PolicyMetrics, policy_loss


@dataclass(frozen=True, eq=False)
class Experience:
    """The rollouts of a step and what they are worth.

    Args:
        prompts: P prompts.
        rollouts: S responses, each of the prompt that it names.
        advantage: (S,), or a list of S tensors, one number for each of a response's tokens.
    """

    prompts: Sequence[EncodedPrompt]
    rollouts: Sequence[Rollout]
    advantage: Tensor | Sequence[Tensor]

    def of_tokens(self, response: int) -> Tensor:
        """Returns the advantages of a response's tokens."""
        value = self.advantage[response]
        return value if value.dim() else value.expand(len(self.rollouts[response].token_ids))

    def inspected(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Returns some responses with all that a step takes of them."""
        rollouts = [self.rollouts[s] for s in chosen]
        return {
            **of_responses(self.prompts, [r.token_ids for r in rollouts], [r.prompt for r in rollouts]),
            "log_probs": [r.log_probs for r in rollouts],
            "model_log_probs": [r.model_log_probs for r in rollouts],
            "advantage": [self.of_tokens(s) for s in chosen],
        }


def policy_update(
    policy: Policy,
    experience: Experience,
    encoder: PromptEncoder,
    stepper: Stepper,
    loss: PolicyLoss,
    memory: Memory,
    *,
    temperature: float,
    longest: int,
    batch: int | None = None,
    reference: Policy | None = None,
) -> dict[str, float]:
    """Takes the optimiser steps on a step's rollouts; returns what is logged.

    The loss is divided by the tokens or sequences of a whole optimiser step: how it is cut into packs changes nothing.

    Args:
        policy: the policy, whose weights sampled the rollouts.
        experience: the rollouts.
        encoder: of the policy.
        stepper: its optimiser.
        loss: the algorithm.
        memory: packs.
        temperature: that of the sampling.
        longest: the most tokens that a response could have had.
        batch: responses of an optimiser step; None: all, and the policy is still the one that sampled.
        reference: the policy that the KL term holds on to, where the loss has one.
    """
    rollouts = experience.rollouts
    size = len(rollouts) if batch is None else batch
    parts = [list(range(start, min(start + size, len(rollouts)))) for start in range(0, len(rollouts), size)]
    packs = [_packs(experience, chosen, encoder, memory.pack_tokens) for chosen in parts]
    options = loss.loss_options(longest)
    # the first of several steps is on-policy too, but its ratio of 1 must be exact for all
    old = None
    if len(parts) > 1:
        old = [[_logp(policy, part, temperature) for part in group] for group in packs]
    metrics: PolicyMetrics | None = None
    total, gaps, steps = 0.0, [], []
    for index, group in enumerate(packs):
        stepper.begin()
        losses = []
        denominator = _denominator(rollouts, parts[index], loss.aggregate)
        for place, part in enumerate(group):
            before = None if old is None else old[index][place]
            held = None if reference is None else _logp(reference, part, temperature)
            value, found, difference = _backward(
                policy, part, experience, before, held, {**options, "denominator": denominator}, temperature, memory
            )
            losses.append(value)
            gaps.append(difference)
            metrics = found if metrics is None else metrics + found
        steps.append(stepper.end(losses, experience.inspected(parts[index])))
        total += float(sum(losses))
    return {
        "loss": total / max(1, len(parts)),
        **_figures(metrics, loss),
        # not Python's, which passes over NaN
        "engine_gap": float(torch.tensor(gaps).max()),
        **_of_steps(steps),
    }


def _packs(experience: Experience, chosen: Sequence[int], encoder: PromptEncoder, budget: int) -> list[ResponsePack]:
    responses = [experience.rollouts[s].token_ids for s in chosen]
    owner = [experience.rollouts[s].prompt for s in chosen]
    packs = pack_responses(experience.prompts, responses, owner, encoder, budget)
    return [part._replace(responses=tuple(chosen[s] for s in part.responses)) for part in packs]


def _denominator(rollouts: Sequence[Rollout], chosen: Sequence[int], aggregate: str) -> float:
    if aggregate == "token_mean":
        return float(sum(len(rollouts[s].token_ids) for s in chosen))
    return float(len(chosen))


@torch.no_grad()
def _logp(policy: Policy, part: ResponsePack, temperature: float) -> Tensor:
    part = part.to(policy.device)
    return policy(part.pack, part.pixel_values, part.image_grid_thw, temperature=temperature).logp


def _backward(
    policy: Policy,
    part: ResponsePack,
    experience: Experience,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    options: dict[str, Any],
    temperature: float,
    memory: Memory,
) -> tuple[Tensor, PolicyMetrics, float]:
    """Returns a pack's share of the loss, its metrics, and how far the engine's log-probabilities are off at most."""
    part = part.to(policy.device)
    device = policy.device
    out = policy(
        part.pack,
        part.pixel_values,
        part.image_grid_thw,
        temperature=temperature,
        entropy=True,
        cache_bytes=memory.head_cache_bytes,
    )
    rollouts = [experience.rollouts[s] for s in part.responses]
    sampled = torch.cat([r.log_probs for r in rollouts]).to(device)
    modelled = torch.cat([r.model_log_probs for r in rollouts]).to(device)
    loss, metrics = policy_loss(
        out.logp,
        old_logp,
        torch.cat([experience.of_tokens(s) for s in part.responses]).to(device),
        part.pack.cu_branch,
        rollout_logp=sampled if options["correction"] else None,
        ref_logp=ref_logp,
        entropy=out.entropy,
        **options,
    )
    loss.backward()
    reference = out.logp.detach() if old_logp is None else old_logp
    return loss.detach().cpu(), metrics, float((modelled - reference).abs().max())


def _figures(metrics: PolicyMetrics | None, loss: PolicyLoss) -> dict[str, float]:
    """Returns the means over the tokens of all optimiser steps, of what the loss has."""
    names = ["entropy", "clipped_low", "clipped_high", "clipped_dual", "approx_kl", "ratio_max", "tokens"]
    names += ["ref_kl"] if loss.kl_coef else []
    names += ["correction_raw", "correction_used", "correction_clipped", "ess"] if loss.correction else []
    means = {} if metrics is None else metrics.means()
    return {name: means[name] for name in names if name in means}


def _of_steps(steps: Sequence[Stepped]) -> dict[str, float]:
    """Returns the mean gradient norm of the optimiser steps that were taken, and how many were not."""
    norms = [one.grad_norm for one in steps if one.skipped is None]
    return {
        "lr": steps[-1].lr,
        "grad_norm": sum(norms) / len(norms) if norms else math.nan,
        "skipped": len(steps) - len(norms),
    }
