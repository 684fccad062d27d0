"""The op of `pair_loss`: schema, fake, checks of values and autograd. N pairs, P preferred scores."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.metrics import PAIR_TOTALS
from prism_kernels.ops.pair_loss.eager import pair_loss_eager
from prism_kernels.ops.rows import accumulator

NAME = "pair_loss"


def _check_values(group: Tensor | None, scores: int, denominator: Tensor | None) -> None:
    if group is not None and check.reads_values(group):
        bad = (group < 0) | (group >= scores)
        if bad.any():
            index = int(bad.nonzero()[0, 0])
            check.fail(NAME, f"group ids in [0, {scores})", f"{int(group[index])} at {index}")
    if denominator is not None and check.reads_values(denominator):
        check.positive(NAME, "denominator", float(denominator))


def _forward(
    preferred: Tensor,
    other: Tensor,
    group: Tensor | None,
    valid: Tensor | None,
    denominator: Tensor | None,
    divisor: float,
    regularisation: float,
    soft_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_values(group, preferred.shape[0], denominator)
    dtype = accumulator(other.dtype)
    scores = (preferred.to(dtype), other.to(dtype))
    return pair_loss_eager(*scores, group, valid, denominator, divisor, regularisation, soft_clip)


def _forward_fake(preferred: Tensor, other: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(other.dtype)
    return (
        other.new_empty((), dtype=dtype),
        other.new_empty(preferred.shape[0], dtype=dtype),
        other.new_empty(other.shape[0], dtype=dtype),
        other.new_empty(len(PAIR_TOTALS), dtype=torch.float64),
    )


_pair_loss_fwd = register_op(
    "pair_loss_fwd(Tensor preferred, Tensor other, Tensor? group, Tensor? valid, Tensor? denominator, float divisor, "
    "float regularisation, float soft_clip) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)


class PairLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to both scores, which the forward pass has already formed."""

    @staticmethod
    def forward(
        ctx: Any, preferred: Tensor, other: Tensor, constants: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and the metrics' totals."""
        loss, *grads, totals = _pair_loss_fwd(preferred, other, *constants, *numbers)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (preferred.dtype, other.dtype)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients: those of the forward pass times the loss's."""
        if grad_loss is None:
            return (None,) * 4
        grads = [
            (grad * grad_loss).to(dtype) if needed else None
            for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        ]
        return *grads, None, None
