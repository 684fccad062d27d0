"""The specification of `linear_policy_loss`: the two references one after the other, with the whole (T, V) logits."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels.ops.linear_logprob.reference import linear_logprob_reference
from prism_kernels.ops.policy_loss.reference import policy_loss_reference


def linear_policy_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns the loss, the metrics of `policy_loss` by their names, and the log-probabilities."""
    keep = target != ignore_index
    if mask is not None:
        keep = keep & mask
    out = linear_logprob_reference(
        hidden,
        weight,
        torch.where(keep, target, ignore_index),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        lora=lora,
        entropy=bool(options.get("entropy_coef")),
        ignore_index=ignore_index,
    )
    loss, metrics = policy_loss_reference(
        out.logp, old_logp, advantage, cu_seqlens, mask=keep, entropy=out.entropy, **options
    )
    return loss, metrics, out.logp.detach()
