"""Schema, fake and the autograd function of `pair_loss`. N pairs, P preferred scores."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.pair_loss.metrics import NAMES
from prism_kernels.ops.pair_loss.torch import forward

NAME = "pair_loss"

define(
    "pair_loss_fwd(Tensor preferred, Tensor other, Tensor? group, Tensor? valid, Tensor? denominator, float divisor, "
    "float regularisation, float soft_clip) -> (Tensor, Tensor, Tensor, Tensor)"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_values(group: Tensor | None, scores: int, denominator: Tensor | None) -> None:
    if group is not None and check.reads_values(group):
        bad = (group < 0) | (group >= scores)
        if bad.any():
            place = int(bad.nonzero()[0, 0])
            check.fail(NAME, f"group ids in [0, {scores})", f"{int(group[place])} at {place}")
    if denominator is not None and check.reads_values(denominator) and not 0 < float(denominator) < float("inf"):
        check.fail(NAME, "denominator > 0 and finite", float(denominator))


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
    return forward(preferred.to(dtype), other.to(dtype), group, valid, denominator, divisor, regularisation, soft_clip)


def _forward_fake(preferred: Tensor, other: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(other.dtype)
    return (
        other.new_empty((), dtype=dtype),
        other.new_empty(preferred.shape[0], dtype=dtype),
        other.new_empty(other.shape[0], dtype=dtype),
        other.new_empty(len(NAMES), dtype=torch.float64),
    )


LIBRARY.impl("pair_loss_fwd", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::pair_loss_fwd", _forward_fake, lib=LIBRARY)


class PairLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to both scores, which the forward pass has already formed."""

    @staticmethod
    def forward(
        ctx: Any, preferred: Tensor, other: Tensor, rest: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and the metrics' totals."""
        loss, *grads, totals = torch.ops.prism_kernels.pair_loss_fwd(preferred, other, *rest, *numbers)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (preferred.dtype, other.dtype)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients: a scale."""
        if grad_loss is None:
            return (None,) * 4
        grads = [
            (grad * grad_loss).to(dtype) if wanted else None
            for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
        ]
        return *grads, None, None
