"""verl's own functions, called from its installed package, and the corresponding calls of ours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peer_cases import AdvantageCase, Batch, HeadCase, LossCase, Result, head_case, head_result
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils import tensordict_utils as tu
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.torch_functional import (
    calculate_sum_pi_squared_from_logits,
    entropy_from_logits,
    logprobs_from_logits,
)
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

VERSION = "0.9.1"
METRICS = {
    "clipped_low+clipped_high": "actor/pg_clipfrac",
    "approx_kl": "actor/ppo_kl",
    "clipped_dual": "actor/pg_clipfrac_lower",
}
AGGREGATES = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
}
ESTIMATORS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl", "k1+": "kl+", "k3+": "low_var_kl+"}


@dataclass(frozen=True)
class Call:
    """A configuration of verl: fields of ActorConfig and PolicyLossConfig, and the options that come with the data."""

    mode: str = "vanilla"
    actor: dict[str, Any] = field(default_factory=dict)
    # rollout_is and its threshold: a number truncates weights, "low_high" drops those outside
    correction: tuple[str, float | str] | None = None
    bypass: RolloutCorrectionConfig | None = None
    entropy: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    on_policy: bool = False


def data_of(batch: Batch, columns: dict[str, Tensor], counts: dict[str, int]) -> TensorDict:
    """Returns verl's batch: prompts of one token, and nested columns over the responses."""
    lengths = batch.cu_seqlens.diff().tolist()

    def nested(x: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(x.split(lengths)), layout=torch.jagged)

    prompts = torch.nested.as_nested_tensor([torch.zeros(1, dtype=torch.int64)] * len(lengths), layout=torch.jagged)
    fields = {
        "prompts": prompts,
        "responses": nested(torch.zeros(sum(lengths), dtype=torch.int64)),
        "response_mask": nested(batch.mask.long()),
        **{name: nested(x) for name, x in columns.items()},
    }
    known = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **counts}
    return tu.get_tensordict(fields, non_tensor_dict=known)


def with_prompts(batch: Batch, x: Tensor) -> Tensor:
    """Returns x (T,) as the model outputs it: each token's entry is at the position before the token."""
    pieces = x.split(batch.cu_seqlens.diff().tolist())
    return torch.cat([torch.cat((piece, x.new_zeros(1))) for piece in pieces])


def actor_config(call: Call) -> ActorConfig:
    more = {} if call.bypass is None else {"rollout_correction": call.bypass}
    policy = PolicyLossConfig(loss_mode=call.mode, **more)
    # verl's default clip_ratio_c of 3 exceeds all ratios of these batches
    defaults = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.5}
    return ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy, **{**defaults, **call.actor}
    )


def rollout_weights(batch: Batch, level: str, threshold: float | str) -> tuple[Tensor, dict[str, float]]:
    """Returns verl's rollout correction weights (S, L), and the metrics that count tokens as ours do."""
    behind = batch.pad(batch.columns["old_logp"] - batch.columns["rollout_logp"])
    weights, metrics = compute_rollout_correction_weights(behind, batch.pad(batch.mask.long()), level, threshold)
    found = {"correction_used": metrics["rollout_is_mean"]}
    if "rollout_is_oob_ratio" in metrics:
        found["correction_clipped"] = metrics["rollout_is_oob_ratio"]
    elif level == "token":
        found["correction_clipped"] = metrics["rollout_is_ratio_fraction_high"]
    return weights, found


def loss(batch: Batch, call: Call) -> Result:
    """Returns the result of verl's `ppo_loss`, with its KL and entropy terms."""
    logp = batch.columns["logp"].clone().requires_grad_()
    entropy = batch.columns["entropy"].clone().requires_grad_()
    old = batch.columns["rollout_logp" if call.bypass else "old_logp"]
    columns = {
        "old_log_probs": batch.columns["logp"] if call.on_policy else old,
        "advantages": batch.advantage.repeat_interleave(batch.cu_seqlens.diff().long()),
        "ref_log_prob": batch.columns["ref_logp"],
    }
    corrected = {}
    if call.correction:
        weights, corrected = rollout_weights(batch, *call.correction)
        columns["rollout_is_weights"] = batch.pack(weights)
    output = {"log_probs": with_prompts(batch, logp)}
    if call.entropy:
        output["entropy"] = with_prompts(batch, entropy)
    value, metrics = ppo_loss(actor_config(call), output, data_of(batch, columns, call.counts))
    grads = torch.autograd.grad(value, [logp, entropy], allow_unused=True, materialize_grads=True)
    found = {name: metrics[key].aggregate() for name, key in METRICS.items() if key in metrics} | corrected
    if call.actor.get("use_kl_loss") and call.actor.get("loss_agg_mode", "token-mean") == "token-mean":
        found["ref_kl"] = metrics["kl_loss"].aggregate()
    if call.entropy and "loss_agg_mode" not in call.actor:
        found["entropy"] = metrics["actor/entropy_loss"].aggregate()
    if call.mode in ("gspo", "cispo"):
        # these losses have no dual clip, and verl reports 0
        assert found["clipped_dual"] == 0
    if call.bypass:
        # verl's metric compares with the rollout policy
        found.pop("approx_kl")
    return Result(value.detach(), *grads, found)


