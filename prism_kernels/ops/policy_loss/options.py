"""The options that the policy losses share, their form as arguments of an operator, and the checks of all arguments.

T tokens, S sequences.
"""

import math
from collections.abc import Mapping
from operator import lt
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.ops.rows import FLOATS

RATIOS = ("token", "sequence")
OBJECTIVES = ("clip", "cispo", "reinforce")
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
CORRECTIONS = ("token_tis", "sequence_tis", "geometric_tis", "token_mask", "sequence_mask", "geometric_mask")

# exp(40) squared is well below fp32's largest number: no product of ratios and weights is inf, so none with 0 is NaN
LARGEST_BOUND = 40.0

_NO_CORRECTION = -1


class Options(NamedTuple):
    """All options. Without a dual clip `dual_clip` is inf; without a denominator or a horizon they are 0."""

    ratio: str
    objective: str
    aggregate: str
    kl_estimator: str
    correction: str | None
    # whether the advantage is one number for each token
    per_token: bool
    clip_low: float
    clip_high: float
    dual_clip: float
    log_ratio_bound: float
    denominator: float
    horizon: float
    kl_coef: float
    lower: float
    upper: float
    entropy_coef: float

    def encoded(self) -> tuple[list[int], list[float]]:
        """Returns the names as indices into the tuples above (-1: no correction), and the numbers.

        csrc/include/prism/policy_loss.h counts the names in the same order.
        """
        choices = [
            RATIOS.index(self.ratio),
            OBJECTIVES.index(self.objective),
            AGGREGATES.index(self.aggregate),
            ESTIMATORS.index(self.kl_estimator),
            _NO_CORRECTION if self.correction is None else CORRECTIONS.index(self.correction),
            int(self.per_token),
        ]
        return choices, [float(x) for x in self[6:]]

    @staticmethod
    def decoded(choices: list[int], numbers: list[float]) -> "Options":
        """Returns the options that `encoded` returned as indices and numbers."""
        ratio, objective, aggregate, estimator, correction, per_token = choices
        return Options(
            RATIOS[ratio],
            OBJECTIVES[objective],
            AGGREGATES[aggregate],
            ESTIMATORS[estimator],
            None if correction == _NO_CORRECTION else CORRECTIONS[correction],
            bool(per_token),
            *numbers,
        )

    @property
    def correction_unit(self) -> str:
        """The tokens whose log-ratios a correction combines: `token`, `sequence` (their sum) or `geometric` (mean)."""
        return "token" if self.correction is None else self.correction.split("_")[0]


def checked_options(
    op: str,
    *,
    ratio: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    objective: str,
    log_ratio_bound: float,
    aggregate: str,
    denominator: float | Tensor | None,
    horizon: float | None,
    kl_coef: float,
    kl_estimator: str,
    correction: str | None,
    correction_bounds: tuple[float, float],
    entropy_coef: float,
    per_token: bool,
) -> Options:
    """Returns the options, after checking them."""
    check.one_of(op, "ratio", ratio, RATIOS)
    check.one_of(op, "objective", objective, OBJECTIVES)
    check.one_of(op, "aggregate", aggregate, AGGREGATES)
    check.one_of(op, "kl_estimator", kl_estimator, ESTIMATORS)
    if correction is not None:
        check.one_of(op, "correction", correction, CORRECTIONS)
    low, high = _pair(op, "clip", clip, "clip to be two numbers >= 0, (low, high)")
    expected = "correction_bounds (lower, upper) with 0 <= lower < upper"
    lower, upper = _pair(op, "correction_bounds", correction_bounds, expected)
    if not lower < upper:
        check.fail(op, expected, correction_bounds)
    dual = torch.inf
    if dual_clip is not None:
        if objective != "clip":
            check.fail(op, f"dual_clip None with objective {objective!r}", dual_clip)
        dual = _upper(check.number(op, "dual_clip", dual_clip, math.nextafter(1, 2), torch.inf, "dual_clip > 1"))
    expected = f"log_ratio_bound in (0, {LARGEST_BOUND:g}]"
    bound = check.number(op, "log_ratio_bound", log_ratio_bound, check.SMALLEST, LARGEST_BOUND, expected)
    length = check.optional(op, "horizon", horizon)
    if aggregate == "seq_mean_token_sum_norm" and horizon is None:
        check.fail(op, f"horizon > 0 with aggregate {aggregate!r}", None)
    divisor = 0.0 if isinstance(denominator, Tensor) else check.optional(op, "denominator", denominator)
    return Options(
        ratio,
        objective,
        aggregate,
        kl_estimator,
        correction,
        per_token,
        low,
        high,
        dual,
        bound,
        divisor,
        length,
        check.number(op, "kl_coef", kl_coef),
        lower,
        upper,
        check.number(op, "entropy_coef", entropy_coef),
    )


