"""TRL's trainers on our log-probability op: `patch()` before a trainer is made, `undo()` or `with` to take it back.

GRPO, RLOO, KTO, DPO and SFT give their model a fused LM head; with the patch that head is `linear_logprob`, which
takes LoRA on the head too and skips prompts and padding. B sequences of L tokens, D width.
"""

import functools
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from prism_kernels.check import fail
from prism_kernels.integrations.head import (
    Head,
    LogitSettings,
    head_logprob,
    head_of,
    logit_settings,
    run_to_head,
)
from prism_kernels.integrations.logit_statistics import is_highest, mean_logit
from prism_kernels.integrations.patching import Patch, Replacement, require_parameters, require_version
from prism_kernels.integrations.trl_loss import loss_replacements

NAME = "integrations.trl"
VERSIONS = ("1.16",)
TRANSFORMERS = ("5",)
TRAINERS = ("grpo", "rloo", "kto", "dpo", "sft")
PARAMETERS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def patch(*, cache_bytes: int | None = 0, losses: bool = False) -> Patch:
    """Replaces the fused LM head of TRL's trainers, and on request GRPO's loss; returns the patch, to undo it.

    A trainer keeps the head that it was made with. LoRA on the head, which TRL refuses, is allowed: one plain adapter
    without dropout. DeepSpeed ZeRO-3 is refused.

    Args:
        cache_bytes: memory that a call may keep for its backward pass, as in `linear_logprob`: 0 keeps nothing, as
            TRL's own head does; None keeps all, which saves a matrix product out of four.
        losses: whether the loss of GRPOTrainer is `policy_loss` too, from the next step on. Options for which
            `policy_loss` differs from TRL are refused when a trainer is made, or at its next step. The losses of RLOO,
            KTO, DPO and SFT are other functions and stay TRL's.
    """
    require_version(NAME, "trl", VERSIONS)
    require_version(NAME, "transformers", TRANSFORMERS)
    trainers = [import_module(f"trl.trainer.{name}_trainer") for name in TRAINERS]
    modules = [import_module("trl.trainer.utils"), *trainers]
    published = modules[0].add_fused_lm_head
    require_parameters(NAME, published, PARAMETERS)
    for module in trainers:
        if getattr(module, "add_fused_lm_head", None) is not published:
            fail(NAME, f"{module.__name__} to use trl.trainer.utils.add_fused_lm_head", "another", RuntimeError)
    ours = _head_adder(published, cache_bytes)
    replacements = [Replacement(module, "add_fused_lm_head", ours) for module in modules]
    # TRL refuses a head that is an instance of this class. without peft the trainers do not have it
    with_peft = [module for module in trainers if hasattr(module, "BaseTunerLayer")]
    replacements += [Replacement(module, "BaseTunerLayer", _NoAdapter) for module in with_peft]
    if losses:
        replacements += loss_replacements(trainers[TRAINERS.index("grpo")].GRPOTrainer)
    return Patch(NAME, replacements)


class _NoInstances(type):
    def __instancecheck__(cls, _: object) -> bool:
        return False


class _NoAdapter(metaclass=_NoInstances):
    """Replaces peft's class of adapters, so that add_fused_lm_head decides which it takes, and says why not."""


def _head_adder(published: Callable[..., None], cache_bytes: int | None) -> Callable[..., None]:
    @functools.wraps(published)
    def add_fused_lm_head(
        model: nn.Module,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        fuse_lm_head(model, temperature, cast_lm_head_to_fp32, outputs, cache_bytes)

    return add_fused_lm_head


def fuse_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    cache_bytes: int | None = 0,
) -> None:
    """Gives a model the fused head: called with `fused_lm_head=True` and labels it returns TRL's FusedCausalLMOutput.

    Args:
        model: a causal language model, or a vision-language one, of transformers.
        temperature: divides the logits.
        cast_lm_head_to_fp32: whether the head's product runs in fp32.
        outputs: the fields to compute besides the log-probabilities.
        cache_bytes: see `patch`.
    """
    unknown = [name for name in outputs if name not in FIELDS]
    if unknown:
        fail(NAME, f"outputs among {', '.join(FIELDS)}", ", ".join(unknown))
    head = head_of(NAME, model.get_output_embeddings())
    if cast_lm_head_to_fp32 and head.lora is not None:
        # TRL's cast replaces the head's forward, which then leaves the adapter out when completions are sampled
        fail(NAME, "cast_lm_head_to_fp32=False with LoRA on the LM head", True, NotImplementedError)
    settings = logit_settings(NAME, model.config)
    original = model.forward

    # generation validates its arguments against the original signature
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **options)
        labels, shifted = options.pop("labels", None), options.pop("shift_labels", None)
        count = options.pop("num_items_in_batch", None)
        before = run_to_head(NAME, self, labels, shifted, args, options)
        device = before.hidden.device.type
        dtype = torch.float32 if cast_lm_head_to_fp32 else None
        if dtype is None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

        def compute(hidden: Tensor, head: Head) -> dict[str, Any]:
            hidden = hidden.to(dtype or hidden.dtype)
            with torch.autocast(device, enabled=False):
                return score(hidden, before.target, head, temperature, settings, outputs, cache_bytes)

        fields = before.at_head(compute)
        mask = before.target != -100
        loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        if before.balance is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * before.balance
        output = import_module("trl.trainer.utils").FusedCausalLMOutput
        return output(loss=loss, label_mask=mask, aux_loss=before.balance, **fields)

    model.forward = types.MethodType(forward, model)


def score(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    temperature: float,
    settings: LogitSettings,
    outputs: tuple[str, ...],
    cache_bytes: int | None,
) -> dict[str, Any]:
    """Returns the fields of each position, (B, L), 0 where the target is -100; those not in `outputs` are None."""
    result = head_logprob(
        hidden,
        target,
        head,
        settings,
        temperature=temperature,
        entropy="entropy" in outputs,
        cache_bytes=cache_bytes,
    )
    fields: dict[str, Any] = dict.fromkeys(FIELDS)
    fields["log_probs"], fields["entropy"] = result.logp, result.entropy
    mask = target != -100
    if "log_sum_sq_probs" in outputs:
        # an ignored row's sum is 0, which has no logarithm
        fields["log_sum_sq_probs"] = result.sum_pi_squared.where(mask, 1.0).log()
    if "mean_logits" in outputs or "is_top1" in outputs:
        with torch.no_grad():
            rows = hidden[mask]
            if "mean_logits" in outputs:
                mean = mean_logit(rows, head, settings.softcap) / (temperature * settings.divisor)
                fields["mean_logits"] = mean.new_zeros(mask.shape).masked_scatter(mask, mean)
            if "is_top1" in outputs:
                top1 = is_highest(rows, head, target[mask], result.logp[mask], result.sum_pi_squared[mask])
                fields["is_top1"] = torch.zeros_like(mask).masked_scatter(mask, top1)
    return fields
