"""The ops of `policy_loss`: schemas, fakes, autograd, and what the kernels' arguments become. T tokens, S sequences."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.library import register_op
from prism_kernels.metrics import POLICY_TOTALS
from prism_kernels.ops.policy_loss.eager import policy_loss_eager
from prism_kernels.ops.policy_loss.options import Options, check_values
from prism_kernels.ops.rows import accumulator, contiguous

NAME = "policy_loss"

_COLUMNS = (
    "Tensor logp, Tensor? old_logp, Tensor advantage, Tensor cu_seqlens, Tensor? mask, Tensor? ref_logp, "
    "Tensor? rollout_logp, Tensor? entropy"
)
# `Options.encoded()`
_OPTIONS = "int[] choices, float[] numbers"


def _launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *columns, choices, numbers = arguments
    return _policy_loss_cuda(*(contiguous(x) for x in columns), choices, numbers)


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
    check_values(NAME, cu_seqlens, logp.shape[0], denominator)
    if backend == "cuda":
        columns = (logp, old_logp, advantage, cu_seqlens, mask, ref_logp, rollout_logp, entropy, denominator)
        return _launch(*columns, choices, numbers)
    dtype = accumulator(logp.dtype)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).contiguous()

    log_probs = (logp.to(dtype).contiguous(), cast(old_logp), advantage.to(dtype).contiguous())
    extras = (cast(ref_logp), cast(rollout_logp), cast(entropy))
    options = Options.decoded(choices, numbers)
    if backend == "torch":
        return policy_loss_eager(*log_probs, cu_seqlens, mask, *extras, denominator, options)
    loss, grad, grad_entropy, totals = results = _forward_fake(logp, *[None] * 6, entropy)
    _policy_loss_cpu(
        *log_probs,
        cu_seqlens.to(torch.int64).contiguous(),
        contiguous(mask),
        *extras,
        options.denominator if denominator is None else float(denominator),
        choices,
        numbers,
        loss=loss,
        grad=grad,
        grad_entropy=grad_entropy,
        totals=totals,
    )
    return results


def _forward_fake(logp: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy = rest[6]
    dtype = accumulator(logp.dtype)
    grad = logp.new_empty(logp.shape[0], dtype=dtype)
    return (
        logp.new_empty((), dtype=dtype),
        grad,
        grad.new_empty(0 if entropy is None else logp.shape[0]),
        logp.new_empty(len(POLICY_TOTALS), dtype=torch.float64),
    )


# csrc/cpu: columns of one dtype and stride 1, int64 cu_seqlens, and a denominator of 0 for none
_policy_loss_cpu = register_op(
    f"policy_loss_fwd.out({_COLUMNS}, float denominator, {_OPTIONS}, *, "
    "Tensor(a!) loss, Tensor(b!) grad, Tensor(c!) grad_entropy, Tensor(d!) totals) -> ()"
)
# csrc/cuda: columns of any dtypes and stride 1
_policy_loss_cuda = register_op(
    f"policy_loss_fwd.cuda({_COLUMNS}, Tensor? denominator, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
_policy_loss_fwd = register_op(
    f"policy_loss_fwd({_COLUMNS}, Tensor? denominator, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
    cuda=_launch,
)


class PolicyLossFunction(torch.autograd.Function):
    """The gradient of the loss with respect to logp and entropy, which the forward pass has already formed."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, entropy: Tensor | None, constants: tuple[Any, ...], options: Options, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and the metrics' totals; `constants` are the other tensors in the order of the schema."""
        *columns, denominator = constants
        loss, grad, grad_entropy, totals = _policy_loss_fwd(
            logp, *columns, entropy, denominator, *options.encoded(), backend
        )
        ctx.save_for_backward(grad, grad_entropy)
        ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients: those of the forward pass times the loss's."""
        if grad_loss is None:
            return (None,) * 5
        grad, grad_entropy = ctx.saved_tensors
        dtype, entropy_dtype = ctx.dtypes
        needs_logp, needs_entropy = ctx.needs_input_grad[:2]
        # a product with 1 would only move memory; on other devices, reading grad_loss would wait for the device
        readable = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (readable and float(grad_loss) == 1):
            grad = grad * grad_loss if needs_logp else grad
            grad_entropy = grad_entropy * grad_loss if needs_entropy else grad_entropy
        return (
            grad.to(dtype) if needs_logp else None,
            grad_entropy.to(entropy_dtype) if needs_entropy else None,
            None,
            None,
            None,
        )
