"""A Mixture-of-Experts block for transformers' models that knows the tokens' kinds and keeps its routing.

B sequences of L tokens, T = B * L, D width, E experts. The block replaces a model's own, with the same parameters under
the same names (`gate.weight`, `experts.gate_up_proj`, `experts.down_proj`), and with `kind_bias` if there are kinds. A
model's forward passes no kinds and returns no routing, so contexts around the call do::

    use_moe_blocks(model, kinds=5)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    with token_kinds(pack.kind, pack.token_weight), collect_routing(model) as routings:
        output = model(...)
    loss = ... + sum(r.aux_loss for r in routings) / len(routings)
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism_kernels.check import fail
from prism_kernels.integrations.transformers.experts import check_experts
from prism_kernels.ops.moe_experts import moe_experts
from prism_kernels.ops.moe_route import Routing, moe_route

NAME = "MoeBlock"


class _Tokens(NamedTuple):
    kind: Tensor | None
    weight: Tensor | None


class _Collection(NamedTuple):
    blocks: tuple[nn.Module, ...]
    routings: list[Routing]


_NO_TOKENS = _Tokens(None, None)
_tokens: ContextVar[_Tokens] = ContextVar("prism_kernels_tokens", default=_NO_TOKENS)
_collections: ContextVar[tuple[_Collection, ...]] = ContextVar("prism_kernels_routings", default=())


@contextmanager
def _value(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def token_kinds(kind: Tensor | None, weight: Tensor | None = None) -> Iterator[None]:
    """Gives the blocks inside the kind of each token of the batch, and its weight in the losses.

    Both have one element for each token, in order. The innermost context counts.
    """
    with _value(_tokens, _Tokens(kind, weight)):
        yield


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Yields a list that receives the `Routing` of each of the model's blocks, in the order in which they run."""
    collection = _Collection(tuple(m for m in model.modules() if isinstance(m, MoeBlock)), [])
    if not collection.blocks:
        fail("collect_routing", "a model with MoeBlock (see use_moe_blocks)", type(model).__name__)
    with _value(_collections, (*_collections.get(), collection)):
        yield collection.routings


@contextmanager
def _recomputing(tokens: _Tokens) -> Iterator[None]:
    # the first computation has collected the routing already
    with _value(_tokens, tokens), _value(_collections, ()):
        yield


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns the contexts of torch.utils.checkpoint for models with `MoeBlock`: pass this as its `context_fn`.

    The backward pass computes a layer again after `token_kinds` has ended, on a GPU in another thread. The second
    context gives it the kinds and weights of the forward pass.
    """
    return nullcontext(), _recomputing(_tokens.get())


class MoeBlock(nn.Module):
    """The block of a layer: routes each token by its hidden state and kind, and sums its experts."""

    kind_bias: nn.Parameter | None

    def __init__(self, block: nn.Module, kinds: int | None = None):
        """Takes over the router and the experts of a transformers' block; the bias of `kinds` kinds starts at 0."""
        super().__init__()
        gate, experts = getattr(block, "gate", None), getattr(block, "experts", None)
        if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module):
            fail(NAME, "a block with the modules gate and experts", type(block).__name__, TypeError)
        assert isinstance(gate, nn.Module) and isinstance(experts, nn.Module)
        check_experts(experts)
        weight, top_k = getattr(gate, "weight", None), getattr(gate, "top_k", None)
        if (
            not isinstance(weight, nn.Parameter)
            or not isinstance(top_k, int)
            or getattr(gate, "bias", None) is not None
        ):
            fail(NAME, "a gate with a weight, top_k and no bias", type(gate).__name__, TypeError)
        assert isinstance(weight, nn.Parameter) and isinstance(top_k, int)
        self.experts = experts
        self.gate = gate
        self.top_k = top_k
        self.renormalize = bool(getattr(gate, "norm_topk_prob", True))
        bias = None if kinds is None else nn.Parameter(weight.new_zeros(kinds, weight.shape[0], dtype=torch.float32))
        self.register_parameter("kind_bias", bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the block's output, of the shape of hidden_states (B, L, D)."""
        tokens = _tokens.get()
        if self.kind_bias is not None and tokens.kind is None:
            fail(NAME, "the tokens' kinds (call the model inside token_kinds(kind, weight))", None, RuntimeError)
        kind, weight = (None if t is None else t.reshape(-1) for t in tokens)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = moe_route(
            x,
            self.gate.get_parameter("weight"),
            self.top_k,
            kind=kind,
            kind_bias=self.kind_bias,
            token_weight=weight,
            renormalize=self.renormalize,
        )
        for blocks, routings in _collections.get():
            if any(block is self for block in blocks):
                routings.append(routing)
        gate_up, down = (self.experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        out = moe_experts(x, routing, gate_up, down)
        return out.reshape(hidden_states.shape)


def use_moe_blocks(model: nn.Module, kinds: int | None = None) -> list[MoeBlock]:
    """Replaces each Qwen3 MoE block of a model by a `MoeBlock`; returns the new blocks in the order of the layers.

    Parameters keep their names; with `kinds` each block also gets a `kind_bias` (kinds, E) of zeros. The model's own
    `output_router_logits` has no logits then: `collect_routing` replaces it.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    blocks = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Qwen3MoeSparseMoeBlock | Qwen3VLMoeTextSparseMoeBlock):
                block = MoeBlock(child, kinds).train(child.training)
                setattr(parent, name, block)
                blocks.append(block)
    if not blocks:
        fail("use_moe_blocks", "a model with Qwen3 MoE blocks", type(model).__name__)
    return blocks
