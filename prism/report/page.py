"""The page: its head, the tables over all stages, and the order of its sections."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from prism.report.charts import bar
from prism.report.drift_section import drift_section
from prism.report.held_out import discriminator_section, policy_section
from prism.report.reading import Row, RunRecord, number
from prism.report.samples import samples_section
from prism.report.shapes_errors import World
from prism.report.stages import NAMES, SKIPPED, stage_charts, troubles
from prism.report.style import CSS
from prism.report.tables import MISSING, table

# no script runs and nothing is fetched, whatever a response says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# of the steps where something was wrong, how many are listed
_LISTED = 8


def page(record: RunRecord) -> str:
    """Returns the report of a run as HTML."""
    world = World(record)
    title = f"Report of {record.folder.resolve().name}"
    stages = [_section(stage, NAMES.get(stage, stage), stage_charts(record, stage)) for stage in record.steps]
    sections = [
        f"<header><h1>{escape(title)}</h1>{_status(record)}{_facts(record)}</header>",
        _section("stages", "After each stage", policy_section(record)),
        _section("discriminator", "The discriminator on held-out problems", discriminator_section(record)),
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
    return table(("what was run", ""), lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)


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
        rate = MISSING
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
                MISSING if peak is None else f"{peak / 2**20:,.0f}",
            ]
        )
    heads = ("stage", "steps", "time", "share", "seconds a step", "response tokens a second", "peak memory, MiB")
    return (
        table(heads, lines, "numbers")
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
        told = f"{skipped:.0f}" if counted else MISSING
        bad = sum(bool(row.get("non_finite")) for row in rows)
        lines.append([escape(stage), told, str(bad), escape(listed + more) or "none"])
    if not lines:
        return "<p>Not measured: no step was taken yet.</p>"
    heads = ("stage", "optimiser steps not taken", "steps with a value that is not finite", "which")
    return (
        table(heads, lines)
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
    return table(("setting", "this run", "default"), lines)
