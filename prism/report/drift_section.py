"""The section on drift: how far the policy is from its teachers, before and after alignment."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from prism.data.drift import COUNTS, wasserstein
from prism.report.charts import Series, column_chart, dot_chart, figure, legend, table
from prism.report.run_folder import RunProblems, RunRecord, mean, number, read_rollouts
from prism.report.summary import CHANNELS
from prism_kernels.grammar import split_response

# recorded steps that are pooled at either end
_STEPS = 3
# larger numbers share the last column
_MOST = 12


def drift_section(record: RunRecord, world: RunProblems) -> str:
    """Returns the drift on held-out problems, in the log of alignment, and in the recorded responses."""
    rows = record.steps.get("align", [])
    if not rows:
        return f"{_held_out(record)}<p>Not measured: the run has not reached alignment.</p>"
    parts = [_held_out(record), "<h3>While aligning</h3>", _logged(record)]
    files = record.rollouts.get("align", [])
    if len(files) < 2:
        parts.append(
            '<p class="note">Distributions: not measured, fewer than two steps of alignment were recorded.</p>'
        )
        return "".join(parts)
    count = min(_STEPS, len(files) // 2)
    ends = [_numbers([path for _, path in part], world) for part in (files[:count], files[-count:])]
    titles = ("Caption items", "Reasoning steps")
    parts.append('<div class="figures">')
    for channel, title in enumerate(titles):
        parts.append(_distribution(title, CHANNELS[channel], [end[channel] for end in ends], files, count))
    return "".join([*parts, "</div>"])


def _held_out(record: RunRecord) -> str:
    keys = [f"drift_{channel}" for channel in CHANNELS]
    lines = []
    for after, one in record.evaluations.items():
        for how, part in (("greedy", one), ("temperature 1", one.get("sampled", {}))):
            if any(key in part for key in keys):
                values = (number(part.get(key)) for key in keys)
                lines.append([escape(after), how, *("not measured" if v is None else f"{v:.3f}" for v in values)])
    if not lines:
        return "<p>Not measured on held-out problems.</p>"
    warm = any("sampled" in one for one in record.evaluations.values())
    series = [
        Series(
            channel,
            [
                (x, number((one.get("sampled", {}) if warm else one).get(f"drift_{channel}")))
                for x, one in enumerate(record.evaluations.values())
            ],
        )
        for channel in CHANNELS
    ]
    drawn = dot_chart(list(record.evaluations), series, title="Drift after each stage")
    meaning = f"distance to the curated teacher in items and steps, {'temperature 1' if warm else 'greedy'}"
    return (
        f'<div class="figures">{figure("Drift", meaning, drawn, legend(CHANNELS, "dot"))}</div>'
        f"{table(('after', 'responses', 'perception, caption items', 'reasoning, steps'), lines, 'numbers')}"
        "<p class=\"note\">Wasserstein distance between the policy's valid responses and the curated teacher's on the "
        "same held-out problems of validation: the mean number of caption items, or of reasoning steps, by which a "
        "response would have to change. A greedy policy has few forms and may be near its teachers by chance.</p>"
    )


def _logged(record: RunRecord) -> str:
    rows = record.steps["align"]
    count = max(1, min(5, len(rows) // 2))
    lines = []
    for channel, unit in zip(CHANNELS, ("caption items", "reasoning steps")):
        values = [number(row.get(f"drift_{channel}")) for row in rows]
        cells = [_mean_and_error(part) for part in (values[:count], values[-count:])]
        before, after = (mean(part) for part in (values[:count], values[-count:]))
        change = "not measured" if before is None or after is None else f"{after - before:+.3f}"
        lines.append(
            f"<tr><th>{channel}</th><td>{unit}</td><td>{cells[0]}</td><td>{cells[1]}</td><td>{change}</td></tr>"
        )
    several = "step" if count == 1 else f"{count} steps"
    heads = f"<th>channel</th><th>in</th><th>first {several}</th><th>last {several}</th><th>change</th>"
    ended = "" if "align" not in record.unfinished else " The stage is not finished: its last steps are the latest."
    return (
        f'<div class="wide numbers"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
        "<p class=\"note\">Wasserstein distance between the policy's valid responses and their teachers' on the same "
        "prompts, mean over steps ± standard error. On a step's few prompts it is above zero even without drift. "
        f"The first step samples from the policy before alignment.{ended}</p>"
    )


def _mean_and_error(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not measured"
    middle = sum(known) / len(known)
    if len(known) < 2:
        return f"{middle:.3f}"
    variance = sum((value - middle) ** 2 for value in known) / (len(known) - 1)
    return f"{middle:.3f} ± {math.sqrt(variance / len(known)):.3f}"


def _numbers(files: Iterable[Path], world: RunProblems) -> list[tuple[Counter[int], Counter[int]]]:
    """Returns by channel how often each number of items or steps occurs, for the policy and for the teachers."""
    policy, teachers = [], []
    for path in files:
        asked = {}
        for row in read_rollouts(path):
            policy.append(split_response(str(row.get("response"))))
            asked[str(row.get("problem"))] = row
        teachers += [split_response(sample.response.text) for row in asked.values() if (sample := world.problem(row))]
    return [
        (Counter(map(COUNTS[channel], filter(None, policy))), Counter(map(COUNTS[channel], filter(None, teachers))))
        for channel in CHANNELS
    ]


def _distribution(
    title: str,
    channel: str,
    ends: list[tuple[Counter[int], Counter[int]]],
    files: Sequence[tuple[int, Path]],
    count: int,
) -> str:
    teachers = ends[0][1] + ends[1][1]
    parts = [("policy, first steps", ends[0][0]), ("policy, last steps", ends[1][0]), ("teachers", teachers)]
    present = [counts for _, counts in parts if counts]
    if not present:
        return ""
    top = min(_MOST, max(max(counts) for counts in present))
    low = min(top, min(min(counts) for counts in present))
    series = []
    for label, counts in parts:
        if not counts:
            series.append(Series(f"{label}: none", []))
            continue
        folded = Counter(dict.fromkeys(range(low, top + 1), 0))
        for n, times in counts.items():
            folded[min(n, top)] += times
        series.append(Series(label, [(n - low, folded[n] / counts.total()) for n in range(low, top + 1)]))
    more = any(max(counts) > top for counts in present)
    names = [f"{n}{'+' if more and n == top else ''}" for n in range(low, top + 1)]
    drawn = column_chart(names, series, title=f"{title} per response", below=f"{title.lower()} per response")
    steps = f"steps {_span(files[:count])} and {_span(files[-count:])}"
    if not teachers:
        distances = "the teachers' responses are not available, so the distances are not measured here"
    else:
        before, after = (wasserstein([*policy.elements()], [*theirs.elements()]) for policy, theirs in ends)
        distances = f"distance to the teachers on the same prompts {_three(before)} at first, {_three(after)} at last"
    meaning = f"share of the valid responses with each number ({channel}), {steps} pooled; {distances}"
    return figure(title, meaning, drawn, legend([one.label for one in series], shape="column"))


def _span(files: Sequence[tuple[int, Path]]) -> str:
    first, last = files[0][0], files[-1][0]
    return str(first) if first == last else f"{first}–{last}"


def _three(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"
