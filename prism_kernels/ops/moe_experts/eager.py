"""The steps around the experts' matrix products, in plain torch: gather, SwiGLU forward and backward, combine.

T tokens, K experts of a token, N = T * K assignments, D width, I width of the activation. An assignment's number is
t * K + k; rows (N, ...) are in the order of the permutation (N,), which lists these numbers by expert.
"""

import torch
from torch import Tensor

from prism_kernels.ops.rows import accumulator

# elements of an activation that exist in fp32 at a time: few enough for a CPU's caches, enough for few launches
CPU_BLOCK, BLOCK = 2**18, 2**22


def gather(x: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """Returns the token's row of x (T, D) for each assignment, (N, D)."""
    return x.index_select(0, permutation // top_k)


def _blocks(pre: Tensor) -> list[slice]:
    rows = max(1, (CPU_BLOCK if pre.device.type == "cpu" else BLOCK) // max(1, pre.shape[1]))
    return [slice(start, start + rows) for start in range(0, pre.shape[0], rows)]


def swiglu(pre: Tensor) -> Tensor:
    """Returns silu(gate) * up (N, I) of pre = [gate, up] (N, 2I); rounded once."""
    dtype = accumulator(pre.dtype)
    out = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
    for block in _blocks(pre):
        gate, up = pre[block].to(dtype).chunk(2, dim=1)
        out[block] = torch.nn.functional.silu(gate).mul_(up)
    return out


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
    grad_weight = weight.new_empty(weight.shape) if needs_weight else None
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


def inverse_permutation(permutation: Tensor) -> Tensor:
    """Returns the row of each assignment, (N,)."""
    row = torch.arange(permutation.shape[0], device=permutation.device, dtype=permutation.dtype)
    return torch.empty_like(permutation).scatter_(0, permutation.to(torch.int64), row)


def combine(rows: Tensor, permutation: Tensor, weight: Tensor | None, tokens: int, top_k: int) -> Tensor:
    """Returns the sum over each token's K rows of rows (N, D), weighted with weight (T, K) if given: (T, D)."""
    dtype = accumulator(rows.dtype)
    row = inverse_permutation(permutation).view(tokens, top_k)
    out = rows.new_zeros(tokens, rows.shape[1], dtype=dtype)
    for k in range(top_k):
        part = rows.index_select(0, row[:, k]).to(dtype)
        out += part if weight is None else part.mul_(weight[:, k, None])
    return out.to(rows.dtype)
