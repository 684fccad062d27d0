"""Schemas of the row kernels. They write into tensors that the caller owns, so nothing is allocated inside.

`exp` may be `z` itself and `out` may be `source` itself (the same memory, element for element); other overlaps may not.
"""

from typing import Any

import torch

from prism_kernels.library import LIBRARY, define

_FORWARD = (
    "(Tensor z, Tensor target, Tensor anchor, Tensor inv_temperature, Tensor? bias, float softcap, bool chain, "
    "Tensor(a!)? exp, Tensor(b!) stats) -> ()"
)
_BACKWARD = (
    "(Tensor source, bool source_is_exp, Tensor target, Tensor anchor, Tensor inv_temperature, Tensor coefficients, "
    "Tensor? bias, float softcap, Tensor(a!) out) -> ()"
)

# the default overloads are implemented by csrc/cpu and csrc/cuda, the .triton ones in triton.py
define("anchored_rows_fwd" + _FORWARD)
define("anchored_rows_bwd" + _BACKWARD)
define("anchored_rows_fwd.triton" + _FORWARD)
define("anchored_rows_bwd.triton" + _BACKWARD)


def _nothing(*args: Any) -> None:
    """Returns nothing: every output is an argument."""


def _forward_triton(*args: Any) -> None:
    from prism_kernels.ops.anchored_rows.triton import forward

    forward(*args)


def _backward_triton(*args: Any) -> None:
    from prism_kernels.ops.anchored_rows.triton import backward

    backward(*args)


for _name in ("anchored_rows_fwd", "anchored_rows_bwd", "anchored_rows_fwd.triton", "anchored_rows_bwd.triton"):
    torch.library.register_fake(f"prism_kernels::{_name}", _nothing, lib=LIBRARY)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("anchored_rows_fwd.triton", _forward_triton, _key)
    LIBRARY.impl("anchored_rows_bwd.triton", _backward_triton, _key)
