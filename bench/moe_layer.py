"""A Mixture-of-Experts layer on a GPU: `moe_route` and `moe_experts`, forward and backward, in the
discriminator's shapes.

T tokens, E experts, K experts of a token, D width, 2I rows before the activation, N = T * K assignments.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.versus import Bar, Duel, Goal, Reference, Rival, Run, Values
from prism_kernels import moe_experts, moe_route
from prism_kernels.ops.moe_experts.reference import moe_experts_reference
from prism_kernels.ops.moe_route.reference import moe_route_reference

NAMES = ("out", "x", "router", "gate_up", "down")


class Shape(NamedTuple):
    """The sizes of a layer."""

    tokens: int
    width: int
    inner: int
    dtype: torch.dtype
    experts: int = 4
    top_k: int = 2

    def label(self) -> str:
        dtype = "fp32" if self.dtype == torch.float32 else "bf16"
        sizes = f"T={self.tokens:,}, E={self.experts}, K={self.top_k}, D={self.width}, I={self.inner}"
        floor = f", floor {sum(FLOORS_US[self.tokens]) / 1e3:.1f} ms (predicted)" if self.tokens in FLOORS_US else ""
        return f"{sizes}, {dtype}, forward and backward{floor}"


class Data(NamedTuple):
    shape: Shape
    # x (T, D), router (E, D), gate_up (E, 2I, D), down (E, D, I)
    leaves: tuple[Tensor, ...]
    grad: Tensor


def make(shape: Shape, device: str = "cpu") -> Data:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device) * scale

    T, D, inner, dtype, E, K = shape
    router = normal(E, D, scale=0.5 * D**-0.5)
    x = normal(T, D)
    # 16-bit numbers would break ties differently, so each expert's logit is 3 below the previous one
    chosen = torch.rand(T, E, generator=generator, device=device).topk(K).indices
    for place in range(K):
        rows = router[chosen[:, place]]
        x += 3 * (K - place) * rows / rows.square().sum(1, keepdim=True)
    gate_up, down = normal(E, 2 * inner, D, scale=D**-0.5), normal(E, D, inner, scale=inner**-0.5)
    leaves = tuple(t.to(dtype).requires_grad_() for t in (x, router, gate_up, down))
    return Data(shape, leaves, normal(T, D).to(dtype))


def values(out: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> Values:
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))))


def exact(data: Data) -> Values:
    leaves = tuple(leaf.detach().double().requires_grad_() for leaf in data.leaves)
    x, router, gate_up, down = leaves
    probability = (x @ router.t()).softmax(-1)
    weight, index = probability.topk(data.shape.top_k)
    weight = weight / weight.sum(1, keepdim=True)
    return values(moe_experts_reference(x, index, weight, gate_up, down), leaves, data.grad.double())


def ours(backend: str):
    """Our layer; `backend` is that of the code around the products, and the router chooses its own."""

    def load(data: Data) -> Run:
        def run() -> Values:
            x, router, gate_up, down = data.leaves
            routing = moe_route(x, router, data.shape.top_k)
            return values(moe_experts(x, routing, gate_up, down, backend=backend), data.leaves, data.grad)

        return run

    return load


def block(implementation: str, shape: Shape) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeSparseMoeBlock(config)


def transformers(implementation: str):
    def load(data: Data) -> Run:
        module = block(implementation, data.shape)
        x, *parameters = data.leaves
        router, gate_up, down = (nn.Parameter(p.detach()) for p in parameters)
        module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj = router, gate_up, down
        return lambda: values(module(x[None])[0], (x, router, gate_up, down), data.grad)

    return load


EAGER, GROUPED = "transformers eager", "transformers grouped_mm"


def products(shape: Shape, device: str):
    """The six matrix products of a layer's forward and backward, with one expert."""

    def load(_: Data) -> Run:
        N, D, inner = shape.tokens * shape.top_k, shape.width, shape.inner
        a, b, c = (torch.randn(N, n, device=device).to(shape.dtype) for n in (D, 2 * inner, inner))
        first, second = (torch.randn(*n, device=device).to(shape.dtype) for n in ((2 * inner, D), (D, inner)))
        into = {n: torch.empty_like(t) for n, t in zip("abcfs", (a, b, c, first, second))}

        def run() -> None:
            torch.mm(a, first.t(), out=into["b"])
            torch.mm(c, second.t(), out=into["a"])
            torch.mm(a, second, out=into["c"])
            torch.mm(a.t(), c, out=into["s"])
            torch.mm(b, first, out=into["a"])
            torch.mm(b.t(), a, out=into["f"])

        return run

    return load


