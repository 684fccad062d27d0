"""TRL's own functions, called from its installed package, and the corresponding calls of ours.

The trainers' methods run unbound, on an object with the attributes that they read; none of their code is copied here.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peer_cases import AdvantageCase, Batch, HeadCase, LossCase, Result, head_case, head_result
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

VERSION = "1.16.0"
METRICS = {
    "clipped_low": "clip_ratio/low_mean",
    "clipped_high": "clip_ratio/high_mean",
    "clipped_low+clipped_high": "clip_ratio/region_mean",
    "ref_kl": "kl",
    "entropy": "entropy",
}
HORIZON = 40


@dataclass(frozen=True)
class Call:
    """A configuration of TRL: attributes of the trainer, and options that it reads from `args`."""

    loss_type: str = "dapo"
    trainer: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    # vLLM's importance sampling mode, with its least and largest ratio
    correction: tuple[str, float | None, float | None] | None = None
    on_policy: bool = False
    steps: int = 1


def trainer(call: Call, result: Callable[[], tuple[Tensor, Tensor, None]]) -> SimpleNamespace:
    """Returns an object with the attributes that the trainers' methods read; `result` replaces the model's output."""
    args = {
        "delta": None,
        "use_bias_correction_kl": False,
        "steps_per_generation": call.steps,
        "gradient_accumulation_steps": call.steps,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing_kwargs": None,
        **call.args,
    }
    mode, low, high = call.correction or ("sequence_mask", None, None)
    known = {
        "accelerator": Accelerator(cpu=True),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": SimpleNamespace(),
        "args": SimpleNamespace(**args),
        "loss_type": call.loss_type,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": HORIZON,
        "use_vllm": call.correction is not None,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
        "num_iterations": 1,
        "mask_truncated_completions": False,
        "pad_to_multiple_of": None,
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "log_multimodal": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_metrics": {"train": defaultdict(list)},
        "_logs": {
            "prompt": [],
            "completion": [],
            "advantages": [],
            "rewards": defaultdict(list),
            "extra": defaultdict(list),
        },
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: result(),
        **call.trainer,
    }
    known["_entropy_bonus_enabled"] = known["entropy_coef"] != 0
    return SimpleNamespace(**known)


def scored(self: SimpleNamespace, batch: Batch, rewards: Tensor, method: Callable | None = None) -> dict[str, Tensor]:
    """Returns TRL's inputs of a loss, from completions, tool masks, sampled log-probabilities and rewards (N, K)."""
    bounds = list(itertools.pairwise(batch.cu_seqlens.tolist()))
    tokens = [[1] * (b - a) for a, b in bounds]
    tool_mask = [batch.mask[a:b].long().tolist() for a, b in bounds]
    sampled = [batch.columns["rollout_logp"][a:b].tolist() for a, b in bounds]
    texts = ["" for _ in bounds]
    if method is None:
        method = GRPOTrainer._generate_and_score_completions
        generated = ([[1]] * len(bounds), tokens, tool_mask, texts, sampled, {}, None, None)
    else:
        generated = ([[1]] * len(bounds), tokens, texts)
    self._generate = lambda prompts: generated
    self._calculate_rewards = lambda *args: rewards
    self.reward_weights = torch.ones(rewards.shape[1], dtype=torch.float64)
    self.reward_func_names = [f"reward {k}" for k in range(rewards.shape[1])]
    self.reward_funcs = self.reward_func_names
    return method(self, [{"prompt": ""} for _ in bounds])