def _losses() -> dict[str, tuple[LossCase, Call]]:
    cases: dict[str, tuple[LossCase, Call]] = {}
    clip = {"clip": (0.2, 0.28)}
    modes = {
        "vanilla": {**clip, "dual_clip": 1.5},
        "gspo": {**clip, "ratio": "sequence"},
        "cispo": {**clip, "objective": "cispo"},
        "gpg": {"objective": "reinforce"},
    }
    for mode, options in modes.items():
        for aggregate, name in AGGREGATES.items():
            for batch in ("masked", "silent"):
                # without loss_scale_factor verl uses the length of the matrix
                horizon = {"horizon": 11.0} if aggregate.endswith("norm") else {}
                cases[f"{mode}-{name}-{batch}"] = (
                    LossCase(batch, {**options, "aggregate": aggregate, **horizon}),
                    Call(mode, {"loss_agg_mode": name}),
                )
        cases[f"{mode}-plain"] = LossCase("plain", options), Call(mode)
        if mode != "gpg":
            cases[f"{mode}-on-policy"] = (
                LossCase("masked", options, on_policy=True),
                Call(mode, {}, on_policy=True),
            )
    vanilla = modes["vanilla"]
    cases["horizon-40"] = (
        LossCase("masked", {**vanilla, "aggregate": "seq_mean_token_sum_norm", "horizon": 40.0}),
        Call(actor={"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 40}),
    )
    cases["token-sum"] = (
        LossCase("masked", {**vanilla, "denominator": 1.0}),
        Call(actor={"loss_agg_mode": "token-sum"}),
    )
    cases["global-tokens"] = (
        # the gradients of two ranks are averaged, so each divides by half of all tokens
        LossCase("silent", {**vanilla, "denominator": 50.0}),
        Call(counts={"dp_size": 2, "batch_num_tokens": 100}),
    )
    cases["global-sequences"] = (
        LossCase("silent", {**vanilla, "aggregate": "seq_mean_token_mean", "denominator": 6.0}),
        Call(actor={"loss_agg_mode": "seq-mean-token-mean"}, counts={"dp_size": 2, "global_batch_size": 12}),
    )
    for estimator, name in ESTIMATORS.items():
        cases[f"kl-{name}"] = (
            LossCase("masked", {**vanilla, "kl_coef": 0.3, "kl_estimator": estimator}, ("ref_logp",)),
            Call(actor={"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": name}),
        )
    cases["kl-per-sequence-and-entropy"] = (
        LossCase(
            "silent",
            {
                **vanilla,
                "aggregate": "seq_mean_token_mean",
                "kl_coef": 0.3,
                "kl_estimator": "k3",
                "entropy_coef": 0.1,
            },
            ("ref_logp", "entropy"),
        ),
        Call(
            actor={
                "loss_agg_mode": "seq-mean-token-mean",
                "use_kl_loss": True,
                "kl_loss_coef": 0.3,
                "kl_loss_type": "k3",
                "entropy_coeff": 0.1,
            },
            entropy=True,
        ),
    )
    cases["entropy"] = (
        LossCase("masked", {**vanilla, "entropy_coef": 0.1}, ("entropy",)),
        Call(actor={"entropy_coeff": 0.1}, entropy=True),
    )
    rollout = ("rollout_logp",)
    for mode in ("vanilla", "cispo"):
        for level in ("token", "sequence"):
            low, high = (0.5, 1.5) if level == "token" else (0.3, 3.0)
            for rule, threshold, bounds in (("tis", 1.3, (0.0, 1.3)), ("mask", f"{low}_{high}", (low, high))):
                options = {**modes[mode], "correction": f"{level}_{rule}", "correction_bounds": bounds}
                cases[f"{mode}-{level}-{rule}"] = (
                    LossCase("masked", options, rollout),
                    Call(mode, correction=(level, threshold)),
                )
    for level in ("token", "sequence"):
        # verl's ratio is straight-through: a weight per token has the gradient of an advantage per token
        options = {**modes["gspo"], "correction": f"{level}_tis", "correction_bounds": (0.0, 1.3)}
        cases[f"gspo-{level}-tis"] = (
            LossCase("masked", options, rollout, per_token=True),
            Call("gspo", correction=(level, 1.3)),
        )
        # the weight is the ratio of the current policy to the rollout policy
        options = {"objective": "reinforce", "correction": f"{level}_tis", "correction_bounds": (0.0, 1.3)}
        cases[f"bypass-reinforce-{level}-tis"] = (
            LossCase("masked", options, rollout, on_policy=True),
            Call(
                "bypass_mode",
                bypass=RolloutCorrectionConfig(
                    bypass_mode=True, loss_type="reinforce", rollout_is=level, rollout_is_threshold=1.3
                ),
            ),
        )
    return cases


LOSSES = _losses()

# eight samples in three unordered groups
REWARD = [1.0, 0.25, 0.5, 0.0, 1.0, 0.75, 0.5, 0.125]
GROUP = [2, 0, 2, 1, 0, 2, 1, 0]


def advantage(case: AdvantageCase, estimator: str, config: dict[str, Any]) -> Tensor:
    """Returns the advantage of each sample by verl's estimator, which gives all its tokens the same."""
    reward = torch.tensor(case.reward, dtype=torch.float64)
    lengths = torch.arange(len(case.reward)) % 3 + 2
    mask = (torch.arange(4) < lengths[:, None]).long()
    scores = torch.zeros(mask.shape, dtype=torch.float64)
    # the reward is on the last token
    scores[torch.arange(len(case.reward)), lengths - 1] = reward
    index = np.array([f"prompt {g}" for g in case.group], dtype=object)
    found, _ = get_adv_estimator_fn(estimator)(scores, response_mask=mask, index=index, config=AlgoConfig(), **config)
    assert torch.equal(found, found[:, :1] * mask)
    return found[:, 0].double()


def _advantages() -> dict[str, tuple[AdvantageCase, str, dict[str, Any]]]:
    none = {"norm_adv_by_std_in_grpo": False}
    loo = {"baseline": "leave_one_out", "scale": "none"}
    single = 1e-5
    return {
        "grpo": (AdvantageCase(REWARD, GROUP, {}), "grpo", {}),
        "grpo-eps": (AdvantageCase(REWARD, GROUP, {"eps": 1e-2}), "grpo", {"epsilon": 1e-2}),
        "grpo-unscaled": (AdvantageCase(REWARD, GROUP, {"scale": "none"}), "grpo", none),
        "grpo-vectorized": (AdvantageCase(REWARD, GROUP, {}, tolerance=single), "grpo_vectorized", {}),
        "grpo-vectorized-unscaled": (
            AdvantageCase(REWARD, GROUP, {"scale": "none"}, tolerance=single),
            "grpo_vectorized",
            none,
        ),
        "rloo": (AdvantageCase(REWARD, GROUP, loo), "rloo", {}),
        "rloo-vectorized": (AdvantageCase(REWARD, GROUP, loo), "rloo_vectorized", {}),
        # this estimator also gives 0 to a group of one
        "rloo-vectorized-one": (AdvantageCase([*REWARD, 0.5], [*GROUP, 3], loo), "rloo_vectorized", {}),
    }


ADVANTAGES = _advantages()


def from_logits(case: HeadCase) -> dict[str, Tensor]:
    """Returns verl's log-probabilities, entropies and squared probabilities of logits."""
    leaves = case.leaves()
    logits = leaves[0]
    target = torch.tensor(case.target)
    return head_result(
        case,
        leaves,
        logprobs_from_logits(logits, target, inplace_backward=False),
        entropy_from_logits(logits),
        calculate_sum_pi_squared_from_logits(logits),
    )


def from_hidden(case: HeadCase) -> dict[str, Tensor]:
    """Returns the result of verl's fused head in torch, which works in chunks and float32."""
    leaves = case.leaves()
    head = FusedLinearForPPO(chunk_size=4)
    logp, entropy = head(leaves[0], leaves[1], torch.tensor(case.target), case.options.get("temperature", 1.0))
    return head_result(case, leaves, logp, entropy, None)


HEADS: dict[str, tuple[HeadCase, Callable[[HeadCase], dict[str, Tensor]]]] = {
    "logits": (head_case({}, linear=False), from_logits),
    "fused-head": (head_case({}, linear=True, tolerance=2e-5), from_hidden),
    "fused-head-temperature": (head_case({"temperature": 0.7}, linear=True, tolerance=2e-5), from_hidden),
}
