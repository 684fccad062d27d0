"""The metrics of the losses: totals on the device that merge, so that micro-batches and ranks can be added up."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POLICY_TOTALS = (
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
POLICY_SUMS = 14

PAIR_TOTALS = ("pairs", "correct", "margin", "preferred", "other")


def _total(names: tuple[str, ...], name: str, meaning: str) -> Any:
    index = names.index(name)
    return property(lambda self: self.totals[index], doc=meaning)


def _policy_total(name: str, meaning: str) -> Any:
    return _total(POLICY_TOTALS, name, meaning)


def _pair_total(name: str, meaning: str) -> Any:
    return _total(PAIR_TOTALS, name, meaning)


@dataclass(frozen=True)
class PolicyMetrics:
    """Totals of `policy_loss` over the valid tokens of a batch, on its device; `a + b` are those of both batches.

    Each name is a tensor without dimensions; `totals` holds all of them, fp64, in the order of `POLICY_TOTALS`.
    """

    totals: Tensor

    tokens = _policy_total("tokens", "valid tokens")
    sequences = _policy_total("sequences", "sequences with a valid token")
    clipped_low = _policy_total("clipped_low", "tokens whose ratio is clipped to 1 - low")
    clipped_high = _policy_total("clipped_high", "tokens whose ratio is clipped to 1 + high")
    clipped_dual = _policy_total("clipped_dual", "tokens of negative advantage whose ratio is clipped to dual_clip")
    approx_kl = _policy_total("approx_kl", "sum of old_logp - logp, an estimate of KL(old, new)")
    ref_kl = _policy_total("ref_kl", "sum of the estimates of the KL to the reference")
    ratio = _policy_total("ratio", "sum of the ratios, before clipping")
    ratio_min = _policy_total("ratio_min", "smallest ratio; inf without a token")
    ratio_max = _policy_total("ratio_max", "largest ratio; -inf without a token")
    correction_raw = _policy_total("correction_raw", "sum of the rollout correction's weights, before its bounds")
    correction_used = _policy_total("correction_used", "sum of the rollout correction's weights, as used")
    correction_clipped = _policy_total("correction_clipped", "tokens whose correction was truncated or dropped")
    ess_sum = _policy_total("ess_sum", "sum of w = ratio * correction as used, the weight of each token")
    ess_sum_sq = _policy_total("ess_sum_sq", "sum of w squared; ess_sum ** 2 / ess_sum_sq: effective sample size")
    entropy = _policy_total("entropy", "sum of the entropies that were given")

    def __add__(self, other: "PolicyMetrics") -> "PolicyMetrics":
        a, b = self.totals, other.totals
        low, high = POLICY_SUMS, POLICY_SUMS + 1
        merged = (a[:low] + b[:low], torch.minimum(a[low:high], b[low:high]), torch.maximum(a[high:], b[high:]))
        return PolicyMetrics(torch.cat(merged))

    def means(self) -> dict[str, float]:
        """Returns the means per token as floats (the only transfer from the device), and the counts.

        `ess` is the effective sample size as a share of the tokens, in (0, 1]. Without a token the means are NaN.
        """
        total = dict(zip(POLICY_TOTALS, self.totals.tolist()))
        tokens = total["tokens"]
        unscaled = ("tokens", "sequences", "ratio_min", "ratio_max")
        result = {name: total[name] for name in unscaled}
        for name in POLICY_TOTALS:
            if name not in unscaled and not name.startswith("ess_"):
                result[name] = total[name] / tokens if tokens else float("nan")
        square = tokens * total["ess_sum_sq"]
        result["ess"] = total["ess_sum"] ** 2 / square if square else float("nan")
        return result


@dataclass(frozen=True)
class PairMetrics:
    """Totals of `pair_loss` over the valid pairs of a batch, on its device; `a + b` are those of both batches.

    Each name is a tensor without dimensions; `totals` holds all of them, fp64, in the order of `PAIR_TOTALS`.
    """

    totals: Tensor

    pairs = _pair_total("pairs", "valid pairs")
    correct = _pair_total("correct", "pairs whose preferred score is the higher one")
    margin = _pair_total("margin", "sum of preferred - other, before any clip")
    preferred = _pair_total("preferred", "sum of the preferred scores, each counted once for each of its pairs")
    other = _pair_total("other", "sum of the other scores")

    def __add__(self, other: "PairMetrics") -> "PairMetrics":
        return PairMetrics(self.totals + other.totals)

    def means(self) -> dict[str, float]:
        """Returns the means per pair as floats (the only transfer from the device), and the number of pairs.

        Without a valid pair the means are NaN.
        """
        pairs, *sums = self.totals.tolist()
        means = {name: total / pairs if pairs else float("nan") for name, total in zip(PAIR_TOTALS[1:], sums)}
        return {"pairs": pairs, **means}
