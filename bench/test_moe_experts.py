"""`moe_experts`, forward and backward, against transformers' experts, at the discriminator's proportions."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.versus import Bar, Duel, Rival, Run, Values, duel_test
from prism_kernels import Routing, moe_experts, use_backend
from prism_kernels.ops.moe_experts.reference import moe_experts_reference

# T tokens, E experts, K experts of a token, D width, 2I rows before the activation: an eighth of Qwen3-VL-2B's width
T, E, K, D, INNER = 1024, 4, 2, 256, 768
NAMES = ("out", "x", "weight", "gate_up", "down")


class Data(NamedTuple):
    index: Tensor
    leaves: tuple[Tensor, ...]
    grad: Tensor


def make() -> Data:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    weight, index = torch.rand(T, E, generator=generator).topk(K)
    gate_up, down = normal(E, 2 * INNER, D, scale=D**-0.5), normal(E, D, INNER, scale=INNER**-0.5)
    return Data(index, (normal(T, D), weight.requires_grad_(), gate_up, down), torch.randn(T, D, generator=generator))


def values(out: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> Values:
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))))


def exact(data: Data) -> Values:
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in data.leaves)
    x, weight, gate_up, down = leaves
    return values(moe_experts_reference(x, data.index, weight, gate_up, down), leaves, data.grad)


def ours(data: Data) -> Run:
    def run() -> Values:
        x, weight, gate_up, down = data.leaves
        with use_backend("torch"):
            out = moe_experts(x, Routing.from_topk(data.index, weight, E), gate_up, down)
        return values(out, data.leaves, data.grad)

    return run


@cache
def experts(implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    return Qwen3MoeExperts(config)


def transformers(implementation: str):
    def load(data: Data) -> Run:
        module = experts(implementation)
        x, weight, gate_up, down = data.leaves
        module.gate_up_proj, module.down_proj = nn.Parameter(gate_up.detach()), nn.Parameter(down.detach())
        leaves = (x, weight, module.gate_up_proj, module.down_proj)
        return lambda: values(module(x, data.index, weight), leaves, data.grad)

    return load


EAGER, GROUPED = "transformers eager", "transformers grouped_mm"
DUELS = (
    Duel(
        op="moe_experts",
        label=f"T={T:,}, E={E}, K={K}, D={D}, I={INNER}, fp32, forward and backward",
        make=make,
        exact=exact,
        rivals=(
            Rival("ours, torch", ours, ours=True),
            Rival(EAGER, transformers("eager"), package="transformers"),
            Rival(GROUPED, transformers("grouped_mm"), package="transformers"),
        ),
        tolerance=1e-5,
        bars=(Bar(GROUPED, 1.0),),
        memory=True,
    ),
)
test_moe_experts = duel_test(DUELS, __name__)
