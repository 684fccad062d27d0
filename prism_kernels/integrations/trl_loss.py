"""GRPOTrainer's loss by `policy_loss`. B completions of L tokens.

The other trainers keep their losses, for which `policy_loss` has no options: RLOO clips the product of a completion's
ratios, KTO and DPO compare whole completions with a reference, SFT has no advantages.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prism_kernels.check import fail
from prism_kernels.integrations.padded import padded_policy_loss
from prism_kernels.integrations.patching import Replacement, require_parameters
from prism_kernels.metrics import PolicyMetrics
from prism_kernels.ops.policy_loss.options import LARGEST_BOUND, RATIOS

NAME = "integrations.trl"
AGGREGATES = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "seq_mean_token_sum_norm",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "luspo": "seq_mean_token_sum",
}
# these divide by the tokens of all micro-batches of an optimisation step, not of one
WHOLE = ("dapo", "cispo")
# the model's inputs besides tokens
INPUTS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
SCORES = (
    *("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    *("batch_size", "compute_entropy", "compute_aux_loss", *INPUTS),
)
INIT = (
    *("self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
    *("reward_processing_classes", "callbacks", "optimizers", "quantization_config", "peft_config"),
    *("tools", "rollout_func", "environment_factory"),
)
OFF_POLICY = ("advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold")


def loss_replacements(trainer: Any) -> list[Replacement]:
    """Returns the replacements of GRPOTrainer's loss, after a check of the methods that ours calls."""
    require_parameters(NAME, trainer._compute_loss, ("self", "model", "inputs"))
    require_parameters(NAME, trainer._get_per_token_logps_and_entropies, SCORES)
    require_parameters(NAME, trainer.get_high_entropy_mask, ("self", "entropies", "mask", "threshold"))
    require_parameters(NAME, trainer.get_off_policy_mask, OFF_POLICY)
    require_parameters(NAME, trainer.__init__, INIT)
    return [
        Replacement(trainer, "_compute_loss", compute_loss),
        Replacement(trainer, "__init__", _refusing_init(trainer.__init__)),
    ]


def _refusing_init(published: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(published)
    def init(self: Any, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **options: Any) -> None:
        # a subclass may define another loss; without `args` TRL takes a configuration that is allowed
        if args is not None and type(self)._compute_loss is compute_loss:
            loss_options(args, args)
        published(self, model, reward_funcs, args, *rest, **options)

    return init


def loss_options(settings: Any, config: Any) -> dict[str, Any]:
    """Returns the options of `policy_loss` for a GRPOTrainer; raises where there are none.

    Args:
        settings: the trainer, which has copied most of its configuration; before there is one, the configuration.
        config: the configuration.
    """
    kind, level = settings.loss_type, settings.importance_sampling_level
    if kind not in AGGREGATES:
        _refuse(f"loss_type among {', '.join(AGGREGATES)}", repr(kind))
    if level not in RATIOS:
        _refuse(f"importance_sampling_level among {', '.join(RATIOS)}", repr(level))
    if settings.use_adaptive_entropy:
        _refuse("use_adaptive_entropy=False (entropy_coef is a constant bonus)", True)
    # a trainer has epsilon_low instead of epsilon, and no None
    low = getattr(settings, "epsilon_low", config.epsilon)
    high = config.epsilon if settings.epsilon_high is None else settings.epsilon_high
    options: dict[str, Any] = {"objective": "clip", "clip": (low, high), "dual_clip": config.delta}
    if kind == "cispo":
        if high < 1:
            _refuse('epsilon_high >= 1 with loss_type="cispo", where it is the bound itself', high)
        options = {"objective": "cispo", "clip": (1.0, high - 1)}
    elif config.delta is not None and config.delta <= 1 + high:
        _refuse(f"delta above 1 + epsilon_high = {1 + high:g}", config.delta)
    if level == "sequence":
        if settings.top_entropy_quantile < 1:
            _refuse_token_weights("top_entropy_quantile=1.0", settings.top_entropy_quantile)
        if _corrected(settings) and settings.vllm_importance_sampling_mode.startswith("token"):
            mode = settings.vllm_importance_sampling_mode
            _refuse_token_weights('vllm_importance_sampling_mode="sequence_mask" or "sequence_truncate"', repr(mode))
    return {
        **options,
        "ratio": level,
        # TRL has no bound: the largest that the op allows
        "log_ratio_bound": LARGEST_BOUND,
        "aggregate": AGGREGATES[kind],
        "horizon": float(settings.max_completion_length) if kind == "dr_grpo" else None,
    }


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns the loss of a micro-batch, and adds the metrics of the trainer's own `_compute_loss`."""
    options = loss_options(self, self.args)
    advantage = inputs["advantages"]
    # a subclass may give an advantage for each token
    advantage = advantage[:, None] if advantage.dim() == 1 else advantage
    if options["ratio"] == "sequence" and advantage.shape[1] > 1:
        _refuse_token_weights("advantages of shape (B,)", tuple(advantage.shape))
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    logp, entropy, balance = self._get_per_token_logps_and_entropies(
        model,
        torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1),
        torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1),
        mask.shape[1],
        compute_entropy=True,
        compute_aux_loss=self.aux_loss_enabled,
        **{name: inputs.get(name) for name in INPUTS},
    )
    old = inputs.get("old_per_token_logps")
    before = logp.detach() if old is None else old
    log_ratio = logp - before
    if options["ratio"] == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    valid = acting = mask.bool()
    # weights of a token's or a completion's objective are not negative, so that they may multiply its advantage
    weighted = advantage
    if self.off_policy_mask_threshold is not None:
        sampled = inputs.get("sampling_per_token_logps", before)
        kept = self.get_off_policy_mask(advantage, logp, sampled, mask, self.off_policy_mask_threshold)
        weighted = weighted * kept
    if self.top_entropy_quantile < 1:
        acting = self.get_high_entropy_mask(entropy.detach(), mask, 1 - self.top_entropy_quantile)
        weighted = weighted * acting
    if _corrected(self):
        weighted = weighted * inputs["importance_sampling_ratio"]

    mode = "train" if self.model.training else "eval"
    # only training accumulates micro-batches
    steps = self.current_gradient_accumulation_steps if mode == "train" else 1
    loss, totals = padded_policy_loss(
        logp,
        old,
        weighted,
        valid,
        denominator=_denominator(self, inputs, steps if mode == "train" else None),
        **options,
        **_kl_term(self, inputs, logp, log_ratio),
    )
    metrics = self._metrics[mode]
    objective = loss.detach()
    if self.loss_type not in WHOLE:
        loss = loss / steps
    if self.entropy_coef != 0:
        # TRL averages the entropy over this micro-batch's tokens, whatever the loss type
        loss = loss - self.entropy_coef / steps * (entropy * acting).sum() / acting.sum().clamp(min=1)
        metrics["policy_loss"].append(self.accelerator.gather(objective).nanmean().item())
        if mode == "train" and self.accelerator.sync_gradients:
            metrics["entropy_coef"].append(self.entropy_coef)
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef / steps * balance
        metrics["aux_loss"].append(self.accelerator.gather_for_metrics(balance.detach()).mean().item())
    ratio, surprise = log_ratio.detach().exp(), (entropy.detach() * mask).sum(dtype=torch.float64)
    for name, value in _measured(self, totals, surprise, ratio, advantage, valid, options["clip"]).items():
        metrics[name].append(value)
    return loss


