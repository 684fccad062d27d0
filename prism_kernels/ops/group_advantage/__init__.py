"""Advantages of samples within their groups (the rollouts of one prompt), vectorised, without host synchronisation."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.group_advantage.op import BASELINES, NAME, SCALES, group_advantage_fwd
from prism_kernels.ops.rows import FLOATS


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "std",
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Returns each sample's advantage over its group, (N,), fp32 (fp64 for fp64 input), without gradient.

    With the default options it replaces, for the samples of each group::

        (reward - reward.mean()) / (reward.std() + eps)

    Samples that are not valid get 0 and enter no statistic; they may hold any value. A group of one valid sample
    gets 0 where its advantage is relative to the group.

    Args:
        reward: (N,).
        group: (N,), integer ids in [0, N), in any order; groups may have any size.
        baseline: what is subtracted: the group's `mean`, the mean of the group's other samples (`leave_one_out`), or
            nothing (`none`).
        scale: the divisor: the group's `std` (ddof 1) + eps; nothing (`none`); or, with `batch_std`, the result is
            centred and divided by its std + eps over the valid samples of the batch.
        valid: (N,), bool; None: all.
        eps: added to the std.
    """
    check_samples(NAME, {"reward": reward}, group, {"valid": valid})
    check.one_of(NAME, "baseline", baseline, BASELINES)
    check.one_of(NAME, "scale", scale, SCALES)
    eps = check.positive(NAME, "eps", eps)
    return group_advantage_fwd(
        reward.detach(),
        group,
        valid,
        BASELINES.index(baseline),
        SCALES.index(scale),
        eps,
        resolve(NAME, reward.device),
    )


def check_samples(op: str, floats: dict[str, Tensor], group: Tensor, flags: dict[str, Tensor | None]) -> None:
    """Checks tensors (N,); their shapes and devices are compared with those of the first of `floats`."""
    first, like = next(iter(floats.items()))
    check.tensor(op, first, like)
    check.shape(op, first, like, ("N",))
    check.tensor(op, "group", group)
    check.dtype(op, "group", group, (torch.int64, torch.int32))
    for name, value in floats.items():
        check.tensor(op, name, value)
        check.dtype(op, name, value, FLOATS)
    for name, flag in flags.items():
        if flag is not None:
            check.tensor(op, name, flag)
            check.dtype(op, name, flag, (torch.bool,))
    for name, value in {**floats, "group": group, **{k: v for k, v in flags.items() if v is not None}}.items():
        check.shape(op, name, value, tuple(like.shape))
        check.device(op, name, value, like, first)
