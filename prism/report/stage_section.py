"""The section of a stage: its charts, and a table of all its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prism.report.charts import Series, column_chart, figure, legend, line_chart, smoothing_note
from prism.report.run_folder import Row, RunRecord, mean, number
from prism.report.summary import CHANNELS


@dataclass(frozen=True)
class Chart:
    """A chart of some metrics.

    Args:
        title: the title.
        meaning: what the values mean, and their unit.
        keys: the metrics, each a line, with their labels.
        low: least value of the axis; None fits the data.
        high: greatest value of the axis; None fits the data.
        log: whether the axis is logarithmic.
        reference: a level to draw, and its label.
        optional: whether the section keeps silent if the metrics were not measured.
    """

    title: str
    meaning: str
    keys: tuple[tuple[str, str], ...]
    low: float | None = None
    high: float | None = None
    log: bool = False
    reference: tuple[float, str] | None = None
    optional: bool = False


def _by_channel(key: str) -> tuple[tuple[str, str], ...]:
    return tuple((key.format(channel), channel) for channel in CHANNELS)


_NORM = Chart("Gradient norm", "of the policy's gradient, before clipping", (("grad_norm", "norm"),), log=True)
_ENTROPY = Chart("Entropy", "of the policy, nats per token, mean over response tokens", (("entropy", "entropy"),))
_LENGTH = Chart("Length", "tokens per response, mean over the step's responses", (("length", "length"),))
_POLICY_LOSS = Chart("Policy loss", "the surrogate that is minimised; its level has no meaning", (("loss", "loss"),))
_ENGINE = Chart(
    "Trainer against engine",
    "largest difference between a token's log-probabilities in the trainer and in the rollout engine, nats",
    (("engine_gap", "difference"),),
    log=True,
)
_SUPERVISED = (
    Chart("Loss", "−log p of the teachers' tokens, nats per token", (("loss", "loss"),), log=True),
    _NORM,
)
_SCORES = (
    Chart(
        "Pairs told apart",
        "share of the step's pairs in which the teacher outscores the policy, before the discriminator's update",
        _by_channel("d_accuracy_{}"),
        low=0.0,
        high=1.0,
        reference=(0.5, "chance"),
    ),
    Chart(
        "Discriminator's gap",
        "the teacher's score minus the policy's, mean over the step's pairs; scores have no unit",
        _by_channel("d_gap_{}"),
        reference=(0.0, "no difference"),
    ),
    Chart(
        "Discriminator's loss",
        "−log of the probability that the teacher wins a pair, summed over both channels, nats",
        (("d_loss", "loss"),),
        reference=(1.386, "chance: 2 ln 2"),
    ),
)
CHARTS: dict[str, tuple[Chart, ...]] = {
    "base": _SUPERVISED,
    "sft": _SUPERVISED,
    "distill": _SUPERVISED,
    "warmup": _SCORES,
    "align": (
        Chart(
            "Drift",
            "Wasserstein distance between the policy and its teachers on the step's prompts, in caption items "
            "(perception) and reasoning steps (reasoning)",
            _by_channel("drift_{}"),
            low=0.0,
        ),
        *_SCORES,
        Chart(
            "Scores",
            "the discriminator's scores of the policy's responses, mean over the step's valid ones",
            _by_channel("score_{}"),
            optional=True,
        ),
        Chart(
            "Valid responses",
            "share with caption, thinking and answer in the required form",
            (("valid", "valid"),),
            low=0.0,
            high=1.0,
        ),
        _ENTROPY,
        _LENGTH,
        _POLICY_LOSS,
        _NORM,
        _ENGINE,
    ),
    "rlvr": (
        Chart(
            "Reward",
            "mean over the step's responses: 0.8 for a right answer, 0.2 for the format, minus the overlong penalty",
            (("reward", "reward"),),
        ),
        Chart(
            "Accuracy and format",
            "shares of the step's sampled responses",
            (("accuracy", "right answer"), ("format", "format")),
            low=0.0,
            high=1.0,
        ),
        _LENGTH,
        _ENTROPY,
        Chart(
            "Informative groups",
            "share of problems with right and wrong responses; dynamic sampling keeps only these",
            (("informative", "share"),),
            low=0.0,
            high=1.0,
        ),
        _POLICY_LOSS,
        _NORM,
        _ENGINE,
    ),
}
# metrics that count skipped optimiser steps, and whose optimiser it is
SKIPPED = {"skipped": "", "d_skipped": " of the discriminator"}
NAMES = {
    "base": "Base: a policy of the embedded world",
    "sft": "SFT: fine-tuning on the public demonstrations",
    "distill": "Distillation: fine-tuning on the curated demonstrations",
    "warmup": "Warm-up: the discriminator learns to tell policy and teacher apart",
    "align": "Alignment: policy against discriminator",
    "rlvr": "RLVR: reinforcement learning from verified rewards",
}


def stage_charts(record: RunRecord, stage: str) -> str:
    """Returns the section of a stage."""
    rows = _with_length(record, stage)
    figures, absent = [], []
    for chart in (*CHARTS.get(stage, ()), *_expert_chart(record, stage)):
        if drawn := _figure(chart, rows):
            figures.append(drawn)
        elif not chart.optional:
            absent.append(chart.title)
    if loads := _expert_loads(rows):
        figures.append(loads)
    missing = f'<p class="note">Not measured in this stage: {escape(", ".join(absent))}.</p>' if absent else ""
    smoothing = f'<p class="note">{note}</p>' if (note := smoothing_note(len(rows))) else ""
    return f'{smoothing}<div class="figures">{"".join(figures)}</div>{missing}{_all_metrics(rows)}'


def troubles(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Returns the steps with a non-finite value or a skipped optimiser step, each with its problems."""
    steps = []
    for row in rows:
        problems = [f"{name} not finite" for name in row.get("non_finite", [])]
        for key, who in SKIPPED.items():
            if count := number(row.get(key)):
                problems.append(f"{count:.0f} optimiser step{'s' if count > 1 else ''}{who} skipped")
        if problems:
            steps.append((int(row["step"]), ", ".join(problems)))
    return steps


