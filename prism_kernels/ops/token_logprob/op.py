"""The ops of `token_logprob`: schemas, fakes, autograd, and the steps around the row kernels. T rows, V columns."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.rows import RowSums, accumulator, coefficients, has_gradient, inverse, outcome

NAME = "token_logprob"


def _forward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, columns = logits.shape
    dtype = accumulator(logits.dtype)
    check.targets(NAME, target, columns, ignore_index)
    check.temperatures(NAME, temperature)
    keep = target != ignore_index
    exists = (target >= 0) & (target < columns)
    index = target.clamp(0, columns - 1)
    anchor = logits.gather(1, index[:, None])[:, 0].to(dtype)
    anchor = torch.where(exists, anchor, torch.where(keep, torch.nan, 0.0))
    sums = torch.empty(5, total, dtype=dtype, device=logits.device)
    inv_temperature = inverse(temperature)
    ROW_KERNELS[backend].forward(
        logits, torch.where(exists & keep, target, -1), anchor, inv_temperature, None, 0.0, False, None, sums[:4]
    )
    sums[4] = anchor
    return *outcome(RowSums(*sums), inv_temperature, keep), sums


def _forward_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))
    return row, row.clone(), row.clone(), row.clone(), row.new_empty(5, logits.shape[0])


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
    rows, inv_temperature = RowSums(*sums), inverse(temperature)
    coefs, bad = coefficients(rows, inv_temperature, keep, 0.0, grad_logp, grad_entropy)
    local = torch.where(keep, target, -1)
    ROW_KERNELS[backend].backward(logits, False, local, rows.anchor, inv_temperature, coefs, None, 0.0, out)
    bad &= has_gradient(grad_logp, grad_entropy)
    out.masked_fill_(bad[:, None], torch.nan)


def _backward(logits: Tensor, *rest: Any) -> Tensor:
    # not empty_like, which copies the order of the strides
    out = logits.new_empty(logits.shape)
    _write_gradient(out, logits, *rest)
    return out


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_in_place(logits: Tensor, *rest: Any) -> None:
    _write_gradient(logits, logits, *rest)


_GRADIENT = (
    "Tensor target, Tensor temperature, Tensor sums, Tensor grad_logp, Tensor? grad_entropy, int ignore_index, "
    "str backend"
)
token_logprob_fwd = register_op(
    "token_logprob_fwd(Tensor logits, Tensor target, Tensor temperature, int ignore_index, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
token_logprob_bwd = register_op(
    f"token_logprob_bwd(Tensor logits, {_GRADIENT}) -> Tensor", fake=_backward_fake, eager=_backward
)
token_logprob_bwd_ = register_op(f"token_logprob_bwd_(Tensor(a!) logits, {_GRADIENT}) -> ()", eager=_backward_in_place)


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
        logp, entropy, lse, square, sums = token_logprob_fwd(logits, target, temperature, ignore_index, backend)
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
        """Returns the gradient of the logits, in the logits' memory if so asked."""
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
            token_logprob_bwd_(*arguments)
            return logits, None, None, None, None, None
        return token_logprob_bwd(*arguments), None, None, None, None, None
