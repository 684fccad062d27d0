"""The op of `prism_advantage`: schemas and fake. N samples. Advantages have no gradient."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels.library import register_op
from prism_kernels.ops.group_advantage.op import check_groups, fail_group
from prism_kernels.ops.prism_advantage.eager import Settings, prism_advantage_eager
from prism_kernels.ops.rows import accumulator, contiguous

NAME = "prism_advantage"

# the op's integers index these tuples; csrc counts in the same order
NORMALIZE = ("channel", "sum")
INVALID = ("exclude", "below_min")
MODES = ("align", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align")

_COLUMNS = "Tensor perception, Tensor reasoning, Tensor group, Tensor? format_ok, Tensor? accuracy"
# `formula` is the mode, whose name torch's dispatch reserves; `numbers` are `Settings`
_OPTIONS = "int normalize, int invalid, int formula, float[] numbers"


def _launch(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    format_ok: Tensor | None,
    accuracy: Tensor | None,
    *options: Any,
) -> Tensor:
    columns = (perception, reasoning, group, format_ok, accuracy)
    return _prism_advantage_cuda(*(contiguous(x) for x in columns), *options)


def _forward(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    format_ok: Tensor | None,
    accuracy: Tensor | None,
    normalize: int,
    invalid: int,
    formula: int,
    numbers: list[float],
    backend: str,
) -> Tensor:
    dtype = accumulator(perception.dtype)
    if backend == "cpu":
        out = perception.new_empty(perception.shape[0], dtype=dtype)
        bad = group.new_empty(1, dtype=torch.int64)
        _prism_advantage_cpu(
            perception.to(dtype).contiguous(),
            reasoning.to(dtype).contiguous(),
            group.to(torch.int64).contiguous(),
            contiguous(format_ok),
            None if accuracy is None else accuracy.to(dtype).contiguous(),
            normalize,
            invalid,
            formula,
            numbers,
            out=out,
            bad=bad,
        )
        if (index := int(bad)) >= 0:
            fail_group(NAME, group, index)
        return out
    check_groups(NAME, group)
    columns = (perception, reasoning, group, format_ok, accuracy)
    if backend == "cuda":
        return _launch(*columns, normalize, invalid, formula, numbers)
    names = (NORMALIZE[normalize], INVALID[invalid], MODES[formula])
    return prism_advantage_eager(*columns, *names, Settings(*numbers)).to(dtype)


def _forward_fake(perception: Tensor, *_: Any) -> Tensor:
    return perception.new_empty(perception.shape[0], dtype=accumulator(perception.dtype))


# csrc/cpu: samples of one dtype and stride 1, int64 ids; `bad` is the index of the first bad id, or -1
_prism_advantage_cpu = register_op(
    f"prism_advantage_fwd.out({_COLUMNS}, {_OPTIONS}, *, Tensor(a!) out, Tensor(b!) bad) -> ()"
)
# csrc/cuda: samples of any dtypes and stride 1
_prism_advantage_cuda = register_op(f"prism_advantage_fwd.cuda({_COLUMNS}, {_OPTIONS}) -> Tensor", fake=_forward_fake)
prism_advantage_fwd = register_op(
    f"prism_advantage_fwd({_COLUMNS}, {_OPTIONS}, str backend) -> Tensor",
    fake=_forward_fake,
    eager=_forward,
    cuda=_launch,
)
