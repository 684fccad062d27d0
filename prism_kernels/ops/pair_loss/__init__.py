"""The Bradley-Terry loss of preferred over other scores, with metrics: one pass, no host synchronisation."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.metrics import PairMetrics
from prism_kernels.ops.pair_loss.op import NAME, PairLossFunction
from prism_kernels.ops.rows import FLOATS


def pair_loss(
    preferred: Tensor,
    other: Tensor,
    *,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    denominator: float | Tensor | None = None,
    regularisation: float = 0.0,
    soft_clip: float | None = None,
) -> tuple[Tensor, PairMetrics]:
    """Returns the loss and its metrics; the gradients are formed in the same pass, and backward only scales them.

    It replaces, over the valid pairs::

        p = preferred[group]
        x = p - other
        x = soft_clip * torch.tanh(x / soft_clip)
        loss = (-logsigmoid(x) + regularisation * (p ** 2 + other ** 2)).mean()

    A pair that is not valid may hold any value, even NaN. Without a valid pair the loss and its gradients are 0.

    Args:
        preferred: (N,), or (P,) with `group`.
        other: (N,).
        group: (N,), integer ids in [0, P): the preferred score that each other score is paired with.
        valid: (N,), bool, the pairs that count; None: all.
        denominator: the number of pairs to divide by instead of this batch's: the global one.
        regularisation: the factor of the squares of both scores, before any clip; it keeps the scores bounded.
        soft_clip: c of c * tanh(x / c) on the difference; unlike a clip it never sets the gradient to 0.
    """
    for name, value in (("preferred", preferred), ("other", other)):
        check.tensor(NAME, name, value)
        check.shape(NAME, name, value, ("N" if name == "other" or group is None else "P",))
        check.dtype(NAME, name, value, FLOATS)
    check.device(NAME, "preferred", preferred, other, "other")
    for name, column, dtypes in (("group", group, (torch.int64, torch.int32)), ("valid", valid, (torch.bool,))):
        if column is not None:
            check.tensor(NAME, name, column)
            check.dtype(NAME, name, column, dtypes)
            check.shape(NAME, name, column, tuple(other.shape))
            check.device(NAME, name, column, other, "other")
    if group is None:
        check.shape(NAME, "preferred", preferred, tuple(other.shape))
    divisor, tensor_denominator = 0.0, None
    if isinstance(denominator, Tensor):
        check.denominator(NAME, denominator)
        check.device(NAME, "denominator", denominator, other, "other")
        tensor_denominator = denominator.detach()
    else:
        divisor = check.optional(NAME, "denominator", denominator)
    clip = check.optional(NAME, "soft_clip", soft_clip)
    factor = check.number(NAME, "regularisation", regularisation, 0, expected="regularisation >= 0 and finite")
    constants = (group, valid, tensor_denominator)
    numbers = (divisor, factor, clip)
    loss, totals = PairLossFunction.apply(preferred, other, constants, numbers)
    return loss, PairMetrics(totals)
