"""Schema and fake of `prism_advantage`. N samples. Advantages are constants: there is no gradient."""

from typing import Any

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.group_advantage.registration import accumulator, bad_id, beside, check_groups, native
from prism_kernels.ops.prism_advantage.torch import Settings, forward

NAME = "prism_advantage"

NORMALIZE = ("channel", "sum")
INVALID = ("exclude", "below_min")
MODES = ("align", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align")

# implemented by csrc/cpu: samples of one dtype and stride 1, int64 ids; `bad` is the place of the first bad id, or -1
define(
    "prism_advantage_fwd.out(Tensor perception, Tensor reasoning, Tensor group, Tensor? format_ok, Tensor? accuracy, "
    "int normalize, int invalid, int formula, float[] numbers, *, Tensor(a!) out, "
    "Tensor(b!) bad) -> ()"
)
# implemented by csrc/cuda: samples of any dtypes and stride 1
define(
    "prism_advantage_fwd.cuda(Tensor perception, Tensor reasoning, Tensor group, Tensor? format_ok, Tensor? accuracy, "
    "int normalize, int invalid, int formula, float[] numbers) -> Tensor"
)
# `numbers` are `Settings`; `formula` is the mode, a name that torch's own dispatch keeps for itself
define(
    "prism_advantage_fwd(Tensor perception, Tensor reasoning, Tensor group, Tensor? format_ok, Tensor? accuracy, "
    "int normalize, int invalid, int formula, float[] numbers, str backend) -> Tensor"
)


def advantages(
    columns: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    choices: tuple[int, int, int],
    numbers: list[float],
    backend: str,
) -> Tensor:
    """Returns the advantages; on `cuda` past the operator in Python, which only checks values and chooses."""
    if backend == "cuda" and not check.reads_values(columns[2]):
        return _launch(columns, choices, numbers)
    return torch.ops.prism_kernels.prism_advantage_fwd.default(*columns, *choices, numbers, backend)


def _launch(columns: tuple[Tensor | None, ...], choices: tuple[int, int, int], numbers: list[float]) -> Tensor:
    return torch.ops.prism_kernels.prism_advantage_fwd.cuda(*(beside(x) for x in columns), *choices, numbers)


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
    if backend == "cpu":
        dtype = accumulator(perception.dtype)
        out = perception.new_empty(perception.shape[0], dtype=dtype)
        bad = group.new_empty(1, dtype=torch.int64)
        torch.ops.prism_kernels.prism_advantage_fwd.out(
            native(perception, dtype),
            native(reasoning, dtype),
            native(group, torch.int64),
            native(format_ok),
            native(accuracy, dtype),
            normalize,
            invalid,
            formula,
            numbers,
            out=out,
            bad=bad,
        )
        if (place := int(bad)) >= 0:
            bad_id(NAME, group, place)
        return out
    check_groups(NAME, group)
    if backend == "cuda":
        columns = (perception, reasoning, group, format_ok, accuracy)
        return _launch(columns, (normalize, invalid, formula), numbers)
    names = (NORMALIZE[normalize], INVALID[invalid], MODES[formula])
    result = forward(perception, reasoning, group, format_ok, accuracy, *names, Settings(*numbers))
    return result.to(accumulator(perception.dtype))


def _forward_fake(perception: Tensor, *rest: Any) -> Tensor:
    return perception.new_empty(perception.shape[0], dtype=accumulator(perception.dtype))


LIBRARY.impl("prism_advantage_fwd", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::prism_advantage_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::prism_advantage_fwd.cuda", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::prism_advantage_fwd.out", lambda *args, **results: None, lib=LIBRARY)
