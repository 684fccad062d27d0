"""Draws a result file: time, peak memory and error of each contender. `python -m bench.plot` redraws every plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.cases import TRAIN
from bench.results import MIB, RESULTS

# Okabe and Ito's palette: colour-blind readers and grey prints keep the colours apart
OURS, PLAIN, PEER, LINE = "#0072B2", "#999999", "#E69F00", "#000000"
FONT = 11
# README.md shows a plot of these contenders alone, narrow enough to be read at the width of a page
OVERVIEW = (
    "ours, C++",
    "ours, C++, cache_bytes=0",
    "PyTorch",
    "PyTorch, torch.compile",
    "TRL ChunkedLogProbFunction",
    "verl logprobs_from_logits",
)
OVERVIEW_NAME = "overview.png"


def draw(content: dict[str, Any], path: Path, only: Sequence[str] = ()) -> None:
    """Writes a PNG of the first case, forward and backward: time, memory, and the error on confident tokens.

    Args:
        content: the result file.
        path: where the PNG goes.
        only: the contenders to draw, in a narrow plot; empty: all of them, in a wide one.
    """
    case = content["cases"][0]
    rows = [r for r in content["rows"] if (r["case"], r["pass"]) == (case["name"], TRAIN)]
    if only:
        rows = [r for r in rows if r["contender"] in only]
    plt.rcParams.update({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False})
    figure, (time, memory, error) = plt.subplots(
        1,
        3,
        figsize=(11.5 if only else 15.5, 2.6 + 0.42 * len(rows)),
        sharey=True,
        width_ratios=(1.1, 1, 1),
        layout="constrained",
    )
    time.set_yticks(range(len(rows)), [r["contender"] for r in rows])
    time.invert_yaxis()
    products = "three torch.mm" if content["reference"] == "torch.mm" else f"a {content['reference']}"

    _bars(time, rows, [r.get("ratio") for r in rows], "{:.2f}")
    time.axvline(1, color=LINE, linewidth=1, linestyle="--")
    time.set_title(f"time over {products}\n(less is better)", fontsize=FONT, fontweight="bold")

    peaks = [r["peak_extra_bytes"] / MIB if "peak_extra_bytes" in r else None for r in rows]
    _bars(memory, rows, peaks, "{:,.0f}")
    memory.axvline(case["logits_bytes"] / MIB, color=LINE, linewidth=1, linestyle="--")
    memory.set_title(
        f"peak extra memory, MiB\n(dashed: the logits in fp32, {case['logits_bytes'] / MIB:,.0f})",
        fontsize=FONT,
        fontweight="bold",
    )

    _dots(error, rows, [r.get("errors", {}).get("gradient_confident") for r in rows])
    error.set_title(
        "gradient error, confident tokens\n(relative; 1 − p from 1e-9 to 1e-3)", fontsize=FONT, fontweight="bold"
    )

    for axes in (time, memory, error):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"{content['op']}, {TRAIN}, {case['label']}", fontsize=FONT + 3, fontweight="bold", x=0.01, ha="left"
    )
    figure.supxlabel(caption(content), fontsize=FONT - 2, color="#444444", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140 if only else 120)
    plt.close(figure)


def caption(content: dict[str, Any]) -> str:
    """Returns one line: the machine, the versions, the date and the way of measuring."""
    a_reference = content["reference"] if content["reference"] == "torch.mm" else f"a {content['reference']}"
    return f"{origin(content)} Medians of runs that alternate with {a_reference}."


def origin(content: dict[str, Any]) -> str:
    """Returns the machine, the versions and the date."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items() if name != "numpy")
    kept = "; malloc keeps freed memory" if content.get("keeps_memory") else ""
    return f"{content['machine']}; {versions}; {content['date']}{kept}."


def _colour(row: dict[str, Any]) -> str:
    return OURS if row["ours"] else PEER if row["package"] else PLAIN


def _bars(axes: Axes, rows: list[dict[str, Any]], values: list[float | None], form: str) -> None:
    bars = axes.barh(range(len(rows)), [v or 0 for v in values], color=[_colour(r) for r in rows], height=0.7)
    labels = [_reason(r) if v is None else form.format(v) for r, v in zip(rows, values)]
    for text in axes.bar_label(bars, labels, fontsize=FONT - 1, padding=4):
        # a dashed line may run through the label
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xlim(0, 1.18 * max([v for v in values if v is not None], default=1))


def _dots(axes: Axes, rows: list[dict[str, Any]], values: list[float | None]) -> None:
    axes.set_xscale("log")
    known = [max(v, 1e-9) for v in values if v is not None]
    low, high = min(known, default=1e-7) / 10, max(known, default=1.0)
    axes.set_xlim(low, high * (high / low) ** 0.35)
    for height, (row, value) in enumerate(zip(rows, values)):
        if value is None:
            axes.text(low, height, f" {_reason(row)}", va="center", fontsize=FONT - 1)
            continue
        axes.plot([low, value], [height, height], color=_colour(row), linewidth=2)
        axes.plot(value, height, "o", color=_colour(row), markersize=8)
        axes.text(value, height, f"   {value:.2g}", va="center", fontsize=FONT - 1)


def _reason(row: dict[str, Any]) -> str:
    return str(row["status"]).partition(":")[0]


def main() -> None:
    """Redraws the plots of every result file beside it."""
    paths = sorted(RESULTS.glob("*/*.json"))
    if not paths:
        raise SystemExit(f"bench.plot: no results under {RESULTS}; run `make bench` first")
    for path in paths:
        content = json.loads(path.read_text())
        # other files hold duels or patched trainers; figures with kept memory stand in one line of a page
        if "cases" not in content or content.get("keeps_memory"):
            continue
        draw(content, path.with_suffix(".png"))
        print(f"drew {path.with_suffix('.png')}")
        if content["op"] == "linear_logprob" and content["device"] == "cpu":
            draw(content, path.with_name(OVERVIEW_NAME), OVERVIEW)
            print(f"drew {path.with_name(OVERVIEW_NAME)}")


if __name__ == "__main__":
    main()
