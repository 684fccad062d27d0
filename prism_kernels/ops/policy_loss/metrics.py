"""What a policy loss measures on the side: totals that merge, so that micro-batches and ranks can be added up."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = (
    "tokens",
    "sequences",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "approx_kl",
    "ref_kl",
    "ratio",
    "correction_raw",
    "correction_used",
    "correction_clipped",
    "ess_sum",
    "ess_sum_sq",
    "entropy",
    "ratio_min",
    "ratio_max",
)
# the first entries merge by addition, then one by the minimum and one by the maximum
SUMS = 14


def _total(name: str, meaning: str) -> Any:
    index = NAMES.index(name)
    return property(lambda self: self.totals[index], doc=meaning)


@dataclass(frozen=True)
class PolicyMetrics:
    """Totals over the valid tokens of a batch, on its device; `a + b` are those of both batches.

    Each name is a tensor without dimensions; `totals` holds all of them, fp64, in the order of `NAMES`.
    """

    totals: Tensor

    tokens = _total("tokens", "valid tokens")
    sequences = _total("sequences", "sequences with a valid token")
    clipped_low = _total("clipped_low", "tokens whose ratio is held at 1 - low")
    clipped_high = _total("clipped_high", "tokens whose ratio is held at 1 + high")
    clipped_dual = _total("clipped_dual", "tokens with a negative advantage whose ratio is held at the dual clip")
    approx_kl = _total("approx_kl", "sum of old_logp - logp, an estimate of KL(old, new)")
    ref_kl = _total("ref_kl", "sum of the estimates of the KL to the reference")
    ratio = _total("ratio", "sum of the ratios, before clipping")
    ratio_min = _total("ratio_min", "smallest ratio; inf without a token")
    ratio_max = _total("ratio_max", "largest ratio; -inf without a token")
    correction_raw = _total("correction_raw", "sum of the weights of the rollout correction, before its bounds")
    correction_used = _total("correction_used", "sum of the weights of the rollout correction, as used")
    correction_clipped = _total("correction_clipped", "tokens whose correction was truncated or dropped")
    ess_sum = _total("ess_sum", "sum of w = ratio * correction as used, by which the tokens count")
    ess_sum_sq = _total("ess_sum_sq", "sum of w squared; ess_sum ** 2 / ess_sum_sq is the effective sample size")
    entropy = _total("entropy", "sum of the entropies that were given")

    def __add__(self, other: "PolicyMetrics") -> "PolicyMetrics":
        a, b = self.totals, other.totals
        low, high = SUMS, SUMS + 1
        merged = (a[:low] + b[:low], torch.minimum(a[low:high], b[low:high]), torch.maximum(a[high:], b[high:]))
        return PolicyMetrics(torch.cat(merged))

    def means(self) -> dict[str, float]:
        """Returns the means per token as floats (the only transfer from the device), and the counts.

        `ess` is the effective sample size as a share of the tokens, in (0, 1]. Without a token the means are NaN.
        """
        total = dict(zip(NAMES, self.totals.tolist()))
        tokens = total["tokens"]
        kept = ("tokens", "sequences", "ratio_min", "ratio_max")
        result = {name: total[name] for name in kept}
        for name in NAMES:
            if name not in kept and not name.startswith("ess_"):
                result[name] = total[name] / tokens if tokens else float("nan")
        square = tokens * total["ess_sum_sq"]
        result["ess"] = total["ess_sum"] ** 2 / square if square else float("nan")
        return result
