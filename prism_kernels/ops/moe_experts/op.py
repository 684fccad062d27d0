"""The ops of `moe_experts`: schemas, fakes, autograd, and the matrix products between the kernels' steps.

T tokens, K experts of a token, N = T * K assignments, D width, E experts, I width of the activation. Rows (N, ...) are
ordered by expert; offsets (E,) says where each expert's rows end, the last at N.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from prism_kernels.library import register_op
from prism_kernels.ops.moe_experts import eager

NAME = "moe_experts"


def _product_dtype(a: Tensor) -> torch.dtype:
    # on the cpu products of halves are slower than products in fp32
    return torch.float32 if a.device.type == "cpu" and a.dtype != torch.float64 else a.dtype


def _experts(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields each expert and where its rows begin and end; reads the offsets on the host."""
    start = 0
    for e, end in enumerate(offsets.tolist()):
        yield e, start, end
        start = end


def _fits_grouped_mm(*operands: Tensor) -> bool:
    """Returns whether grouped_mm is worth calling: bf16 on a GPU, strides and addresses multiples of 16 bytes."""
    # elsewhere and in other dtypes torch's grouped_mm is a loop, too, and reads the offsets on the host
    if any(a.dtype != torch.bfloat16 or a.device.type != "cuda" for a in operands):
        return False
    if torch.cuda.get_device_capability(operands[0].device) < (8, 0):
        return False

    def aligned(a: Tensor) -> bool:
        outer = a.stride()[:-2]
        inner = a.stride()[-2:]
        if 1 not in inner or a.data_ptr() % 16:
            return False
        return all(s * a.element_size() % 16 == 0 for s in (max(inner), *outer))

    return all(aligned(a) for a in operands)


def rows_by_expert(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Returns the product (N, Q) of each row of a (N, P) with the weight (E, P, Q) of its expert."""
    if a.shape[0] and _fits_grouped_mm(a, weight):
        # grouped_mm pads its rows to multiples of 16 bytes
        return grouped_mm(a, weight, offs=offsets).contiguous()
    out = a.new_empty(a.shape[0], weight.shape[2])
    dtype = _product_dtype(a)
    for e, start, end in _experts(offsets):
        if start == end:
            continue
        if dtype == a.dtype:
            torch.mm(a[start:end], weight[e], out=out[start:end])
        else:
            out[start:end].copy_(torch.mm(a[start:end].to(dtype), weight[e].to(dtype)))
    return out


def outer_by_expert(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sum of the outer products of each expert's rows of a (N, P) and b (N, Q), (E, P, Q)."""
    if a.shape[0] and _fits_grouped_mm(a.t(), b):
        out = grouped_mm(a.t(), b, offs=offsets).contiguous()
        if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= (10, 0):
            # there grouped_mm does not write the result of an expert without rows
            empty = offsets == torch.nn.functional.pad(offsets[:-1], (1, 0))
            out.masked_fill_(empty[:, None, None], 0)
        return out
    out = a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])
    dtype = _product_dtype(a)
    for e, start, end in _experts(offsets):
        if start == end:
            out[e].zero_()
        elif dtype == a.dtype:
            torch.mm(a[start:end].t(), b[start:end], out=out[e])
        else:
            out[e].copy_(torch.mm(a[start:end].to(dtype).t(), b[start:end].to(dtype)))
    return out


def _steps(backend: str) -> ModuleType:
    """Returns the module with gather, swiglu, swiglu_backward and combine."""
    if backend == "torch":
        return eager
    from prism_kernels.ops.moe_experts import kernels

    return kernels


def _forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, permutation: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    tokens, top_k = weight.shape
    steps = _steps(backend)
    # a surrounding autocast must not lower the precision of these products
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
    needs_x, needs_weight, needs_gate_up, needs_down = needs
    needs_pre = needs_x or needs_gate_up
    # not one empty tensor: an operator's results may not share memory
    grad_x, grad_gate_up, grad_down = (x.new_empty(0) for _ in range(3))
    with torch.autocast(x.device.type, enabled=False):
        grad_rows = steps.gather(grad, permutation, top_k)
        grad_activation = rows_by_expert(grad_rows, down, offsets) if needs_pre or needs_weight else None
        grad_pre, weighted, grad_weight = steps.swiglu_backward(
            pre, grad_activation, weight, permutation, (needs_pre, needs_down, needs_weight)
        )
        del grad_activation
        if weighted is not None:
            grad_down = outer_by_expert(grad_rows, weighted, offsets)
        del grad_rows, weighted
        if needs_gate_up:
            assert grad_pre is not None
            grad_gate_up = outer_by_expert(grad_pre, steps.gather(x, permutation, top_k), offsets)
        if needs_x:
            assert grad_pre is not None
            grad_x = steps.combine(rows_by_expert(grad_pre, gate_up, offsets), permutation, None, tokens, top_k)
    return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight, grad_gate_up, grad_down


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip((x, weight, gate_up, down), needs))


moe_experts_fwd = register_op(
    "moe_experts_fwd(Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor offsets, Tensor permutation, "
    "str backend) -> (Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
moe_experts_bwd = register_op(
    "moe_experts_bwd(Tensor grad, Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor offsets, "
    "Tensor permutation, Tensor pre, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    eager=_backward,
)


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
        out, pre = moe_experts_fwd(*tensors, backend)
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
        # the gradient of a sum, for example, is expanded: its rows have stride 0
        grads = moe_experts_bwd(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return *(g if needed else None for g, needed in zip(grads, needs)), None, None, None
