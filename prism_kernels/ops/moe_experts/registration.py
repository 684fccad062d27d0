"""Schemas, fakes and the autograd function of `moe_experts`.

T tokens, K experts of a token, N = T * K assignments, D width, E experts, I width of the activation.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.moe_experts import torch as form
from prism_kernels.ops.moe_experts.grouped import outer_by_expert, rows_by_expert

NAME = "moe_experts"

define(
    "moe_experts_fwd(Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor offsets, Tensor permutation, "
    "str backend) -> (Tensor, Tensor)"
)
define(
    "moe_experts_bwd(Tensor grad, Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor offsets, "
    "Tensor permutation, Tensor pre, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _steps(backend: str) -> ModuleType:
    """Returns the module with gather, swiglu, swiglu_backward and combine."""
    if backend == "torch":
        return form
    from prism_kernels.ops.moe_experts import triton

    return triton


def _forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, permutation: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    tokens, top_k = weight.shape
    steps = _steps(backend)
    # a surrounding autocast must not lower the products in here
    with torch.autocast(x.device.type, enabled=False):
        pre = rows_by_expert(steps.gather(x, permutation, top_k), gate_up.transpose(1, 2), offsets)
        rows = rows_by_expert(steps.swiglu(pre), down.transpose(1, 2), offsets)
        return steps.combine(rows, permutation, weight, tokens, top_k), pre


def _forward_fake(x: Tensor, weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.shape[0] * weight.shape[1], gate_up.shape[1])


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    pre: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, top_k = weight.shape
    steps = _steps(backend)
    wants_x, wants_weight, wants_gate_up, wants_down = needs
    wants_pre = wants_x or wants_gate_up
    # not one empty tensor: an operator's results may not share memory
    grad_x, grad_gate_up, grad_down = (x.new_empty(0) for _ in range(3))
    with torch.autocast(x.device.type, enabled=False):
        arriving = steps.gather(grad, permutation, top_k)
        through = rows_by_expert(arriving, down, offsets) if wants_pre or wants_weight else None
        grad_pre, weighted, grad_weight = steps.swiglu_backward(
            pre, through, weight, permutation, (wants_pre, wants_down, wants_weight)
        )
        del through
        if weighted is not None:
            grad_down = outer_by_expert(arriving, weighted, offsets)
        del arriving, weighted
        if wants_gate_up:
            assert grad_pre is not None
            grad_gate_up = outer_by_expert(grad_pre, steps.gather(x, permutation, top_k), offsets)
        if wants_x:
            assert grad_pre is not None
            grad_x = steps.combine(rows_by_expert(grad_pre, gate_up, offsets), permutation, None, tokens, top_k)
    return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight, grad_gate_up, grad_down


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip((x, weight, gate_up, down), needs))


for _name, _implementation, _fake in (
    ("moe_experts_fwd", _forward, _forward_fake),
    ("moe_experts_bwd", _backward, _backward_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prism_kernels::{_name}", _fake, lib=LIBRARY)


class MoeExpertsFunction(torch.autograd.Function):
    """The gradients with respect to x, the routing's weights, gate_up and down."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        permutation: Tensor,
        backend: str,
    ) -> Tensor:
        """Returns the weighted sum of the experts' outputs."""
        tensors = (x.contiguous(), weight.contiguous(), gate_up, down, offsets, permutation)
        out, pre = torch.ops.prism_kernels.moe_experts_fwd(*tensors, backend)
        ctx.save_for_backward(*tensors, pre)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients that are needed."""
        needs = list(ctx.needs_input_grad[:4])
        if not any(needs):
            return (None,) * 7
        # an expanded gradient, of a sum for example, has rows of stride 0
        grads = torch.ops.prism_kernels.moe_experts_bwd(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return *(g if wanted else None for g, wanted in zip(grads, needs)), None, None, None
