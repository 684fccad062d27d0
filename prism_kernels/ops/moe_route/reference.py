"""The specification of `moe_route`: in autograd, in the dtype of its input. T tokens, E experts, K = top_k."""

import torch
from torch import Tensor

from prism_kernels.ops.moe_route import Routing


def moe_route_reference(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    kind: Tensor | None = None,
    kind_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    renormalize: bool = True,
    kinds: int = 5,
) -> Routing:
    """Returns the `Routing` of `moe_route`; `kinds` is the number of kinds where there is no bias."""
    T, E = x.shape[0], router_weight.shape[0]
    logits = x @ router_weight.t()
    if kind_bias is not None:
        kinds = kind_bias.shape[0]
        logits = logits + kind_bias[torch.zeros(T, dtype=torch.int64) if kind is None else kind.long()]
    probability = logits.softmax(-1)
    index = torch.sort(probability, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weight = probability.gather(1, index)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)

    counted = torch.ones(T, dtype=x.dtype) if token_weight is None else token_weight.to(x.dtype)
    total = counted.sum().clamp(min=torch.finfo(x.dtype).tiny)
    chosen = torch.zeros_like(probability).scatter(1, index, 1.0)
    counts = []
    aux = x.new_zeros(()) + 0 * probability[counted != 0].sum()
    for c in range(1 if kind is None and kind_bias is None else kinds):
        members = (counted != 0) if kind is None else (counted != 0) & (kind == c)
        share = counted[members, None]
        counts.append((share * chosen[members]).sum(0))
        if share.sum() > 0:
            f, P = counts[-1] / share.sum(), (share * probability[members]).sum(0) / share.sum()
            aux = aux + share.sum() / total * E * (f * P).sum()
    lse = logits.logsumexp(-1)[counted != 0]
    z = (counted[counted != 0] * lse.square()).sum() / total

    flat = index.reshape(-1)
    permutation = torch.sort(flat, stable=True).indices
    offsets = torch.stack([(flat <= e).sum() for e in range(E)])
    return Routing(index, weight, offsets.int(), permutation.int(), torch.stack(counts), aux, z)
