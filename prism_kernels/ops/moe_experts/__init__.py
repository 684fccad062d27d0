"""The experts of a Mixture-of-Experts layer: gated MLPs over the tokens that a router sent to each."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.moe_experts.op import NAME, MoeExpertsFunction
from prism_kernels.ops.moe_route import Routing
from prism_kernels.ops.rows import FLOATS, accumulator

INTEGERS = (torch.int32, torch.int64)


def moe_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, *, backend: str | None = None) -> Tensor:
    """Returns the sum over each token's experts of weight * expert(x), (T, D).

    It replaces, with fp32 sums::

        for t in range(T):
            for e, weight in zip(routing.index[t], routing.weight[t]):
                gate, up = (x[t] @ gate_up[e].t()).chunk(2)
                out[t] += weight * ((silu(gate) * up) @ down[e].t())

    Differentiable in x, routing.weight, gate_up and down. Deterministic. For the backward pass it saves x and the rows
    before the activation (T * K, 2I); the activation is recomputed, and the gradient of routing.weight is formed from
    it, so that no expert's output is saved. Under autocast the products run in autocast's dtype.

    Args:
        x: (T, D).
        routing: from `moe_route`, or `Routing.from_topk`. Its offsets and permutation must belong to its index: on the
            CPU, and with PRISM_KERNELS_CHECK=1, an error says where they do not; on a GPU such a token is NaN, and bad
            offsets make all tokens NaN.
        gate_up: (E, 2I, D), each expert's gate rows, then its up rows: the layout of transformers 5.
        down: (E, D, I).
        backend: `triton` or `torch`; see `use_backend`. Both multiply with torch.
    """
    check.tensor(NAME, "x", x)
    check.shape(NAME, "x", x, ("T", "D"))
    check.dtype(NAME, "x", x, FLOATS)
    check.memory(NAME, "x", x)
    if not isinstance(routing, Routing):
        check.fail(NAME, "routing to be a Routing", type(routing).__name__, TypeError)
    T, D = x.shape
    index, weight, offsets, permutation = routing[:4]
    for name, value, dtypes in (
        ("routing.index", index, INTEGERS),
        ("routing.weight", weight, FLOATS),
        ("routing.offsets", offsets, INTEGERS),
        ("routing.permutation", permutation, INTEGERS),
    ):
        check.tensor(NAME, name, value)
        check.dtype(NAME, name, value, dtypes)
        check.device(NAME, name, value, x, "x")
    check.shape(NAME, "routing.index", index, (T, "K"))
    if index.shape[1] == 0:
        check.fail(NAME, "routing.index of shape (T, K) with K > 0", tuple(index.shape))
    check.shape(NAME, "routing.weight", weight, tuple(index.shape))
    check.shape(NAME, "routing.permutation", permutation, (index.numel(),))
    check.shape(NAME, "routing.offsets", offsets, ("E",))
    experts = offsets.shape[0]
    if experts == 0:
        check.fail(NAME, "routing.offsets of shape (E,) with E > 0", tuple(offsets.shape))
    for name, value in (("gate_up", gate_up), ("down", down)):
        check.tensor(NAME, name, value)
        check.dtype(NAME, name, value, FLOATS)
        check.device(NAME, name, value, x, "x")
    check.shape(NAME, "gate_up", gate_up, (experts, "2I", D))
    if gate_up.shape[1] % 2:
        check.fail(NAME, f"gate_up of shape ({experts}, 2I, {D}), an even number of rows", tuple(gate_up.shape))
    check.shape(NAME, "down", down, (experts, D, gate_up.shape[1] // 2))
    weight = weight.to(accumulator(x.dtype))
    dtype = x.dtype
    device = x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        x, gate_up, down = x.to(lower), gate_up.to(lower), down.to(lower)
    for name, value in (("gate_up", gate_up), ("down", down)):
        if value.dtype != x.dtype:
            check.fail(NAME, f"{name} of x's dtype {x.dtype} (or autocast)", value.dtype, TypeError)
    order = (index, offsets, permutation)
    out = MoeExpertsFunction.apply(x, weight, gate_up, down, order, resolve(NAME, x.device, backend))
    return out.to(dtype)
