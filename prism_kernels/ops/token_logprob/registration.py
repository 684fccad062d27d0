"""Schemas, fakes and the autograd function of `token_logprob`. T rows, V columns."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.anchored_rows.formulas import RowSums, coefficients, outcome, poisoned

NAME = "token_logprob"

define(
    "token_logprob_fwd(Tensor logits, Tensor target, Tensor temperature, int ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_ARGUMENTS = (
    "Tensor target, Tensor temperature, Tensor sums, Tensor grad_logp, Tensor? grad_entropy, int ignore_index, "
    "str backend"
)
define(f"token_logprob_bwd(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor")
define(f"token_logprob_bwd_(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()")


def accumulator(logits: Tensor) -> torch.dtype:
    """Returns the dtype of the results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _forward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, columns = logits.shape
    check.targets(NAME, target, columns, ignore_index)
    check.temperatures(NAME, temperature)
    keep = target != ignore_index
    exists = (target >= 0) & (target < columns)
    index = target.clamp(0, columns - 1)
    anchor = logits.gather(1, index[:, None])[:, 0].to(accumulator(logits))
    anchor = torch.where(exists, anchor, torch.where(keep, torch.nan, 0.0))
    sums = torch.empty(5, total, dtype=accumulator(logits), device=logits.device)
    inverse = _inverse(temperature)
    ROW_KERNELS[backend].forward(
        logits, torch.where(exists & keep, target, -1), anchor, inverse, None, 0.0, False, None, sums[:4]
    )
    sums[4] = anchor
    return *outcome(RowSums(*sums), inverse, keep), sums


def _inverse(temperature: Tensor) -> Tensor:
    return torch.where(temperature > 0, 1 / temperature, torch.nan)


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    ignore_index: int,
    backend: str,
) -> None:
    keep = target != ignore_index
    rows, inverse = RowSums(*sums), _inverse(temperature)
    coefs = coefficients(rows, inverse, keep, 0.0, grad_logp, grad_entropy)
    local = torch.where(keep, target, -1)
    ROW_KERNELS[backend].backward(logits, False, local, rows.anchor, inverse, coefs, None, 0.0, out)
    has = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
    out.masked_fill_((poisoned(rows, inverse, keep) & has)[:, None], torch.nan)


def _backward(logits: Tensor, *rest: Any) -> Tensor:
    out = torch.empty_like(logits)
    _write_gradient(out, logits, *rest)
    return out


def _backward_in_place(logits: Tensor, *rest: Any) -> None:
    _write_gradient(logits, logits, *rest)


def _forward_fake(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = logits.new_empty(logits.shape[0], dtype=accumulator(logits))
    return row, row.clone(), row.clone(), row.clone(), row.new_empty(5, logits.shape[0])


LIBRARY.impl("token_logprob_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("token_logprob_bwd", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("token_logprob_bwd_", _backward_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::token_logprob_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake(
    "prism_kernels::token_logprob_bwd", lambda logits, *rest: torch.empty_like(logits), lib=LIBRARY
)
torch.library.register_fake("prism_kernels::token_logprob_bwd_", lambda logits, *rest: None, lib=LIBRARY)


class TokenLogProbFunction(torch.autograd.Function):
    """The gradient of `logp` and `entropy` with respect to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        temperature: Tensor,
        ignore_index: int,
        inplace_backward: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns logp, entropy, lse and the sum of squared probabilities."""
        logp, entropy, lse, square, sums = torch.ops.prism_kernels.token_logprob_fwd(
            logits, target, temperature, ignore_index, backend
        )
        ctx.save_for_backward(logits, target, temperature, sums)
        ctx.options = (ignore_index, inplace_backward, backend)
        ctx.mark_non_differentiable(lse, square)
        ctx.set_materialize_grads(False)
        return logp, entropy, lse, square

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits, in their own memory if that was asked for."""
        logits, target, temperature, sums = ctx.saved_tensors
        ignore_index, in_place, backend = ctx.options
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        if grad_logp is None:
            grad_logp = torch.zeros_like(temperature)
        arguments = (
            logits,
            target,
            temperature,
            sums,
            grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            ignore_index,
            backend,
        )
        if in_place:
            torch.ops.prism_kernels.token_logprob_bwd_(*arguments)
            return logits, None, None, None, None, None
        return torch.ops.prism_kernels.token_logprob_bwd(*arguments), None, None, None, None, None
