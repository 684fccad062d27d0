"""The page: its head, the tables over all stages, and the order of its sections."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from prism.report.charts import Series, bar, dot_chart, legend
from prism.report.drift import drift_section
from prism.report.reading import Row, RunRecord, number
from prism.report.samples import samples_section
from prism.report.stages import CHANNELS, NAMES, SKIPPED, figure, stage_charts, troubles
from prism.report.style import CSS
from prism.report.world import World

# no script runs and nothing is fetched, whatever a response says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SHARES = {
    "accuracy": "accuracy",
    "format": "format",
    "perception_error": "perception error",
    "reasoning_error": "reasoning error",
}
_MISSING = '<span class="missing">not measured</span>'
# of the steps where something was wrong, how many are listed
_LISTED = 8


def page(record: RunRecord) -> str:
    """Returns the report of a run as HTML."""
    world = World(record)
    title = f"Report of {record.folder.resolve().name}"
    stages = [_section(stage, NAMES.get(stage, stage), stage_charts(record, stage)) for stage in record.steps]
    sections = [
        f"<header><h1>{escape(title)}</h1>{_status(record)}{_facts(record)}</header>",
        _section("stages", "After each stage", _after_stages(record)),
        _section("drift", "Drift before and after alignment", drift_section(record, world)),
        *stages,
        _section("time", "Time and memory by stage", _time(record)),
        _section("troubles", "Steps not taken, values not finite", _troubles(record)),
        _section("samples", "Sample rollouts", samples_section(record, world)),
        _section("settings", "Settings that differ from the defaults", _settings(record)),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{CSS}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{content}</section>'


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "texts") -> str:
    """Returns a table of `texts` or `numbers`; the cells are HTML, the first of a line is its head."""
    head = "".join(f"<th>{one}</th>" for one in heads)
    body = "".join(f"<tr><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table><tr>{head}</tr>{body}</table></div>'


def _status(record: RunRecord) -> str:
    if not record.unfinished:
        return f"<p>Finished: {escape(', '.join(record.stages))}.</p>"
    told = []
    for stage in record.stages:
        done, planned = len(record.steps.get(stage, ())), record.planned(stage)
        if stage in record.unfinished:
            told.append(f"{stage}: {done} of {planned} steps" + (", not evaluated" if done >= planned else ""))
    return (
        f'<p class="warn"><strong>This run is not finished.</strong> {escape("; ".join(told))}. What is missing is '
        "left out; <code>prism run</code> with the same settings goes on.</p>"
    )


def _facts(record: RunRecord) -> str:
    models = (f"{key.split('.')[1]} {record.setting(key)}" for key in ("model.policy", "model.discriminator"))
    lines = [
        ("stages", escape(", ".join(record.stages))),
        ("seed", escape(str(record.setting("run.seed")))),
        ("models", escape("; ".join(models))),
        ("data", escape(str(record.setting("data.source")))),
        ("time in steps", _duration(sum(_seconds(rows) for rows in record.steps.values()))),
    ]
    if record.environment is None:
        lines.append(("versions, device, date", "not recorded by the run"))
    else:
        lines += [(escape(key.replace("_", " ")), escape(_plain(value))) for key, value in record.environment.items()]
    lines.append(("settings", f'<a href="#settings">{len(record.changed)} differ from the defaults</a>'))
    return _table(("what was run", ""), lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)


# --- after each stage


def _after_stages(record: RunRecord) -> str:
    found = record.evaluations
    if not found:
        return "<p>Not measured: the run has no evaluation yet, or its checkpoints were removed before it ended.</p>"
    series = [
        Series(
            label,
            [(place, number(one.get(key))) for place, one in enumerate(found.values())],
            [_standard_error(one, key) for one in found.values()],
        )
        for key, label in _SHARES.items()
    ]
    drawn = dot_chart(list(found), series, title="Accuracy, format and errors after each stage", high=1.0)
    meaning = "shares of the held-out problems ± standard error, one greedy response each"
    if temperature := record.setting("evaluation.temperature"):
        meaning = f"shares of the held-out problems ± standard error, one response each at temperature {temperature:g}"
    chart = figure("Held-out problems", meaning, drawn, legend(list(_SHARES.values()), "dot"))
    lines = [_evaluation(after, one) for after, one in found.items()]
    heads = ("after", "problems", *_SHARES.values(), "length, tokens")
    return (
        f'<div class="figures lead">{chart}</div>'
        f"{_table(heads, lines, 'numbers')}"
        '<p class="note">Shares of the problems ± standard error. Format: caption, thinking and answer as the grammar '
        "asks. Perception error: the caption differs from the scene. Reasoning error: the answer does not follow from "
        "the response's own caption. A response without a valid form counts as wrong in everything. Lines on different "
        "splits are of different problems: between them the draw differs too.</p>"
        f"{_pairs(record)}"
    )


def _standard_error(one: Row, key: str) -> float | None:
    share, count = number(one.get(key)), number(one.get("samples"))
    return math.sqrt(share * (1 - share) / count) if share is not None and count else None


def _evaluation(after: str, one: Row) -> list[str]:
    cells = [escape(after), escape(f"{one.get('samples')} of {one.get('split')}")]
    for key in _SHARES:
        share, error = number(one.get(key)), _standard_error(one, key)
        told = _MISSING if share is None else f"{share:.3f}"
        cells.append(told if error is None else f"{told} ± {error:.3f}")
    length = number(one.get("length"))
    return [*cells, _MISSING if length is None else f"{length:.1f}"]


def _pairs(record: RunRecord) -> str:
    """Returns how well the discriminator told held-out pairs apart."""
    keys = [f"pair_{figure}_{channel}" for figure in ("accuracy", "gap") for channel in CHANNELS]
    lines = []
    for after, one in record.evaluations.items():
        if any(key in one for key in keys):
            values = (number(one.get(key)) for key in keys)
            lines.append([escape(after), *(_MISSING if value is None else f"{value:.3f}" for value in values)])
    head = "<h3>The discriminator on held-out pairs</h3>"
    if not lines:
        return f"{head}<p>Not measured: the run has not come to the end of the warm-up.</p>"
    heads = ("after", *(f"{figure}, {channel}" for figure in ("pair accuracy", "gap") for channel in CHANNELS))
    return (
        f"{head}{_table(heads, lines, 'numbers')}"
        '<p class="note">Pair accuracy: the share of pairs whose teacher outscores the policy of that moment (0.5 is '
        "chance). Gap: the teacher's score less the policy's, mean over the pairs; scores have no unit. After "
        "alignment a lower accuracy means that the policy is harder to tell from its teachers.</p>"
    )


# --- over all stages


def _seconds(rows: Sequence[Row]) -> float:
    return sum(number(row.get("seconds")) or 0.0 for row in rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _time(record: RunRecord) -> str:
    if not record.steps:
        return "<p>Not measured: no step was taken yet.</p>"
    whole = sum(_seconds(rows) for rows in record.steps.values()) or 1.0
    lines = []
    for stage, rows in record.steps.items():
        seconds = _seconds(rows)
        tokens = [number(row.get("tokens")) for row in rows]
        rate = _MISSING
        if seconds and tokens and None not in tokens:
            rate = f"{sum(token or 0.0 for token in tokens) / seconds:,.0f}"
        peak = max((found for row in rows if (found := number(row.get("peak_bytes")))), default=None)
        share = seconds / whole
        lines.append(
            [
                escape(stage),
                f"{len(rows)} of {record.planned(stage)}",
                _duration(seconds),
                f"{bar(share)} {share:.0%}",
                f"{seconds / len(rows):.2f}",
                rate,
                _MISSING if peak is None else f"{peak / 2**20:,.0f}",
            ]
        )
    heads = ("stage", "steps", "time", "share", "seconds a step", "response tokens a second", "peak memory, MiB")
    return (
        _table(heads, lines, "numbers")
        + '<p class="note">Of the steps alone, each counted once however often the run was resumed: evaluations, '
        "checkpoints and the start are not in it.</p>"
    )


def _troubles(record: RunRecord) -> str:
    lines = []
    for stage, rows in record.steps.items():
        found = troubles(rows)
        listed = "; ".join(f"step {step}: {what}" for step, what in found[:_LISTED])
        more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        counted = any(key in row for row in rows for key in SKIPPED)
        skipped = sum(number(row.get(key)) or 0.0 for row in rows for key in SKIPPED)
        told = f"{skipped:.0f}" if counted else _MISSING
        bad = sum(bool(row.get("non_finite")) for row in rows)
        lines.append([escape(stage), told, str(bad), escape(listed + more) or "none"])
    if not lines:
        return "<p>Not measured: no step was taken yet.</p>"
    heads = ("stage", "optimiser steps not taken", "steps with a value that is not finite", "which")
    return (
        _table(heads, lines)
        + '<p class="note">A step whose loss or gradient is not finite is not taken. A measure may be not finite '
        "without harm, as a distance where no response was valid. The charts mark such steps with a triangle.</p>"
    )


def _settings(record: RunRecord) -> str:
    if not record.changed:
        return "<p>None.</p>"
    lines = [
        [f"<code>{escape(key)}</code>", escape(json.dumps(value)), escape(json.dumps(default))]
        for key, value, default in record.changed
    ]
    return _table(("setting", "this run", "default"), lines)
