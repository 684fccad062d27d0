"""What the pair loss measures on the side: totals that merge by addition."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMES = ("pairs", "correct", "margin", "preferred", "other")


def _total(name: str, meaning: str) -> Any:
    index = NAMES.index(name)
    return property(lambda self: self.totals[index], doc=meaning)


@dataclass(frozen=True)
class PairMetrics:
    """Totals over the valid pairs of a batch, on its device; `a + b` are those of both batches.

    Each name is a tensor without dimensions; `totals` holds all of them, fp64, in the order of `NAMES`.
    """

    totals: Tensor

    pairs = _total("pairs", "valid pairs")
    correct = _total("correct", "pairs whose preferred score is the higher one")
    margin = _total("margin", "sum of preferred - other, before any clip")
    preferred = _total("preferred", "sum of the preferred scores, each counted once for each of its pairs")
    other = _total("other", "sum of the other scores")

    def __add__(self, other: "PairMetrics") -> "PairMetrics":
        return PairMetrics(self.totals + other.totals)

    def means(self) -> dict[str, float]:
        """Returns the means per pair as floats (the only transfer from the device), and the number of pairs.

        Without a valid pair the means are NaN.
        """
        pairs, *sums = self.totals.tolist()
        means = {name: total / pairs if pairs else float("nan") for name, total in zip(NAMES[1:], sums)}
        return {"pairs": pairs, **means}
