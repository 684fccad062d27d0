"""The goals of each stage, whether the held-out evaluations show them reached, and a run in a few lines of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from prism.report.run_folder import evaluated, number

CHANNELS = ("perception", "reasoning")
# a share this high need not rise
_HIGH_ENOUGH = 0.99
_PAIR_ACCURACY = 0.8
_COLUMNS = ("accuracy", "perception_error", "reasoning_error", "format")

Evaluation = Mapping[str, Any]


class Improvement(NamedTuple):
    """A goal of a stage, and whether it was reached.

    Args:
        stage: the stage.
        statement: the goal.
        holds: whether the figures show it reached; without a figure they do not.
        figures: the figures that decide; None where one was not measured.
    """

    stage: str
    statement: str
    holds: bool
    figures: dict[str, float | None]


def improvements(evaluations: Mapping[str, Evaluation]) -> list[Improvement]:
    """Returns the goals of the stages that the run has finished, in order.

    Accuracies are of greedy responses; the standard error of a difference combines both. Drift is measured at
    temperature 1 if possible: it compares distributions, and a greedy policy has only modes.

    Args:
        evaluations: the tables of `evaluations.json`, each under the stage that it follows, in order.
    """
    # the name of an evaluation within a stage ends with its step
    stages = [stage for stage in evaluations if " " not in stage]
    goals: list[Improvement] = []
    for before, stage in pairwise(stages):
        goals_of = _STAGES.get(stage)
        if goals_of is not None:
            goals += goals_of(evaluations[before], evaluations[stage])
    return goals


def _sft(before: Evaluation, after: Evaluation) -> list[Improvement]:
    was, now = number(before.get("format")), number(after.get("format"))
    rises = was is not None and now is not None and (now > was or now >= _HIGH_ENOUGH)
    return [
        Improvement("sft", f"format rises, or is at least {_HIGH_ENOUGH}", rises, {"before": was, "after": now}),
        _accuracy("sft", before, after, "accuracy rises", 0),
    ]


def _warmup(before: Evaluation, after: Evaluation) -> list[Improvement]:
    goals = []
    for channel in CHANNELS:
        share = number(after.get("discriminator", {}).get("pairs", {}).get(channel, {}).get("accuracy"))
        holds = share is not None and share >= _PAIR_ACCURACY
        statement = f"pair accuracy on held-out pairs is at least {_PAIR_ACCURACY}, {channel}"
        goals.append(Improvement("warmup", statement, holds, {"accuracy": share}))
    return goals


def _align(before: Evaluation, after: Evaluation) -> list[Improvement]:
    goals = []
    for channel in CHANNELS:
        was, now = (number(one.get("sampled", one).get(f"drift_{channel}")) for one in (before, after))
        falls = was is not None and now is not None and now < was
        goals.append(Improvement("align", f"drift falls, {channel}", falls, {"before": was, "after": now}))
    return [*goals, _accuracy("align", before, after, "accuracy is not lower by more than two standard errors", -2)]


def _rlvr(before: Evaluation, after: Evaluation) -> list[Improvement]:
    # test has the same problems before and after, and more of them than validation
    if "test" in before and "test" in after:
        before, after = before["test"], after["test"]
    return [_accuracy("rlvr", before, after, "accuracy rises by more than two standard errors", 2)]


def _accuracy(stage: str, before: Evaluation, after: Evaluation, statement: str, errors: float) -> Improvement:
    """Returns the goal that accuracy rises by more than `errors` standard errors of the difference.

    If `errors` is negative, accuracy may fall by that much and not more.
    """
    was, now = number(before.get("accuracy")), number(after.get("accuracy"))
    both = [number(one.get("accuracy_se")) for one in (before, after)]
    known = [value for value in both if value is not None]
    error = math.hypot(*known) if len(known) == 2 else None
    holds = False
    if was is not None and now is not None and error is not None:
        holds = now - was > errors * error if errors >= 0 else now - was >= errors * error
    figures = {"before": was, "after": now, "standard_error": error, "samples": number(after.get("samples"))}
    return Improvement(stage, statement, holds, figures)


_STAGES: dict[str, Callable[[Evaluation, Evaluation], list[Improvement]]] = {
    "sft": _sft,
    "warmup": _warmup,
    "align": _align,
    "rlvr": _rlvr,
}


def summary(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures and goals of each stage as lines of text; empty if nothing was evaluated yet.

    Args:
        evaluations: see `improvements`.
    """
    stages = {stage: one for stage, one in evaluations.items() if " " not in stage}
    if not stages:
        return ""
    table: list[tuple[str, ...]] = [("after", "problems", *(name.replace("_", " ") for name in _COLUMNS))]
    for stage, one in stages.items():
        table += [_line(stage + (", T=1" if sampled else ""), part) for sampled, part in evaluated(dict(one))]
    blocks = [_table(table)]
    if discriminator := _discriminator(stages):
        blocks.append(discriminator)
    if drift := _drift(stages):
        blocks.append(drift)
    if goals := improvements(stages):
        blocks.append("\n".join(_goal_line(one) for one in goals))
    return "\n\n".join(blocks)


def figures_text(one: Improvement) -> str:
    """Returns the figures of a goal in words."""
    figures = {name: "not measured" if value is None else f"{value:.3f}" for name, value in one.figures.items()}
    if "accuracy" in figures:
        return figures["accuracy"]
    change = f"{figures['before']} → {figures['after']}"
    before, after, error, samples = (one.figures.get(key) for key in ("before", "after", "standard_error", "samples"))
    if before is None or after is None or error is None:
        return change
    return f"{change}, {after - before:+.3f} ± {error:.3f} of {samples or 0:.0f} problems"


def _line(after: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (number(one.get(name)) for name in _COLUMNS)
    cells = ["-" if share is None else f"{share:.3f}" for share in shares]
    error = number(one.get("accuracy_se"))
    if error is not None:
        cells[0] += f" ± {error:.3f}"
    return (after, f"{one.get('samples')} of {one.get('split')}", *cells)


def _discriminator(stages: Mapping[str, Mapping[str, Any]]) -> str:
    table: list[tuple[str, ...]] = [("pairs told apart after", "shown", *CHANNELS)]
    for stage, one in stages.items():
        for view, channels in one.get("discriminator", {}).items():
            shares = (number(channels.get(channel, {}).get("accuracy")) for channel in CHANNELS)
            table.append((stage, view, *("-" if share is None else f"{share:.3f}" for share in shares)))
    return _table(table) if len(table) > 1 else ""


def _drift(stages: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(stages)
    if "align" not in names[1:]:
        return ""
    before = names[names.index("align") - 1]
    ends = (("before alignment", stages[before]), ("after alignment", stages["align"]))
    table: list[tuple[str, ...]] = [("drift to the teachers", "caption items", "reasoning steps")]
    for name, one in ends:
        for how, part in (("", one), (", T=1", one.get("sampled", {}))):
            values = [number(part.get(f"drift_{channel}")) for channel in CHANNELS]
            if any(value is not None for value in values):
                table.append((name + how, *("-" if value is None else f"{value:.3f}" for value in values)))
    return _table(table) if len(table) > 1 else ""


def _goal_line(one: Improvement) -> str:
    return f"{'yes' if one.holds else 'NO '}  {one.stage}: {one.statement} ({figures_text(one)})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
