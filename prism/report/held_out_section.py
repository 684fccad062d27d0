"""The sections on held-out problems: the policy after each stage, and the discriminator with its controls."""

import math
from html import escape

from prism.report.charts import MISSING, Series, dot_chart, figure, legend, table
from prism.report.run_folder import Row, RunRecord, evaluated, number
from prism.report.summary import CHANNELS, figures_text, improvements

_SHARES = {
    "accuracy": "accuracy",
    "format": "format",
    "perception_error": "perception error",
    "reasoning_error": "reasoning error",
}
# the views of the discriminator's evaluation, in words
_VIEWS = {
    "pairs": "the policy's responses, as they are",
    "swapped images": "the same on other problems' images",
    "equal style": "the curated teacher's texts with one thing wrong",
}


def policy_section(record: RunRecord) -> str:
    """Returns the goals of each stage, and the policy's figures after each."""
    evaluations = record.evaluations
    if not evaluations:
        return "<p>Not measured: the run has no evaluation yet, or its checkpoints were removed before it ended.</p>"
    temperature = record.setting("evaluation.temperature")
    usual = f"temperature {temperature:g}" if temperature else "greedy"
    charts = [_chart("Held-out problems", usual, evaluations)]
    warm = {after: one["sampled"] for after, one in evaluations.items() if "sampled" in one}
    if warm:
        charts.append(_chart("Held-out problems, sampled", "temperature 1", warm))
    lines = [
        _line(after, "temperature 1" if sampled else usual, one)
        for after, whole in evaluations.items()
        for sampled, one in evaluated(whole)
    ]
    heads = ("after", "responses", "problems", *_SHARES.values(), "length, tokens")
    return (
        f"{_improvements(record)}"
        f'<div class="figures">{"".join(charts)}</div>'
        f"{table(heads, lines, 'numbers')}"
        '<p class="note">Shares of the problems ± standard error. Format: caption, thinking and answer in the required '
        "form. Perception error: the caption differs from the scene. Reasoning error: the answer does not follow from "
        "the response's own caption. A response without a valid form counts as wrong in everything. Rows of different "
        "splits are measured on different problems, so part of their difference is chance. The warm-up does not change "
        "the policy.</p>"
    )


def discriminator_section(record: RunRecord) -> str:
    """Returns how well the discriminator tells better texts from worse ones, by view."""
    lines, changes = [], []
    for after, one in record.evaluations.items():
        for view, channels in one.get("discriminator", {}).items():
            cells = [escape(after), escape(_VIEWS.get(view, view))]
            for channel in CHANNELS:
                figures = channels.get(channel, {})
                cells += [_three(figures.get(key)) for key in ("accuracy", "gap", "auc")]
                if by_change := figures.get("by_change"):
                    shares = ", ".join(f"{change} {_three(share)}" for change, share in by_change.items())
                    changes.append(f"after {after} ({channel}): {shares}")
            lines.append(cells)
    if not lines:
        return "<p>Not measured: the run has not finished the warm-up.</p>"
    heads = ("after", "shown", *(f"{channel}: {name}" for channel in CHANNELS for name in ("pairs won", "gap", "AUC")))
    by_change = f" Pairs of equal style won, by error: {escape('; '.join(changes))}." if changes else ""
    return (
        f'<div class="figures">{"".join(_views(record, channel) for channel in CHANNELS)}</div>'
        f"{table(heads, lines, 'numbers')}"
        '<p class="note">Pairs won: share of the pairs in which the right text, or the teacher\'s, outscores the other '
        "(0.5 is chance). Gap: mean difference of the two scores, which have no unit. AUC: how often a right response "
        "of the policy outscores a wrong one to the same problem; the exact counters say which are right. A "
        "discriminator that needs the image for perception is at chance on other problems' images; one that looks at "
        f"content, not only at style, wins the pairs of equal style.{by_change} After alignment, fewer pairs won mean "
        "that the policy is harder to tell from its teachers.</p>"
    )


def _views(record: RunRecord, channel: str) -> str:
    """Returns the chart of the pairs won in a channel, by view."""
    known = {after: one["discriminator"] for after, one in record.evaluations.items() if "discriminator" in one}
    views = list(dict.fromkeys(view for one in known.values() for view in one))
    series = [
        Series(
            view,
            [(x, number(one.get(view, {}).get(channel, {}).get("accuracy"))) for x, one in enumerate(known.values())],
        )
        for view in views
    ]
    drawn = dot_chart(list(known), series, title=f"Pairs won by what is shown, {channel}", high=1.0)
    return figure(f"Pairs won, {channel}", "by what is shown; 0.5 is chance", drawn, legend(views, "dot"))


def _improvements(record: RunRecord) -> str:
    goals = improvements(record.evaluations)
    if not goals:
        return ""
    lines = [
        [
            escape(one.stage),
            escape(one.statement),
            "yes" if one.holds else '<strong class="no">no</strong>',
            escape(figures_text(one)),
        ]
        for one in goals
    ]
    return "<h3>What each stage is for</h3>" + table(("stage", "goal", "reached", "figures"), lines)


def _chart(title: str, how: str, evaluations: dict[str, Row]) -> str:
    series = [
        Series(
            label,
            [(x, number(one.get(key))) for x, one in enumerate(evaluations.values())],
            [_standard_error(one, key) for one in evaluations.values()],
        )
        for key, label in _SHARES.items()
    ]
    drawn = dot_chart(
        list(evaluations), series, title=f"{title}: accuracy, format and errors after each stage", high=1.0
    )
    meaning = f"shares of the held-out problems of validation ± standard error, one response each, {how}"
    return figure(title, meaning, drawn, legend(list(_SHARES.values()), "dot"))


def _standard_error(one: Row, key: str) -> float | None:
    share, count = number(one.get(key)), number(one.get("samples"))
    if share is None or not count or not 0 <= share <= 1 or count < 0:
        return None
    return math.sqrt(share * (1 - share) / count)


def _line(after: str, how: str, one: Row) -> list[str]:
    cells = [escape(after), how, escape(f"{one.get('samples')} of {one.get('split')}")]
    for key in _SHARES:
        share, error = number(one.get(key)), _standard_error(one, key)
        shown = MISSING if share is None else f"{share:.3f}"
        cells.append(shown if error is None else f"{shown} ± {error:.3f}")
    length = number(one.get("length"))
    return [*cells, MISSING if length is None else f"{length:.1f}"]


def _three(value: object) -> str:
    finite = number(value)
    return MISSING if finite is None else f"{finite:.3f}"
