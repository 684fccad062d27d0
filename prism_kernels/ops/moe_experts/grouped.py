"""Products of consecutive groups of rows, one group for each expert, with the expert's own matrix.

N assignments by expert, E experts; offsets (E,) says where each expert's rows end, the last at N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


def _operand(a: Tensor) -> torch.dtype:
    # on the cpu halves are slower than fp32, as in linear_logprob
    return torch.float32 if a.device.type == "cpu" and a.dtype != torch.float64 else a.dtype


def _groups(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for e, end in enumerate(offsets.tolist()):
        yield e, start, end
        start = end


def _fits(*operands: Tensor) -> bool:
    """Whether grouped_mm takes these: bf16 on a GPU; its strides and addresses must be multiples of 16 bytes."""
    # elsewhere, and in other dtypes, torch's own form is a loop too, which reads the offsets on the host as well
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
    if a.shape[0] and _fits(a, weight):
        # its rows are padded to multiples of 16 bytes
        return grouped_mm(a, weight, offs=offsets).contiguous()
    out = a.new_empty(a.shape[0], weight.shape[2])
    dtype = _operand(a)
    for e, start, end in _groups(offsets):
        if start == end:
            continue
        if dtype == a.dtype:
            torch.mm(a[start:end], weight[e], out=out[start:end])
        else:
            out[start:end].copy_(torch.mm(a[start:end].to(dtype), weight[e].to(dtype)))
    return out


def outer_by_expert(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sums (E, P, Q) of the outer products of an expert's rows of a (N, P) with those of b (N, Q)."""
    if a.shape[0] and _fits(a.t(), b):
        out = grouped_mm(a.t(), b, offs=offsets).contiguous()
        if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= (10, 0):
            # there an expert without rows is left unwritten
            empty = offsets == torch.nn.functional.pad(offsets[:-1], (1, 0))
            out.masked_fill_(empty[:, None, None], 0)
        return out
    out = a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])
    dtype = _operand(a)
    for e, start, end in _groups(offsets):
        if start == end:
            out[e].zero_()
        elif dtype == a.dtype:
            torch.mm(a[start:end].t(), b[start:end], out=out[e])
        else:
            out[e].copy_(torch.mm(a[start:end].to(dtype).t(), b[start:end].to(dtype)))
    return out