def cuda_duel(op: str, shape: Shape, goal_ms: float | None = None, device: str = "cuda") -> Duel:
    """The layer on a GPU, beside its matrix products."""
    goals = (Goal("host syncs", "syncs", "<=", 0),)
    if goal_ms is not None:
        goals += (Goal("milliseconds", "median_s", "<=", goal_ms, unit=1e3),)
    first = "Triton" if device == "cuda" else "torch"
    return Duel(
        op=op,
        label=shape.label(),
        make=lambda: make(shape, device),
        exact=exact,
        rivals=(
            Rival(f"ours, {first}", ours(first.lower()), ours=True),
            Rival("ours, torch", ours("torch"), ours=True),
            Rival(EAGER, transformers("eager"), package="transformers"),
            Rival(GROUPED, transformers("grouped_mm"), package="transformers"),
        ),
        tolerance=3e-2,
        bars=(Bar(EAGER, 1.0), Bar(GROUPED, 1.0)),
        memory=True,
        limit_s=1.0,
        device=device,
        reference=Reference("its six torch.mm", products(shape, device)),
        goals=goals,
    )


def route_values(weight: Tensor, aux: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> Values:
    gradients = torch.autograd.grad((weight, aux), leaves, (grad.to(weight.dtype), torch.ones_like(aux)))
    return dict(zip(("weight", "aux", "x", "router"), (weight.detach(), aux.detach(), *gradients)))


def cuda_route_duel(shape: Shape, device: str = "cuda") -> Duel:
    """The router alone on a GPU: softmax, top-K, losses, and the permutation of the assignments."""

    def upstream(data: Data) -> Tensor:
        return data.grad[:, : shape.top_k]

    def exactly(data: Data) -> Values:
        # the specification runs on the CPU
        leaves = tuple(leaf.detach().cpu().double().requires_grad_() for leaf in data.leaves[:2])
        routing = moe_route_reference(*leaves, shape.top_k, kinds=1)
        found = route_values(routing.weight, routing.aux_loss, leaves, upstream(data).cpu())
        return {name: value.to(device) for name, value in found.items()}

    def route(backend: str):
        def load(data: Data) -> Run:
            leaves = data.leaves[:2]

            def run() -> Values:
                routing = moe_route(*leaves, shape.top_k, backend=backend)
                return route_values(routing.weight, routing.aux_loss, leaves, upstream(data))

            return run

        return load

    def plain(data: Data) -> Run:
        leaves = x, router = data.leaves[:2]

        def run() -> Values:
            probability = (x.float() @ router.float().t()).softmax(-1)
            weight, index = probability.topk(shape.top_k)
            chosen = torch.zeros_like(probability).scatter(1, index, 1.0)
            aux = shape.experts * (chosen.mean(0) * probability.mean(0)).sum()
            # the assignments sorted by expert, for a grouped product
            torch.argsort(index.flatten(), stable=True)
            return route_values(weight / weight.sum(1, keepdim=True), aux, leaves, upstream(data))

        return run

    return Duel(
        op="moe_route",
        label=f"T={shape.tokens:,}, E={shape.experts}, K={shape.top_k}, D={shape.width}, forward and backward",
        make=lambda: make(shape, device),
        exact=exactly,
        rivals=(
            Rival("ours, CUDA", route("cuda" if device == "cuda" else "torch"), ours=True),
            Rival("ours, torch", route("torch"), ours=True),
            Rival("PyTorch", plain),
        ),
        tolerance=3e-2,
        limit_s=1.0,
        device=device,
        goals=(Goal("host syncs", "syncs", "<=", 0),),
    )


# microseconds of the matrix products and of the memory-bound parts, forward, then backward: predictions for an H200
FLOORS_US = {8192: (1566, 195, 3132, 343), 16384: (3132, 390, 6263, 687), 32768: (6263, 781, 12526, 1373)}
TRUE = Shape(16384, 2048, 6144, torch.bfloat16)
CUDA_DUELS = (
    cuda_duel("moe_layer_16k", TRUE, goal_ms=13.2),
    cuda_duel("moe_layer_8k", TRUE._replace(tokens=8192)),
    cuda_duel("moe_layer_32k", TRUE._replace(tokens=32768)),
    cuda_route_duel(TRUE),
)
