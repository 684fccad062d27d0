"""The ops of the row kernels. They write into tensors that the caller owns, so nothing is allocated inside.

`exp` may be `z` itself and `out` may be `source` itself (the same memory, element for element); other overlaps may not.
"""

from typing import Any

from prism_kernels.library import register_op


def _forward_triton(*values: Any) -> None:
    from prism_kernels.ops.anchored_rows.kernels import forward

    forward(*values)


def _backward_triton(*values: Any) -> None:
    from prism_kernels.ops.anchored_rows.kernels import backward

    backward(*values)


anchored_rows_fwd = register_op(
    "anchored_rows_fwd(Tensor z, Tensor target, Tensor anchor, Tensor inv_temperature, Tensor? bias, float softcap, "
    "bool chain, Tensor(a!)? exp, Tensor(b!) stats) -> ()",
    triton=_forward_triton,
)
anchored_rows_bwd = register_op(
    "anchored_rows_bwd(Tensor source, bool source_is_exp, Tensor target, Tensor anchor, Tensor inv_temperature, "
    "Tensor coefficients, Tensor? bias, float softcap, Tensor(a!) out) -> ()",
    triton=_backward_triton,
)
