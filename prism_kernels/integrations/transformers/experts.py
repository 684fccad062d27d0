"""`moe_experts` under transformers' models: `experts_implementation="prism"`.

Importing this module registers it::

    import prism_kernels.integrations.transformers.experts
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="prism", trust_remote_code=False)
"""

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from prism_kernels.check import fail
from prism_kernels.ops.moe_experts import moe_experts
from prism_kernels.ops.moe_route import Routing

NAME = 'experts_implementation="prism"'


def check_experts(experts: nn.Module) -> None:
    """Raises unless `moe_experts` can compute the experts of a module of transformers."""
    who = type(experts).__name__
    activation = getattr(experts, "act_fn", None)
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    gating = getattr(type(experts), "_apply_gate", _default_apply_gate)
    checks = {
        "gated experts, with gate_up_proj": getattr(experts, "has_gate", True),
        "experts without bias": not getattr(experts, "has_bias", False),
        "weights (E, 2I, D) and (E, D, I), not transposed": not getattr(experts, "is_transposed", False),
        "gate and up rows one after the other, not interleaved": getattr(experts, "is_concatenated", True),
        "experts that are all on this rank": not getattr(experts, "_is_expert_parallel", False),
        "the plain gating, act_fn(gate) * up": gating is _default_apply_gate,
        "weights gate_up_proj and down_proj as tensors": isinstance(gate_up, Tensor) and isinstance(down, Tensor),
    }
    for expected, holds in checks.items():
        if not holds:
            fail(NAME, f'{expected} (take another, such as "grouped_mm")', who, NotImplementedError)
    if not isinstance(activation, SiLUActivation | nn.SiLU):
        got = f"{type(activation).__name__} in {who}"
        fail(NAME, 'the activation SiLU (take another, such as "grouped_mm")', got, NotImplementedError)


def prism_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Returns the weighted sum of the experts of a transformers layer, (T, D)."""
    check_experts(experts)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    routing = Routing.from_topk(top_k_index, top_k_weights, gate_up.shape[0])
    return moe_experts(hidden_states, routing, gate_up, down)


ALL_EXPERTS_FUNCTIONS.register("prism", prism_experts_forward)
