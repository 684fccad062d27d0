"""Log-probabilities of given tokens from logits: one read forward, one read and one write backward."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.rows import FLOATS, accumulator, row_temperature
from prism_kernels.ops.token_logprob.op import NAME, TokenLogProbFunction
from prism_kernels.outputs import TokenLogProbs


def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> TokenLogProbs:
    """Returns the log-probability of each target under softmax(logits / temperature), exact for confident tokens.

    It replaces, without a second copy of the logits::

        log_pi = torch.log_softmax(logits.float() / temperature[..., None], -1)
        logp = log_pi.gather(-1, target[..., None])[..., 0]
        entropy = -(log_pi.exp() * log_pi).sum(-1)

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64.
        target: int64, of the logits' leading shape, already aligned (no shift).
        temperature: a number, or a tensor of the target's shape.
        entropy: whether to return the entropy too (differentiable).
        ignore_index: rows with this target are 0 throughout and have no gradient.
        inplace_backward: write the gradient over the logits. They must not be used otherwise, and backward runs once:
            torch raises where a later backward pass needs their values. Rows that share memory are refused.
        backend: `cuda`, `triton`, `cpu` or `torch`; see `use_backend`.
    """
    for name, value in (("logits", logits), ("target", target)):
        check.tensor(NAME, name, value)
    check.dtype(NAME, "logits", logits, FLOATS)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        check.fail(NAME, "logits of shape (..., V) with V > 0", tuple(logits.shape))
    check.shape(NAME, "target", target, tuple(logits.shape[:-1]))
    check.dtype(NAME, "target", target, (torch.int64,))
    check.device(NAME, "target", target, logits, "logits")
    ignore_index, entropy = check.integer(NAME, "ignore_index", ignore_index), check.flag(NAME, "entropy", entropy)
    inplace_backward = check.flag(NAME, "inplace_backward", inplace_backward)
    tau = row_temperature(NAME, temperature, target, accumulator(logits.dtype))
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.stride(1) != 1:
        # not contiguous(), which leaves the strides of an empty tensor
        flat = flat.clone(memory_format=torch.contiguous_format)
    # an expanded tensor, or a window over one that is shorter than its rows
    if inplace_backward and flat.shape[0] > 1 and flat.stride(0) < flat.shape[1]:
        got = f"logits of shape {tuple(logits.shape)} and strides {logits.stride()}"
        check.fail(NAME, "logits whose rows do not share memory with inplace_backward; pass logits.contiguous()", got)
    results = TokenLogProbFunction.apply(
        flat, target.reshape(-1), tau, ignore_index, inplace_backward, resolve(NAME, logits.device, backend)
    )
    logp, row_entropy, lse, square = (r.view(target.shape) for r in results)
    return TokenLogProbs(logp, row_entropy if entropy else None, lse, square)
