"""Schemas, fakes and the autograd function of `prefix_attention` on the CPU. T tokens, H and K heads, d width."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.prefix_attention.torch import accumulator, backward, forward
from prism_kernels.packing import Layout, layout_of

NAME = "prefix_attention"

_PACK = "Tensor cu_prefix, Tensor cu_branch, Tensor branch_group, float scale"
define(f"prefix_attention_fwd(Tensor q, Tensor k, Tensor v, {_PACK}) -> (Tensor, Tensor)")
define(
    f"prefix_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PACK})"
    " -> (Tensor, Tensor, Tensor)"
)


def _layout(cu_prefix: Tensor, cu_branch: Tensor, branch_group: Tensor, tokens: int) -> Layout:
    layout = layout_of(cu_prefix, cu_branch, branch_group)
    total = sum(layout.prefix) + sum(layout.branch)
    if total != tokens or min((*layout.prefix, *layout.branch, 0)) < 0:
        check.fail(NAME, f"a pack whose cu_prefix and cu_branch rise and cover its {tokens} tokens", total)
    if sum(layout.branches) != len(layout.branch) or (branch_group.diff() < 0).any():
        check.fail(NAME, f"branch_group in [0, {len(layout.prefix)}) and not to decrease", branch_group.tolist())
    return layout


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_prefix: Tensor, cu_branch: Tensor, branch_group: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, _layout(cu_prefix, cu_branch, branch_group, q.shape[0]), scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_prefix: Tensor,
    cu_branch: Tensor,
    branch_group: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, q, k, v, out, lse, layout_of(cu_prefix, cu_branch, branch_group), scale)


def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for name, implementation, fake in (
    ("prefix_attention_fwd", _forward, _forward_fake),
    ("prefix_attention_bwd", _backward, _backward_fake),
):
    LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"prism_kernels::{name}", fake, lib=LIBRARY)


class PrefixAttentionFunction(torch.autograd.Function):
    """The attention's output, differentiable in q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor, Tensor], scale: float
    ) -> Tensor:
        """Returns the output."""
        out, lse = torch.ops.prism_kernels.prefix_attention_fwd(q, k, v, *lengths, scale)
        ctx.save_for_backward(q, k, v, out, lse, *lengths)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of q, k and v."""
        grads = torch.ops.prism_kernels.prefix_attention_bwd(grad, *ctx.saved_tensors, ctx.scale)
        return *(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad)), None, None
