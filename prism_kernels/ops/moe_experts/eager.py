"""The steps around the experts' matrix products, in plain torch: gather, SwiGLU forward and backward, combine.

T tokens, K experts of a token, N = T * K assignments, D width, E experts, I width of the activation. An assignment's
number is t * K + k; rows (N, ...) are in the order of the permutation (N,), which lists these numbers by expert.
"""

from operator import lt
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.ops.rows import accumulator

# elements of an activation that exist in fp32 at a time: few enough for a CPU's caches, enough for few launches
CPU_BLOCK, BLOCK = 2**18, 2**22


class Order(NamedTuple):
    """A routing's order, int32, with which no step reads or writes out of bounds."""

    # [E] where each expert's rows end
    offsets: Tensor
    # [N] the assignment of each row
    permutation: Tensor
    # [N] the row of each assignment; -1: none
    row: Tensor

    @staticmethod
    def empty(experts: int, assignments: int, like: Tensor) -> "Order":
        """Returns memory for an order on the device of `like`."""
        sizes = (experts, assignments, assignments)
        return Order(*(torch.empty(size, dtype=torch.int32, device=like.device) for size in sizes))


def checked_order(op: str, index: Tensor, offsets: Tensor, permutation: Tensor) -> Order:
    """Returns the order after reading and checking all values."""
    total = permutation.shape[0]
    ends = offsets.tolist()
    if ends[-1] != total or ends[0] < 0 or any(map(lt, ends[1:], ends)):
        got = str(ends) if len(ends) <= 16 else f"{ends[:16]} and {len(ends) - 16} more"
        check.fail(op, f"routing.offsets that do not decrease, from at least 0 to {total}, the assignments", got)
    assignment, position = permutation.to(torch.int64), torch.arange(total, device=permutation.device)
    bad = (assignment < 0) | (assignment >= total)
    if bad.any():
        check.fail(op, f"routing.permutation in [0, {total})", int(assignment[bad][0]))
    counts = torch.bincount(assignment, minlength=total)
    if (counts > 1).any():
        check.fail(op, "routing.permutation to hold each assignment once", f"{int(counts.argmax())} more than once")
    expert = index.reshape(-1)[assignment]
    by_offsets = torch.bucketize(position, offsets.contiguous(), right=True)
    wrong = (expert != by_offsets).nonzero()[:, 0]
    if wrong.numel():
        i = int(wrong[0])
        expected = "routing.permutation and routing.offsets to follow routing.index"
        check.fail(op, expected, f"expert {int(by_offsets[i])} instead of {int(expert[i])} for row {i}")
    row = torch.empty_like(position).scatter_(0, assignment, position)
    return Order(*(x.to(torch.int32, copy=True) for x in (offsets, permutation, row)))


def safe_order(index: Tensor, offsets: Tensor, permutation: Tensor) -> Order:
    """Returns the order without waiting for the device; a wrong assignment has no row.

    With bad offsets no assignment has one. An assignment without a row gives NaN.
    """
    total = permutation.shape[0]
    # a running maximum, so that no expert has fewer than 0 rows
    ends = offsets.clamp(0, total).cummax(0).values
    ends[-1:] = total
    whole = (ends == offsets).all()
    assignment = permutation.to(torch.int64)
    inside = assignment.clamp(0, max(total - 1, 0))
    position = torch.arange(total, device=offsets.device)
    expert = index.reshape(-1).index_select(0, inside) if total else inside
    fits = whole & (inside == assignment) & (expert == torch.bucketize(position, ends, right=True))
    row = torch.full((total + 1,), -1, dtype=torch.int32, device=offsets.device)
    row.scatter_(0, torch.where(fits, inside, total), position.to(torch.int32))
    return Order(ends.to(torch.int32), inside.to(torch.int32), row[:total])


def gather(x: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """Returns the token's row of x (T, D) for each assignment, (N, D)."""
    return x.index_select(0, permutation // top_k)


def _blocks(pre: Tensor) -> list[slice]:
    rows = max(1, (CPU_BLOCK if pre.device.type == "cpu" else BLOCK) // max(1, pre.shape[1]))
    return [slice(start, start + rows) for start in range(0, pre.shape[0], rows)]


def swiglu(pre: Tensor) -> Tensor:
    """Returns silu(gate) * up (N, I) of pre = [gate, up] (N, 2I); rounded once."""
    blocks = _blocks(pre)
    if len(blocks) == 1:
        return _activation(pre).to(pre.dtype)
    out = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
    for block in blocks:
        out[block] = _activation(pre[block])
    return out


def _activation(pre: Tensor) -> Tensor:
    gate, up = pre.to(accumulator(pre.dtype)).chunk(2, dim=1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(
    pre: Tensor, grad: Tensor | None, weight: Tensor, permutation: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradient of pre (N, 2I), the weighted activation (N, I) and the weights' gradient (T, K), as needed.

    `grad` (N, I) is the gradient of the activation for weights of 1; None if only the second result is needed.
    """
    dtype = accumulator(pre.dtype)
    needs_pre, needs_activation, needs_weight = needs
    total, width = pre.shape[0], pre.shape[1] // 2
    grad_pre = pre.new_empty(pre.shape) if needs_pre else None
    weighted = pre.new_empty(total, width) if needs_activation else None
    # an assignment without a row keeps NaN
    grad_weight = torch.full_like(weight, torch.nan) if needs_weight else None
    assignment = permutation.to(torch.int64)
    by_expert = weight.reshape(-1).index_select(0, assignment)[:, None]
    for block in _blocks(pre):
        gate, up = pre[block].to(dtype).chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        share = by_expert[block]
        if weighted is not None:
            weighted[block] = silu * up * share
        if grad is None:
            continue
        g = grad[block].to(dtype)
        if grad_weight is not None:
            grad_weight.view(-1)[assignment[block]] = (g * silu * up).sum(1)
        if grad_pre is not None:
            g = g * share
            grad_pre[block, :width] = g * up * (sigmoid + silu * (1 - sigmoid))
            grad_pre[block, width:] = g * silu
    return grad_pre, weighted, grad_weight


def combine(rows: Tensor, row: Tensor, weight: Tensor | None, tokens: int, top_k: int) -> Tensor:
    """Returns the sum over each token's K rows of rows (N, D), weighted with weight (T, K) if given: (T, D).

    `row` (N,) is the row of each assignment; one of -1 makes its token NaN.
    """
    dtype = accumulator(rows.dtype)
    row = row.view(tokens, top_k)
    out = rows.new_zeros(tokens, rows.shape[1], dtype=dtype)
    # where values are checked, every assignment has a row
    unknown = None if check.reads_values(row) else row < 0
    for k in range(top_k):
        column = row[:, k] if unknown is None else row[:, k].clamp(min=0)
        part = rows.index_select(0, column).to(dtype)
        if unknown is not None:
            part.masked_fill_(unknown[:, k, None], torch.nan)
        out += part if weight is None else part.mul_(weight[:, k, None])
    return out.to(rows.dtype)
