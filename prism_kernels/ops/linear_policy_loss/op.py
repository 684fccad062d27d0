"""The op of `linear_policy_loss`: schema, fake and autograd. T rows (tokens), V columns, D hidden, R rank of LoRA."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.metrics import POLICY_TOTALS
from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.linear_logprob.eager import Gradients, Needs
from prism_kernels.ops.linear_policy_loss.eager import Policy, default_rows, run_chunks
from prism_kernels.ops.policy_loss.eager import Segments, corrections, token_weights
from prism_kernels.ops.policy_loss.options import Options, check_values
from prism_kernels.ops.rows import HEAD, HeadArguments, accumulator, may_synchronise

NAME = "linear_policy_loss"


def _forward(*values: Any) -> tuple[Tensor, ...]:
    return _run(HeadArguments(*values[:8]), *values[8:])


def _run(
    given: HeadArguments,
    ignore_index: int,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    denominator: Tensor | None,
    choices: list[int],
    numbers: list[float],
    chunk_tokens: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    hidden, target = given.hidden, given.target
    total, columns = hidden.shape[0], given.weight.shape[0]
    check.targets(NAME, target, columns, ignore_index)
    check.temperatures(NAME, given.temperature, given.softcap)
    check_values(NAME, cu_seqlens, total, denominator)
    options = Options.decoded(choices, numbers)
    dtype = accumulator(hidden.dtype)
    may_read = may_synchronise(hidden)
    keep = target != ignore_index
    if mask is not None:
        keep = keep & mask

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    segments = Segments.of(cu_seqlens, keep, total, dtype)
    advantage = advantage.to(dtype)
    if not options.per_token:
        # with no sequence at all there is no token either
        advantage = segments.spread(advantage) if advantage.numel() else advantage.new_zeros(total)
    policy_columns = [cast(old_logp), advantage, cast(ref_logp), cast(rollout_logp)]
    weight = token_weights(segments, options, denominator)
    head = given.head(keep)
    rows = None
    if may_read:
        rows = keep.nonzero()[:, 0]
        rows = None if rows.numel() == total else rows
        # all rows that are left are valid
        segments = segments._replace(mask=None)
    if rows is not None:
        head = head.rows(rows)
        policy_columns = [None if x is None else x.index_select(0, rows) for x in policy_columns]
        weight = weight.index_select(0, rows)
        bounds = torch.nn.functional.pad(segments.counts.to(torch.int64).cumsum(0), (1, 0))
        segments = Segments(bounds, segments.sequence.index_select(0, rows), None, segments.counts)
    old, row_advantage, ref, rollout = policy_columns
    assert row_advantage is not None
    correction = None
    if rollout is None or old is not None:
        log_ratio = None if rollout is None or old is None else segments.kept(old - rollout)
        correction = corrections(log_ratio, segments, options, weight)
    policy = Policy(old, row_advantage, ref, rollout, weight, correction, segments)

    chunk = chunk_tokens or default_rows(hidden, columns)
    # a surrounding autocast must not lower the precision of these products
    with torch.autocast(hidden.device.type, enabled=False):
        loss, totals, logp, grads = run_chunks(
            head, ROW_KERNELS[backend], policy, options, chunk, Needs(*needs), may_read
        )

    def spread(x: Tensor, wanted: bool) -> Tensor:
        if rows is None or not wanted:
            return x
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x)

    def cast_like(grad: Tensor, x: Tensor | None) -> Tensor:
        return grad.to(dtype if x is None else x.dtype)

    return (
        loss,
        totals,
        spread(logp, True),
        spread(grads.hidden, needs[0]),
        cast_like(grads.weight, given.weight),
        cast_like(grads.bias, given.bias),
        spread(grads.lora_hidden, needs[3]),
        cast_like(grads.lora_weight, given.lora_weight),
    )


def _forward_fake(*values: Any) -> tuple[Tensor, ...]:
    given, needs = HeadArguments(*values[:8]), values[-2]
    hidden, dtype = given.hidden, accumulator(given.hidden.dtype)

    def like(x: Tensor | None, wanted: bool, kind: torch.dtype) -> Tensor:
        return hidden.new_empty(x.shape if x is not None and wanted else 0, dtype=kind)

    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(POLICY_TOTALS), dtype=torch.float64),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        like(hidden, needs[0], hidden.dtype),
        like(given.weight, needs[1], given.weight.dtype),
        like(given.bias, needs[2], dtype if given.bias is None else given.bias.dtype),
        like(given.lora_hidden, needs[3], dtype),
        like(given.lora_weight, needs[4], dtype if given.lora_weight is None else given.lora_weight.dtype),
    )


# `choices` and `numbers` are policy_loss's `Options.encoded()`; chunk_tokens = 0 takes the default
linear_policy_loss_fwd = register_op(
    f"linear_policy_loss_fwd({HEAD}, int ignore_index, Tensor? old_logp, Tensor advantage, Tensor cu_seqlens, "
    "Tensor? mask, Tensor? ref_logp, Tensor? rollout_logp, Tensor? denominator, int[] choices, float[] numbers, "
    "int chunk_tokens, bool[5] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)


class LinearPolicyLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to the head's tensors, which the forward pass has already formed."""

    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the metrics' totals and logp.

        `values` are the first five of `HeadArguments`, the op's other arguments but the last two, and those.
        """
        *leaves, rest, needs, backend = values
        loss, totals, logp, *grads = linear_policy_loss_fwd(*leaves, *rest, needs, backend)
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        ctx.mark_non_differentiable(totals, logp)
        ctx.set_materialize_grads(False)
        return loss, totals, logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients: a scale."""
        if grad_loss is None:
            return (None,) * 8
        grads = Gradients(*ctx.saved_tensors)
        return *((g * grad_loss).to(g.dtype) if n else None for g, n in zip(grads, ctx.needs)), None, None, None
