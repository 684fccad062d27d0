"""The short form of the report, for a console."""

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report.improvements import CHANNELS, Improvement, improvements
from prism.report.reading import evaluated, number

_COLUMNS = ("accuracy", "perception_error", "reasoning_error", "format")


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
