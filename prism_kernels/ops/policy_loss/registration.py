"""Schema, fake and the autograd function of `policy_loss`. T tokens, S sequences."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.policy_loss import arguments
from prism_kernels.ops.policy_loss.metrics import NAMES
from prism_kernels.ops.policy_loss.options import Options
from prism_kernels.ops.policy_loss.torch import forward

NAME = "policy_loss"

# implemented by csrc/cpu: columns of one dtype and stride 1, int64 cu_seqlens, and a denominator of 0 for none
define(
    "policy_loss_fwd.out(Tensor logp, Tensor? old_logp, Tensor advantage, Tensor cu_seqlens, Tensor? mask, "
    "Tensor? ref_logp, Tensor? rollout_logp, Tensor? entropy, float denominator, int[] choices, float[] numbers, *, "
    "Tensor(a!) loss, Tensor(b!) grad, Tensor(c!) grad_entropy, Tensor(d!) totals) -> ()"
)
# implemented by csrc/cuda: columns of any dtypes and stride 1
define(
    "policy_loss_fwd.cuda(Tensor logp, Tensor? old_logp, Tensor advantage, Tensor cu_seqlens, Tensor? mask, "
    "Tensor? ref_logp, Tensor? rollout_logp, Tensor? entropy, Tensor? denominator, int[] choices, float[] numbers)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# `choices` and `numbers` are `Options.encoded()`
define(
    "policy_loss_fwd(Tensor logp, Tensor? old_logp, Tensor advantage, Tensor cu_seqlens, Tensor? mask, "
    "Tensor? ref_logp, Tensor? rollout_logp, Tensor? entropy, Tensor? denominator, int[] choices, float[] numbers, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    entropy: Tensor | None,
    denominator: Tensor | None,
    choices: list[int],
    numbers: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments.values(NAME, cu_seqlens, logp.shape[0], denominator)
    if backend == "cuda":
        columns = (logp, old_logp, advantage, cu_seqlens, mask, ref_logp, rollout_logp, entropy, denominator)
        return _launch(columns, choices, numbers)
    dtype = accumulator(logp.dtype)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    given = (logp.to(dtype).contiguous(), cast(old_logp), advantage.to(dtype).contiguous())
    more = (cast(ref_logp), cast(rollout_logp), cast(entropy))
    options = Options.decoded(choices, numbers)
    if backend == "torch":
        return forward(*given, cu_seqlens, mask, *more, denominator, options)
    loss, grad, grad_entropy, totals = results = _forward_fake(logp, *[None] * 6, entropy)
    torch.ops.prism_kernels.policy_loss_fwd.out(
        *given,
        cu_seqlens.to(torch.int64).contiguous(),
        None if mask is None else mask.contiguous(),
        *more,
        options.denominator if denominator is None else float(denominator),
        choices,
        numbers,
        loss=loss,
        grad=grad,
        grad_entropy=grad_entropy,
        totals=totals,
    )
    return results


def _launch(
    columns: tuple[Tensor | None, ...], choices: list[int], numbers: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    beside = [x if x is None or x.is_contiguous() else x.contiguous() for x in columns]
    return torch.ops.prism_kernels.policy_loss_fwd.cuda(*beside, choices, numbers)


def _forward_fake(logp: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy = rest[6]
    dtype = accumulator(logp.dtype)
    grad = logp.new_empty(logp.shape[0], dtype=dtype)
    return (
        logp.new_empty((), dtype=dtype),
        grad,
        grad.new_empty(0 if entropy is None else logp.shape[0]),
        logp.new_empty(len(NAMES), dtype=torch.float64),
    )


LIBRARY.impl("policy_loss_fwd", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("prism_kernels::policy_loss_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("prism_kernels::policy_loss_fwd.cuda", _forward_fake, lib=LIBRARY)
# every output is an argument
torch.library.register_fake("prism_kernels::policy_loss_fwd.out", lambda *args, **results: None, lib=LIBRARY)


class PolicyLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to logp and entropy, which the forward pass has already formed."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor | None, rest: tuple[Any, ...], options: Options, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and the metrics' totals."""
        columns = (logp, *rest[:-1], entropy, rest[-1])
        choices, numbers = options.encoded()
        if backend == "cuda" and not check.reads_values(logp):
            # past the operator in Python, which only checks values and chooses
            loss, grad, grad_entropy, totals = _launch(columns, choices, numbers)
        else:
            op = torch.ops.prism_kernels.policy_loss_fwd.default
            loss, grad, grad_entropy, totals = op(*columns, choices, numbers, backend)
        ctx.save_for_backward(grad, grad_entropy)
        ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients: a scale."""
        if grad_loss is None:
            return (None,) * 5
        grad, grad_entropy = ctx.saved_tensors
        dtype, entropy_dtype = ctx.dtypes
        wants_logp, wants_entropy = ctx.needs_input_grad[:2]
        # a product with 1 would only move memory; elsewhere than on the cpu reading the number would wait for it
        readable = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (readable and float(grad_loss) == 1):
            grad = grad * grad_loss if wants_logp else grad
            grad_entropy = grad_entropy * grad_loss if wants_entropy else grad_entropy
        return (
            grad.to(dtype) if wants_logp else None,
            grad_entropy.to(entropy_dtype) if wants_entropy else None,
            None,
            None,
            None,
        )
