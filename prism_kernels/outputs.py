"""The result of the log-probability ops."""

from typing import NamedTuple

from torch import Tensor


class TokenLogProbs(NamedTuple):
    """Per-token results, shaped like the targets, in fp32 (fp64 for fp64 input); 0 in ignored rows.

    `logp` and `entropy` (None unless asked for) are differentiable; `lse` (log-sum-exp of the logits over the
    temperature) and `sum_pi_squared` (sum of the squared probabilities) are not.
    """

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    sum_pi_squared: Tensor
