"""The backward pass: a block of columns at a time, from the kept exponentials or from logits computed again.

T rows, V columns of this rank's slice, D hidden, R rank of LoRA. G (T, V) is the gradient of the logits; it exists
block by block only. A block of columns needs nothing of the others, since the row sums are known: so a weight
block's gradient is one product over all rows, and nothing is accumulated in low precision.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.anchored_rows.formulas import RowSums, coefficients, poisoned
from prism_kernels.ops.linear_logprob import blocks
from prism_kernels.ops.linear_logprob.forward import Head


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
    sums: Tensor,
    cache: Tensor,
    chain: bool,
    keep: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
    needs: Needs,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    backend: str,
    onto: Gradients | None = None,
) -> Gradients:
    """Returns the gradients; `rows`, where given, are the only rows with a gradient, in rising order.

    `dtypes` are those of the gradients of weight, bias and LoRA's weight; hidden's are its own and LoRA's hidden's.
    With `onto` those of weight, bias and LoRA's weight are added to its tensors, in the accumulator's dtype.
    """
    total = head.hidden.shape[0]
    work = _Work(head, RowSums(*sums), cache, keep, grad_logp, grad_entropy, total)
    if rows is not None:
        work = work.select(rows)
    operand = blocks.operand(head.hidden)
    coefs = coefficients(
        work.sums, work.head.inv_temperature, work.keep, head.softcap, work.grad_logp, work.grad_entropy
    )
    # exponentials that are already the gradient up to a factor for each row go into the products as they are
    direct = grad_entropy is None and (not head.softcap or chain) and cache.dtype == operand and cache.shape[0] == total
    scale = _row_scale(coefs, work.sums, direct, operand)
    grads = _products(work, coefs, scale, direct, needs, dtypes, backend, onto)

    bad = poisoned(work.sums, work.head.inv_temperature, work.keep) & work.has_gradient()

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
    coefs: Tensor,
    scale: Tensor | None,
    direct: bool,
    needs: Needs,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    backend: str,
    onto: Gradients | None,
) -> Gradients:
    """Returns the gradients; those of hidden and LoRA's hidden still lack the factor `scale` of each row."""
    head = work.head
    hidden, columns = head.hidden, head.weight.shape[0]
    operand, accumulator = blocks.operand(hidden), blocks.accumulator(hidden)
    height = hidden.shape[0]
    lora = head.lora_hidden is not None and head.lora_weight is not None

    def new(*shape: int, dtype: torch.dtype = accumulator, wanted: bool) -> Tensor:
        if not wanted:
            return torch.empty(0, dtype=dtype, device=hidden.device)
        make = torch.zeros if height == 0 else torch.empty
        return make(*shape, dtype=dtype, device=hidden.device)

    rank = head.lora_hidden.shape[1] if head.lora_hidden is not None else 0
    grads = Gradients(
        hidden=new(height, hidden.shape[1], wanted=needs.hidden),
        weight=new(columns, hidden.shape[1], dtype=dtypes[0], wanted=needs.weight and onto is None),
        bias=new(columns, dtype=dtypes[1], wanted=needs.bias and onto is None),
        lora_hidden=new(height, rank, wanted=needs.lora_hidden),
        lora_weight=new(columns, rank, dtype=dtypes[2], wanted=needs.lora_weight and onto is None),
    )
    if onto is not None:
        grads = grads._replace(weight=onto.weight, bias=onto.bias, lora_weight=onto.lora_weight)
    if height == 0:
        return grads

    unit, factor = _common_unit(scale, operand)
    live = (coefs != 0).any(0)[:, None]

    def scaled(x: Tensor) -> Tensor:
        # a row without gradient may hold NaN, which must not reach the products over rows
        return torch.where(live, x if factor is None else x * factor[:, None], 0).to(operand)

    # (gradient, the small side of its product over rows)
    over_rows: list[tuple[Tensor, Tensor]] = []
    if needs.weight:
        over_rows.append((grads.weight, scaled(hidden)))
    if needs.lora_weight and head.lora_hidden is not None:
        over_rows.append((grads.lora_weight, scaled(head.lora_hidden)))
    if needs.bias:
        over_rows.append((grads.bias[:, None], scaled(torch.ones_like(coefs[0])[:, None])))

    tall, wide = (height, columns) if direct and work.rows is None else blocks.backward_block(hidden, height)
    maker = _GradientMaker(work, coefs, scale, direct, operand, backend, tall, wide)
    for v0 in range(0, columns, wide):
        v1 = min(v0 + wide, columns)
        weight = blocks.weight_block(head.weight[v0:v1], hidden)
        # what is summed over blocks of rows, or cannot be a product's output, is summed in fp32 first
        exact = unit is None and (tall >= height or onto is not None)
        sinks = []
        for out, x in over_rows:
            if exact and out.dtype in (operand, accumulator):
                sinks.append((out[v0:v1], out, x))
            else:
                sinks.append((torch.empty(v1 - v0, x.shape[1], dtype=accumulator, device=x.device), out, x))
        for r0 in range(0, height, tall):
            r = slice(r0, min(r0 + tall, height))
            g = maker.block(r, v0, v1, weight)
            if needs.hidden:
                blocks.multiply(g, weight, grads.hidden[r], add=v0 > 0)
            if lora and needs.lora_hidden and head.lora_weight is not None:
                blocks.multiply(g, head.lora_weight[v0:v1].to(operand), grads.lora_hidden[r], add=v0 > 0)
            for sink, _, x in sinks:
                blocks.multiply(g.t(), x[r], sink, add=r0 > 0 or (exact and onto is not None))
        for sink, out, _ in sinks:
            if sink.data_ptr() == out[v0:v1].data_ptr():
                continue
            total = sink if unit is None else sink.mul_(unit)
            out[v0:v1] = total if onto is None else total.add_(out[v0:v1])
    return grads


