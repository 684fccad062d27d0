"""What each stage is for, and whether it did it, from the held-out evaluations of a run."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from prism.report.reading import number

CHANNELS = ("perception", "reasoning")
# a share that is as good as it can be does not rise
_WHOLE = 0.99
_PAIRS = 0.8

Evaluation = Mapping[str, Any]


class Improvement(NamedTuple):
    """A statement about a stage.

    Args:
        stage: which.
        statement: what should be so.
        holds: whether it is; what was not measured does not hold.
        figures: from which that follows; None where one was not measured.
    """

    stage: str
    statement: str
    holds: bool
    figures: dict[str, float | None]


def improvements(evaluations: Mapping[str, Evaluation]) -> list[Improvement]:
    """Returns what should have become better, stage by stage, for those that the run has finished.

    Accuracies are of greedy responses, each with its standard error; a difference has that of both together. Drift is
    of responses at temperature 1 where there are such: it compares distributions, and a greedy policy has only modes.

    Args:
        evaluations: of `evaluations.json`: by what they come after, in order.
    """
    # evaluations within a stage have its step behind its name
    stages = [stage for stage in evaluations if " " not in stage]
    found: list[Improvement] = []
    for before, stage in pairwise(stages):
        judge = _STAGES.get(stage)
        if judge is not None:
            found += judge(evaluations[before], evaluations[stage])
    return found


def _sft(before: Evaluation, after: Evaluation) -> list[Improvement]:
    was, now = number(before.get("format")), number(after.get("format"))
    rises = was is not None and now is not None and (now > was or now >= _WHOLE)
    return [
        Improvement("sft", f"format rises, or is at least {_WHOLE}", rises, {"before": was, "after": now}),
        _accuracy("sft", before, after, "accuracy rises", 0),
    ]


def _warmup(before: Evaluation, after: Evaluation) -> list[Improvement]:
    found = []
    for channel in CHANNELS:
        share = number(pair_accuracy(after, "pairs", channel))
        holds = share is not None and share >= _PAIRS
        statement = f"pair accuracy on held-out pairs is at least {_PAIRS}, {channel}"
        found.append(Improvement("warmup", statement, holds, {"accuracy": share}))
    return found


def _align(before: Evaluation, after: Evaluation) -> list[Improvement]:
    found = []
    for channel in CHANNELS:
        was, now = (number(one.get("sampled", one).get(f"drift_{channel}")) for one in (before, after))
        falls = was is not None and now is not None and now < was
        found.append(Improvement("align", f"drift falls, {channel}", falls, {"before": was, "after": now}))
    return [*found, _accuracy("align", before, after, "accuracy is not lower by more than two standard errors", -2)]


def _rlvr(before: Evaluation, after: Evaluation) -> list[Improvement]:
    # the same problems before and after, and more of them than validation has
    if "test" in before and "test" in after:
        before, after = before["test"], after["test"]
    return [_accuracy("rlvr", before, after, "accuracy rises by more than two standard errors", 2)]


def _accuracy(stage: str, before: Evaluation, after: Evaluation, statement: str, errors: float) -> Improvement:
    """Returns whether the accuracy rises by more than some standard errors of the difference; below 0, at least so."""
    was, now = number(before.get("accuracy")), number(after.get("accuracy"))
    spread = [number(one.get("accuracy_se")) for one in (before, after)]
    known = [value for value in spread if value is not None]
    error = math.hypot(*known) if len(known) == 2 else None
    holds = False
    if was is not None and now is not None and error is not None:
        holds = now - was > errors * error if errors >= 0 else now - was >= errors * error
    figures = {"before": was, "after": now, "standard_error": error, "samples": number(after.get("samples"))}
    return Improvement(stage, statement, holds, figures)


def pair_accuracy(evaluation: Evaluation, view: str, channel: str) -> Any:
    """Returns a channel's pair accuracy in a view of the discriminator, None where it was not measured."""
    return evaluation.get("discriminator", {}).get(view, {}).get(channel, {}).get("accuracy")


_STAGES: dict[str, Callable[[Evaluation, Evaluation], list[Improvement]]] = {
    "sft": _sft,
    "warmup": _warmup,
    "align": _align,
    "rlvr": _rlvr,
}
