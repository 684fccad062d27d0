"""The steps around the experts' matrix products, in Triton: a program handles one row, a block of columns at a time.

The functions have the names, arguments and results of those in eager.py, which also names the dimensions.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.ops.moe_experts.eager import Order
from prism_kernels.ops.rows import accumulator

# from 3.10 on, Triton contracts a * b + c only on request: the tiles are tested with it
FP_FUSION = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """The columns of a block and its warps."""

    columns: int
    num_warps: int


# by compute capability; 0 is the interpreter, where blocks are small so that small tests cross their edges. A lane
# loads 8 halves: 16 bytes
TILES = {0: Tile(32, 1), 80: Tile(1024, 4), 90: Tile(1024, 4), 100: Tile(1024, 4)}


@functools.cache
def architecture(device: torch.device) -> int:
    """Returns the key of the tile table for a device: 80, 90 or 100; 0 for the CPU, that is, the interpreter."""
    if device.type == "cpu":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@triton.jit
def _order_kernel(
    index, offsets, permutation, ends, safe, row, total, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # every program reads all offsets: bad ones leave all assignments without a row
    e = tl.arange(0, EXPERTS)
    live = e < experts
    end = tl.load(offsets + e, mask=live, other=0)
    start = tl.load(offsets + e - 1, mask=live & (e > 0), other=0)
    bad = live & ((end < start) | ((e == experts - 1) & (end != total)))
    whole = tl.sum(bad.to(tl.int32)) == 0
    rows = tl.where(whole, total, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + e, tl.where(whole, end, total), mask=live)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    assignment = tl.load(permutation + i, mask=inside, other=-1)
    known = (assignment >= 0) & (assignment < total)
    tl.store(safe + i, tl.where(known, assignment, 0), mask=inside)
    expert = tl.load(index + assignment, mask=known, other=-1)
    known &= (expert >= 0) & (expert < experts)
    low = tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0)
    high = tl.load(offsets + expert, mask=known, other=0)
    tl.store(row + assignment, i, mask=known & (low <= i) & (i < high) & (i < rows))


@triton.jit
def _gather_kernel(source, permutation, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source += (tl.load(permutation + row) // TOP_K).to(tl.int64) * columns
    out += row * columns
    for c0 in range(0, columns, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        tl.store(out + c, tl.load(source + c, mask=c < columns), mask=c < columns)


@triton.jit
def _swiglu_fwd_kernel(pre, out, columns, BLOCK: tl.constexpr, dtype: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pre += row * 2 * columns
    out += row * columns
    for c0 in range(0, columns, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        live = c < columns
        gate = tl.load(pre + c, mask=live, other=0.0).to(dtype)
        up = tl.load(pre + columns + c, mask=live, other=0.0).to(dtype)
        act = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + c, act.to(out.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_bwd_kernel(
    pre, grad, weight, permutation, grad_pre, weighted, grad_weight, columns,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    assignment = tl.load(permutation + row)
    share = tl.load(weight + assignment)
    pre += row * 2 * columns
    total = tl.zeros([BLOCK], dtype)
    for c0 in range(0, columns, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        live = c < columns
        gate = tl.load(pre + c, mask=live, other=0.0).to(dtype)
        up = tl.load(pre + columns + c, mask=live, other=0.0).to(dtype)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if weighted is not None:
            act = silu * up * share
            tl.store(weighted + row * columns + c, act.to(weighted.dtype.element_ty), mask=live)
        if grad is not None:
            g = tl.load(grad + row * columns + c, mask=live, other=0.0).to(dtype)
            if grad_weight is not None:
                total += g * silu * up
            if grad_pre is not None:
                g *= share
                to = grad_pre + row * 2 * columns + c
                by_gate = g * up * (sigmoid + silu * (1.0 - sigmoid))
                tl.store(to, by_gate.to(grad_pre.dtype.element_ty), mask=live)
                tl.store(to + columns, (g * silu).to(grad_pre.dtype.element_ty), mask=live)
    if grad_weight is not None:
        tl.store(grad_weight + assignment, tl.sum(total))


@triton.jit
def _combine_kernel(
    rows, row, weight, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row += token * TOP_K
    out += token * columns
    for c0 in range(0, columns, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        live = c < columns
        total = tl.zeros([BLOCK], dtype)
        for k in tl.static_range(TOP_K):
            place = tl.load(row + k).to(tl.int64)
            known = c < tl.where(place >= 0, columns, 0)
            part = tl.load(rows + place * columns + c, mask=known, other=float("nan")).to(dtype)
            if weight is not None:
                part *= tl.load(weight + token * TOP_K + k)
            total += part
        tl.store(out + c, total.to(out.dtype.element_ty), mask=live)


_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def backward_registers(dtype: torch.dtype) -> int:
    """Returns the registers that SwiGLU's backward may take: by itself, ptxas stops at 48 (fp64: 72) and spills."""
    return 128 if dtype == torch.float64 else 64


