"""The ops of `prefix_attention` on the CPU: schemas, fakes, checks of values and autograd.

T tokens, H heads of q, K heads of k and v, d width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.library import register_op
from prism_kernels.ops.prefix_attention import eager
from prism_kernels.ops.rows import accumulator
from prism_kernels.packing import layout_of

NAME = "prefix_attention"


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cu_prefix, cu_branch, group, last, scale = rest
    layout = layout_of(cu_prefix, cu_branch, group, last, q.shape[0], NAME)
    return eager.forward(q, k, v, layout, scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    cu_prefix, cu_branch, group, last, scale = rest
    layout = layout_of(cu_prefix, cu_branch, group, last, q.shape[0], NAME)
    return eager.backward(grad, q, k, v, out, lse, layout, scale)


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# `PrefixPack.lengths`
_PACK = "Tensor cu_prefix, Tensor cu_branch, Tensor branch_group, Tensor last_index, float scale"
prefix_attention_fwd = register_op(
    f"prefix_attention_fwd(Tensor q, Tensor k, Tensor v, {_PACK}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
prefix_attention_bwd = register_op(
    f"prefix_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PACK})"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    eager=_backward,
)


class PrefixAttentionFunction(torch.autograd.Function):
    """The attention's output, differentiable in q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, ...], scale: float) -> Tensor:
        """Returns the output."""
        out, lse = prefix_attention_fwd(q, k, v, *lengths, scale)
        ctx.save_for_backward(q, k, v, out, lse, *lengths)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of q, k and v."""
        grads = prefix_attention_bwd(grad, *ctx.saved_tensors, ctx.scale)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None
