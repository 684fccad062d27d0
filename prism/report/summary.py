"""What each stage is for, whether it did it by the held-out evaluations, and a run in a few lines of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from prism.report.run_folder import evaluated, number

CHANNELS = ("perception", "reasoning")
# a share that is as good as it can be does not rise
_WHOLE = 0.99
_PAIRS = 0.8
_COLUMNS = ("accuracy", "perception_error", "reasoning_error", "format")

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


def summary(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what each stage did, as lines of text; empty where nothing was evaluated yet.

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
    if told := _discriminator(stages):
        blocks.append(told)
    if told := _drift(stages):
        blocks.append(told)
    if found := improvements(stages):
        blocks.append("\n".join(_told(one) for one in found))
    return "\n\n".join(blocks)


def told_figures(one: Improvement) -> str:
    """Returns the figures of a statement in words."""
    figures = {name: "not measured" if value is None else f"{value:.3f}" for name, value in one.figures.items()}
    if "accuracy" in figures:
        return figures["accuracy"]
    told = f"{figures['before']} → {figures['after']}"
    before, after, error, samples = (one.figures.get(key) for key in ("before", "after", "standard_error", "samples"))
    if before is None or after is None or error is None:
        return told
    return f"{told}, {after - before:+.3f} ± {error:.3f} of {samples or 0:.0f} problems"


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
    known = list(stages)
    if "align" not in known[1:]:
        return ""
    before = known[known.index("align") - 1]
    ends = (("before alignment", stages[before]), ("after alignment", stages["align"]))
    table: list[tuple[str, ...]] = [("drift to the teachers", "caption items", "reasoning steps")]
    for name, one in ends:
        for how, part in (("", one), (", T=1", one.get("sampled", {}))):
            values = [number(part.get(f"drift_{channel}")) for channel in CHANNELS]
            if any(value is not None for value in values):
                table.append((name + how, *("-" if value is None else f"{value:.3f}" for value in values)))
    return _table(table) if len(table) > 1 else ""


def _told(one: Improvement) -> str:
    return f"{'yes' if one.holds else 'NO '}  {one.stage}: {one.statement} ({told_figures(one)})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
