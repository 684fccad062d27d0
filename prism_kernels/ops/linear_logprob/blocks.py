"""Matrix products with fp32 accumulation, and the sizes of the blocks in which logits exist."""

import torch
from torch import Tensor

# columns of a weight block that is cast at a time, and of a forward block without kept exponentials on the cpu
COLUMNS = 8192
# rows of a forward block on the cpu: a multiple of 512, since below that MKL takes other kernels, whose bits differ;
# up to 2048, since a product of few rows spends its time on packing the weight
CPU_UNIT = 512
CPU_ROWS = 2048
# bytes of logits that exist at a time in the backward pass
CPU_SCRATCH = 48 * 2**20
CUDA_SCRATCH = 400 * 2**20


def accumulator(hidden: Tensor) -> torch.dtype:
    """Returns the dtype of logits and sums: fp32, or fp64 for fp64 input."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def operand(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which matrix products run: the input's on CUDA; elsewhere at least fp32, which is faster."""
    return hidden.dtype if hidden.device.type == "cuda" else accumulator(hidden)


def cached(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which exponentials are kept: fp16 would overflow, so bf16 stands in for it."""
    return torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype


def forward_rows(hidden: Tensor, columns: int) -> int:
    """Returns the rows of a forward block. It must not depend on their number: a row's bits do not either."""
    if hidden.device.type != "cuda":
        return max(CPU_UNIT, min(CPU_ROWS, CPU_ROWS * COLUMNS // columns // CPU_UNIT * CPU_UNIT))
    return max(128, min(2048, 2**30 // (4 * columns) // 128 * 128))


def padded(hidden: Tensor, height: int) -> Tensor:
    """Returns hidden with rows of 0 appended, so that a last block's product has the bits of a whole one's."""
    unit = height if hidden.device.type == "cuda" else CPU_UNIT
    missing = -hidden.shape[0] % unit
    return torch.cat((hidden, hidden.new_zeros(missing, hidden.shape[1]))) if missing else hidden


def backward_block(hidden: Tensor, rows: int) -> tuple[int, int]:
    """Returns rows and columns of a backward block, so that its logits and their gradient fit in the scratch."""
    cuda = hidden.device.type == "cuda"
    high = min(rows, 16384 if cuda else 4096)
    size = accumulator(hidden).itemsize + (operand(hidden).itemsize if operand(hidden) != accumulator(hidden) else 0)
    wide = (CUDA_SCRATCH if cuda else CPU_SCRATCH) // (size * high)
    return high, max(256, wide // 256 * 256)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Writes a @ b to `out`, or adds it there; out's dtype may be the accumulator's."""
    if a.dtype == out.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out.dtype, out=out)


def weight_block(weight: Tensor, hidden: Tensor) -> Tensor:
    """Returns a block of the weight as the products take it: rounded to hidden's dtype, then in the operands'."""
    return weight.to(hidden.dtype).to(operand(hidden))


def multiply_weight(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Writes hidden @ weight.T to `out`; a weight of another dtype is cast a block of columns at a time."""
    x = hidden.to(operand(hidden))
    if weight.dtype == hidden.dtype == x.dtype:
        multiply(x, weight.t(), out)
        return
    for v0 in range(0, weight.shape[0], COLUMNS):
        v1 = v0 + COLUMNS
        multiply(x, weight_block(weight[v0:v1], hidden).t(), out[:, v0:v1])
