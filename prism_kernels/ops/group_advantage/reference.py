"""The specification of `group_advantage`: one group after the other, in float64."""

import torch
from torch import Tensor


def group_advantage_reference(
    reward: Tensor,
    group: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "std",
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Returns what `group_advantage` returns."""
    ids = group.tolist()
    keep = [True] * len(ids) if valid is None else valid.tolist()
    members = {g: [i for i, (h, ok) in enumerate(zip(ids, keep)) if h == g and ok] for g in set(ids)}
    result = torch.zeros(len(ids), dtype=torch.float64)
    for rows in members.values():
        x = reward[rows].double()
        if baseline == "none":
            centred = x
        elif len(rows) <= 1:
            centred = torch.zeros_like(x)
        elif baseline == "mean":
            centred = x - x.mean()
        else:
            centred = x - (x.sum() - x) / (len(rows) - 1)
        if scale == "std":
            centred = centred / (x.std() + eps) if len(rows) > 1 else torch.zeros_like(x)
        result[rows] = centred
    if scale == "batch_std":
        rows = [i for i, ok in enumerate(keep) if ok]
        x = result[rows]
        result[rows] = (x - x.mean()) / (x.std() + eps) if len(rows) > 1 else torch.zeros_like(x)
        if baseline != "none":
            for rows in members.values():
                if len(rows) == 1:
                    result[rows] = 0
    return result
