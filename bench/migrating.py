"""Makes the tables of docs/migrating.md: a trainer's time and memory before and after our patch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.plot import origin
from bench.results import MIB, load


class Measured(NamedTuple):
    """The measured part of a trainer, and the module under bench/end_to_end that measures it, with its options."""

    what: str
    command: str


TRAINERS = {
    "trl": Measured("a step of GRPOTrainer", "trl_patch"),
    "verl": Measured("forward and backward of the functions that verl's engine calls", "head_patch --trainer verl"),
    "openrlhf": Measured("forward and backward of Actor", "head_patch --trainer openrlhf"),
    "transformers": Measured(
        "forward and backward; without the patch, log_softmax and gather on the logits", "head_patch"
    ),
}
STAND_IN = (
    "Measured with the tests' stand-in, which has the package's names and mathematics and makes the same tensors of "
    "logits, not with the package itself."
)


def table(content: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of a table whose rows come in pairs: without the patch, and with it."""
    yield "| | time | peak memory of the process | of that, the step |"
    yield "|---|---:|---:|---:|"
    rows = content["rows"]
    for theirs, ours in zip(rows[::2], rows[1::2]):
        case = f", {theirs['case']}" if "case" in theirs else ""
        yield f"| {theirs['contender']}{case} | " + " | ".join(_figures(theirs)) + " |"
        ratios = (ours[key] / theirs[key] for key in ("median_s", "peak_bytes", "peak_extra_bytes"))
        cells = (f"{figure}, × {ratio:.2f}" for figure, ratio in zip(_figures(ours), ratios))
        yield f"| **{ours['contender']}**{case} | " + " | ".join(cells) + " |"


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    whole, step = (f"{row[key] / MIB:,.0f} MiB" for key in ("peak_bytes", "peak_extra_bytes"))
    return f"{row['median_s']:.3g} s", whole, step


def block(trainer: str) -> str:
    """Returns the generated part of a trainer's section, between its markers."""
    what, command = TRAINERS[trainer]
    content = load(f"{trainer}_patch", "cpu-*")
    lines = [
        f"<!-- {trainer}:begin -->",
        "<!-- made by `python -m bench.tables` from bench/results; edits here are lost -->",
        "",
    ]
    if content is None:
        lines.append(f"Before and after: not measured; `python -m bench.end_to_end.{command}` measures it.")
    else:
        steps = len(content["rows"][0]["samples_s"])
        note = f" {STAND_IN}" if content.get("stand_in") else ""
        lines += [f"Before and after, {what}, {content['label']}:", "", *table(content), ""]
        lines.append(f"<sub>{origin(content)} Medians of {steps} alternating steps.{note}</sub>")
    return "\n".join([*lines, "", f"<!-- {trainer}:end -->"])
