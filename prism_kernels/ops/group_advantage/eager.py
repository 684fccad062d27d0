"""Group statistics in plain torch, in float64, without host synchronisation: a stable sort, then segment sums."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The groups of N samples, whose ids may be in any order."""

    # [N] the samples, group by group
    order: Tensor
    # [N + 1] where each group's samples begin in that order
    bounds: Tensor
    # [N] each sample's group
    ids: Tensor
    # [N] whether a sample's id is out of range
    bad: Tensor

    @staticmethod
    def of(group: Tensor) -> "Groups":
        """Returns the groups of the ids, (N,)."""
        n = group.numel()
        # clamped, since on a GPU the values are not checked
        ids = group.to(torch.int64).clamp(0, max(n - 1, 0))
        ordered, order = torch.sort(ids, stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(n + 1, device=group.device))
        return Groups(order, bounds, ids, (group < 0) | (group >= n))

    def reduce(self, x: Tensor, how: str, initial: float) -> Tensor:
        """Returns the sum, min or max of x (N,) over each sample's group, (N,)."""
        if x.numel() == 0:
            return x
        # not index_add_: its order of summation varies on a GPU
        parts = torch.segment_reduce(
            x.index_select(0, self.order), how, offsets=self.bounds, axis=0, initial=initial, unsafe=True
        )
        return parts.index_select(0, self.ids)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of x (N,) over each sample's group, (N,)."""
        return self.reduce(x, "sum", 0)


def _deviation(square_sum: Tensor, count: Tensor) -> Tensor:
    return (square_sum / (count - 1).clamp(min=1)).sqrt()


def z_score(x: Tensor, included: Tensor | None, groups: Groups, eps: float, single: str) -> Tensor:
    """Returns (x - mean) / (std + eps) within each group, over the included samples (None: all); 0 for the others.

    A group of one gets 0 with `single` "zero"; with "raw" its mean counts as 0 and its std as 1.
    """
    count = groups.sum(torch.ones_like(x) if included is None else included.to(x.dtype))
    x = x if included is None else torch.where(included, x, 0)
    centred = x - groups.sum(x) / count.clamp(min=1)
    centred = centred if included is None else torch.where(included, centred, 0)
    result = centred / (_deviation(groups.sum(centred.square()), count) + eps)
    return torch.where(count > 1, result, x / (1 + eps) if single == "raw" else torch.zeros_like(x))


def group_advantage_eager(
    reward: Tensor, group: Tensor, valid: Tensor | None, baseline: str, scale: str, eps: float
) -> Tensor:
    """Returns the advantages in float64."""
    groups = Groups.of(group)
    x = reward.to(torch.float64)
    included = torch.ones_like(groups.bad) if valid is None else valid
    if scale == "std" and baseline == "mean":
        result = z_score(x, included, groups, eps, "zero")
    else:
        x = torch.where(included, x, 0)
        count = groups.sum(included.to(x.dtype))
        centred = torch.where(included, x - groups.sum(x) / count.clamp(min=1), 0)
        result = x
        if baseline == "mean":
            result = centred
        elif baseline == "leave_one_out":
            result = centred * (count / (count - 1).clamp(min=1))
        single = count <= 1
        if baseline != "none" or scale == "std":
            result = torch.where(single, 0, result)
        if scale == "std":
            # the deviation of a group of one is NaN where its reward is
            deviation = torch.where(single, 0, _deviation(groups.sum(centred.square()), count))
            result = result / (deviation + eps)
        elif scale == "batch_std":
            total = included.sum()
            mean = result.sum() / total.clamp(min=1)
            centred = torch.where(included & (total > 1), result - mean, 0)
            result = centred / (_deviation(centred.square().sum(), total) + eps)
            if baseline != "none":
                result = torch.where(single, 0, result)
    return torch.where(groups.bad, torch.nan, torch.where(included, result, 0))
