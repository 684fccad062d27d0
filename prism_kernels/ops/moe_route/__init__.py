"""The router of a Mixture-of-Experts layer: each token's experts, and the losses that keep the experts balanced."""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.moe_route.op import NAME, MoeRouteFunction, moe_permutation_fwd
from prism_kernels.ops.rows import FLOATS, accumulator

# the kinds of tokens without a bias: prompt, image, perception, reasoning, answer
KINDS = 5
# of experts: beyond it a count is a mistake, and the sort by expert would take all memory
MOST = 2**16


class Routing(NamedTuple):
    """Each token's experts and their weights, and the order in which the experts take the tokens.

    T tokens, E experts, K experts of a token. An assignment is a token with one of its experts, number t * K + k.
    """

    # [T, K] int64; a tuple's method `index` is not needed here
    index: Tensor  # type: ignore[assignment]
    # [T, K] fp32 (fp64 for fp64 input), differentiable
    weight: Tensor
    # [E] int32, where each expert's assignments end in the permutation
    offsets: Tensor
    # [T * K] int32, the assignments by expert, those of one expert in the order of the tokens
    permutation: Tensor
    # [kinds, E] the total weight of each kind's tokens that chose each expert
    counts: Tensor
    # no dimensions; None from `from_topk`
    aux_loss: Tensor | None
    z_loss: Tensor | None

    @staticmethod
    def from_topk(index: Tensor, weight: Tensor, num_experts: int, *, backend: str | None = None) -> "Routing":
        """Returns the routing of another router's choice: index and weight (T, K); differentiable in weight."""
        op = f"{NAME}.from_topk"
        check.tensor(op, "index", index)
        check.shape(op, "index", index, ("T", "K"))
        check.dtype(op, "index", index, (torch.int64, torch.int32))
        check.tensor(op, "weight", weight)
        check.shape(op, "weight", weight, tuple(index.shape))
        check.dtype(op, "weight", weight, FLOATS)
        check.device(op, "weight", weight, index, "index")
        num_experts = check.integer(op, "num_experts", num_experts, 1, MOST)
        if index.shape[1] < 1:
            check.fail(op, "index of shape (T, K) with K > 0", tuple(index.shape))
        offsets, permutation = moe_permutation_fwd(index, num_experts, resolve(NAME, index.device, backend))
        # clamped, since on a GPU the values are not checked: a bad index shows as a weight of NaN
        clamped = index.to(torch.int64).clamp(0, num_experts - 1)
        dtype = accumulator(weight.dtype)
        weight = torch.where(clamped == index, weight.to(dtype), torch.nan)
        counts = offsets.diff(prepend=offsets.new_zeros(1)).to(dtype)[None]
        return Routing(clamped, weight, offsets, permutation, counts, None, None)


def moe_route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    kind: Tensor | None = None,
    kind_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    renormalize: bool = True,
    backend: str | None = None,
) -> Routing:
    """Returns the `Routing` of T tokens among E experts; differentiable in x, router_weight and kind_bias.

    It replaces, with logits in fp32 for every dtype of x and ties broken towards the lower index::

        logits = x.float() @ router_weight.float().t() + kind_bias[kind]
        probability = logits.softmax(-1)
        weight, index = probability.topk(top_k)
        weight = weight / weight.sum(-1, keepdim=True)
        z_loss = (token_weight * logits.logsumexp(-1) ** 2).sum() / token_weight.sum()
        aux_loss = 0
        for c in range(kinds):
            w = token_weight * (kind == c)
            counts[c] = (w[:, None] * one_hot(index, E).sum(1)).sum(0)
            f, P = counts[c] / w.sum(), (w[:, None] * probability).sum(0) / w.sum()
            aux_loss += w.sum() / token_weight.sum() * E * (f * P).sum()

    The losses are those of this one layer. `aux_loss` is top_k where the tokens of each kind are balanced over the
    experts. Both losses are 0 if no token counts.

    Args:
        x: (T, D).
        router_weight: (E, D).
        top_k: the number of experts of a token, 1 to E.
        kind: (T,), the tokens' kinds, from 0: below kind_bias's first dimension, or 5 without it; None: one kind.
        kind_bias: (kinds, E), added to the logits of the tokens of each kind.
        token_weight: (T,), how much each token counts in the losses and `counts`; 0: not at all. None: 1.
        renormalize: whether the weights of a token's experts sum to 1; otherwise they are their probabilities.
        backend: `cuda` or `torch`; see `use_backend`.
    """
    check.tensor(NAME, "x", x)
    check.shape(NAME, "x", x, ("T", "D"))
    check.dtype(NAME, "x", x, FLOATS)
    check.tensor(NAME, "router_weight", router_weight)
    check.shape(NAME, "router_weight", router_weight, ("E", x.shape[1]))
    check.dtype(NAME, "router_weight", router_weight, FLOATS)
    check.device(NAME, "router_weight", router_weight, x, "x")
    experts = router_weight.shape[0]
    top_k = check.integer(NAME, "top_k", top_k, 1, experts, f"top_k in [1, {experts}], the number of experts")
    renormalize = check.flag(NAME, "renormalize", renormalize)
    kinds = 1 if kind is None else KINDS
    if kind_bias is not None:
        check.tensor(NAME, "kind_bias", kind_bias)
        check.shape(NAME, "kind_bias", kind_bias, (1 if kind is None else "kinds", experts))
        if kind_bias.shape[0] == 0:
            check.fail(NAME, "kind_bias of shape (kinds, E) with kinds > 0", tuple(kind_bias.shape))
        check.dtype(NAME, "kind_bias", kind_bias, FLOATS)
        check.device(NAME, "kind_bias", kind_bias, x, "x")
        kinds = kind_bias.shape[0]
    for name, column, dtypes in (("kind", kind, (torch.int64, torch.int32)), ("token_weight", token_weight, FLOATS)):
        if column is not None:
            check.tensor(NAME, name, column)
            check.shape(NAME, name, column, (x.shape[0],))
            check.dtype(NAME, name, column, dtypes)
            check.device(NAME, name, column, x, "x")
    constants = (kind, None if token_weight is None else token_weight.detach())
    options = (top_k, kinds, renormalize, resolve(NAME, x.device, backend))
    return Routing(*MoeRouteFunction.apply(x, router_weight, kind_bias, constants, options))
