"""Exact, fused kernels for reinforcement-learning post-training."""

from prism_kernels import library
from prism_kernels.backend import backend_status, use_backend
from prism_kernels.ops.linear_logprob import linear_logprob
from prism_kernels.ops.token_logprob import token_logprob
from prism_kernels.outputs import TokenLogProbs
from prism_kernels.version import __version__

# after the schemas, which the extensions implement
library.load_native()

__all__ = ["TokenLogProbs", "__version__", "backend_status", "linear_logprob", "token_logprob", "use_backend"]
