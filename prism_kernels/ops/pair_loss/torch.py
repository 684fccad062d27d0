"""The pair loss and its gradients in plain torch, in one pass. N pairs, P preferred scores."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Loss(NamedTuple):
    """The loss, its gradients with respect to the two scores, and the metrics' totals."""

    value: Tensor
    grad_preferred: Tensor
    grad_other: Tensor
    totals: Tensor


def forward(
    preferred: Tensor,
    other: Tensor,
    group: Tensor | None,
    valid: Tensor | None,
    denominator: Tensor | None,
    divisor: float,
    regularisation: float,
    soft_clip: float,
) -> Loss:
    """Returns the loss; a `divisor` or `soft_clip` of 0 stands for none."""
    scores = preferred.shape[0]
    keep = torch.ones_like(other, dtype=torch.bool) if valid is None else valid
    if group is None:
        place = torch.arange(other.shape[0], device=other.device)
        first = preferred
    elif scores == 0:
        # with no score there is no pair either
        place, first = group.to(torch.int64), torch.zeros_like(other)
    else:
        # held within the scores, since on a GPU the values are not checked
        place = group.to(torch.int64).clamp(0, scores - 1)
        first = preferred.index_select(0, place)
        first = torch.where(place == group, first, torch.nan)
    # selected before any arithmetic: what is not valid may be NaN
    p, o = torch.where(keep, first, 0), torch.where(keep, other, 0)
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
    if group is not None:
        grad = _sums(grad, place, scores)
    totals = [keep, keep & (x > 0), x, p, o]
    return Loss(
        loss,
        grad,
        share * (2 * regularisation * o - slope),
        torch.stack([t.sum(dtype=torch.float64) for t in totals]),
    )


def _sums(x: Tensor, place: Tensor, size: int) -> Tensor:
    """Returns the sums of x (N,) by place, (size,)."""
    if size == 0 or x.numel() == 0:
        return x.new_zeros(size)
    ordered, order = torch.sort(place, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(size + 1, device=x.device))
    # not index_add_: its order of summation varies on a GPU
    return torch.segment_reduce(x.index_select(0, order), "sum", offsets=bounds, axis=0, initial=0, unsafe=True)
