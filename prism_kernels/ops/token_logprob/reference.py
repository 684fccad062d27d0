"""The specification of `token_logprob`: dense, readable, in the dtype of its input (float64 in the tests)."""

import torch
from torch import Tensor

from prism_kernels.outputs import TokenLogProbs


def token_logprob_reference(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> TokenLogProbs:
    """Returns what `token_logprob` returns, by `torch.log_softmax` in autograd."""
    keep = target != ignore_index
    tau = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).expand(target.shape)
    scaled = logits / tau[..., None]
    log_pi = torch.log_softmax(scaled, -1)
    pi = log_pi.exp()
    logp = log_pi.gather(-1, torch.where(keep, target, 0)[..., None])[..., 0]
    # a token of probability 0 adds nothing to the entropy: 0 * -inf counts as 0
    row_entropy = -(pi * torch.where(pi == 0, 0.0, log_pi)).sum(-1)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)

    def kept(x: Tensor) -> Tensor:
        return torch.where(keep, x, zero)

    return TokenLogProbs(
        kept(logp),
        kept(row_entropy) if entropy else None,
        kept(torch.logsumexp(scaled, -1).detach()),
        kept(pi.square().sum(-1).detach()),
    )
