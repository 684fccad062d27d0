"""The page: the order of its sections, its head, the tables over all stages, and its style sheet."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from prism.report.charts import MISSING, bar, table
from prism.report.drift_section import drift_section
from prism.report.held_out_section import discriminator_section, policy_section
from prism.report.run_folder import Row, RunProblems, RunRecord, number
from prism.report.samples_section import samples_section
from prism.report.stage_section import NAMES, SKIPPED, stage_charts, troubles

# whatever a response says, no script runs and nothing is fetched
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# greatest number of steps that are listed with their problems
_LISTED = 8


def page(record: RunRecord) -> str:
    """Returns the report of a run as HTML."""
    world = RunProblems(record)
    title = f"Report of {record.folder.resolve().name}"
    stages = [_section(stage, NAMES.get(stage, stage), stage_charts(record, stage)) for stage in record.steps]
    sections = [
        f"<header><h1>{escape(title)}</h1>{_status(record)}{_facts(record)}</header>",
        _section("stages", "After each stage", policy_section(record)),
        _section("discriminator", "The discriminator on held-out problems", discriminator_section(record)),
        _section("drift", "Drift before and after alignment", drift_section(record, world)),
        *stages,
        _section("time", "Time and memory by stage", _time(record)),
        _section("troubles", "Skipped steps and values that are not finite", _troubles(record)),
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
    progress = []
    for stage in record.stages:
        done, planned = len(record.steps.get(stage, ())), record.planned(stage)
        if stage in record.unfinished:
            progress.append(f"{stage}: {done} of {planned} steps" + (", not evaluated" if done >= planned else ""))
    return (
        f'<p class="warn"><strong>This run is not finished.</strong> {escape("; ".join(progress))}. Missing parts are '
        "left out; <code>prism run</code> with the same settings resumes the run.</p>"
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
    return table(("run", ""), lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)


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
        peak = max((size for row in rows if (size := number(row.get("peak_bytes")))), default=None)
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
        + '<p class="note">Times of the steps only, each counted once even if the run was resumed: evaluations, '
        "checkpoints and start-up are not included.</p>"
    )


def _troubles(record: RunRecord) -> str:
    lines = []
    for stage, rows in record.steps.items():
        steps = troubles(rows)
        listed = "; ".join(f"step {step}: {problems}" for step, problems in steps[:_LISTED])
        more = f"; and {len(steps) - _LISTED} more" if len(steps) > _LISTED else ""
        counted = any(key in row for row in rows for key in SKIPPED)
        skipped = sum(number(row.get(key)) or 0.0 for row in rows for key in SKIPPED)
        count = f"{skipped:.0f}" if counted else MISSING
        non_finite = sum(bool(row.get("non_finite")) for row in rows)
        lines.append([escape(stage), count, str(non_finite), escape(listed + more) or "none"])
    if not lines:
        return "<p>Not measured: no step was taken yet.</p>"
    heads = ("stage", "skipped optimiser steps", "steps with a value that is not finite", "which")
    return (
        table(heads, lines)
        + '<p class="note">An optimiser step is skipped if its loss or gradient is not finite. Other values may be not '
        "finite without harm, such as a distance when no response was valid. The charts mark such steps with a "
        "triangle.</p>"
    )


def _settings(record: RunRecord) -> str:
    parts = ["<p>None.</p>"]
    if record.changed:
        lines = [
            [f"<code>{escape(key)}</code>", escape(json.dumps(value)), escape(json.dumps(default))]
            for key, value, default in record.changed
        ]
        parts = [table(("setting", "this run", "default"), lines)]
    if record.changes:
        lines = [
            [escape(one.after), f"<code>{escape(one.key)}</code>", *(escape(json.dumps(x)) for x in (one.old, one.new))]
            for one in record.changes
        ]
        heads = ("after", "setting", "until then", "from then on")
        parts.append(f"<h3>Changed when the run was resumed</h3>{table(heads, lines)}")
    return "".join(parts)


# light, dark and print; the colour-blind can tell the colours apart
CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#5b6470;--line:#d5d9df;--soft:#f4f5f7;--warn:#b3261e;
--c0:#0072b2;--c1:#d55e00;--c2:#008a63;--c3:#aa4499;--c4:#8a6d00}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e8eaed;--dim:#a2abb6;--line:#3a4149;--soft:#1e2329;
--warn:#ff8a80;--c0:#56b4e9;--c1:#f0a04b;--c2:#3ecf9f;--c3:#e39bd3;--c4:#d9c24a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.4rem 0 .4rem}
h4{font-size:.9rem;margin:0 0 .4rem}
a{color:var(--c0)}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.85em}
.note,.missing{color:var(--dim);font-size:.85rem}
.warn{border-left:4px solid var(--warn);background:var(--soft);padding:.5rem .8rem}
.no{color:var(--warn)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600}
.wide tr:first-child th{color:var(--dim);font-weight:500;vertical-align:bottom}
.numbers td{white-space:nowrap}
.numbers th:first-child{position:sticky;left:0;background:var(--bg)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:0 1.6rem;margin:.8rem 0}
.figures.lead{grid-template-columns:minmax(0,500px)}
figure{margin:0 0 1rem;min-width:0;break-inside:avoid;display:grid;grid-row:span 3;grid-template-rows:subgrid;row-gap:0;
align-content:start}
figcaption{font-size:.85rem;line-height:1.35;margin-bottom:.3rem}
figcaption span{color:var(--dim)}
.chart{width:100%;height:auto;display:block;font-size:11px}
.chart text{fill:var(--fg)}
.chart .note{fill:var(--dim);font-size:10.5px}
.grid{stroke:var(--line);stroke-width:.7}
.axis{stroke:var(--dim);stroke-width:1}
.ref{stroke:var(--dim);stroke-width:1;stroke-dasharray:2 3}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1;opacity:.38}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.fill.c0{fill:var(--c0)}.fill.c1{fill:var(--c1)}.fill.c2{fill:var(--c2)}.fill.c3{fill:var(--c3)}.fill.c4{fill:var(--c4)}
.d1{stroke-dasharray:6 4}.d2{stroke-dasharray:1.5 4}.d3{stroke-dasharray:8 3 1.5 3}.d4{stroke-dasharray:3 3}
.bad{fill:var(--warn)}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1rem;font-size:.85rem;margin:.2rem 0 0}
.legend{align-content:start}
.key{display:inline-flex;align-items:center;gap:.35rem}
.key svg{width:28px;height:12px;flex:none}
.bar{width:60px;height:9px;background:var(--soft)}
details{margin:.6rem 0}
summary{cursor:pointer;font-size:.85rem;color:var(--dim)}
article{display:grid;grid-template-columns:190px minmax(0,1fr);gap:1rem;
border:1px solid var(--line);border-radius:6px;padding:.8rem;margin:.8rem 0}
article p{margin:.3rem 0}
article img{display:block;image-rendering:pixelated;border:1px solid var(--line)}
.responses{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:1rem}
.response{min-width:0;break-inside:avoid}
.seg{border-left:4px solid var(--dim);padding:.1rem 0 .1rem .6rem;margin:.3rem 0;
white-space:pre-wrap;overflow-wrap:anywhere;font:.85rem/1.4 ui-monospace,"DejaVu Sans Mono",monospace}
.seg b{display:block;font:600 .75rem/1.3 system-ui,"DejaVu Sans",sans-serif}
.legend .seg{margin:0}
.seg.caption{border-color:var(--c0);color:var(--c0)}
.seg.think{border-color:var(--c1);border-left-style:dashed;color:var(--c1)}
.seg.answer{border-color:var(--c2);border-left-style:double;color:var(--c2)}
.seg.outside{border-color:var(--warn);border-left-style:dotted;color:var(--warn)}
@media (max-width:640px){body{font-size:15px}main{padding:.7rem}article{grid-template-columns:minmax(0,1fr)}}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--dim:#444;--line:#bbb;--soft:#f4f4f4;--warn:#b3261e;
--c0:#0072b2;--c1:#b84f00;--c2:#006b4d;--c3:#aa4499;--c4:#8a6d00}
body{font-size:10pt}main{max-width:none;padding:0}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible}table{font-size:7.5pt}.figures{grid-template-columns:1fr 1fr}article{break-inside:avoid}
h2,h3,h2+.note{break-after:avoid}}
"""
