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
    logit = z.gather(1, index[:, None])[:, 0]
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
    kernels = ROW_KERNELS[backend]
    total, columns = head.hidden.shape[0], head.weight.shape[0]
    accumulator = blocks.accumulator(head.hidden)
    sums = torch.empty(5, total, dtype=accumulator, device=head.hidden.device)
    if memory is None:
        memory = torch.empty(cache_rows, columns, dtype=blocks.cached(head.hidden), device=head.hidden.device)
    cache = memory[:cache_rows]
    # the same on every rank, since each block is a round of collectives
    height = blocks.forward_rows(head.hidden, columns if shard is None else shard.largest)
    # on the cpu, blocks that lie whole in an fp32 cache are computed in place there, several at a time
    in_place = cache.dtype == accumulator
    direct = cache_rows // height * height if in_place else 0
    step = max(height, blocks.CPU_CACHED_ROWS) if in_place and cache.device.type != "cuda" else height
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
            z = scratch
            if end - start < height:
                x = torch.cat((x, x.new_zeros(height - (end - start), x.shape[1])))
        blocks.multiply_weight(x, weight, z)
        z = z[: end - start]
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden[rows], head.lora_weight.t())
        _row_block(head, kernels.forward, z, rows, cache[rows] if end <= cache_rows else None, sums, chain, shard)
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
