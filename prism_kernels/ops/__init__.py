"""The operators, one folder each. Importing any of them registers all of them and loads the native extensions."""

from prism_kernels import library
from prism_kernels.ops import (
    anchored_rows,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    moe_experts,
    moe_route,
    pair_loss,
    policy_loss,
    prefix_attention,
    prism_advantage,
    token_logprob,
)

# after the schemas, which the extensions implement
library.load_native()

__all__ = [
    "anchored_rows",
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
]
