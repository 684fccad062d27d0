"""verl on our ops: `patch()` replaces its log-probabilities, `register()` adds PRISM's advantages and losses by name.

Each of verl's many processes needs both calls: write them into a module and name it in `VERL_USE_EXTERNAL_MODULES`,
which verl imports with itself::

    from prism_kernels.integrations import verl
    verl.patch()
    verl.register()

B responses of L tokens, V columns, D width, T rows.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.check import fail
from prism_kernels.integrations import one_pass
from prism_kernels.integrations.padded import padded_policy_loss
from prism_kernels.integrations.patching import (
    Patch,
    Registration,
    Replacement,
    everywhere,
    require_parameters,
    require_version,
)
from prism_kernels.ops.group_advantage import group_advantage
from prism_kernels.ops.linear_logprob import linear_logprob
from prism_kernels.ops.prism_advantage import prism_advantage
from prism_kernels.ops.token_logprob import token_logprob

NAME = "integrations.verl"
VERSIONS = ("0.9.1",)
AGGREGATES = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
}
Channels = Callable[..., Mapping[str, Tensor]]


def patch(*, cache_bytes: int | None = 0) -> Patch:
    """Replaces verl's fused heads and its functions of logits; returns the patch, to undo it.

    These are `linear_cross_entropy` and `FusedLinearForPPO`, `logprobs_from_logits`, `entropy_from_logits` (chunked
    or not) and `calculate_sum_pi_squared_from_logits`. Results are in fp32. An engine keeps the entropy function that
    it was made with: patch first.

    Args:
        cache_bytes: memory that a fused head may keep for its backward pass, as in `linear_logprob`: 0 keeps nothing,
            None all.
    """
    require_version(NAME, "verl", VERSIONS)
    kernel = import_module("verl.utils.kernel.linear_cross_entropy")
    functional = import_module("verl.utils.torch_functional")
    fused = import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    expected = {
        kernel.LinearCrossEntropy.forward: (
            *("ctx", "hidden", "weight", "labels"),
            *("temperature", "reduction", "dist_process_group"),
        ),
        fused.forward: ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
        functional.logprobs_from_logits: ("logits", "labels", "inplace_backward"),
        functional.entropy_from_logits: ("logits",),
        functional.entropy_from_logits_with_chunking: ("logits", "chunk_size"),
        functional.calculate_sum_pi_squared_from_logits: ("logits",),
    }
    for function, names in expected.items():
        require_parameters(NAME, function, names)
    linear_cross_entropy, forward = _heads(cache_bytes)
    ours = (
        *(logprobs_from_logits, entropy_from_logits),
        *(entropy_from_logits_with_chunking, calculate_sum_pi_squared_from_logits),
    )
    replacements = [
        *everywhere(kernel, "linear_cross_entropy", linear_cross_entropy),
        Replacement(fused, "forward", forward),
        *(r for function in ours for r in everywhere(functional, function.__name__, function)),
    ]
    return Patch(NAME, replacements)


def _heads(cache_bytes: int | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the replacements of `linear_cross_entropy` and of `FusedLinearForPPO.forward`."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float | Tensor = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        if reduction.lower() != "none":
            fail(NAME, 'reduction="none"', repr(reduction), NotImplementedError)
        if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
            # verl leaves it to Megatron's layers to sum the gradient of hidden over ranks
            size = dist.get_world_size(dist_process_group)
            fail(NAME, "tensor_model_parallel_size=1 with fused kernels", size, NotImplementedError)
        logp, entropy = forward(None, hidden, weight, labels, temperature)
        return logp.flatten(), entropy.flatten()

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        target = input_ids.to(torch.int64)
        out = linear_logprob(
            hidden_states, vocab_weights, target, temperature=temperature, entropy=True, cache_bytes=cache_bytes
        )
        assert out.entropy is not None
        return out.logp, out.entropy

    return linear_cross_entropy, forward


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool | None = None) -> Tensor:
    """Returns the log-probabilities of the labels, in fp32, in one pass with `entropy_from_logits` of the same tensor.

    Args:
        logits: (..., V).
        labels: of the logits' leading shape.
        inplace_backward: True writes the gradient over the logits, which must have no other use. None is False: verl's
            own default is True, but its callers that rely on it pass True.
    """
    target = labels.to(torch.int64)
    if inplace_backward:
        return token_logprob(logits, target, inplace_backward=True).logp
    return one_pass.logprobs(logits, target)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Returns the entropies of the rows of logits (..., V), in fp32, in one pass with their log-probabilities.

    The two share a graph: backward passes through one and later through the other must retain it.
    """
    return one_pass.entropies(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Returns the entropies of the rows of logits (T, V); memory is saved without chunks."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Returns the sums of the squared probabilities of logits (..., V), in fp32, as constants."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprob(logits.detach(), target).sum_pi_squared


def channels_of_tokens(token_level_rewards: Tensor, response_mask: Tensor) -> dict[str, Tensor]:
    """Returns the reasoning score, on the last valid token, and the perception score, the sum over the other tokens."""
    position = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (position * response_mask.bool()).argmax(1, keepdim=True)
    reasoning = token_level_rewards.gather(1, last)[:, 0]
    return {"perception": token_level_rewards.sum(1) - reasoning, "reasoning": reasoning}


def register(*, channels: Channels = channels_of_tokens, **options: Any) -> Registration:
    """Registers PRISM's advantages and losses in verl; returns the registration, to undo it.

    `algorithm.adv_estimator`: `prism` is `prism_advantage`, `prism_grpo` is `group_advantage` (a group of one has the
    advantage 0). `actor.policy_loss.loss_mode`: `prism_grpo` is verl's `vanilla`, `prism_gspo` its `gspo`,
    `prism_dapo` is `prism_grpo` with `loss_agg_mode: token-mean` alone; clip ratios, dual clip, aggregation and rollout
    correction come from verl's configuration. A loss costs one synchronisation, for its metrics.

    Args:
        channels: returns prism_advantage's perception and reasoning, and format_ok and accuracy where its mode needs
            them, each (B,), from verl's token_level_rewards (B, L) and response_mask (B, L).
        options: of prism_advantage: mode, alpha, normalize, ...
    """
    require_version(NAME, "verl", VERSIONS)
    core = import_module("verl.trainer.ppo.core_algos")
    known = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights")
    require_parameters(NAME, core.compute_policy_loss_vanilla, known)
    estimators, losses = core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY
    entries = [
        (estimators, "prism", _prism_estimator(channels, options)),
        (estimators, "prism_grpo", grpo_advantage),
        (losses, "prism_grpo", grpo_loss),
        (losses, "prism_dapo", dapo_loss),
        (losses, "prism_gspo", gspo_loss),
    ]
    return Registration(NAME, entries)


def _prism_estimator(channels: Channels, options: Mapping[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    def prism_estimator(
        token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {**channels(token_level_rewards, response_mask), **options}
        perception, reasoning = arguments.pop("perception"), arguments.pop("reasoning")
        advantage = prism_advantage(perception, reasoning, _groups(index, perception), **arguments)
        return _per_token(advantage, response_mask)

    return prism_estimator


def grpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Returns each response's advantage within its group at each of its tokens, (B, L), twice: verl wants returns too.

    Args:
        token_level_rewards: (B, L); a response's reward is their sum.
        response_mask: (B, L).
        index: (B,), equal entries are a group.
        epsilon: added to the standard deviation.
        norm_adv_by_std_in_grpo: whether to divide by it; None: the setting of `config`, or True.
        config: verl's `algorithm` configuration.
    """
    scaled = norm_adv_by_std_in_grpo
    if scaled is None:
        scaled = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    reward = token_level_rewards.sum(1)
    scale = "std" if scaled else "none"
    return _per_token(group_advantage(reward, _groups(index, reward), scale=scale, eps=epsilon), response_mask)


def grpo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the clipped loss with a ratio per token and a dual clip, and verl's metrics."""
    options = {"ratio": "token", "dual_clip": float(config.get("clip_ratio_c", 3.0))}
    return _loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options)


def dapo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Returns `grpo_loss` as DAPO's mean over tokens."""
    if loss_agg_mode != "token-mean":
        fail(NAME, "loss_agg_mode: token-mean for prism_dapo", loss_agg_mode)
    return grpo_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


def gspo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Returns the clipped loss with a ratio per sequence (the paper's is seq-mean-token-mean), and verl's metrics."""
    options = {"ratio": "sequence"}
    return _loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights, options)


def _loss(
    old: Tensor,
    new: Tensor,
    advantage: Tensor,
    mask: Tensor,
    mode: str,
    config: Any,
    weights: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    if mode not in AGGREGATES:
        fail(NAME, f"loss_agg_mode among {', '.join(AGGREGATES)}", repr(mode))
    # weights of the objective are positive, so that they may multiply the advantage
    weighted = advantage if weights is None else advantage * weights
    low, high = (float(config.clip_ratio if x is None else x) for x in (config.clip_ratio_low, config.clip_ratio_high))
    horizon = None
    if mode == "seq-mean-token-sum-norm":
        horizon = float(config.global_batch_info.get("loss_scale_factor") or new.shape[1])
    loss, metrics = padded_policy_loss(
        new,
        old,
        weighted,
        mask.bool(),
        clip=(low, high),
        aggregate=AGGREGATES[mode],
        denominator=_denominator(mode, config.global_batch_info),
        horizon=horizon,
        **options,
    )
    means = metrics.means()
    return loss, {
        "actor/pg_clipfrac": means["clipped_low"] + means["clipped_high"],
        "actor/ppo_kl": means["approx_kl"],
        "actor/pg_clipfrac_lower": means["clipped_dual"],
    }


def _denominator(mode: str, batch: Mapping[str, Any]) -> float | None:
    """Returns one rank's denominator for the whole batch; None: the op counts this micro-batch."""
    ranks = batch.get("dp_size") or 1
    if mode == "token-sum":
        return 1 / ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = batch.get(name)
    if count is None and ranks > 1:
        fail(NAME, f"{name} with dp_size > 1", None)
    return None if count is None else float(count) / ranks


def _groups(index: np.ndarray, like: Tensor) -> Tensor:
    """Returns the groups as ids in [0, B)."""
    return torch.as_tensor(np.unique(index, return_inverse=True)[1], device=like.device)


def _per_token(advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = advantage[:, None] * mask
    return spread, spread