def loss(batch: Batch, call: Call) -> Result:
    """Returns the result of `GRPOTrainer._compute_loss` on the data of `_generate_and_score_completions`."""
    logp = batch.columns["logp"].clone().requires_grad_()
    entropy = batch.columns["entropy"].clone().requires_grad_()
    old = batch.pad(batch.columns["old_logp"])
    # the model's log-probabilities: without gradient when completions are scored, with it for the loss
    current = [old]
    self = trainer(call, lambda: (current[0], batch.pad(entropy), None))
    self.num_generations = len(batch.advantage)
    beta, self.beta = self.beta, 0.0
    inputs = scored(self, batch, torch.zeros(len(batch.advantage), 1, dtype=torch.float64))
    self.beta = beta
    inputs["advantages"] = batch.advantage
    inputs["ref_per_token_logps"] = batch.pad(batch.columns["ref_logp"])
    # TRL's scoring also decides whether the old log-probabilities are used
    if not call.on_policy:
        inputs["old_per_token_logps"] = old
    if call.steps > 1:
        # the data of one of several steps
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * call.steps
        self.current_gradient_accumulation_steps = 1
    metrics = {}
    if call.correction and call.correction[0].startswith("token"):
        # with a sequence ratio TRL's mean is over sequences
        metrics["correction_used"] = self._metrics["train"]["sampling/importance_sampling_ratio/mean"][0]
    self._metrics["train"].clear()
    current[0] = batch.pad(logp)
    value = GRPOTrainer._compute_loss(self, None, inputs)
    grads = torch.autograd.grad(value, [logp, entropy], allow_unused=True, materialize_grads=True)
    found = self._metrics["train"]
    level = self.importance_sampling_level
    for name, key in METRICS.items():
        # with a sequence ratio TRL's clip metrics are over sequences, ours over tokens
        if key in found and not (level == "sequence" and "clip" in key):
            metrics[name] = found[key][0]
    return Result(value.detach(), *grads, metrics)


def _losses() -> dict[str, tuple[LossCase, Call]]:
    cases: dict[str, tuple[LossCase, Call]] = {}
    entropy = ("entropy",)
    clip = {"clip": (0.2, 0.28)}
    # the batch size, fully masked sequences included
    whole = {"denominator": 5.0}
    types = {
        "grpo": {**clip, "aggregate": "seq_mean_token_mean"},
        "bnpo": {**clip, "aggregate": "token_mean"},
        "dr_grpo": {**clip, "aggregate": "seq_mean_token_sum_norm", "horizon": float(HORIZON)},
        "dapo": {**clip, "aggregate": "token_mean"},
        "luspo": {**clip, "aggregate": "seq_mean_token_sum"},
        "cispo": {"objective": "cispo", "clip": (1.0, 0.3), "aggregate": "token_mean"},
    }
    for kind, options in types.items():
        ceiling = {"epsilon_high": 1.3} if kind == "cispo" else {}
        for level in ("token", "sequence"):
            for batch in ("plain", "masked", "silent"):
                given = {**options, "ratio": level}
                if batch == "silent" and not options["aggregate"].startswith("token"):
                    given |= whole
                cases[f"{kind}-{level}-{batch}"] = (
                    LossCase(batch, given, entropy),
                    Call(kind, {"importance_sampling_level": level, **ceiling}),
                )
        cases[f"{kind}-on-policy"] = (
            LossCase("masked", options, entropy, on_policy=True),
            Call(kind, ceiling, on_policy=True),
        )
    for level in ("token", "sequence"):
        cases[f"delta-{level}"] = (
            LossCase("plain", {"clip": (0.2, 0.05), "dual_clip": 1.1, "ratio": level}, entropy),
            Call("dapo", {"importance_sampling_level": level, "epsilon_high": 0.05}, {"delta": 1.1}),
        )
    for kind in ("grpo", "dapo", "dr_grpo"):
        cases[f"{kind}-beta"] = (
            LossCase("masked", {**types[kind], "kl_coef": 0.3, "kl_estimator": "k3"}, ("ref_logp", "entropy")),
            Call(kind, {"beta": 0.3}),
        )
    cases["dapo-steps"] = (
        # a micro-batch of one of three steps, all with the same number of tokens
        LossCase("masked", types["dapo"], entropy),
        Call("dapo", steps=3),
    )
    # TRL's bonus is always a mean over tokens, as ours is for these two losses
    for kind in ("dapo", "bnpo"):
        cases[f"{kind}-entropy"] = (
            LossCase("masked", {**types[kind], "entropy_coef": 0.1}, entropy),
            Call(kind, {"entropy_coef": 0.1}),
        )
    rollout = ("rollout_logp", "entropy")
    for mode, name in (("truncate", "tis"), ("mask", "mask")):
        for unit in ("token", "sequence"):
            low, high = (None, 1.3) if mode == "truncate" else (0.6, 1.3) if unit == "token" else (0.2, 4.0)
            for kind, ratio in (("dapo", "token"), ("grpo", "sequence"), ("cispo", "token")):
                correction = {"correction": f"{unit}_{name}", "correction_bounds": (low or 0.0, high)}
                ceiling = {"epsilon_high": 1.3} if kind == "cispo" else {}
                cases[f"{kind}-{ratio}-{unit}-{mode}"] = (
                    LossCase("masked", {**types[kind], "ratio": ratio, **correction}, rollout),
                    Call(
                        kind, {"importance_sampling_level": ratio, **ceiling}, correction=(f"{unit}_{mode}", low, high)
                    ),
                )
    return cases


