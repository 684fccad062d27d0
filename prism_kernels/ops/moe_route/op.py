"""The ops of `moe_route`: schemas, fakes, checks of values and autograd.

T tokens, D width, E experts, K experts of a token, C kinds of tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import register_op
from prism_kernels.ops.moe_route import eager
from prism_kernels.ops.moe_route.eager import Choice, Tokens
from prism_kernels.ops.rows import accumulator

NAME = "moe_route"
# limits of csrc/cuda/moe_route.cu: the most experts, and the assignments of a block
MOST_EXPERTS = 512
TILE = 1024


def _check_values(kind: Tensor | None, kinds: int, token_weight: Tensor | None) -> None:
    if kind is not None and check.reads_values(kind):
        bad = (kind < 0) | (kind >= kinds)
        if bad.any():
            index = int(bad.nonzero()[0, 0])
            check.fail(NAME, f"kind in [0, {kinds})", f"{int(kind[index])} at {index}")
    if token_weight is not None and check.reads_values(token_weight):
        bad = ~((token_weight >= 0) & token_weight.isfinite())
        if bad.any():
            index = int(bad.nonzero()[0, 0])
            check.fail(NAME, "token_weight >= 0 and finite", f"{float(token_weight[index])} at {index}")


def _choose(logits: Tensor, top_k: int, backend: str) -> Choice:
    if backend == "torch" or logits.shape[1] > MOST_EXPERTS:
        return eager.choose(logits, top_k)
    experts = logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)
    probability, lse = torch.empty_like(logits), logits.new_empty(logits.shape[0])
    _route_rows(logits.contiguous(), experts, probability, lse)
    return Choice(experts, probability, lse)


def _permute(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch" or experts > MOST_EXPERTS:
        return eager.permute(index, experts)
    assignments = index.numel()
    offsets = index.new_empty(experts, dtype=torch.int32)
    permutation = index.new_empty(assignments, dtype=torch.int32)
    tiles = index.new_empty(-(-assignments // TILE), experts, dtype=torch.int32)
    _permute_assignments(index.to(torch.int64).contiguous(), tiles, offsets, permutation)
    return offsets, permutation


def _forward(
    x: Tensor,
    router_weight: Tensor,
    kind_bias: Tensor | None,
    kind: Tensor | None,
    token_weight: Tensor | None,
    top_k: int,
    kinds: int,
    renormalize: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    _check_values(kind, kinds, token_weight)
    tokens = Tokens(kind, token_weight, kinds)
    experts = router_weight.shape[0]
    # a surrounding autocast must not lower the precision of these products
    with torch.autocast(x.device.type, enabled=False):
        choice = _choose(eager.logits(x, router_weight, tokens, kind_bias), top_k, backend)
        counts = eager.count(choice.experts, tokens, experts)
        losses = eager.losses(choice, tokens, counts)
        return (
            choice.experts,
            eager.weights(choice, renormalize),
            *_permute(choice.experts, experts, backend),
            counts.to(choice.lse.dtype),
            *losses,
            choice.probability,
            choice.lse,
        )


def _forward_fake(x: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    top_k, kinds = rest[3:5]
    T, E, dtype = x.shape[0], router_weight.shape[0], accumulator(x.dtype)
    return (
        x.new_empty(T, top_k, dtype=torch.int64),
        x.new_empty(T, top_k, dtype=dtype),
        x.new_empty(E, dtype=torch.int32),
        x.new_empty(T * top_k, dtype=torch.int32),
        x.new_empty(kinds, E, dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty(T, E, dtype=dtype),
        x.new_empty(T, dtype=dtype),
    )


def _backward(
    x: Tensor,
    router_weight: Tensor,
    kind: Tensor | None,
    token_weight: Tensor | None,
    index: Tensor,
    probability: Tensor,
    lse: Tensor,
    counts: Tensor,
    renormalize: bool,
    grad_weight: Tensor | None,
    grad_aux: Tensor | None,
    grad_z: Tensor | None,
    bias_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = Tokens(kind, token_weight, counts.shape[0])
    choice = Choice(index, probability, lse)
    with torch.autocast(x.device.type, enabled=False):
        grad = eager.logits_gradient(choice, tokens, counts, renormalize, grad_weight, grad_aux, grad_z)
        grad_x, grad_router, grad_bias = eager.input_gradients(grad, x, router_weight, tokens, needs)
    return grad_x.to(x.dtype), grad_router.to(router_weight.dtype), grad_bias.to(bias_dtype)


def _backward_fake(x: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts, bias_dtype, needs = rest[5], rest[-2], rest[-1]

    def like(t: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
        return t.new_empty(t.shape if needed else 0, dtype=dtype)

    return (
        like(x, x.dtype, needs[0]),
        like(router_weight, router_weight.dtype, needs[1]),
        like(counts, bias_dtype, needs[2]),
    )


def _permutation(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    if check.reads_values(index):
        bad = (index < 0) | (index >= experts)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            check.fail(f"{NAME}.from_topk", f"index in [0, {experts})", f"{int(index[row, column])} in row {row}")
    # clamped, since on a GPU the values are not checked
    return _permute(index.clamp(0, experts - 1), experts, backend)


def _permutation_fake(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    return index.new_empty(experts, dtype=torch.int32), index.new_empty(index.numel(), dtype=torch.int32)


moe_route_fwd = register_op(
    "moe_route_fwd(Tensor x, Tensor router_weight, Tensor? kind_bias, Tensor? kind, Tensor? token_weight, int top_k, "
    "int kinds, bool renormalize, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    eager=_forward,
)
moe_route_bwd = register_op(
    "moe_route_bwd(Tensor x, Tensor router_weight, Tensor? kind, Tensor? token_weight, Tensor index, "
    "Tensor probability, Tensor lse, Tensor counts, bool renormalize, Tensor? grad_weight, Tensor? grad_aux, "
    "Tensor? grad_z, ScalarType bias_dtype, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    eager=_backward,
)
moe_permutation_fwd = register_op(
    "moe_permutation_fwd(Tensor index, SymInt experts, str backend) -> (Tensor, Tensor)",
    fake=_permutation_fake,
    eager=_permutation,
)
# csrc/cuda
_route_rows = register_op(
    "moe_route_fwd.rows(Tensor logits, Tensor(a!) experts, Tensor(b!) probability, Tensor(c!) lse) -> ()"
)
# csrc/cuda; `tiles` (ceil(T * K / TILE), E) int32 is scratch
_permute_assignments = register_op(
    "moe_permutation_fwd.out(Tensor index, Tensor(a!) tiles, Tensor(b!) offsets, Tensor(c!) permutation) -> ()"
)


class MoeRouteFunction(torch.autograd.Function):
    """The gradients of the experts' weights and of the two losses with respect to x, router_weight and kind_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router_weight: Tensor,
        kind_bias: Tensor | None,
        constants: tuple[Tensor | None, Tensor | None],
        options: tuple[int, int, bool, str],
    ) -> tuple[Tensor, ...]:
        """Returns the fields of `Routing`; `constants` and `options` are in the order of the schema."""
        *fields, probability, lse = moe_route_fwd(x, router_weight, kind_bias, *constants, *options)
        index, _, offsets, permutation, counts, *_ = fields
        ctx.save_for_backward(x, router_weight, *constants, index, probability, lse, counts)
        ctx.renormalize = options[2]
        ctx.bias_dtype = probability.dtype if kind_bias is None else kind_bias.dtype
        ctx.mark_non_differentiable(index, offsets, permutation, counts)
        ctx.set_materialize_grads(False)
        return tuple(fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients that are needed."""
        _, grad_weight, _, _, _, grad_aux, grad_z = grads
        if grad_weight is None and grad_aux is None and grad_z is None:
            return (None,) * 5
        needs = list(ctx.needs_input_grad[:3])
        results = moe_route_bwd(
            *ctx.saved_tensors, ctx.renormalize, grad_weight, grad_aux, grad_z, ctx.bias_dtype, needs
        )
        return *(grad if needed else None for grad, needed in zip(results, needs)), None, None
