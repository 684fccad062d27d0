"""The specification of `linear_logprob`: dense, readable, in the dtype of its input (float64 in the tests)."""

import torch
from torch import Tensor

from prism_kernels.ops.token_logprob.reference import token_logprob_reference
from prism_kernels.outputs import TokenLogProbs


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
) -> TokenLogProbs:
    """Returns what `linear_logprob` returns, from the whole (T, V) logits in autograd."""
    logits = hidden @ weight.t()
    if lora is not None:
        a, b, scale = lora
        logits = logits + scale * ((hidden @ a.t()) @ b.t())
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprob_reference(logits, target, temperature=temperature, entropy=entropy, ignore_index=ignore_index)
