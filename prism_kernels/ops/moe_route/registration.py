"""Schemas, fakes and the autograd functions of `moe_route`. T tokens, D width, E experts, K experts of a token."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels import check
from prism_kernels.library import LIBRARY, define
from prism_kernels.ops.moe_route import torch as form
from prism_kernels.ops.moe_route.torch import Choice, Tokens, accumulator

NAME = "moe_route"
# of the CUDA kernels: the most experts, and the assignments of a block
MOST_EXPERTS = 512
TILE = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

define(
    "moe_route_fwd(Tensor x, Tensor router_weight, Tensor? kind_bias, Tensor? kind, Tensor? token_weight, int top_k, "
    "int kinds, bool renormalize, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
define(
    "moe_route_bwd(Tensor x, Tensor router_weight, Tensor? kind, Tensor? token_weight, Tensor index, "
    "Tensor probability, Tensor lse, Tensor counts, bool renormalize, Tensor? grad_weight, Tensor? grad_aux, "
    "Tensor? grad_z, ScalarType bias_dtype, bool[3] needs) -> (Tensor, Tensor, Tensor)"
)
define("moe_permutation_fwd(Tensor index, SymInt experts, str backend) -> (Tensor, Tensor)")
# csrc/cuda/moe_route.cu. `tiles` (ceil(T * K / TILE), E) int32 is scratch
define("moe_route_fwd.rows(Tensor logits, Tensor(a!) experts, Tensor(b!) probability, Tensor(c!) lse) -> ()")
define("moe_permutation_fwd.out(Tensor index, Tensor(a!) tiles, Tensor(b!) offsets, Tensor(c!) permutation) -> ()")


def _check_values(kind: Tensor | None, kinds: int, token_weight: Tensor | None) -> None:
    if kind is not None and check.reads_values(kind):
        bad = (kind < 0) | (kind >= kinds)
        if bad.any():
            place = int(bad.nonzero()[0, 0])
            check.fail(NAME, f"kind in [0, {kinds})", f"{int(kind[place])} at {place}")
    if token_weight is not None and check.reads_values(token_weight):
        bad = ~((token_weight >= 0) & token_weight.isfinite())
        if bad.any():
            place = int(bad.nonzero()[0, 0])
            check.fail(NAME, "token_weight >= 0 and finite", f"{float(token_weight[place])} at {place}")


def _choose(z: Tensor, top_k: int, backend: str) -> Choice:
    if backend == "torch" or z.shape[1] > MOST_EXPERTS:
        return form.choose(z, top_k)
    experts = z.new_empty(z.shape[0], top_k, dtype=torch.int64)
    probability, lse = torch.empty_like(z), z.new_empty(z.shape[0])
    torch.ops.prism_kernels.moe_route_fwd.rows(z.contiguous(), experts, probability, lse)
    return Choice(experts, probability, lse)


def _permute(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch" or experts > MOST_EXPERTS:
        return form.permute(index, experts)
    total = index.numel()
    offsets = index.new_empty(experts, dtype=torch.int32)
    permutation = index.new_empty(total, dtype=torch.int32)
    tiles = index.new_empty(-(-total // TILE), experts, dtype=torch.int32)
    torch.ops.prism_kernels.moe_permutation_fwd.out(index.to(torch.int64).contiguous(), tiles, offsets, permutation)
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
    # a surrounding autocast must not lower the products in here
    with torch.autocast(x.device.type, enabled=False):
        choice = _choose(form.logits(x, router_weight, tokens, kind_bias), top_k, backend)
        counts = form.count(choice.experts, tokens, experts)
        losses = form.losses(choice, tokens, counts)
        return (
            choice.experts,
            form.weights(choice, renormalize),
            *_permute(choice.experts, experts, backend),
            counts.to(choice.lse.dtype),
            *losses,
            choice.probability,
            choice.lse,
        )


def _forward_fake(x: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    top_k, kinds = rest[3:5]
    total, experts, dtype = x.shape[0], router_weight.shape[0], accumulator(x)
    return (
        x.new_empty(total, top_k, dtype=torch.int64),
        x.new_empty(total, top_k, dtype=dtype),
        x.new_empty(experts, dtype=torch.int32),
        x.new_empty(total * top_k, dtype=torch.int32),
        x.new_empty(kinds, experts, dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty((), dtype=dtype),
        x.new_empty(total, experts, dtype=dtype),
        x.new_empty(total, dtype=dtype),
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
    with torch.autocast(x.device.type, enabled=False):
        grad = form.logits_gradient(
            Choice(index, probability, lse), tokens, counts, renormalize, grad_weight, grad_aux, grad_z
        )
        grad_x, grad_router, grad_bias = form.input_gradients(grad, x, router_weight, tokens, needs)
    return grad_x.to(x.dtype), grad_router.to(router_weight.dtype), grad_bias.to(bias_dtype)


def _backward_fake(x: Tensor, router_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts, bias_dtype, needs = rest[5], rest[-2], rest[-1]

    def like(t: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor:
        return t.new_empty(t.shape if wanted else 0, dtype=dtype)

    return (
        like(x, x.dtype, needs[0]),
        like(router_weight, router_weight.dtype, needs[1]),
        like(counts, bias_dtype, needs[2]),
    )


def _permutation(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    if check.reads_values(index):
        bad = (index < 0) | (index >= experts)
        if bad.any():
            row, place = bad.nonzero()[0].tolist()
            check.fail(f"{NAME}.from_topk", f"index in [0, {experts})", f"{int(index[row, place])} in row {row}")
    # held in range, since on a GPU the values are not checked
    return _permute(index.clamp(0, experts - 1), experts, backend)


def _permutation_fake(index: Tensor, experts: int, backend: str) -> tuple[Tensor, Tensor]:
    return index.new_empty(experts, dtype=torch.int32), index.new_empty(index.numel(), dtype=torch.int32)


for _name, _implementation, _fake in (
    ("moe_route_fwd", _forward, _forward_fake),
    ("moe_route_bwd", _backward, _backward_fake),
    ("moe_permutation_fwd", _permutation, _permutation_fake),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prism_kernels::{_name}", _fake, lib=LIBRARY)
for _name in ("moe_route_fwd.rows", "moe_permutation_fwd.out"):
    # every output is an argument
    torch.library.register_fake(f"prism_kernels::{_name}", lambda *args: None, lib=LIBRARY)


class MoeRouteFunction(torch.autograd.Function):
    """The gradients of the experts' weights and of the two losses with respect to x, router_weight and kind_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router_weight: Tensor,
        kind_bias: Tensor | None,
        constants: tuple[Tensor | None, Tensor | None],
        chosen: tuple[int, int, bool, str],
    ) -> tuple[Tensor, ...]:
        """Returns the fields of `Routing`."""
        *fields, probability, lse = torch.ops.prism_kernels.moe_route_fwd(
            x, router_weight, kind_bias, *constants, *chosen
        )
        index, _, offsets, permutation, counts, *_ = fields
        ctx.save_for_backward(x, router_weight, *constants, index, probability, lse, counts)
        ctx.renormalize = chosen[2]
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
        results = torch.ops.prism_kernels.moe_route_bwd(
            *ctx.saved_tensors, ctx.renormalize, grad_weight, grad_aux, grad_z, ctx.bias_dtype, needs
        )
        return *(grad if wanted else None for grad, wanted in zip(results, needs)), None, None
