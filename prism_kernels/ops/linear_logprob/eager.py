"""Forward and backward pass around the row kernels: the logits exist a block at a time.

T rows, V columns of this rank's slice, D hidden, R rank of LoRA. The forward pass takes a block of rows and keeps its
row sums and, where asked, its exponentials. The backward pass takes a block of columns: G (T, V), the gradient of the
logits, comes from the kept exponentials or from logits computed again. A block of columns needs nothing of the others,
since the row sums are known: so a weight block's gradient is one product over all rows, and nothing is accumulated in
low precision.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels.ops.anchored_rows import RowKernels
from prism_kernels.ops.rows import Head, RowSums, accumulator, cached, coefficients, has_gradient, operand

# columns of a weight block that is cast at a time, and of a forward block without kept exponentials on the cpu
COLUMNS = 8192
# rows of a forward block on the cpu: a multiple of 512, since below that MKL takes other kernels, whose bits differ;
# up to 2048, since a product of few rows spends its time on packing the weight
CPU_UNIT = 512
CPU_ROWS = 2048
# bytes of logits that exist at a time in the backward pass
CPU_SCRATCH = 48 * 2**20
CUDA_SCRATCH = 400 * 2**20
# far below any logit, and finite
LOWEST_ANCHOR = -1e30


def forward_rows(hidden: Tensor, columns: int) -> int:
    """Returns the rows of a forward block, whatever T is: a row's bits must not depend on the number of rows."""
    if hidden.device.type != "cuda":
        return max(CPU_UNIT, min(CPU_ROWS, CPU_ROWS * COLUMNS // columns // CPU_UNIT * CPU_UNIT))
    return max(128, min(2048, 2**30 // (4 * columns) // 128 * 128))


def backward_block(hidden: Tensor, rows: int) -> tuple[int, int]:
    """Returns rows and columns of a backward block, so that its logits and their gradient fit in the scratch."""
    cuda = hidden.device.type == "cuda"
    height = min(rows, 16384 if cuda else 4096)
    exact, product = accumulator(hidden.dtype), operand(hidden)
    size = exact.itemsize + (product.itemsize if product != exact else 0)
    width = (CUDA_SCRATCH if cuda else CPU_SCRATCH) // (size * height)
    return height, max(256, width // 256 * 256)


def _padded(hidden: Tensor, height: int) -> Tensor:
    """Returns hidden with rows of 0 appended, so that a last block's product has the bits of a whole one's."""
    unit = height if hidden.device.type == "cuda" else CPU_UNIT
    missing = -hidden.shape[0] % unit
    return torch.cat((hidden, hidden.new_zeros(missing, hidden.shape[1]))) if missing else hidden


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


def _weight_block(weight: Tensor, hidden: Tensor) -> Tensor:
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
        multiply(x, _weight_block(weight[v0:v1], hidden).t(), out[:, v0:v1])


class Shard(NamedTuple):
    """This rank's slice of a vocabulary that is spread over the ranks of a process group."""

    group: dist.ProcessGroup
    # the slice's first column, the columns of all ranks, and those of the rank that has most
    first: int
    total: int
    largest: int

    @staticmethod
    def of(weight: Tensor, group: dist.ProcessGroup) -> "Shard":
        """Returns this rank's slice, of a size that may differ from the others'; reads the sizes from all ranks."""
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
        size = torch.tensor([weight.shape[0]], dtype=torch.int64, device=weight.device)
        dist.all_gather_into_tensor(sizes, size, group=group)
        columns = sizes.tolist()
        return Shard(group, sum(columns[: dist.get_rank(group)]), sum(columns), max(columns))


def chained(head: Head, entropy: bool, cache_rows: int) -> bool:
    """Returns whether the kept exponentials carry the soft cap's slope: they do if the products take them unchanged."""
    unchanged = cached(head.hidden) == operand(head.hidden) and cache_rows == head.hidden.shape[0]
    return bool(head.softcap) and not entropy and unchanged


def forward(
    head: Head, kernels: RowKernels, cache_rows: int, chain: bool, shard: Shard | None, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the row sums (5, T), in the order of `RowSums`, and the exponentials (cache_rows, V) of the first rows.

    With `chain` the exponentials carry the soft cap's slope; at the target they hold minus the sum of the others.
    They go to the first rows of `memory` where it is given, which need not be new.
    """
    hidden, (total, columns) = head.hidden, (head.hidden.shape[0], head.weight.shape[0])
    exact, cuda = accumulator(hidden.dtype), hidden.device.type == "cuda"
    sums = torch.empty(5, total, dtype=exact, device=hidden.device)
    if memory is None:
        memory = torch.empty(cache_rows, columns, dtype=cached(hidden), device=hidden.device)
    cache = memory[:cache_rows]
    if cache_rows == 0 and shard is None and columns > COLUMNS and not cuda:
        for start in range(0, total, CPU_ROWS):
            rows = slice(start, min(start + CPU_ROWS, total))
            _sum_over_columns(head.rows(rows), kernels, sums[:, rows])
        return sums, cache
    # the same on every rank, since each block is a round of collectives
    height = forward_rows(hidden, columns if shard is None else shard.largest)
    # on the cpu, blocks that lie whole in an fp32 cache are computed in place there, several at a time
    in_place = cache.dtype == exact
    unit = height if cuda else CPU_UNIT
    direct = cache_rows // unit * unit if in_place else 0
    step = max(height, CPU_ROWS) if in_place and not cuda else height
    # a GPU has the bandwidth to cast it once for all blocks of rows; elsewhere it is cast block by block
    weight = head.weight.to(hidden.dtype) if cuda else head.weight

    scratch: Tensor | None = None
    start = 0
    while start < total:
        end = min(start + step, direct) if start < direct else min(start + height, total)
        if start < cache_rows < end:
            end = cache_rows
        rows = slice(start, end)
        block = head.rows(rows)
        x = block.hidden
        exp = cache[rows] if end <= cache_rows else None
        if exp is not None and end <= direct:
            z = exp
        else:
            if scratch is None:
                scratch = torch.empty(height, columns, dtype=exact, device=cache.device)
            x = _padded(x, height)
            z = scratch[: x.shape[0]]
        multiply_weight(x, weight, z)
        z = z[: end - start]
        if block.lora_hidden is not None and block.lora_weight is not None:
            z.addmm_(block.lora_hidden, block.lora_weight.t())
        _row_block(block, kernels, z, exp, sums[:, rows], chain, shard)
        start = end
    return sums, cache


def _row_block(
    head: Head, kernels: RowKernels, z: Tensor, exp: Tensor | None, sums: Tensor, chain: bool, shard: Shard | None
) -> None:
    """Writes the sums and, where asked, the exponentials of a block of rows, whose logits are z."""
    target, inv_temperature, stats = head.target, head.inv_temperature, sums[:4]
    columns = z.shape[1]
    index = target.clamp(0, columns - 1)
    logit = _target_logits(head, z.gather(1, index[:, None])[:, 0], index)
    anchor = logit
    if shard is not None:
        dist.all_reduce(logit, group=shard.group)
        # every rank must take the same anchor: the highest that any of them needs
        kernels.forward(z, target, logit, inv_temperature, head.bias, head.softcap, False, None, stats)
        anchor = stats[0].clone()
        dist.all_reduce(anchor, dist.ReduceOp.MAX, group=shard.group)
    kernels.forward(z, target, anchor, inv_temperature, head.bias, head.softcap, chain, exp, stats)
    if shard is not None:
        merged = stats[1:].contiguous()
        dist.all_reduce(merged, group=shard.group)
        stats[1:] = merged
    sums[4] = logit
    if exp is not None:
        at_target = -torch.where(stats[1].isfinite(), stats[1], 0.0)
        if chain:
            at_target = at_target * (1 - (logit / head.softcap).square())
        inside, index = (target == index)[:, None], index[:, None]
        exp.scatter_(1, index, torch.where(inside, at_target[:, None].to(exp.dtype), exp.gather(1, index)))


def _target_logits(head: Head, logit: Tensor, index: Tensor) -> Tensor:
    """Returns the targets' logits from those of hidden @ weight.T at the columns `index`."""
    if head.bias is not None:
        logit = logit + head.bias[index]
    if head.softcap:
        logit = torch.tanh(logit / head.softcap) * head.softcap
    logit = torch.where(head.target == -1, 0.0, logit)
    return torch.where(head.target == head.weight.shape[0], torch.nan, logit)


def _sum_over_columns(head: Head, kernels: RowKernels, sums: Tensor) -> None:
    """Writes the sums of all rows, a block of columns at a time: many rows at once in little memory."""
    target, inv_temperature = head.target, head.inv_temperature
    x = _padded(head.hidden, CPU_ROWS)
    columns, exact = head.weight.shape[0], sums.dtype
    logit = _row_dots(head, exact)
    sums[4] = logit
    # a block that holds nothing but -inf must not become NaN where the target's logit is -inf too
    anchor = logit.clamp(min=LOWEST_ANCHOR)
    merged = sums[:4]
    scratch = torch.empty(x.shape[0] * COLUMNS, dtype=exact, device=x.device)
    part = torch.empty(4, target.shape[0], dtype=exact, device=x.device)
    for v0 in range(0, columns, COLUMNS):
        v1 = min(v0 + COLUMNS, columns)
        z = scratch[: x.shape[0] * (v1 - v0)].view(x.shape[0], v1 - v0)
        multiply_weight(x, head.weight[v0:v1], z)
        z = z[: target.shape[0]]
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden, head.lora_weight[v0:v1].t())
        bias = None if head.bias is None else head.bias[v0:v1]
        local = torch.where((target >= v0) & (target < v1), target - v0, -1)
        kernels.forward(z, local, anchor, inv_temperature, bias, head.softcap, False, None, part)
        merged.copy_(part if v0 == 0 else _merge(merged, part, inv_temperature))


def _row_dots(head: Head, exact: torch.dtype) -> Tensor:
    """Returns the targets' logits, each by a dot product of its own."""
    index = head.target.clamp(0, head.weight.shape[0] - 1)
    logit = (head.hidden.to(exact) * _weight_block(head.weight[index], head.hidden)).sum(1)
    if head.lora_hidden is not None and head.lora_weight is not None:
        logit += (head.lora_hidden * head.lora_weight[index]).sum(1)
    return _target_logits(head, logit, index)


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


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_hidden: bool
    lora_weight: bool


class Gradients(NamedTuple):
    """One tensor for each of `Needs`; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_hidden: Tensor
    lora_weight: Tensor


def backward(
    head: Head,
    kernels: RowKernels,
    sums: Tensor,
    cache: Tensor,
    chain: bool,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
    needs: Needs,
    out: Gradients,
    add: bool = False,
) -> Gradients:
    """Returns the gradients; those of weight, bias and LoRA's weight are written to `out`, or added there.

    `rows`, where given, are the only rows with a gradient, in rising order. What is added to must be in the
    accumulator's dtype.
    """
    total = head.hidden.shape[0]
    work = _Work(head, RowSums(*sums), cache, grad_logp, grad_entropy, total)
    if rows is not None:
        work = work.pick(rows)
    product = operand(head.hidden)
    coefs, bad = coefficients(
        work.sums, work.head.inv_temperature, work.head.keep, head.softcap, work.grad_logp, work.grad_entropy
    )
    # exponentials that are already the gradient up to a factor for each row go into the products as they are
    direct = grad_entropy is None and (not head.softcap or chain) and cache.dtype == product and cache.shape[0] == total
    scale = _row_scale(coefs, work.sums, direct, product)
    grads = _products(work, kernels, coefs, scale, direct, needs, out, add)
    bad &= has_gradient(work.grad_logp, work.grad_entropy)

    def finish(grad: Tensor, dtype: torch.dtype) -> Tensor:
        if grad.dim() == 1:
            return grad.to(dtype)
        if scale is not None:
            grad.mul_(scale[:, None])
        grad = grad.masked_fill_(bad[:, None], torch.nan).to(dtype)
        return grad if rows is None else grad.new_zeros(total, grad.shape[1]).index_copy_(0, rows, grad)

    return grads._replace(
        hidden=finish(grads.hidden, head.hidden.dtype),
        lora_hidden=finish(grads.lora_hidden, grads.lora_hidden.dtype),
    )


def _products(
    work: "_Work",
    kernels: RowKernels,
    coefs: Tensor,
    scale: Tensor | None,
    direct: bool,
    needs: Needs,
    out: Gradients,
    add: bool,
) -> Gradients:
    """Returns the gradients; those of hidden and LoRA's hidden still lack the factor `scale` of each row."""
    head = work.head
    hidden, lora_hidden, lora_weight = head.hidden, head.lora_hidden, head.lora_weight
    height, columns = hidden.shape[0], head.weight.shape[0]
    product, exact = operand(hidden), accumulator(hidden.dtype)
    lora_shape = (height, lora_hidden.shape[1]) if lora_hidden is not None and needs.lora_hidden else (0,)
    grads = out._replace(
        hidden=torch.empty(hidden.shape if needs.hidden else 0, dtype=exact, device=hidden.device),
        lora_hidden=torch.empty(lora_shape, dtype=exact, device=hidden.device),
    )
    if height == 0:
        if not add:
            for grad in (grads.weight, grads.bias, grads.lora_weight):
                grad.zero_()
        return grads

    unit, factor = _common_unit(scale, product)
    live = (coefs != 0).any(0)[:, None]

    def scaled(x: Tensor) -> Tensor:
        # a row without gradient may hold NaN, which must not reach the products over rows
        return torch.where(live, x if factor is None else x * factor[:, None], 0).to(product)

    # (gradient, the small side of its product over rows)
    over_rows: list[tuple[Tensor, Tensor]] = []
    if needs.weight:
        over_rows.append((grads.weight, scaled(hidden)))
    if needs.lora_weight and lora_hidden is not None:
        over_rows.append((grads.lora_weight, scaled(lora_hidden)))
    if needs.bias:
        over_rows.append((grads.bias[:, None], scaled(torch.ones_like(coefs[0])[:, None])))

    tall, wide = (height, columns) if direct and work.rows is None else backward_block(hidden, height)
    # what is summed over blocks of rows, or cannot be a product's output, is summed in fp32 first
    writes = unit is None and (tall >= height or add)
    maker = _GradientMaker(work, kernels, coefs, scale, direct, tall, wide)
    for v0 in range(0, columns, wide):
        v1 = min(v0 + wide, columns)
        weight = _weight_block(head.weight[v0:v1], hidden)
        # (gradient's block, the tensor that its products are summed in, their small side)
        sinks = []
        for grad, x in over_rows:
            block = sink = grad[v0:v1]
            if not (writes and grad.dtype in (product, exact)):
                sink = torch.empty(v1 - v0, x.shape[1], dtype=exact, device=x.device)
            sinks.append((block, sink, x))
        for r0 in range(0, height, tall):
            r = slice(r0, min(r0 + tall, height))
            g = maker.block(r, v0, v1, weight)
            if needs.hidden:
                multiply(g, weight, grads.hidden[r], add=v0 > 0)
            if needs.lora_hidden and lora_weight is not None:
                multiply(g, lora_weight[v0:v1].to(product), grads.lora_hidden[r], add=v0 > 0)
            for _, sink, x in sinks:
                multiply(g.t(), x[r], sink, add=r0 > 0 or (writes and add))
        for block, sink, _ in sinks:
            if sink is not block:
                sum_of_rows = sink if unit is None else sink.mul_(unit)
                block.copy_(sum_of_rows.add_(block) if add else sum_of_rows)
    return grads


def _common_unit(scale: Tensor | None, product: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Splits the rows' factors into one unit and the rest, so that fp16 holds the rest; no unit for other dtypes."""
    if scale is None or product != torch.float16:
        return None, scale
    largest = scale.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)
    return unit, scale / unit


def _row_scale(coefs: Tensor, sums: RowSums, direct: bool, product: torch.dtype) -> Tensor | None:
    """Returns the factor that is taken out of each row of G and applied to the products' small side."""
    if direct:
        return coefs[0]
    if product != torch.float16:
        return None
    # fp16 has no range for small gradients: each row is brought to the order of 1
    alpha, beta, at_target = coefs.abs()
    return alpha * sums.rest + beta * sums.moment.abs() + at_target


class _Work(NamedTuple):
    """The rows that have a gradient."""

    head: Head
    sums: RowSums
    cache: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None
    # all rows of the forward pass, which the cache counts
    total: int
    # indices among those, where rows were left out
    rows: Tensor | None = None

    def pick(self, rows: Tensor) -> "_Work":
        entropy = None if self.grad_entropy is None else self.grad_entropy.index_select(0, rows)
        return self._replace(
            head=self.head.rows(rows),
            sums=RowSums(*(s.index_select(0, rows) for s in self.sums)),
            grad_logp=self.grad_logp.index_select(0, rows),
            grad_entropy=entropy,
            rows=rows,
        )

    def cached_rows(self) -> int:
        """Returns how many of the rows are kept in the cache; they come first."""
        if self.rows is None or self.cache.shape[0] in (0, self.total):
            return min(self.cache.shape[0], self.head.hidden.shape[0])
        return int((self.rows < self.cache.shape[0]).sum())


class _GradientMaker:
    """Makes G's blocks, in scratch that is allocated once."""

    def __init__(
        self, work: _Work, kernels: RowKernels, coefs: Tensor, scale: Tensor | None, direct: bool, tall: int, wide: int
    ) -> None:
        self.work, self.kernels, self.direct = work, kernels, direct
        self.coefs = coefs if scale is None else coefs / torch.where(scale == 0, 1.0, scale)
        self.cached = work.cached_rows()
        hidden = work.head.hidden
        self.product, exact = operand(hidden), accumulator(hidden.dtype)
        size = 0 if direct and work.rows is None else tall * wide
        self.scratch = torch.empty(size, dtype=self.product, device=hidden.device)
        again = self.cached < hidden.shape[0] and self.product != exact
        self.logits = torch.empty(size if again else 0, dtype=exact, device=hidden.device)

    def block(self, r: slice, v0: int, v1: int, weight: Tensor) -> Tensor:
        """Returns G's block of the rows r and the columns v0 to v1, over the factor of `_row_scale`."""
        work = self.work
        if self.direct and work.rows is None:
            return work.cache[r, v0:v1]
        out = self.scratch[: (r.stop - r.start) * (v1 - v0)].view(r.stop - r.start, v1 - v0)
        middle = max(r.start, min(self.cached, r.stop))
        if middle > r.start:
            self._from_cache(slice(r.start, middle), v0, v1, out[: middle - r.start])
        if middle < r.stop:
            self._from_logits(slice(middle, r.stop), v0, v1, weight, out[middle - r.start :])
        return out

    def _from_cache(self, r: slice, v0: int, v1: int, out: Tensor) -> None:
        source = self.work.cache[:, v0:v1]
        if self.work.rows is None:
            source = source[r]
        elif self.direct:
            torch.index_select(source, 0, self.work.rows[r], out=out)
            return
        else:
            source = source.index_select(0, self.work.rows[r])
        self._run(source, True, r, v0, out)

    def _from_logits(self, r: slice, v0: int, v1: int, weight: Tensor, out: Tensor) -> None:
        head = self.work.head
        z = self.logits[: out.numel()].view(out.shape) if self.logits.numel() else out
        multiply(head.hidden[r].to(self.product), weight.t(), z)
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden[r], head.lora_weight[v0:v1].t())
        self._run(z, False, r, v0, out)

    def _run(self, source: Tensor, is_exp: bool, r: slice, v0: int, out: Tensor) -> None:
        head = self.work.head
        bias = None if head.bias is None else head.bias[v0 : v0 + out.shape[1]]
        anchor, inv_temperature = self.work.sums.anchor[r], head.inv_temperature[r]
        target, coefs = head.target[r] - v0, self.coefs[:, r]
        self.kernels.backward(source, is_exp, target, anchor, inv_temperature, coefs, bias, head.softcap, out)
