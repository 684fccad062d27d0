"""Schemas, fakes and the autograd function of `linear_logprob`. T rows, V columns, D hidden, R rank of LoRA."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.anchored_rows.formulas import RowSums, outcome
from prism_kernels.ops.linear_logprob import blocks
from prism_kernels.ops.linear_logprob.backward import Gradients, Needs, backward
from prism_kernels.ops.linear_logprob.forward import Head, Shard, forward, local_targets

NAME = "linear_logprob"

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, Tensor target, "
    "Tensor temperature, float softcap"
)
define(
    f"linear_logprob_fwd({_HEAD}, int ignore_index, bool entropy, SymInt cache_rows, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define(
    f"linear_logprob_bwd({_HEAD}, int ignore_index, bool entropy, Tensor sums, Tensor cache, Tensor grad_logp, "
    "Tensor? grad_entropy, Tensor? rows, bool[5] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    shard: Shard | None,
) -> tuple[Head, Tensor]:
    accumulator = blocks.accumulator(hidden)
    keep = target != ignore_index
    head = Head(
        hidden,
        weight,
        None if bias is None else bias.to(accumulator),
        None if lora_hidden is None else lora_hidden.to(accumulator),
        None if lora_weight is None else lora_weight.to(accumulator),
        local_targets(target, keep, weight.shape[0], shard),
        torch.where(temperature > 0, 1 / temperature, torch.nan),
        softcap,
    )
    return head, keep


def _chain(hidden: Tensor, softcap: float, entropy: bool, cache_rows: int) -> bool:
    """Whether the kept exponentials carry the soft cap's slope: where they go into the products as they are."""
    as_they_are = blocks.cached(hidden) == blocks.operand(hidden) and cache_rows == hidden.shape[0]
    return bool(softcap) and not entropy and as_they_are


def run_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    cache_rows: int,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns logp, entropy, lse, sum of squares, the row sums and the kept exponentials."""
    if shard is None:
        check.targets(NAME, target, weight.shape[0], ignore_index)
    check.temperatures(NAME, temperature)
    # a surrounding autocast must not lower the products in here
    with torch.autocast(hidden.device.type, enabled=False):
        head, keep = _head(
            hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap, ignore_index, shard
        )
        if backend == "triton" and cache_rows == 0 and lora_hidden is None and shard is None:
            sums = _fused(head)
            cache = hidden.new_empty(0, weight.shape[0], dtype=blocks.cached(hidden))
        else:
            sums, cache = forward(head, cache_rows, _chain(hidden, softcap, entropy, cache_rows), backend, shard)
        return *outcome(RowSums(*sums), head.inv_temperature, keep), sums, cache


def _fused(head: Head) -> Tensor:
    from prism_kernels.ops.linear_logprob.triton import fused_forward, target_logits

    logit = target_logits(head.hidden, head.weight, head.target, head.bias, head.softcap)
    stats = fused_forward(head.hidden, head.weight, head.target, logit, head.inv_temperature, head.bias, head.softcap)
    return torch.cat((stats, logit[None]))


def run_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    sums: Tensor,
    cache: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    rows: Tensor | None,
    needs: list[bool],
    backend: str,
    shard: Shard | None = None,
) -> Gradients:
    """Returns the gradients of hidden, weight, bias, lora_hidden and lora_weight; empty where not needed."""
    with torch.autocast(hidden.device.type, enabled=False):
        head, keep = _head(
            hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap, ignore_index, shard
        )
        dtypes = (
            weight.dtype,
            weight.dtype if bias is None else bias.dtype,
            weight.dtype if lora_weight is None else lora_weight.dtype,
        )
        chain = _chain(hidden, softcap, entropy, cache.shape[0])
        grads = backward(head, sums, cache, chain, keep, grad_logp, grad_entropy, rows, Needs(*needs), dtypes, backend)
        if shard is not None:
            for grad in (grads.hidden, grads.lora_hidden):
                if grad.numel():
                    dist.all_reduce(grad, group=shard.group)
        return grads


def _forward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    cache_rows = rest[8]
    total, dtype = hidden.shape[0], blocks.accumulator(hidden)
    row = [hidden.new_empty(total, dtype=dtype) for _ in range(4)]
    cache = hidden.new_empty(cache_rows, weight.shape[0], dtype=blocks.cached(hidden))
    return *row, hidden.new_empty(5, total, dtype=dtype), cache


def _backward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    accumulator = blocks.accumulator(hidden)

    def like(x: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
        if x is None or not wanted:
            return hidden.new_empty(0, dtype=dtype)
        return x.new_empty(x.shape, dtype=dtype)

    return tuple(
        Gradients(
            like(hidden, needs[0], hidden.dtype),
            like(weight, needs[1], weight.dtype),
            like(bias, needs[2], weight.dtype if bias is None else bias.dtype),
            like(lora_hidden, needs[3], accumulator),
            like(lora_weight, needs[4], weight.dtype if lora_weight is None else lora_weight.dtype),
        )
    )


LIBRARY.impl("linear_logprob_fwd", run_forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_logprob_bwd", run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::linear_logprob_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::linear_logprob_bwd", _backward_fake, lib=LIBRARY)


def may_synchronise(tensor: Tensor) -> bool:
    """True where a count may be read from the device: not while compiling, nor while a graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class LinearLogProbFunction(torch.autograd.Function):
    """The gradient of `logp` and `entropy` with respect to hidden, weight, bias and LoRA's two."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
        target: Tensor,
        temperature: Tensor,
        softcap: float,
        ignore_index: int,
        entropy: bool,
        cache_rows: int,
        backend: str,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns logp, entropy, lse and the sum of squared probabilities."""
        head = (hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap)
        arguments = (*head, ignore_index, entropy, cache_rows, backend)
        if shard is None:
            results = torch.ops.prism_kernels.linear_logprob_fwd(*arguments)
        else:
            # a process group is no operator argument; collectives run as they stand
            results = run_forward(*arguments, shard=shard)
        logp, surprise, lse, square, sums, cache = results
        ctx.save_for_backward(*head[:7], sums, cache)
        ctx.options = (softcap, ignore_index, entropy)
        ctx.where = (backend, shard)
        ctx.mark_non_differentiable(lse, square)
        ctx.set_materialize_grads(False)
        return logp, surprise, lse, square

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients that are needed; rows whose incoming gradient is 0 are left out of the products."""
        *tensors, sums, cache = ctx.saved_tensors
        backend, shard = ctx.where
        needs = list(ctx.needs_input_grad[:5])
        if grad_logp is None and grad_entropy is None:
            return (None,) * 13
        if grad_logp is None:
            grad_logp = torch.zeros_like(sums[0])
        rows = None
        if may_synchronise(grad_logp):
            has = grad_logp != 0 if grad_entropy is None else (grad_logp != 0) | (grad_entropy != 0)
            rows = has.nonzero()[:, 0]
            rows = None if rows.numel() == has.numel() else rows
        softcap, ignore_index, entropy = ctx.options
        arguments: Any = (
            *tensors,
            softcap,
            ignore_index,
            entropy,
            sums,
            cache,
            grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            rows,
            needs,
            backend,
        )
        if shard is None:
            grads = torch.ops.prism_kernels.linear_logprob_bwd(*arguments)
        else:
            grads = run_backward(*(*arguments, shard))
        return *(g if n else None for g, n in zip(grads, needs)), *(None,) * 8