def _corrected(settings: Any) -> bool:
    """Whether the objective is weighted by the importance ratios of vLLM's samples."""
    return settings.use_vllm and settings.vllm_importance_sampling_correction


def _denominator(trainer: Any, inputs: dict[str, Any], steps: int | None) -> float | Tensor | None:
    """Returns the loss's denominator: completions, or this rank's share of an optimisation step's tokens.

    Args:
        trainer: a GRPOTrainer.
        inputs: a micro-batch.
        steps: micro-batches of an optimisation step; None in evaluation.
    """
    if trainer.loss_type == "bnpo":
        return None
    if trainer.loss_type not in WHOLE:
        # completions without a valid token count too
        return float(len(inputs["completion_mask"]))
    # the tokens of all ranks, in training of all micro-batches whose completions were sampled together
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1)
    share = 1.0 if steps is None else steps / trainer.args.steps_per_generation
    return tokens * (share / trainer.accelerator.num_processes)


def _kl_term(trainer: Any, inputs: dict[str, Any], logp: Tensor, log_ratio: Tensor) -> dict[str, Any]:
    """Returns the options of `policy_loss` for the KL term, if there is one."""
    if trainer.beta == 0:
        return {}
    reference = inputs["ref_per_token_logps"]
    if not trainer.args.use_bias_correction_kl:
        return {"ref_logp": reference.flatten(), "kl_coef": trainer.beta, "kl_estimator": "k3"}
    # the op has no estimator k3 times the ratio, but adds -entropy_coef * entropy to each token's loss
    delta = logp - reference
    return {"entropy": -(log_ratio.exp() * (torch.expm1(-delta) + delta)).flatten(), "entropy_coef": trainer.beta}


def _measured(
    trainer: Any,
    totals: PolicyMetrics,
    entropy: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    valid: Tensor,
    clip: tuple[float, float],
) -> dict[str, float]:
    """Returns TRL's metrics over all ranks: means over tokens, and the clipped shares of completions.

    Args:
        trainer: a GRPOTrainer.
        totals: the metrics of `policy_loss`.
        entropy: the sum over tokens.
        ratio: (B, L), of the tokens; or (B, 1), of the sequences, of which TRL counts those without a token too.
        advantage: (B, 1) or (B, L), without the weights.
        valid: (B, L).
        clip: as `policy_loss` has it.
    """
    counted = valid if trainer.importance_sampling_level == "token" else torch.ones_like(ratio, dtype=torch.bool)
    low, high = clip
    sides = ((ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0))
    clipped = torch.stack([(side & counted).sum(1) for side in sides], 1).double()
    counts = counted.sum(1, keepdim=True)

    # the KL term is in one of the two, the other is 0
    kl = totals.ref_kl - totals.entropy
    sums = torch.stack((totals.tokens, entropy, kl, counts.sum().double(), *clipped.sum(0)))
    tokens, surprise, kl_sum, count, below, above = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    means = {"entropy": surprise / max(tokens, 1)}
    if trainer.beta != 0:
        means["kl"] = kl_sum / max(tokens, 1)
    below, above = below / max(count, 1), above / max(count, 1)
    if trainer.loss_type == "cispo":
        return {**means, "cispo_clip_ratio": above}
    # NaN where no token is valid
    shares = trainer.accelerator.gather(clipped / counts).tolist()
    known = [pair for pair in shares if not math.isnan(pair[0])]
    return {
        **means,
        "clip_ratio/low_mean": below,
        "clip_ratio/low_min": min((share for share, _ in known), default=math.nan),
        "clip_ratio/high_mean": above,
        "clip_ratio/high_max": max((share for _, share in known), default=math.nan),
        "clip_ratio/region_mean": below + above,
    }


def _refuse(expected: str, got: object) -> None:
    fail(NAME, f"{expected} with losses=True, or TRL's own loss with losses=False", got, NotImplementedError)


def _refuse_token_weights(expected: str, got: object) -> None:
    # with an advantage per token, `policy_loss` takes the gradient of the token's own log-ratio
    _refuse(f'{expected} with importance_sampling_level="sequence"', got)
