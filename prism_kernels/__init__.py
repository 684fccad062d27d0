"""Exact, fused kernels for reinforcement-learning post-training."""

from prism_kernels import library
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
from prism_kernels.version import __version__

# after the schemas, which the extensions implement
library.load_native()

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
