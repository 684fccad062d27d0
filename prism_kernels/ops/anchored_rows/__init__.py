"""The row kernels under `linear_logprob` and `token_logprob`: a log-softmax anchored at the target's logit.

With d_v = (z_v - z_target) / temperature and R the sum of exp(d_v) over v != target, logp = -log1p(R): no cancellation,
so that confident tokens keep their relative accuracy, forward and backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from prism_kernels.ops.anchored_rows.eager import backward, forward
from prism_kernels.ops.anchored_rows.op import anchored_rows_bwd, anchored_rows_fwd


class RowKernels(NamedTuple):
    """The two row kernels of one backend; arguments as in anchored_rows/eager.py."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


# csrc/cpu and csrc/cuda, by the tensors' device
_NATIVE = RowKernels(anchored_rows_fwd, anchored_rows_bwd)
_ops = torch.ops.prism_kernels

ROW_KERNELS = {
    "torch": RowKernels(forward, backward),
    "cpu": _NATIVE,
    "cuda": _NATIVE,
    "triton": RowKernels(_ops.anchored_rows_fwd.triton, _ops.anchored_rows_bwd.triton),
}
