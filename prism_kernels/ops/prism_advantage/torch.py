"""The advantages of the adversarial alignment in plain torch, in float64, without reading a value back."""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.group_advantage.torch import Groups, z_score


class Settings(NamedTuple):
    """The numbers of `prism_advantage`."""

    alpha: float
    format_penalty: float
    align_coef: float
    wrong_penalty: float
    w_acc: float
    w_fmt: float
    eps: float


def forward(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    format_ok: Tensor | None,
    accuracy: Tensor | None,
    normalize: str,
    invalid: str,
    mode: str,
    s: Settings,
) -> Tensor:
    """Returns the advantages in float64."""
    groups = Groups.of(group)
    lone = "raw" if invalid == "below_min" else "zero"
    ok = torch.ones_like(groups.bad) if format_ok is None else format_ok
    has_valid = groups.sum(ok.to(torch.float64)) > 0
    take = ok if invalid == "exclude" else None

    def score(x: Tensor) -> Tensor:
        x = x.to(torch.float64)
        if invalid == "exclude":
            return torch.where(ok, x, 0)
        lowest = groups.reduce(torch.where(ok, x, torch.inf), "min", torch.inf)
        return torch.where(ok, x, torch.where(has_valid, lowest - 1, -1))

    def z(x: Tensor, take: Tensor | None = None) -> Tensor:
        return z_score(x, take, groups, s.eps, lone)

    p, r = score(perception), score(reasoning)
    if normalize == "channel":
        aligned = s.alpha * z(p, take) + (1 - s.alpha) * z(r, take)
    else:
        aligned = z(s.alpha * p + (1 - s.alpha) * r, take)

    none = torch.zeros_like(aligned)
    penalty = torch.where(ok, none, s.format_penalty)
    if mode == "align":
        result = aligned - penalty
    else:
        assert accuracy is not None
        correct = accuracy.to(torch.float64)
        wrong = (correct <= 0) & ok
        blame = torch.where(wrong, s.wrong_penalty, none)
        gate = torch.where(ok & ~wrong, s.align_coef * aligned, none)
        reward = s.w_acc * correct + torch.where(ok, s.w_fmt, none)
        if mode == "acc_gating":
            result = s.align_coef * aligned - blame - penalty
        elif mode == "gated":
            result = gate - blame - penalty
        elif mode == "rlvr":
            result = z(reward) + gate
        elif mode == "rlvr_v2":
            result = z(reward - blame - penalty) + gate
        else:
            signed = torch.where(wrong, -aligned, aligned)
            result = z(torch.where(ok, reward - blame, -penalty)) + torch.where(ok, s.align_coef * signed, none)
    if invalid == "exclude":
        result = torch.where(has_valid, result, none)
    return torch.where(groups.bad, torch.nan, result)
