"""The specification of `prism_advantage`: one group after the other, in float64."""

import torch
from torch import Tensor


def _z(x: Tensor, eps: float, single: str) -> Tensor:
    """Returns the z-scores of one group."""
    if x.numel() == 1:
        return x / (1 + eps) if single == "raw" else torch.zeros_like(x)
    return (x - x.mean()) / (x.std() + eps)


def prism_advantage_reference(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    *,
    format_ok: Tensor | None = None,
    accuracy: Tensor | None = None,
    alpha: float = 0.5,
    normalize: str = "channel",
    invalid: str = "exclude",
    format_penalty: float = 1.5,
    mode: str = "align",
    align_coef: float = 1.0,
    wrong_penalty: float = 1.0,
    w_acc: float = 1.0,
    w_fmt: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Returns what `prism_advantage` returns."""
    single = "raw" if invalid == "below_min" else "zero"
    result = torch.zeros(group.numel(), dtype=torch.float64)
    for g in group.unique().tolist():
        rows = (group == g).nonzero()[:, 0]
        ok = torch.ones(rows.numel(), dtype=torch.bool) if format_ok is None else format_ok[rows]
        channels = [perception[rows].double(), reasoning[rows].double()]
        if invalid == "below_min":
            for x in channels:
                x[~ok] = x[ok].min() - 1 if ok.any() else -1.0
            used = torch.ones_like(ok)
        else:
            used = ok
        if invalid == "exclude" and not ok.any():
            continue
        p, r = (x[used] for x in channels)
        aligned = torch.zeros(rows.numel(), dtype=torch.float64)
        if normalize == "channel":
            aligned[used] = alpha * _z(p, eps, single) + (1 - alpha) * _z(r, eps, single)
        else:
            aligned[used] = _z(alpha * p + (1 - alpha) * r, eps, single)

        fine = ok.double()
        f = 1 - fine
        if mode == "align":
            result[rows] = aligned - format_penalty * f
            continue
        assert accuracy is not None
        correct = accuracy[rows].double()
        w = ((correct <= 0) & ok).double()
        penalty = wrong_penalty * w
        gate = align_coef * aligned * fine * (1 - w)
        reward = w_acc * correct + w_fmt * fine
        result[rows] = {
            "acc_gating": align_coef * aligned - penalty - format_penalty * f,
            "gated": gate - penalty - format_penalty * f,
            "rlvr": _z(reward, eps, single) + gate,
            "rlvr_v2": _z(reward - penalty - format_penalty * f, eps, single) + gate,
            "sign_align": _z(fine * (reward - penalty) - format_penalty * f, eps, single)
            + align_coef * aligned * fine * (1 - 2 * w),
        }[mode]
    return result