def _figure(chart: Chart, rows: Sequence[Row]) -> str:
    keys = [(key, label) for key, label in chart.keys if any(key in row for row in rows)]
    series = [Series(label, [(row["step"], number(row.get(key))) for row in rows]) for key, label in keys]
    if not any(value is not None for one in series for _, value in one.points):
        return ""
    names = {key for key, _ in keys}
    marks = [(row["step"], f"{name} not finite") for row in rows for name in row.get("non_finite", []) if name in names]
    drawn = line_chart(
        series,
        title=f"{chart.title} over the steps",
        low=chart.low,
        high=chart.high,
        log=chart.log,
        reference=chart.reference,
        marks=marks,
    )
    return figure(chart.title, chart.meaning, drawn, legend([_label(one) for one in series]))


def _label(series: Series) -> str:
    """Returns a line's label with its first and last values."""
    values = [value for _, value in series.points if value is not None]
    last = values[-min(5, len(values)) :]
    return (
        f"{series.label}: first {values[0]:.3g}, mean of last {len(last)}: {sum(last) / len(last):.3g}"
        if values
        else f"{series.label}: never finite"
    )


def _with_length(record: RunRecord, stage: str) -> list[Row]:
    """Returns a stage's records, with the mean length added if it follows from the number of tokens."""
    rows = record.steps[stage]
    prompts, group = (record.setting(f"rollout.{stage}.{key}") for key in ("prompts", "group"))
    if stage != "align" or not prompts or not group:
        return rows
    return [{"length": row["tokens"] / (prompts * group), **row} if number(row.get("tokens")) else row for row in rows]


def _expert_chart(record: RunRecord, stage: str) -> list[Chart]:
    if stage not in ("warmup", "align") or record.setting("discriminator.dense"):
        return []
    experts = record.setting("discriminator.experts")
    return [
        Chart(
            "Expert load by token kind",
            "share of a token kind's choices that go to its most chosen expert, over the discriminator's layers",
            tuple((f"d_top_expert_{channel}", f"{channel} tokens") for channel in CHANNELS),
            reference=(1 / experts, f"balanced: 1/{experts}") if experts else None,
        )
    ]


def _expert_loads(rows: Sequence[Row]) -> str:
    """Returns the load of every expert by token kind at the stage's end; empty if it was not measured."""
    last = [row["d_expert_load"] for row in rows if isinstance(row.get("d_expert_load"), dict)][-5:]
    if not last:
        return ""
    series = []
    # the channels come first, in the same colours as in other charts
    kinds = sorted(last[-1], key=lambda kind: CHANNELS.index(kind) if kind in CHANNELS else len(CHANNELS))
    for kind in kinds:
        each = [row[kind] for row in last]
        columns = [mean([number(share) for share in shares]) for shares in zip(*each)]
        series.append(Series(f"{kind} tokens", list(enumerate(columns))))
    names = [f"expert {e + 1}" for e in range(len(series[0].points))]
    drawn = column_chart(names, series, title="Load of each expert by token kind", below="")
    meaning = f"share of a token kind's choices that go to each expert, mean of the last {len(last)} steps"
    return figure("Load of each expert", meaning, drawn, legend([one.label for one in series], shape="column"))


def _all_metrics(rows: Sequence[Row]) -> str:
    """Returns a folded table of every metric of the stage."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step", "non_finite")))
    lines = []
    for name in names:
        values = [value for row in rows if (value := number(row.get(name))) is not None]
        if not values:
            continue
        cells = (values[0], min(values), sum(values) / len(values), max(values), values[-1])
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value:.4g}</td>' for value in cells)}</tr>")
    head = "<tr><th>metric</th><th>first</th><th>least</th><th>mean</th><th>greatest</th><th>last</th></tr>"
    title = f"all {len(lines)} metrics of this stage's {len(rows)} steps, as in metrics.jsonl"
    table = f'<div class="wide numbers"><table>{head}{"".join(lines)}</table></div>'
    return f"<details><summary>{title}</summary>{table}</details>"
