"""The ops of `linear_logprob`: schemas, fakes and autograd. T rows, V columns, D hidden, R rank of LoRA."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.linear_logprob.eager import Gradients, Needs, Shard, backward, chained, forward
from prism_kernels.ops.rows import (
    HEAD,
    Head,
    HeadArguments,
    RowSums,
    accumulator,
    cached,
    has_gradient,
    may_synchronise,
    outcome,
)

NAME = "linear_logprob"


def _head(arguments: HeadArguments, ignore_index: int, shard: Shard | None) -> Head:
    keep = arguments.target != ignore_index
    return arguments.head(keep) if shard is None else arguments.head(keep, shard.first, shard.total)


def _run_forward(
    arguments: HeadArguments,
    ignore_index: int,
    entropy: bool,
    cache_rows: int,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = arguments.hidden, arguments.weight
    if shard is None:
        check.targets(NAME, arguments.target, weight.shape[0], ignore_index)
    check.temperatures(NAME, arguments.temperature, arguments.softcap)
    # a surrounding autocast must not lower the precision of these products
    with torch.autocast(hidden.device.type, enabled=False):
        head = _head(arguments, ignore_index, shard)
        if backend == "triton" and cache_rows == 0 and head.lora_hidden is None and shard is None:
            sums = _fused(head)
            cache = hidden.new_empty(0, weight.shape[0], dtype=cached(hidden))
        else:
            chain = chained(head, entropy, cache_rows)
            sums, cache = forward(head, ROW_KERNELS[backend], cache_rows, chain, shard)
        return *outcome(RowSums(*sums), head.inv_temperature, head.keep), sums, cache


def _fused(head: Head) -> Tensor:
    from prism_kernels.ops.linear_logprob.kernels import fused_forward, target_logits

    logit = target_logits(head.hidden, head.weight, head.target, head.bias, head.softcap)
    stats = fused_forward(head.hidden, head.weight, head.target, logit, head.inv_temperature, head.bias, head.softcap)
    return torch.cat((stats, logit[None]))


def _forward(*values: Any) -> tuple[Tensor, ...]:
    return _run_forward(HeadArguments(*values[:8]), *values[8:])


def _forward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    cache_rows = rest[8]
    total, dtype = hidden.shape[0], accumulator(hidden.dtype)
    row = [hidden.new_empty(total, dtype=dtype) for _ in range(4)]
    cache = hidden.new_empty(cache_rows, weight.shape[0], dtype=cached(hidden))
    return *row, hidden.new_empty(5, total, dtype=dtype), cache


def _run_backward(
    arguments: HeadArguments,
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
    wanted = Needs(*needs)
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        head = _head(arguments, ignore_index, shard)
        chain = chained(head, entropy, cache.shape[0])
        out = _empty(arguments, wanted._replace(hidden=False, lora_hidden=False))
        grads = backward(head, ROW_KERNELS[backend], sums, cache, chain, grad_logp, grad_entropy, rows, wanted, out)
        if shard is not None:
            for grad in (grads.hidden, grads.lora_hidden):
                if grad.numel():
                    dist.all_reduce(grad, group=shard.group)
        return grads


def _empty(arguments: HeadArguments, needs: Needs) -> Gradients:
    """Returns memory for the gradients that are needed, and empty tensors for the others."""
    hidden, weight, bias, lora_hidden, lora_weight = arguments[:5]

    def like(x: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(x.shape if x is not None and wanted else (0,), dtype=dtype)

    return Gradients(
        like(hidden, needs.hidden, hidden.dtype),
        like(weight, needs.weight, weight.dtype),
        like(bias, needs.bias, weight.dtype if bias is None else bias.dtype),
        like(lora_hidden, needs.lora_hidden, accumulator(hidden.dtype)),
        like(lora_weight, needs.lora_weight, weight.dtype if lora_weight is None else lora_weight.dtype),
    )


def _backward(*values: Any) -> Gradients:
    return _run_backward(HeadArguments(*values[:8]), *values[8:])


def _backward_fake(*values: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(HeadArguments(*values[:8]), Needs(*values[-2])))


linear_logprob_fwd = register_op(
    f"linear_logprob_fwd({HEAD}, int ignore_index, bool entropy, SymInt cache_rows, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
linear_logprob_bwd = register_op(
    f"linear_logprob_bwd({HEAD}, int ignore_index, bool entropy, Tensor sums, Tensor cache, Tensor grad_logp, "
    "Tensor? grad_entropy, Tensor? rows, bool[5] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    eager=_backward,
)


class LinearLogProbFunction(torch.autograd.Function):
    """The gradient of `logp` and `entropy` with respect to hidden, weight, bias and LoRA's two."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns logp, entropy, lse and the sum of squared probabilities.

        `values` are `HeadArguments`, ignore_index, entropy, cache_rows, backend and shard.
        """
        arguments, (ignore_index, entropy, cache_rows, backend, shard) = HeadArguments(*values[:8]), values[8:]
        if shard is None:
            results = linear_logprob_fwd(*arguments, ignore_index, entropy, cache_rows, backend)
        else:
            # a process group is no operator argument; collectives run as they stand
            results = _run_forward(arguments, ignore_index, entropy, cache_rows, backend, shard)
        logp, row_entropy, lse, square, sums, cache = results
        ctx.save_for_backward(*arguments[:7], sums, cache)
        ctx.options = (arguments.softcap, ignore_index, entropy)
        ctx.where = (backend, shard)
        ctx.mark_non_differentiable(lse, square)
        ctx.set_materialize_grads(False)
        return logp, row_entropy, lse, square

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
            has = has_gradient(grad_logp, grad_entropy)
            rows = has.nonzero()[:, 0]
            rows = None if rows.numel() == has.numel() else rows
        softcap, ignore_index, entropy = ctx.options
        grad_logp = grad_logp.contiguous()
        grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
        arguments = HeadArguments(*(*tensors, softcap))
        rest = (ignore_index, entropy, sums, cache, grad_logp, grad_entropy, rows, needs, backend)
        grads = linear_logprob_bwd(*arguments, *rest) if shard is None else _run_backward(arguments, *rest, shard)
        return *(g if n else None for g, n in zip(grads, needs)), *(None,) * 8
