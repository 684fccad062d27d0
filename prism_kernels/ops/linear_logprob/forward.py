"""The forward pass: logits a block of rows at a time, and of each block the row sums and, if kept, exponentials.

T rows, V columns of this rank's slice, D hidden, R rank of LoRA.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.linear_logprob import blocks

# far below any logit, and finite
LOWEST_ANCHOR = -1e30


class Head(NamedTuple):
    """What makes the logits: hidden (T, D), weight (V, D), bias (V,), LoRA's hidden (T, R) and weight (V, R).

    bias, LoRA's two and inv_temperature (T,) are in the accumulator's dtype.
    `target` (T,) counts in this rank's slice; -1 stands for a target that is not in it, V for one that does not exist.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    target: Tensor
    inv_temperature: Tensor
    softcap: float


class Shard(NamedTuple):
    """This rank's slice of a vocabulary that is spread over the ranks of a process group."""

    group: dist.ProcessGroup
    # the slice's first column, the columns of all ranks, and those of the rank that has most
    first: int
    total: int
    largest: int

    @staticmethod
    def of(weight: Tensor, group: dist.ProcessGroup) -> "Shard":
        """Returns this rank's place among the ranks, whose slices may differ in size; reads the sizes from them."""
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
        mine = torch.tensor([weight.shape[0]], dtype=torch.int64, device=weight.device)
        dist.all_gather_into_tensor(sizes, mine, group=group)
        columns = sizes.tolist()
        return Shard(group, sum(columns[: dist.get_rank(group)]), sum(columns), max(columns))


def local_targets(target: Tensor, keep: Tensor, columns: int, shard: Shard | None) -> Tensor:
    """Returns the targets as indices into this rank's slice (see `Head.target`)."""
    first, total = (0, columns) if shard is None else (shard.first, shard.total)
    exists = (target >= 0) & (target < total)
    local = target - first
    local = torch.where(exists & (local >= 0) & (local < columns), local, -1)
    return torch.where(keep & ~exists, columns, local)


def _target_logits(head: Head, z: Tensor, rows: slice) -> Tensor:
    columns = z.shape[1]
    target = head.target[rows]
    index = target.clamp(0, columns - 1)
    return _finish_target_logits(head, z.gather(1, index[:, None])[:, 0], index, target, columns)


def _finish_target_logits(head: Head, logit: Tensor, index: Tensor, target: Tensor, columns: int) -> Tensor:
    if head.bias is not None:
        logit = logit + head.bias[index]
    if head.softcap:
        logit = torch.tanh(logit / head.softcap) * head.softcap
    logit = torch.where(target == -1, 0.0, logit)
    return torch.where(target == columns, torch.nan, logit)


