"""Statistics of the logits that trainers log: their mean, and whether the target's is the highest.

T rows, V columns, D width. Both are constants: there is no gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from prism_kernels.integrations.head import Head

# rows of a block of logits
_ROWS = 256
# the rounding error of probabilities: closer cases are decided by the logits
_MARGIN = 1e-3


def mean_logit(hidden: Tensor, head: Head, softcap: float | None = None) -> Tensor:
    """Returns the mean over V of the logits of each row, (T,), in fp32.

    Args:
        hidden: (T, D).
        head: weight (V, D), bias and LoRA.
        softcap: c of c * tanh(z / c); with it the logits are computed, block by block.
    """
    if softcap is not None:
        means = [softcap * (z / softcap).tanh().mean(1) for _, z in _blocks(hidden, head)]
        return torch.cat(means) if means else hidden.new_zeros(0, dtype=torch.float32)
    # the mean of the products with all columns is the product with their mean
    mean = hidden.float() @ head.weight.mean(0, dtype=torch.float32)
    if head.bias is not None:
        mean = mean + head.bias.float().mean()
    if head.lora is not None:
        a, b, scale = head.lora
        mean = mean + scale * (hidden.float() @ a.float().t()) @ b.mean(0, dtype=torch.float32)
    return mean


def is_highest(hidden: Tensor, head: Head, target: Tensor, logp: Tensor, sum_pi_squared: Tensor) -> Tensor:
    """Returns whether each row's target has the highest logit, (T,), bool; of equal logits the first is the highest.

    Let p be the target's probability and s the sum of all squared probabilities. If p² > s - p², no probability is
    higher than p. If p < s, one is, since s is at most the highest. Only the rows between these bounds need logits.

    Args:
        hidden: (T, D).
        head: weight (V, D), bias and LoRA.
        target: (T,).
        logp: (T,), of the targets under this head, at any temperature.
        sum_pi_squared: (T,), at that temperature.
    """
    p, s = logp.exp(), sum_pi_squared
    highest = 2 * p * p > s * (1 + _MARGIN)
    undecided = (~highest & (p >= s * (1 - _MARGIN))).nonzero()[:, 0]
    for rows, z in _blocks(hidden[undecided], head):
        highest[undecided[rows]] = z.argmax(1) == target[undecided[rows]]
    return highest


def _blocks(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of rows and their logits in fp32, before any soft cap."""
    for start in range(0, hidden.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        x = hidden[rows]
        z = linear(x, head.weight.to(x.dtype)).float()
        if head.bias is not None:
            z += head.bias.float()
        if head.lora is not None:
            a, b, scale = head.lora
            z += scale * (x.float() @ a.float().t()) @ b.float().t()
        yield rows, z
