"""The pair loss and its gradients in plain torch, in one pass. N pairs, P preferred scores."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    """The loss, its gradients with respect to the two scores, and the metrics' totals."""

    value: Tensor
    grad_preferred: Tensor
    grad_other: Tensor
    totals: Tensor


def pair_loss_eager(
    preferred: Tensor,
    other: Tensor,
    group: Tensor | None,
    valid: Tensor | None,
    denominator: Tensor | None,
    divisor: float,
    regularisation: float,
    soft_clip: float,
) -> PairLoss:
    """Returns the loss; a `divisor` or `soft_clip` of 0 stands for none."""
    scores = preferred.shape[0]
    keep = torch.ones_like(other, dtype=torch.bool) if valid is None else valid
    index, by_pair = None, preferred
    if group is not None and scores == 0:
        # without a score there is no pair, and nothing to select from
        index, by_pair = group.to(torch.int64), torch.zeros_like(other)
    elif group is not None:
        # clamped, since on a GPU the values are not checked
        index = group.to(torch.int64).clamp(0, scores - 1)
        by_pair = torch.where(index == group, preferred.index_select(0, index), torch.nan)
    # selected before any arithmetic: an invalid score may be NaN
    p, o = torch.where(keep, by_pair, 0), torch.where(keep, other, 0)
    x = p - o
    clipped = torch.tanh(x / soft_clip) if soft_clip else None
    d = x if clipped is None else clipped * soft_clip
    slope = -torch.sigmoid(-d)
    if clipped is not None:
        slope = slope * (1 - clipped.square())

    if denominator is not None:
        total = denominator.to(x.dtype)
    elif divisor:
        total = torch.full((), divisor, dtype=x.dtype, device=x.device)
    else:
        total = keep.sum().to(x.dtype).clamp(min=1)
    share = torch.where(keep, torch.where(total > 0, 1 / total, torch.nan), 0)
    loss = (share * (regularisation * (p.square() + o.square()) - logsigmoid(d))).sum()
    grad = share * (slope + 2 * regularisation * p)
    if index is not None:
        grad = _sums(grad, index, scores)
    # in the order of PAIR_TOTALS
    summands = [keep, keep & (x > 0), x, p, o]
    return PairLoss(
        loss,
        grad,
        share * (2 * regularisation * o - slope),
        torch.stack([t.sum(dtype=torch.float64) for t in summands]),
    )


def _sums(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Returns the sums of x (N,) by index, (size,)."""
    if size == 0 or x.numel() == 0:
        return x.new_zeros(size)
    ordered, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(size + 1, device=x.device))
    # not index_add_: its order of summation varies on a GPU
    return torch.segment_reduce(x.index_select(0, order), "sum", offsets=bounds, axis=0, initial=0, unsafe=True)