def _tile(tensor: Tensor) -> tuple[dict[str, int], int]:
    tile = TILES[architecture(tensor.device)]
    return {"BLOCK": tile.columns}, tile.num_warps


def safe_order(index: Tensor, offsets: Tensor, permutation: Tensor) -> Order:
    """Returns the order without waiting for the device; a wrong assignment has no row."""
    total, experts = permutation.shape[0], offsets.shape[0]
    order = Order.empty(experts, total, offsets)
    order.row.fill_(-1)
    block = 1024
    with torch.cuda.device_of(offsets):
        _order_kernel[(max(1, triton.cdiv(total, block)),)](
            index.contiguous(), offsets.contiguous(), permutation.contiguous(), *order, total, experts,
            EXPERTS=triton.next_power_of_2(experts), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return order


def gather(x: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """Returns the token's row of x (T, D) for each assignment, (N, D)."""
    total, columns = permutation.shape[0], x.shape[1]
    out = x.new_empty(total, columns)
    if out.numel():
        block, num_warps = _tile(x)
        with torch.cuda.device_of(x):
            _gather_kernel[(total,)](x, permutation, out, columns, TOP_K=top_k, **block, num_warps=num_warps)
    return out


def swiglu(pre: Tensor) -> Tensor:
    """Returns silu(gate) * up (N, I) of pre (N, 2I)."""
    total, columns = pre.shape[0], pre.shape[1] // 2
    out = pre.new_empty(total, columns)
    if out.numel():
        block, num_warps = _tile(pre)
        with torch.cuda.device_of(pre):
            _swiglu_fwd_kernel[(total,)](
                pre, out, columns, dtype=_DTYPE[accumulator(pre.dtype)], **block, num_warps=num_warps, **FP_FUSION
            )
    return out


def swiglu_backward(
    pre: Tensor, grad: Tensor | None, weight: Tensor, permutation: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradient of pre, the weighted activation and the weights' gradient, as needed, in one pass."""
    total, columns = pre.shape[0], pre.shape[1] // 2
    grad_pre = pre.new_empty(pre.shape) if needs[0] else None
    weighted = pre.new_empty(total, columns) if needs[1] else None
    # an assignment without a row keeps NaN
    grad_weight = torch.full_like(weight, torch.nan) if needs[2] else None
    if total:
        block, num_warps = _tile(pre)
        with torch.cuda.device_of(pre):
            _swiglu_bwd_kernel[(total,)](
                pre, grad, weight, permutation, grad_pre, weighted, grad_weight, columns,
                dtype=_DTYPE[accumulator(pre.dtype)], **block, num_warps=num_warps,
                maxnreg=backward_registers(pre.dtype), **FP_FUSION,
            )  # fmt: skip
    return grad_pre, weighted, grad_weight


def combine(rows: Tensor, row: Tensor, weight: Tensor | None, tokens: int, top_k: int) -> Tensor:
    """Returns the sum over each token's K rows of rows (N, D), weighted with weight (T, K) if given: (T, D)."""
    out = rows.new_empty(tokens, rows.shape[1])
    if out.numel():
        block, num_warps = _tile(rows)
        with torch.cuda.device_of(rows):
            _combine_kernel[(tokens,)](
                rows, row, weight, out, rows.shape[1],
                TOP_K=top_k, dtype=_DTYPE[accumulator(rows.dtype)], **block, num_warps=num_warps, **FP_FUSION,
            )  # fmt: skip
    return out
