"""The router of a Mixture-of-Experts layer: which experts each token goes to, and the losses that keep it balanced."""

# not `import torch`: in this package that name is the module torch.py
from torch import Tensor, int32, int64

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.moe_route.registration import FLOATS, NAME, MoeRouteFunction
from prism_kernels.ops.moe_route.routing import Routing

# how many kinds of tokens there are where no bias says it: prompt, image, perception, reasoning, answer
KINDS = 5


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

    It replaces, with logits in fp32 whatever the dtype of x, and ties broken towards the lower index::

        logits = x.float() @ router_weight.float().t() + kind_bias[kind]
        probability = logits.softmax(-1)
        weight, index = probability.topk(top_k)
        weight = weight / weight.sum(-1, keepdim=True)

    The losses are those of this one layer. With w the tokens' weights and, for each kind c, W_c their sum, f_ce the
    share of w that chose expert e and P_ce the mean probability of e, the load-balance loss is the mean of
    E * sum_e f_ce * P_ce over the kinds, each weighing as much as its tokens do: top_k where each kind is balanced.
    `z_loss` is the mean of logsumexp(logits) ** 2. Both are 0 without a token that counts.

    Args:
        x: (T, D).
        router_weight: (E, D).
        top_k: the number of experts of a token, 1 to E.
        kind: (T,), the tokens' kinds, from 0: below kind_bias's first dimension, or 5 without it; None: one kind.
        kind_bias: (kinds, E), added to the logits of the tokens of each kind.
        token_weight: (T,), by how much each token counts in the losses and `counts`; 0: not at all. None: 1.
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
    if not 1 <= top_k <= experts:
        check.fail(NAME, f"top_k in [1, {experts}], the number of experts", top_k)
    kinds = 1 if kind is None else KINDS
    if kind_bias is not None:
        check.tensor(NAME, "kind_bias", kind_bias)
        check.shape(NAME, "kind_bias", kind_bias, (1 if kind is None else "kinds", experts))
        check.dtype(NAME, "kind_bias", kind_bias, FLOATS)
        check.device(NAME, "kind_bias", kind_bias, x, "x")
        kinds = kind_bias.shape[0]
    for name, column, dtypes in (("kind", kind, (int64, int32)), ("token_weight", token_weight, FLOATS)):
        if column is not None:
            check.tensor(NAME, name, column)
            check.shape(NAME, name, column, (x.shape[0],))
            check.dtype(NAME, name, column, dtypes)
            check.device(NAME, name, column, x, "x")
    constants = (kind, None if token_weight is None else token_weight.detach())
    chosen = (top_k, kinds, renormalize, resolve(NAME, x.device, backend))
    return Routing(*MoeRouteFunction.apply(x, router_weight, kind_bias, constants, chosen))
