"""Draws a results file: the arms' errors and accuracy, and alignment against distillation by demonstrations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.reproduce.arms import MAIN
from bench.reproduce.figures import DRAWS, SHARES, Figures

# Okabe and Ito's palette: colour-blind readers and grey prints keep the colours apart; shapes and dashes differ too
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
FONT = 11
SHOWN = ("perception_error", "accuracy")
_SETTINGS = {
    "font.size": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # equal figures give equal bytes
    "svg.hashsalt": "reproduce",
}


def draw_all(content: Figures, stem: Path) -> list[Path]:
    """Draws the pictures beside a results file, and returns their paths: `<stem>_arms.svg`, `<stem>_curve.svg`.

    Args:
        content: the results file.
        stem: its path without the suffix.
    """
    made = []
    with plt.rc_context(_SETTINGS):
        if any(arm["part"] == MAIN for arm in content["arms"].values()):
            made.append(_arms(content, stem.with_name(f"{stem.name}_arms.svg")))
        if any(one["points"] for one in content["curve"]):
            made.append(_curve(content, stem.with_name(f"{stem.name}_curve.svg")))
    return made


def _arms(content: Figures, path: Path) -> Path:
    shown = [arm for arm in content["arms"].values() if arm["part"] == MAIN]
    figure, panels = plt.subplots(
        1, len(SHOWN), figsize=(11, 1.7 + 0.5 * len(shown)), sharey=True, layout="constrained", squeeze=False
    )
    for axes, share in zip(panels[0], SHOWN):
        for draw, shift, colour, marker in zip(DRAWS, (-0.15, 0.15), (BLUE, ORANGE), ("o", "s")):
            for row, arm in enumerate(shown):
                middle, error = arm["mean"][draw][share]
                by_seed = [one[draw][share] for one in arm["seeds"].values()]
                # the seeds, drawn under the mean
                axes.plot(by_seed, [row + shift] * len(by_seed), marker, color=colour, alpha=0.35, markersize=4)
                label = DRAWS[draw] if row == 0 else None
                axes.errorbar(
                    middle, row + shift, xerr=error, fmt=marker, color=colour, capsize=3, markersize=7, label=label
                )
        axes.set_title(_title(share), fontsize=FONT, fontweight="bold")
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    first = panels[0][0]
    first.set_yticks(range(len(shown)), [arm["title"] for arm in shown])
    first.invert_yaxis()
    first.set_xlim(left=0)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return _saved(figure, path, f"Test problems after each arm, RLVR by {content['algorithm'].upper()}")


def _curve(content: Figures, path: Path) -> Path:
    figure, panels = plt.subplots(len(DRAWS), len(SHOWN), figsize=(11, 7), sharex=True, layout="constrained")
    for row, draw in zip(panels, DRAWS):
        for axes, share in zip(row, SHOWN):
            (curve,) = [one for one in content["curve"] if (one["draw"], one["share"]) == (draw, share)]
            _lines(axes, content["arms"], curve)
            axes.set_title(f"{_title(share)}, {DRAWS[draw]}", fontsize=FONT, fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("curated demonstrations")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
    return _saved(figure, path, "Alignment against distillation on the same demonstrations, without RLVR")


def _lines(axes: Axes, arms: Mapping[str, Figures], curve: Figures) -> None:
    draw, share = curve["draw"], curve["share"]
    numbers = [one["demonstrations"] for one in curve["points"]]
    for side, colour, style, what in (("arm", BLUE, "o-", "alignment"), ("than", ORANGE, "s--", "distillation")):
        side_arms = [arms[one[side]] for one in curve["points"]]
        shares = [arm["mean"][draw][share] for arm in side_arms]
        # side by side, so that error bars do not hide each other
        places = [n * (0.97 if side == "arm" else 1.03) for n in numbers]
        errors: Any = [error or 0.0 for _, error in shares]
        axes.errorbar(
            places, [middle for middle, _ in shares], yerr=errors, fmt=style, color=colour, capsize=3, label=what
        )
        for x, arm in zip(places, side_arms):
            seeds = [one[draw][share] for one in arm["seeds"].values()]
            axes.plot([x] * len(seeds), seeds, style[0], color=colour, alpha=0.35, markersize=4)
    if curve["points"] and (before := arms.get(_parent(arms, curve["points"]))):
        axes.axhline(before["mean"][draw][share][0], color=GREY, linewidth=1, linestyle=":", label="SFT before both")
    # room for the text at the top
    axes.margins(y=0.16)
    for at in curve["crossings"]:
        axes.axvline(at, color="#000000", linewidth=1, linestyle="-.")
        axes.annotate(
            f" crossing at {at:.0f}", (at, 1), xycoords=("data", "axes fraction"), va="top", fontsize=FONT - 1
        )
    if not curve["crossings"]:
        axes.annotate("no crossing", (0.5, 1), xycoords="axes fraction", ha="center", va="top", fontsize=FONT - 1)
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _parent(arms: Mapping[str, Figures], points: Sequence[Figures]) -> str:
    return str(arms[points[0]["arm"]]["parent"])


def _title(share: str) -> str:
    return f"{SHARES[share]} ({'more' if share == 'accuracy' else 'less'} is better)"


def _saved(figure: Any, path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize=FONT + 2, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