LOSSES = _losses()

REWARD = [1.0, 0.25, 0.5, 0.0, 1.0, 0.75, 0.5, 0.125]
GROUP = [0, 0, 0, 0, 1, 1, 1, 1]


def advantage(case: AdvantageCase, method: str, config: dict[str, Any]) -> Tensor:
    """Returns the advantages of a trainer's scored completions; an invalid sample has a NaN reward."""
    rewards = torch.tensor(case.reward, dtype=torch.float64)[:, None]
    if case.valid is not None:
        rewards[~torch.tensor(case.valid)] = torch.nan
    n = len(case.reward)
    columns = {"rollout_logp": torch.zeros(n, dtype=torch.float64)}
    batch = Batch(columns, rewards[:, 0], torch.arange(n + 1), torch.ones(n, dtype=torch.bool))
    zero = torch.zeros(n, 1, dtype=torch.float64)
    self = trainer(Call(trainer=config), lambda: (zero, zero, None))
    self.num_generations = case.group.count(0)
    score = RLOOTrainer._generate_and_score_completions if method == "rloo" else None
    return scored(self, batch, rewards, score)["advantages"]


def _advantages() -> dict[str, tuple[AdvantageCase, str, dict[str, Any]]]:
    eps = {"eps": 1e-4}
    loo = {"baseline": "leave_one_out", "scale": "none"}
    some = [True, False, True, True, False, False, False, True]
    alone = {"reward": REWARD[:3], "group": [0, 1, 2]}
    none = {"scale_rewards": "none"}
    return {
        "group": (AdvantageCase(REWARD, GROUP, eps), "grpo", {}),
        "none": (AdvantageCase(REWARD, GROUP, {"scale": "none"}), "grpo", none),
        "some-unscorable": (AdvantageCase(REWARD, GROUP, eps, some), "grpo", {}),
        "groups-of-one": (AdvantageCase(**alone, options=eps), "grpo", {}),
        "groups-of-one-unscaled": (AdvantageCase(**alone, options={"scale": "none"}), "grpo", none),
        "rloo": (AdvantageCase(REWARD, GROUP, loo), "rloo", {}),
        "rloo-some-unscorable": (AdvantageCase(REWARD, GROUP, loo, some), "rloo", {}),
        "rloo-groups-of-one": (AdvantageCase(**alone, options=loo), "rloo", {}),
        "rloo-normalized": (
            AdvantageCase(REWARD, GROUP, {**loo, "scale": "batch_std", **eps}),
            "rloo",
            {"normalize_advantages": True},
        ),
    }


ADVANTAGES = _advantages()


def from_logits(case: HeadCase) -> dict[str, Tensor]:
    """Returns TRL's log-probabilities and entropies of logits."""
    leaves = case.leaves()
    tau = case.options.get("temperature", 1.0)
    logp = selective_log_softmax(leaves[0], torch.tensor(case.target), temperature=tau)
    return head_result(case, leaves, logp, entropy_from_logits(leaves[0] / tau, chunk_size=4), None)


def from_hidden(case: HeadCase) -> dict[str, Tensor]:
    """Returns the result of TRL's fused head, which works in vocabulary chunks and float32."""
    leaves = case.leaves()
    bias = leaves[2] if case.bias is not None else None
    logp, entropy, log_square, _, _ = ChunkedLogProbFunction.apply(
        leaves[0],
        leaves[1],
        bias,
        torch.tensor(case.target),
        case.options.get("temperature", 1.0),
        4,
        case.options.get("softcap"),
    )
    return head_result(case, leaves, logp, entropy, log_square.exp())


HEADS: dict[str, tuple[HeadCase, Callable[[HeadCase], dict[str, Tensor]]]] = {
    "logits": (head_case({}, linear=False), from_logits),
    "logits-temperature": (head_case({"temperature": 0.7}, linear=False), from_logits),
    "chunked": (head_case({}, linear=True, tolerance=2e-5), from_hidden),
    "chunked-bias-temperature": (
        head_case({"temperature": 0.7}, linear=True, bias=True, tolerance=2e-5),
        from_hidden,
    ),
    "chunked-softcap": (
        head_case({"temperature": 1.3, "softcap": 4.0}, linear=True, bias=True, tolerance=2e-5),
        from_hidden,
    ),
}
