"""The row kernels under `linear_logprob` and `token_logprob`: a log-softmax anchored at the target's logit.

With d_v = (z_v - z_target) / temperature and R the sum of exp(d_v) over v != target, logp = -log1p(R): no cancellation,
so that confident tokens keep their relative accuracy, forward and backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

# not `import torch`: in this package that name is the module torch.py
from torch import ops

from prism_kernels.ops.anchored_rows import registration as registration
from prism_kernels.ops.anchored_rows.torch import backward, forward


class RowKernels(NamedTuple):
    """The two row kernels of one backend; arguments as in anchored_rows/torch.py."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


_ops = ops.prism_kernels
_NATIVE = RowKernels(_ops.anchored_rows_fwd.default, _ops.anchored_rows_bwd.default)

ROW_KERNELS = {
    "torch": RowKernels(forward, backward),
    "cpu": _NATIVE,
    "cuda": _NATIVE,
    "triton": RowKernels(_ops.anchored_rows_fwd.triton, _ops.anchored_rows_bwd.triton),
}