def _pair(op: str, name: str, value: tuple[float, float], expected: str) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        check.fail(op, f"{name} to be a pair of numbers", value, TypeError)
    low, high = (check.number(op, name, x, 0, torch.inf, expected) for x in value)
    return _upper(low), _upper(high)


def _upper(bound: float) -> float:
    """Returns a bound of ratios, inf for one that no ratio reaches and fp32 may not hold."""
    return torch.inf if bound > math.exp(LARGEST_BOUND) else bound


def check_tensors(
    op: str,
    like_name: str,
    like: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    columns: Mapping[str, Tensor | None],
) -> bool:
    """Checks shapes, dtypes and devices against `like`, (T, ...); returns whether the advantage is one per token.

    `columns` are the float tensors (T,) by name; None where not given.
    """
    tokens = like.shape[0]
    check.tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        check.fail(op, "cu_seqlens of shape (S + 1,)", tuple(cu_seqlens.shape))
    check.dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    check.device(op, "cu_seqlens", cu_seqlens, like, like_name)
    for name, column in columns.items():
        if column is not None:
            check.tensor(op, name, column)
            check.shape(op, name, column, (tokens,))
            check.dtype(op, name, column, FLOATS)
            check.device(op, name, column, like, like_name)
    if mask is not None:
        check.tensor(op, "mask", mask)
        check.shape(op, "mask", mask, (tokens,))
        check.dtype(op, "mask", mask, (torch.bool,))
        check.device(op, "mask", mask, like, like_name)
    if isinstance(denominator, Tensor):
        check.denominator(op, denominator)
        check.device(op, "denominator", denominator, like, like_name)
    check.tensor(op, "advantage", advantage)
    check.dtype(op, "advantage", advantage, FLOATS)
    check.device(op, "advantage", advantage, like, like_name)
    sequences = cu_seqlens.shape[0] - 1
    if advantage.dim() != 1 or advantage.shape[0] not in (sequences, tokens):
        check.fail(
            op,
            f"advantage of shape ({sequences},), one for each sequence, or ({tokens},), one for each token",
            tuple(advantage.shape),
        )
    return advantage.shape[0] == tokens


def check_required(op: str, name: str, value: Tensor | None, option: str, setting: float | str | None) -> None:
    """Checks that a tensor is given where an option needs it."""
    if setting and value is None:
        check.fail(op, f"{name} with {option} {setting!r}", None)


def check_values(op: str, cu_seqlens: Tensor, tokens: int, denominator: Tensor | None) -> None:
    """Checks that the sequences cover the tokens and that the denominator is positive, where values may be read."""
    if not check.reads_values(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        check.fail(op, f"cu_seqlens from 0 to {tokens}, the number of tokens", f"{bounds[0]} to {bounds[-1]}")
    if any(map(lt, bounds[1:], bounds)):
        index = next(i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1])
        check.fail(op, "cu_seqlens that do not decrease", f"{bounds[index]} after {bounds[index - 1]} at {index}")
    if denominator is not None:
        check.positive(op, "denominator", float(denominator))
