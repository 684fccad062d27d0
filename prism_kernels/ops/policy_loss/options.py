"""The options of the policy losses: known names, checks, and their form as an operator's arguments."""

from typing import NamedTuple

from torch import Tensor

from prism_kernels import check

RATIOS = ("token", "sequence")
OBJECTIVES = ("clip", "cispo", "reinforce")
AGGREGATES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
CORRECTIONS = ("token_tis", "sequence_tis", "geometric_tis", "token_mask", "sequence_mask", "geometric_mask")

# exp of it has a square well within fp32's range: no product of ratios and weights is inf, so none with 0 is NaN
LARGEST_BOUND = 40.0

# how the operators count the choices; csrc/cpu/policy_loss_isa.h has the same numbers
_NONE = -1


class Options(NamedTuple):
    """Everything that is no tensor. `dual_clip` is inf, `denominator` and `horizon` 0, where there is none."""

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
        """Returns the names as their places in the tuples above (-1: no correction), and the numbers."""
        choices = [
            RATIOS.index(self.ratio),
            OBJECTIVES.index(self.objective),
            AGGREGATES.index(self.aggregate),
            ESTIMATORS.index(self.kl_estimator),
            _NONE if self.correction is None else CORRECTIONS.index(self.correction),
            int(self.per_token),
        ]
        return choices, [float(x) for x in self[6:]]

    @staticmethod
    def decoded(choices: list[int], numbers: list[float]) -> "Options":
        """Returns what `encoded` was made from."""
        ratio, objective, aggregate, estimator, correction, per_token = choices
        return Options(
            RATIOS[ratio],
            OBJECTIVES[objective],
            AGGREGATES[aggregate],
            ESTIMATORS[estimator],
            None if correction == _NONE else CORRECTIONS[correction],
            bool(per_token),
            *numbers,
        )

    @property
    def correction_unit(self) -> str:
        """Over what a correction's log-ratios are gathered: token, sequence (sum) or geometric (mean)."""
        return "token" if self.correction is None else self.correction.split("_")[0]


def options(
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
    """Returns the checked options."""
    check.one_of(op, "ratio", ratio, RATIOS)
    check.one_of(op, "objective", objective, OBJECTIVES)
    check.one_of(op, "aggregate", aggregate, AGGREGATES)
    check.one_of(op, "kl_estimator", kl_estimator, ESTIMATORS)
    if correction is not None:
        check.one_of(op, "correction", correction, CORRECTIONS)
    low, high = _pair(op, "clip", clip)
    if not (low >= 0 and high >= 0):
        check.fail(op, "clip to be two numbers >= 0, (low, high)", clip)
    lower, upper = _pair(op, "correction_bounds", correction_bounds)
    if not 0 <= lower < upper:
        check.fail(op, "correction_bounds (lower, upper) with 0 <= lower < upper", correction_bounds)
    if dual_clip is not None:
        if objective != "clip":
            check.fail(op, f"dual_clip None with objective {objective!r}", dual_clip)
        if not dual_clip > 1:
            check.fail(op, "dual_clip > 1", dual_clip)
    if not 0 < log_ratio_bound <= LARGEST_BOUND:
        check.fail(op, f"log_ratio_bound in (0, {LARGEST_BOUND:g}]", log_ratio_bound)
    check.positive(op, "horizon", horizon)
    if aggregate == "seq_mean_token_sum_norm" and horizon is None:
        check.fail(op, f"horizon > 0 with aggregate {aggregate!r}", None)
    if not isinstance(denominator, Tensor):
        check.positive(op, "denominator", denominator)
    return Options(
        ratio,
        objective,
        aggregate,
        kl_estimator,
        correction,
        per_token,
        low,
        high,
        float("inf") if dual_clip is None else dual_clip,
        log_ratio_bound,
        0.0 if denominator is None or isinstance(denominator, Tensor) else float(denominator),
        0.0 if horizon is None else float(horizon),
        kl_coef,
        lower,
        upper,
        entropy_coef,
    )


def _pair(op: str, name: str, value: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        check.fail(op, f"{name} to be a pair of numbers", value, TypeError)
    return value[0], value[1]