def forward(
    head: Head, cache_rows: int, chain: bool, backend: str, shard: Shard | None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the row sums (5, T), in the order of `RowSums`, and the exponentials (cache_rows, V) of the first rows.

    With `chain` the exponentials carry the soft cap's slope; at the target they hold minus the sum of the others.
    `memory`, where given, is where the exponentials go: at least as many rows, which need not be new.
    """
    total, columns = head.hidden.shape[0], head.weight.shape[0]
    kernel = ROW_KERNELS[backend].forward
    accumulator = blocks.accumulator(head.hidden)
    sums = torch.empty(5, total, dtype=accumulator, device=head.hidden.device)
    if memory is None:
        memory = torch.empty(cache_rows, columns, dtype=blocks.cached(head.hidden), device=head.hidden.device)
    cache = memory[:cache_rows]
    if cache_rows == 0 and shard is None and columns > blocks.COLUMNS and cache.device.type != "cuda":
        for start in range(0, total, blocks.CPU_ROWS):
            _sum_over_columns(head, kernel, slice(start, min(start + blocks.CPU_ROWS, total)), sums)
        return sums, cache
    # the same on every rank, since each block is a round of collectives
    height = blocks.forward_rows(head.hidden, columns if shard is None else shard.largest)
    # on the cpu, blocks that lie whole in an fp32 cache are computed in place there, several at a time
    in_place = cache.dtype == accumulator
    unit = height if cache.device.type == "cuda" else blocks.CPU_UNIT
    direct = cache_rows // unit * unit if in_place else 0
    step = max(height, blocks.CPU_ROWS) if in_place and cache.device.type != "cuda" else height
    # a GPU has the bandwidth to cast it once for all blocks of rows; elsewhere it is cast block by block
    weight = head.weight if cache.device.type != "cuda" else head.weight.to(head.hidden.dtype)

    scratch: Tensor | None = None
    start = 0
    while start < total:
        end = min(start + step, direct) if start < direct else min(start + height, total)
        if start < cache_rows < end:
            end = cache_rows
        rows = slice(start, end)
        x = head.hidden[rows]
        if end <= direct:
            z = cache[rows]
        else:
            if scratch is None:
                scratch = torch.empty(height, columns, dtype=accumulator, device=cache.device)
            x = blocks.padded(x, height)
            z = scratch[: x.shape[0]]
        blocks.multiply_weight(x, weight, z)
        z = z[: end - start]
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden[rows], head.lora_weight.t())
        _row_block(head, kernel, z, rows, cache[rows] if end <= cache_rows else None, sums, chain, shard)
        start = end
    return sums, cache


def _row_block(
    head: Head,
    kernel: Callable[..., Any],
    z: Tensor,
    rows: slice,
    exp: Tensor | None,
    sums: Tensor,
    chain: bool,
    shard: Shard | None,
) -> None:
    target, inv_temperature = head.target[rows], head.inv_temperature[rows]
    stats = sums[:4, rows]
    logit = _target_logits(head, z, rows)
    anchor = logit
    if shard is not None:
        dist.all_reduce(logit, group=shard.group)
        # every rank must take the same anchor: the highest that any of them needs
        kernel(z, target, logit, inv_temperature, head.bias, head.softcap, False, None, stats)
        anchor = stats[0].clone()
        dist.all_reduce(anchor, dist.ReduceOp.MAX, group=shard.group)
    kernel(z, target, anchor, inv_temperature, head.bias, head.softcap, chain, exp, stats)
    if shard is not None:
        merged = stats[1:].contiguous()
        dist.all_reduce(merged, group=shard.group)
        stats[1:] = merged
    sums[4, rows] = logit
    if exp is not None:
        at_target = -torch.where(stats[1].isfinite(), stats[1], 0.0)
        if chain:
            at_target = at_target * (1 - (logit / head.softcap).square())
        index = target.clamp(0, z.shape[1] - 1)[:, None]
        here = (target == index[:, 0])[:, None]
        exp.scatter_(1, index, torch.where(here, at_target[:, None].to(exp.dtype), exp.gather(1, index)))


def _sum_over_columns(head: Head, kernel: Callable[..., Any], rows: slice, sums: Tensor) -> None:
    """Writes the sums of some rows, a block of columns at a time: many rows at once in little memory."""
    target, inverse = head.target[rows], head.inv_temperature[rows]
    x = blocks.padded(head.hidden[rows], blocks.CPU_ROWS)
    columns, exact = head.weight.shape[0], sums.dtype
    logit = _row_dots(head, rows, exact)
    sums[4, rows] = logit
    # a block that holds nothing but -inf must not become NaN where the target's logit is -inf too
    anchor = logit.clamp(min=LOWEST_ANCHOR)
    merged = sums[:4, rows]
    scratch = torch.empty(x.shape[0] * blocks.COLUMNS, dtype=exact, device=x.device)
    part = torch.empty(4, target.shape[0], dtype=exact, device=x.device)
    for v0 in range(0, columns, blocks.COLUMNS):
        v1 = min(v0 + blocks.COLUMNS, columns)
        z = scratch[: x.shape[0] * (v1 - v0)].view(x.shape[0], v1 - v0)
        blocks.multiply_weight(x, head.weight[v0:v1], z)
        z = z[: target.shape[0]]
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden[rows], head.lora_weight[v0:v1].t())
        bias = None if head.bias is None else head.bias[v0:v1]
        local = torch.where((target >= v0) & (target < v1), target - v0, -1)
        kernel(z, local, anchor, inverse, bias, head.softcap, False, None, part)
        merged.copy_(part if v0 == 0 else _merge(merged, part, inverse))


def _row_dots(head: Head, rows: slice, exact: torch.dtype) -> Tensor:
    """Returns the targets' logits, each a dot product of its own."""
    target = head.target[rows]
    columns = head.weight.shape[0]
    index = target.clamp(0, columns - 1)
    chosen = blocks.weight_block(head.weight[index], head.hidden)
    logit = (head.hidden[rows].to(exact) * chosen).sum(1)
    if head.lora_hidden is not None and head.lora_weight is not None:
        logit += (head.lora_hidden[rows] * head.lora_weight[index]).sum(1)
    return _finish_target_logits(head, logit, index, target, columns)


def _merge(a: Tensor, b: Tensor, inv_temperature: Tensor) -> Tensor:
    """Returns the sums (4, T) over two sets of columns, at the higher of their anchors."""
    centre = torch.maximum(a[0], b[0])
    result = torch.zeros_like(a)
    for anchor, rest, moment, square in (a, b):
        shift = (anchor - centre) * inv_temperature
        factor = shift.exp()
        result[1] += factor * rest
        result[2] += factor * (moment + shift * rest)
        result[3] += factor.square() * square
    result[0] = centre
    return result
