"""Exact, fused kernels for reinforcement-learning post-training.

`import prism_kernels` does not import torch. The first use of a public name does: it registers all operators,
`torch.ops.prism_kernels.*`, and loads the native extensions, as `import prism_kernels.ops` does. Where a program uses
the operators alone, as one that loads an exported graph, it imports `prism_kernels.ops`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prism_kernels.version import __version__

if TYPE_CHECKING:
    from prism_kernels.backend import backend_status, use_backend
    from prism_kernels.metrics import PairMetrics, PolicyMetrics
    from prism_kernels.ops.group_advantage import group_advantage
    from prism_kernels.ops.linear_logprob import linear_logprob
    from prism_kernels.ops.linear_policy_loss import linear_policy_loss
    from prism_kernels.ops.moe_experts import moe_experts
    from prism_kernels.ops.moe_route import Routing, moe_route
    from prism_kernels.ops.pair_loss import pair_loss
    from prism_kernels.ops.policy_loss import policy_loss
    from prism_kernels.ops.prefix_attention import prefix_attention
    from prism_kernels.ops.prism_advantage import prism_advantage
    from prism_kernels.ops.token_logprob import token_logprob
    from prism_kernels.outputs import TokenLogProbs

__all__ = [
    "PairMetrics",
    "PolicyMetrics",
    "Routing",
    "TokenLogProbs",
    "__version__",
    "backend_status",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "moe_experts",
    "moe_route",
    "pair_loss",
    "policy_loss",
    "prefix_attention",
    "prism_advantage",
    "token_logprob",
    "use_backend",
]

# the modules of the names above; without an entry here, ops.<name>
_MODULES = {
    "PairMetrics": "metrics",
    "PolicyMetrics": "metrics",
    "Routing": "ops.moe_route",
    "TokenLogProbs": "outputs",
    "backend_status": "backend",
    "use_backend": "backend",
}


# modules that are attributes of the package without an import of their own
_SUBMODULES = ("backend", "check", "library", "ops", "outputs")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"prism_kernels.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("prism_kernels.ops")
    value = getattr(import_module(f"prism_kernels.{_MODULES.get(name, f'ops.{name}')}"), name)
    # the next use does not come here
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
