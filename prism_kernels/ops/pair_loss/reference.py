"""The specification of `pair_loss`: over the valid pairs only, in autograd, in the dtype of its input."""

import torch
from torch import Tensor


def pair_loss_reference(
    preferred: Tensor,
    other: Tensor,
    *,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    denominator: float | Tensor | None = None,
    regularisation: float = 0.0,
    soft_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and the metrics of `pair_loss` by their names."""
    rows = torch.arange(other.numel()) if valid is None else valid.nonzero()[:, 0]
    p = preferred[rows if group is None else group[rows].long()]
    o = other[rows]
    x = p - o
    d = x if soft_clip is None else soft_clip * torch.tanh(x / soft_clip)
    terms = -torch.nn.functional.logsigmoid(d) + regularisation * (p.square() + o.square())
    metrics = {
        "pairs": torch.tensor(float(rows.numel())),
        "correct": (x > 0).sum(),
        "margin": x.detach().sum(),
        "preferred": p.detach().sum(),
        "other": o.detach().sum(),
    }
    return terms.sum() / (max(rows.numel(), 1) if denominator is None else denominator), metrics