def _common_unit(scale: Tensor | None, operand: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Splits the rows' factors into one unit and the rest, so that fp16 holds the rest; no unit for other dtypes."""
    if scale is None or operand != torch.float16:
        return None, scale
    largest = scale.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0)
    return unit, scale / unit


class _Work(NamedTuple):
    """The rows that have a gradient."""

    head: Head
    sums: RowSums
    cache: Tensor
    keep: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None
    # rows in the cache's count
    total: int
    # indices into the cache, where rows were left out
    rows: Tensor | None = None

    def select(self, rows: Tensor) -> "_Work":
        head = self.head._replace(
            hidden=self.head.hidden.index_select(0, rows),
            target=self.head.target.index_select(0, rows),
            inv_temperature=self.head.inv_temperature.index_select(0, rows),
            lora_hidden=None if self.head.lora_hidden is None else self.head.lora_hidden.index_select(0, rows),
        )
        sums = RowSums(*(s.index_select(0, rows) for s in self.sums))
        entropy = None if self.grad_entropy is None else self.grad_entropy.index_select(0, rows)
        return self._replace(
            head=head,
            sums=sums,
            keep=self.keep.index_select(0, rows),
            grad_logp=self.grad_logp.index_select(0, rows),
            grad_entropy=entropy,
            rows=rows,
        )

    def has_gradient(self) -> Tensor:
        has = self.grad_logp != 0
        return has if self.grad_entropy is None else has | (self.grad_entropy != 0)

    def cached_rows(self) -> int:
        """Returns how many of the rows are kept in the cache; they come first."""
        if self.rows is None or self.cache.shape[0] in (0, self.total):
            return min(self.cache.shape[0], self.keep.shape[0])
        return int((self.rows < self.cache.shape[0]).sum())


def _row_scale(coefs: Tensor, sums: RowSums, direct: bool, operand: torch.dtype) -> Tensor | None:
    """Returns the factor that is taken out of each row of G: applied to the products' small side."""
    if direct:
        return coefs[0]
    if operand != torch.float16:
        return None
    # fp16 has no range for small gradients: each row is brought to the order of 1
    alpha, beta, at_target = coefs.abs()
    return alpha * sums.rest + beta * sums.moment.abs() + at_target


class _GradientMaker:
    """Makes G's blocks, in scratch that is allocated once."""

    def __init__(
        self,
        work: _Work,
        coefs: Tensor,
        scale: Tensor | None,
        direct: bool,
        operand: torch.dtype,
        backend: str,
        tall: int,
        wide: int,
    ) -> None:
        self.work, self.direct, self.operand = work, direct, operand
        self.coefs = coefs if scale is None else coefs / torch.where(scale == 0, 1.0, scale)
        self.kernel = ROW_KERNELS[backend].backward
        self.cached = work.cached_rows()
        device = work.head.hidden.device
        whole = direct and work.rows is None
        size = 0 if whole else tall * wide
        self.scratch = torch.empty(size, dtype=operand, device=device)
        accumulator = work.sums.anchor.dtype
        again = self.cached < work.keep.shape[0] and operand != accumulator
        self.logits = torch.empty(size if again else 0, dtype=accumulator, device=device)

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
        blocks.multiply(head.hidden[r].to(self.operand), weight.t(), z)
        if head.lora_hidden is not None and head.lora_weight is not None:
            z.addmm_(head.lora_hidden[r], head.lora_weight[v0:v1].t())
        self._run(z, False, r, v0, out)

    def _run(self, source: Tensor, is_exp: bool, r: slice, v0: int, out: Tensor) -> None:
        head = self.work.head
        v1 = v0 + out.shape[1]
        target = head.target[r] - v0
        bias = None if head.bias is None else head.bias[v0:v1]
        anchor, inverse = self.work.sums.anchor[r], head.inv_temperature[r]
        coefs = self.coefs[:, r]
        self.kernel(source, is_exp, target, anchor, inverse, coefs, bias, head.softcap, out)
