"""The ops of `moe_experts`: schemas, fakes, autograd, and the matrix products between the kernels' steps.

T tokens, K experts of a token, N = T * K assignments, D width, E experts, I width of the activation. Rows (N, ...) are
ordered by expert; offsets (E,) says where each expert's rows end, the last at N.
"""

from collections.abc import Iterator
from operator import sub
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from prism_kernels import check
from prism_kernels.library import native_reason, register_op
from prism_kernels.ops.moe_experts import eager
from prism_kernels.ops.moe_experts.eager import Order

NAME = "moe_experts"


def _product_dtype(a: Tensor) -> torch.dtype:
    # on the cpu products of halves are slower than products in fp32
    return torch.float32 if a.device.type == "cpu" and a.dtype != torch.float64 else a.dtype


def _by_expert(offsets: Tensor, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the rows of each expert in each of the tensors; reads the offsets on the host."""
    ends = offsets.tolist()
    sizes = list(map(sub, ends, [0, *ends[:-1]]))
    return zip(*(x.split_with_sizes(sizes) for x in rows))


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
    for (part, result), matrix in zip(_by_expert(offsets, a, out), weight.unbind()):
        if part.shape[0] == 0:
            continue
        if dtype == a.dtype:
            torch.mm(part, matrix, out=result)
        else:
            result.copy_(torch.mm(part.to(dtype), matrix.to(dtype)))
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
    for (left, right), result in zip(_by_expert(offsets, a, b), out.unbind()):
        if left.shape[0] == 0:
            result.zero_()
        elif dtype == a.dtype:
            torch.mm(left.t(), right, out=result)
        else:
            result.copy_(torch.mm(left.to(dtype).t(), right.to(dtype)))
    return out


def _steps(backend: str) -> ModuleType:
    """Returns the module with safe_order, gather, swiglu, swiglu_backward and combine."""
    if backend == "torch":
        return eager
    from prism_kernels.ops.moe_experts import kernels

    return kernels


def _checked_order(index: Tensor, offsets: Tensor, permutation: Tensor) -> Order:
    # as moe_route makes them: for these, one call in C++ takes the place of fifteen in torch
    usual = (index.dtype, offsets.dtype, permutation.dtype) == (torch.int64, torch.int32, torch.int32)
    if usual and permutation.device.type == "cpu" and native_reason["_C"] is None:
        order, bad = Order.empty(offsets.shape[0], permutation.shape[0], index), index.new_empty(1)
        given = (index.reshape(-1), offsets.contiguous(), permutation.contiguous())
        _order_cpu(*given, ends=order.offsets, assignment=order.permutation, row=order.row, bad=bad)
        if not int(bad):
            return order
    return eager.checked_order(NAME, index, offsets, permutation)


def _forward(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    tokens, top_k = weight.shape
    steps = _steps(backend)
    find_order = _checked_order if check.reads_values(permutation) else steps.safe_order
    order = find_order(index, offsets, permutation)
    # a surrounding autocast must not lower the precision of these products
    with torch.autocast(x.device.type, enabled=False):
        pre = rows_by_expert(steps.gather(x, order.permutation, top_k), gate_up.transpose(1, 2), order.offsets)
        rows = rows_by_expert(steps.swiglu(pre), down.transpose(1, 2), order.offsets)
        return steps.combine(rows, order.row, weight, tokens, top_k), pre, *order


def _forward_fake(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    assignments = weight.shape[0] * weight.shape[1]
    order = Order.empty(gate_up.shape[0], assignments, x)
    return x.new_empty(x.shape), x.new_empty(assignments, gate_up.shape[1]), *order


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pre: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    row: Tensor,
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
            grad_x = steps.combine(rows_by_expert(grad_pre, gate_up, offsets), row, None, tokens, top_k)
    return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight, grad_gate_up, grad_down


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    return tuple(t.new_empty(t.shape if n else 0) for t, n in zip((x, weight, gate_up, down), needs))


# csrc/cpu; `bad` is 1 where the order does not belong to the index
_order_cpu = register_op(
    "moe_experts_order.out(Tensor index, Tensor offsets, Tensor permutation, *, Tensor(a!) ends, "
    "Tensor(b!) assignment, Tensor(c!) row, Tensor(d!) bad) -> ()"
)
moe_experts_fwd = register_op(
    "moe_experts_fwd(Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor down, Tensor offsets, "
    "Tensor permutation, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
# the order is the forward's last three results
moe_experts_bwd = register_op(
    "moe_experts_bwd(Tensor grad, Tensor x, Tensor weight, Tensor gate_up, Tensor down, Tensor pre, Tensor offsets, "
    "Tensor permutation, Tensor row, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
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
        order: tuple[Tensor, Tensor, Tensor],
        backend: str,
    ) -> Tensor:
        """Returns the weighted sum of the experts' outputs; `order` is the routing's index, offsets and permutation."""
        index, *rest = order
        x, weight = x.contiguous(), weight.contiguous()
        out, pre, *checked = moe_experts_fwd(x, index, weight, gate_up, down, *rest, backend)
        ctx.save_for_backward(x, weight, gate_up, down, pre, *checked)
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients that are needed."""
        needs = list(ctx.needs_input_grad[:4])
        if not any(needs):
            return (None,) * 6
        # the gradient of a sum, for example, is expanded: its rows have stride 0
        grads = moe_experts_bwd(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return *(g if needed else None for g, needed in zip(grads, needs)), None, None
