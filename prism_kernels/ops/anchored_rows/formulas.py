"""From a row's sums to its log-probability and entropy, and from their gradients to the row kernel's coefficients.

Everything here is a vector of T rows. c is the row's anchor, d_v = (z_v - c) / temperature, and over v != target
R = sum e^d, M = sum e^d d, Q = sum e^2d; d_y belongs to the target and is exactly 0 where c is the target's logit.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowSums(NamedTuple):
    """What is kept of a row between forward and backward, as the rows of one (5, T) tensor."""

    anchor: Tensor
    rest: Tensor
    moment: Tensor
    square: Tensor
    target_logit: Tensor


class _Softmax(NamedTuple):
    d_target: Tensor
    e_target: Tensor
    total: Tensor
    log_total: Tensor
    # sum of e^d d over all columns, over the total
    mean_d: Tensor


def _softmax(sums: RowSums, inv_temperature: Tensor) -> _Softmax:
    d_target = (sums.target_logit - sums.anchor) * inv_temperature
    e_target = d_target.exp()
    total = sums.rest + e_target
    # exact for confident tokens: expm1(0) = 0 where the anchor is the target
    log_total = torch.log1p(sums.rest + torch.expm1(d_target))
    # a target of probability 0 has d = -inf, and 0 * -inf must count as 0
    moment = sums.moment + torch.where(e_target == 0, 0.0, e_target * d_target)
    return _Softmax(d_target, e_target, total, log_total, moment / total)


def outcome(sums: RowSums, inv_temperature: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp, entropy, log-sum-exp and the sum of squared probabilities; 0 where a row is not kept."""
    s = _softmax(sums, inv_temperature)
    logp = s.d_target - s.log_total
    entropy = s.log_total - s.mean_d
    lse = sums.anchor * inv_temperature + s.log_total
    square = (sums.square + s.e_target.square()) / s.total.square()
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    return (
        torch.where(keep, logp, zero),
        torch.where(keep, entropy, zero),
        torch.where(keep, lse, zero),
        torch.where(keep, square, zero),
    )


def coefficients(
    sums: RowSums, inv_temperature: Tensor, keep: Tensor, softcap: float, grad_logp: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Returns alpha, beta and at_target (3, T) of `anchored_rows.backward`: the gradient with respect to the logits.

    Rows that are not kept, or have no gradient, or whose sums are NaN or inf are 0: they touch no other row.
    """
    s = _softmax(sums, inv_temperature)
    scale = inv_temperature / s.total
    alpha = -grad_logp * scale
    beta = torch.zeros_like(alpha)
    at_target = grad_logp * sums.rest * scale
    if grad_entropy is not None:
        # entropy - log_total
        excess = -s.mean_d
        beta = -grad_entropy * scale
        alpha = alpha + beta * excess
        e_d = torch.where(s.e_target == 0, 0.0, s.e_target * s.d_target)
        at_target = at_target + beta * (e_d + s.e_target * excess)
    if softcap:
        at_target = at_target * (1 - (sums.target_logit / softcap).square())
    result = torch.stack((alpha, beta, at_target))
    return torch.where(keep & s.total.isfinite(), result, 0.0)


def poisoned(sums: RowSums, inv_temperature: Tensor, keep: Tensor) -> Tensor:
    """Marks the kept rows whose logits held NaN or +inf, or nothing but -inf."""
    return keep & ~_softmax(sums, inv_temperature).total.isfinite()
