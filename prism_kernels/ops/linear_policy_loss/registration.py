"""Schema, fake and the autograd function of `linear_policy_loss`. T rows (tokens), V columns, D hidden, R rank."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.metrics import POLICY_TOTALS
from prism_kernels.ops.linear_logprob import blocks
from prism_kernels.ops.linear_logprob.backward import Gradients, Needs
from prism_kernels.ops.linear_logprob.forward import Head, local_targets
from prism_kernels.ops.linear_logprob.registration import may_synchronise
from prism_kernels.ops.linear_policy_loss.chunks import Policy, default_rows, run_chunks
from prism_kernels.ops.policy_loss.eager import Segments, corrections, token_weights
from prism_kernels.ops.policy_loss.options import Options, check_values

NAME = "linear_policy_loss"

# `choices` and `numbers` are policy_loss's `Options.encoded()`; chunk_tokens = 0 takes the default
define(
    "linear_policy_loss_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor target, Tensor temperature, float softcap, int ignore_index, Tensor? old_logp, Tensor advantage, "
    "Tensor cu_seqlens, Tensor? mask, Tensor? ref_logp, Tensor? rollout_logp, Tensor? denominator, int[] choices, "
    "float[] numbers, int chunk_tokens, bool[5] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: Tensor,
    softcap: float,
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
    total, columns = hidden.shape[0], weight.shape[0]
    check.targets(NAME, target, columns, ignore_index)
    check.temperatures(NAME, temperature)
    check_values(NAME, cu_seqlens, total, denominator)
    options = Options.decoded(choices, numbers)
    dtype = blocks.accumulator(hidden)
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
    columns_T = [cast(old_logp), advantage, cast(ref_logp), cast(rollout_logp)]
    weight_T = token_weights(segments, options, denominator)
    head = Head(
        hidden,
        weight,
        cast(bias),
        cast(lora_hidden),
        cast(lora_weight),
        local_targets(target, keep, columns, None),
        torch.where(temperature > 0, 1 / temperature, torch.nan),
        softcap,
    )
    rows = None
    if may_read:
        rows = keep.nonzero()[:, 0]
        rows = None if rows.numel() == total else rows
        # all rows that are left are valid
        segments = segments._replace(mask=None)
    if rows is not None:

        def pick(x: Tensor | None, rows: Tensor = rows) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)

        columns_T = [pick(x) for x in columns_T]
        weight_T, keep = weight_T.index_select(0, rows), keep.index_select(0, rows)
        bounds = torch.nn.functional.pad(segments.counts.to(torch.int64).cumsum(0), (1, 0))
        segments = Segments(bounds, segments.sequence.index_select(0, rows), None, segments.counts)
        head = head._replace(
            hidden=hidden.index_select(0, rows),
            lora_hidden=pick(head.lora_hidden),
            target=head.target.index_select(0, rows),
            inv_temperature=head.inv_temperature.index_select(0, rows),
        )
    old, advantage_T, ref, rollout = columns_T
    assert advantage_T is not None
    correction = None
    if rollout is None or old is not None:
        behind = None if rollout is None or old is None else segments.kept(old - rollout)
        correction = corrections(behind, segments, options, weight_T)
    policy = Policy(old, advantage_T, ref, rollout, weight_T, correction, segments)

    chunk = chunk_tokens or default_rows(hidden, columns)
    # a surrounding autocast must not lower the products in here
    with torch.autocast(hidden.device.type, enabled=False):
        loss, totals, logp, grads = run_chunks(head, keep, policy, options, chunk, Needs(*needs), backend, may_read)

    def spread(x: Tensor, wanted: bool) -> Tensor:
        if rows is None or not wanted:
            return x
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x)

    like = (weight.dtype, dtype if bias is None else bias.dtype, dtype if lora_weight is None else lora_weight.dtype)
    return (
        loss,
        totals,
        spread(logp, True),
        spread(grads.hidden, needs[0]),
        grads.weight.to(like[0]),
        grads.bias.to(like[1]),
        spread(grads.lora_hidden, needs[3]),
        grads.lora_weight.to(like[2]),
    )


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-2]
    dtype = blocks.accumulator(hidden)

    def like(x: Tensor | None, wanted: bool, kind: torch.dtype | None) -> Tensor:
        kind = dtype if kind is None else kind
        return hidden.new_empty(x.shape if x is not None and wanted else 0, dtype=kind)

    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(POLICY_TOTALS), dtype=torch.float64),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        like(hidden, needs[0], hidden.dtype),
        like(weight, needs[1], weight.dtype),
        like(bias, needs[2], None if bias is None else bias.dtype),
        like(lora_hidden, needs[3], None),
        like(lora_weight, needs[4], None if lora_weight is None else lora_weight.dtype),
    )


LIBRARY.impl("linear_policy_loss_fwd", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::linear_policy_loss_fwd", _forward_fake, lib=LIBRARY)


class LinearPolicyLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to the head's tensors, which the forward pass has already formed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
        rest: tuple[Any, ...],
        needs: list[bool],
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the metrics' totals and logp."""
        loss, totals, logp, *grads = torch.ops.prism_kernels.linear_policy_loss_fwd(
            hidden, weight, bias, lora_hidden, lora_weight, *rest, needs, backend
        )
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
