"""The advantages of the adversarial alignment in plain torch, in float64, without host synchronisation."""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.group_advantage.eager import Groups, z_score


class Settings(NamedTuple):
    """The numeric options of `prism_advantage`."""

    alpha: float
    format_penalty: float
    align_coef: float
    wrong_penalty: float
    w_acc: float
    w_fmt: float
    eps: float


def prism_advantage_eager(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    format_ok: Tensor | None,
    accuracy: Tensor | None,
    normalize: str,
    invalid: str,
    mode: str,
    settings: Settings,
) -> Tensor:
    """Returns the advantages in float64."""
    groups = Groups.of(group)
    single = "raw" if invalid == "below_min" else "zero"
    ok = torch.ones_like(groups.bad) if format_ok is None else format_ok
    has_valid = groups.sum(ok.to(torch.float64)) > 0
    included = ok if invalid == "exclude" else None

    def score(x: Tensor) -> Tensor:
        x = x.to(torch.float64)
        if invalid == "exclude":
            return torch.where(ok, x, 0)
        lowest = groups.reduce(torch.where(ok, x, torch.inf), "min", torch.inf)
        return torch.where(ok, x, torch.where(has_valid, lowest - 1, -1))

    def z(x: Tensor, included: Tensor | None = None) -> Tensor:
        return z_score(x, included, groups, settings.eps, single)

    p, r = score(perception), score(reasoning)
    if normalize == "channel":
        aligned = settings.alpha * z(p, included) + (1 - settings.alpha) * z(r, included)
    else:
        aligned = z(settings.alpha * p + (1 - settings.alpha) * r, included)

    zero = torch.zeros_like(aligned)
    penalty = torch.where(ok, zero, settings.format_penalty)
    if mode == "align":
        result = aligned - penalty
    else:
        assert accuracy is not None
        correct = accuracy.to(torch.float64)
        wrong = (correct <= 0) & ok
        blame = torch.where(wrong, settings.wrong_penalty, zero)
        gate = torch.where(ok & ~wrong, settings.align_coef * aligned, zero)
        reward = settings.w_acc * correct + torch.where(ok, settings.w_fmt, zero)
        if mode == "acc_gating":
            result = settings.align_coef * aligned - blame - penalty
        elif mode == "gated":
            result = gate - blame - penalty
        elif mode == "rlvr":
            result = z(reward) + gate
        elif mode == "rlvr_v2":
            result = z(reward - blame - penalty) + gate
        else:
            signed = torch.where(wrong, -aligned, aligned)
            result = z(torch.where(ok, reward - blame, -penalty)) + torch.where(ok, settings.align_coef * signed, zero)
    if invalid == "exclude":
        result = torch.where(has_valid, result, zero)
    return torch.where(groups.bad, torch.nan, result)
