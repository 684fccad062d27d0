"""The specification of `moe_experts`: a loop over the experts, in autograd, in the dtype of its input."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def moe_experts_reference(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns the sum over each token's experts of weight (T, K) times the expert that index (T, K) names."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(index == e)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, dim=-1)
        result = (silu(gate) * up) @ down[e].t()
        out = out.index_add(0, token, result * weight[token, slot, None].to(x.dtype))
    return out
