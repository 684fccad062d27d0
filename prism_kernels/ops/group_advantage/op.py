"""The op of `group_advantage`: schemas, fake and checks of values. N samples. Advantages have no gradient."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.ops.group_advantage.eager import group_advantage_eager
from prism_kernels.ops.rows import accumulator, contiguous

NAME = "group_advantage"

# the op's integers index these tuples; csrc counts in the same order
BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none", "batch_std")

_ARGUMENTS = "Tensor reward, Tensor group, Tensor? valid, int baseline, int scale, float eps"


def check_groups(op: str, group: Tensor) -> None:
    """Checks that the ids lie in [0, N), where values may be read."""
    if check.reads_values(group):
        bad = (group < 0) | (group >= group.numel())
        if bad.any():
            fail_group(op, group, int(bad.nonzero()[0, 0]))


def fail_group(op: str, group: Tensor, index: int) -> None:
    """Raises for the group id at an index."""
    check.fail(op, f"group ids in [0, {group.numel()})", f"{int(group[index])} at {index}")


def _launch(reward: Tensor, group: Tensor, valid: Tensor | None, baseline: int, scale: int, eps: float) -> Tensor:
    return _group_advantage_cuda(contiguous(reward), contiguous(group), contiguous(valid), baseline, scale, eps)


def _forward(
    reward: Tensor, group: Tensor, valid: Tensor | None, baseline: int, scale: int, eps: float, backend: str
) -> Tensor:
    dtype = accumulator(reward.dtype)
    if backend == "cpu":
        out = reward.new_empty(reward.shape[0], dtype=dtype)
        bad = group.new_empty(1, dtype=torch.int64)
        _group_advantage_cpu(
            reward.to(dtype).contiguous(),
            group.to(torch.int64).contiguous(),
            contiguous(valid),
            baseline,
            scale,
            eps,
            out=out,
            bad=bad,
        )
        if (index := int(bad)) >= 0:
            fail_group(NAME, group, index)
        return out
    check_groups(NAME, group)
    if backend == "cuda":
        return _launch(reward, group, valid, baseline, scale, eps)
    return group_advantage_eager(reward, group, valid, BASELINES[baseline], SCALES[scale], eps).to(dtype)


def _forward_fake(reward: Tensor, *_: Any) -> Tensor:
    return reward.new_empty(reward.shape[0], dtype=accumulator(reward.dtype))


# csrc/cpu: samples of one dtype and stride 1, int64 ids; `bad` is the index of the first bad id, or -1
_group_advantage_cpu = register_op(f"group_advantage_fwd.out({_ARGUMENTS}, *, Tensor(a!) out, Tensor(b!) bad) -> ()")
# csrc/cuda: samples of any dtypes and stride 1
_group_advantage_cuda = register_op(f"group_advantage_fwd.cuda({_ARGUMENTS}) -> Tensor", fake=_forward_fake)
group_advantage_fwd = register_op(
    f"group_advantage_fwd({_ARGUMENTS}, str backend) -> Tensor", fake=_forward_fake, eager=_forward, cuda=_launch
)
