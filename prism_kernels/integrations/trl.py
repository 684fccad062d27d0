"""TRL's trainers on our log-probability op: `patch()` before a trainer is made, `undo()` or `with` to take it back.

GRPO, RLOO, KTO, DPO and SFT give their model a fused LM head; with the patch that head is `linear_logprob`, which
takes LoRA on the head too, and computes prompts and padding not at all. B sequences of L tokens, V columns.
"""

import functools
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from prism_kernels.check import fail
from prism_kernels.integrations.head import Head, LogitSettings, head_of, logit_settings, run_to_head
from prism_kernels.integrations.logit_statistics import is_highest, mean_logit
from prism_kernels.integrations.patching import Patch, Replacement, require_parameters, require_version
from prism_kernels.integrations.trl_loss import loss_replacements
from prism_kernels.ops.linear_logprob import linear_logprob

NAME = "integrations.trl"
VERSIONS = ("1.16",)
TRANSFORMERS = ("5",)
TRAINERS = ("grpo", "rloo", "kto", "dpo", "sft")
PARAMETERS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def patch(*, cache_bytes: int | None = 0, losses: bool = False) -> Patch:
    """Replaces the fused LM head of TRL's trainers, and on request GRPO's loss; returns the patch, to undo it.

    Trainers that were made before keep the head that they have, and those made under the patch keep ours. LoRA on the
    head is allowed, where TRL refuses it: one plain adapter without dropout. DeepSpeed ZeRO-3 is refused.

    Args:
        cache_bytes: memory that a call may keep for its backward pass, as in `linear_logprob`: 0 keeps nothing, so
            that no more is used than by TRL's own head; None keeps all, which saves a matrix product out of four.
        losses: whether the loss of GRPOTrainer is `policy_loss` too, from the next step on. What `policy_loss` does
            not compute as TRL does is refused when a trainer is made, or at its next step. This concerns GRPO alone:
            the losses of RLOO, KTO, DPO and SFT are other functions, and stay TRL's.
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
    # what TRL refuses on a head is an instance of this class. without peft the trainers do not have it
    allowed = [module for module in trainers if hasattr(module, "BaseTunerLayer")]
    replacements += [Replacement(module, "BaseTunerLayer", _NoAdapter) for module in allowed]
    if losses:
        replacements += loss_replacements(trainers[TRAINERS.index("grpo")].GRPOTrainer)
    return Patch(NAME, replacements)


class _NoInstances(type):
    def __instancecheck__(cls, _: object) -> bool:
        return False


class _NoAdapter(metaclass=_NoInstances):
    """In the place of peft's class of adapters: add_fused_lm_head says which it cannot take, and why."""


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
        outputs: which fields besides the log-probabilities are computed.
        cache_bytes: see `patch`.
    """
    unknown = [name for name in outputs if name not in FIELDS]
    if unknown:
        fail(NAME, f"outputs among {', '.join(FIELDS)}", ", ".join(unknown))
    head = head_of(NAME, model.get_output_embeddings())
    if cast_lm_head_to_fp32 and head.lora is not None:
        # TRL's cast gives the head a forward of its own, which leaves the adapter out when completions are sampled
        fail(NAME, "cast_lm_head_to_fp32=False with LoRA on the LM head", True, NotImplementedError)
    settings = logit_settings(NAME, model.config)
    tau = temperature * settings.divisor
    original = model.forward

    # generation validates its arguments against the original signature
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        if not fused_lm_head:
            return original(*args, **options)
        labels, shifted = options.pop("labels", None), options.pop("shift_labels", None)
        count = options.pop("num_items_in_batch", None)
        hidden, target, head, balance = run_to_head(NAME, self, labels, shifted, args, options)
        device = hidden.device.type
        if cast_lm_head_to_fp32:
            hidden = hidden.float()
        elif torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            found = score(hidden, head, target, tau, settings, outputs, cache_bytes)
        mask = target != -100
        loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        if balance is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * balance
        output = import_module("trl.trainer.utils").FusedCausalLMOutput
        return output(loss=loss, label_mask=mask, aux_loss=balance, **found)

    model.forward = types.MethodType(forward, model)


def score(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    temperature: float,
    settings: LogitSettings,
    outputs: tuple[str, ...],
    cache_bytes: int | None,
) -> dict[str, Any]:
    """Returns the fields of each position, (B, L), 0 where the target is -100; those not asked for are None."""
    result = linear_logprob(
        hidden,
        head.weight,
        target,
        bias=head.bias,
        temperature=temperature,
        softcap=settings.softcap,
        lora=head.lora,
        entropy="entropy" in outputs,
        cache_bytes=cache_bytes,
    )
    found: dict[str, Any] = dict.fromkeys(FIELDS)
    found["log_probs"], found["entropy"] = result.logp, result.entropy
    mask = target != -100
    if "log_sum_sq_probs" in outputs:
        # an ignored row has 0, of which there is no logarithm
        found["log_sum_sq_probs"] = result.sum_pi_squared.where(mask, 1.0).log()
    if "mean_logits" in outputs or "is_top1" in outputs:
        with torch.no_grad():
            rows = hidden[mask]
            if "mean_logits" in outputs:
                mean = mean_logit(rows, head, settings.softcap) / temperature
                found["mean_logits"] = mean.new_zeros(mask.shape).masked_scatter(mask, mean)
            if "is_top1" in outputs:
                top1 = is_highest(rows, head, target[mask], result.logp[mask], result.sum_pi_squared[mask])
                found["is_top1"] = torch.zeros_like(mask).masked_scatter(mask, top1)
    return found
