"""`policy_loss` for padded batches. B responses of L tokens."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels.metrics import PolicyMetrics
from prism_kernels.ops.policy_loss import policy_loss


def padded_policy_loss(
    logp: Tensor, old_logp: Tensor | None, advantage: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, PolicyMetrics]:
    """Returns `policy_loss` of the tokens in the mask.

    Args:
        logp: (B, L).
        old_logp: (B, L), or None.
        advantage: (B, L) or (B, 1).
        mask: (B, L), bool.
        options: of `policy_loss`.
    """
    rows, columns = logp.shape
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=logp.device) * columns
    old = None if old_logp is None else old_logp.flatten()
    return policy_loss(logp.flatten(), old, advantage.flatten(), bounds, mask=mask.flatten(), **options)
