"""Schema and fake of `group_advantage`. N samples. Advantages are constants: there is no gradient."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.group_advantage.torch import forward

NAME = "group_advantage"

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none", "batch_std")

# implemented by csrc/cpu: samples of one dtype and stride 1, int64 ids; `bad` is the place of the first bad id, or -1
define(
    "group_advantage_fwd.out(Tensor reward, Tensor group, Tensor? valid, int baseline, int scale, float eps, *, "
    "Tensor(a!) out, Tensor(b!) bad) -> ()"
)
# implemented by csrc/cuda: samples of any dtypes and stride 1
define(
    "group_advantage_fwd.cuda(Tensor reward, Tensor group, Tensor? valid, int baseline, int scale, float eps) -> Tensor"
)
define(
    "group_advantage_fwd(Tensor reward, Tensor group, Tensor? valid, int baseline, int scale, float eps, str backend)"
    " -> Tensor"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the result."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_groups(op: str, group: Tensor) -> None:
    """Checks that the ids lie in [0, N), where values may be read."""
    if check.reads_values(group):
        bad = (group < 0) | (group >= group.numel())
        if bad.any():
            bad_id(op, group, int(bad.nonzero()[0, 0]))


def bad_id(op: str, group: Tensor, place: int) -> None:
    """Raises for the id at a place."""
    check.fail(op, f"group ids in [0, {group.numel()})", f"{int(group[place])} at {place}")


def native(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Returns a column as the C++ kernels take it."""
    return None if x is None else x.to(dtype or x.dtype).contiguous()


def beside(x: Tensor | None) -> Tensor | None:
    """Returns a column with its elements side by side, as the CUDA kernels take it."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def advantages(
    reward: Tensor, group: Tensor, valid: Tensor | None, baseline: int, scale: int, eps: float, backend: str
) -> Tensor:
    """Returns the advantages; on `cuda` past the operator in Python, which only checks values and chooses."""
    if backend == "cuda" and not check.reads_values(group):
        return _launch(reward, group, valid, baseline, scale, eps)
    return torch.ops.prism_kernels.group_advantage_fwd.default(reward, group, valid, baseline, scale, eps, backend)


def _launch(reward: Tensor, group: Tensor, valid: Tensor | None, baseline: int, scale: int, eps: float) -> Tensor:
    columns = (beside(reward), beside(group), beside(valid))
    return torch.ops.prism_kernels.group_advantage_fwd.cuda(*columns, baseline, scale, eps)


def _forward(
    reward: Tensor, group: Tensor, valid: Tensor | None, baseline: int, scale: int, eps: float, backend: str
) -> Tensor:
    if backend == "cpu":
        dtype = accumulator(reward.dtype)
        out = reward.new_empty(reward.shape[0], dtype=dtype)
        bad = group.new_empty(1, dtype=torch.int64)
        torch.ops.prism_kernels.group_advantage_fwd.out(
            native(reward, dtype), native(group, torch.int64), native(valid), baseline, scale, eps, out=out, bad=bad
        )
        if (place := int(bad)) >= 0:
            bad_id(NAME, group, place)
        return out
    check_groups(NAME, group)
    if backend == "cuda":
        return _launch(reward, group, valid, baseline, scale, eps)
    result = forward(reward, group, valid, BASELINES[baseline], SCALES[scale], eps)
    return result.to(accumulator(reward.dtype))


def _forward_fake(reward: Tensor, *rest: Any) -> Tensor:
    return reward.new_empty(reward.shape[0], dtype=accumulator(reward.dtype))


LIBRARY.impl("group_advantage_fwd", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::group_advantage_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::group_advantage_fwd.cuda", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::group_advantage_fwd.out", lambda *args, **results: None, lib=LIBRARY)
