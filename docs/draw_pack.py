"""Draws docs/pack.png: the attention mask of a pack of two groups. `python docs/draw_pack.py` runs it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from prism_kernels.ops.prefix_attention.reference import visible
from prism_kernels.packing import Branch, Kind, PrefixGroup, PrefixPack, build_pack

IMAGE = 9
# a colour for each kind, which colour-blind readers can tell apart; the last is for unseen tokens
COLOURS = ("#8c8c8c", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f4f4f4")
NAMES = ("prompt", "image", "perception", "reasoning", "answer")
STRIP = 1.3


def example() -> tuple[PrefixPack, list[str]]:
    """Returns a pack of two groups, and the names of its prefixes and branches, in order."""
    groups, names = [], []
    for question, (prompt, grids, captions, thoughts) in enumerate(
        (
            ([1] + [IMAGE] * 4 + [1] * 3, [(1, 4, 4)], (3, 4, 4), (5, 3, 4)),
            ([1] * 4, [], (3, 2), (3, 4)),
        )
    ):
        branches = []
        names.append(f"prompt {question + 1}")
        last = len(captions) - 1
        for item, (caption, thought) in enumerate(zip(captions, thoughts)):
            who = "teacher" if item == last else f"student {item + 1}"
            pairs = (None, None) if item == last else (2 * last, 2 * last + 1)
            kinds = [Kind.REASONING] * (thought - 1) + [Kind.ANSWER] * 2
            branches += [
                Branch([2] * caption, Kind.PERCEPTION, pair=pairs[0]),
                Branch([3] * len(kinds), kinds, pair=pairs[1]),
            ]
            names += [f"{who}, caption", f"{who}, thinking and answer"]
        groups.append(PrefixGroup(prompt, branches, image_grids=grids))
    return build_pack(groups, image_token_id=IMAGE), names


def pieces(pack: PrefixPack) -> list[tuple[int, int]]:
    """Returns the first token and the end of each prefix and branch, in the pack's order."""
    prefix = torch.searchsorted(pack.cu_prefix[1:].long(), (pack.branch == -1).cumsum(0) - 1, right=True)
    piece = torch.where(pack.branch == -1, -1 - prefix, pack.branch)
    lengths = torch.unique_consecutive(piece, return_counts=True)[1]
    ends = lengths.cumsum(0)
    return list(zip((ends - lengths).tolist(), ends.tolist()))


def draw(pack: PrefixPack, names: list[str], axes: Axes) -> None:
    """Draws the mask, coloured by the kind of the seen token."""
    total = len(pack.input_ids)
    seen = torch.where(visible(pack), pack.kind, len(NAMES))
    axes.imshow(seen, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(NAMES))
    for line in range(total + 1):
        axes.plot([-0.5, total - 0.5], [line - 0.5] * 2, color="white", linewidth=0.6)
        axes.plot([line - 0.5] * 2, [-0.5, total - 0.5], color="white", linewidth=0.6)
    # the kind of each token, along both sides
    for token, kind in enumerate(pack.kind.tolist()):
        for corner in ((token - 0.5, -1 - STRIP), (-1 - STRIP, token - 0.5)):
            size = (1, STRIP) if corner[0] == token - 0.5 else (STRIP, 1)
            axes.add_patch(Rectangle(corner, *size, color=COLOURS[kind], linewidth=0, clip_on=False))
    for (begin, end), name in zip(pieces(pack), names, strict=True):
        axes.text(-2 - STRIP, (begin + end - 1) / 2, name, ha="right", va="center", fontsize=9)
        # a group begins with its prompt
        colour, width = ("#000000", 1.2) if name.startswith("prompt") else ("#999999", 0.6)
        for x, y in (([-1 - STRIP, total - 0.5], [begin - 0.5] * 2), ([begin - 0.5] * 2, [-1 - STRIP, total - 0.5])):
            if begin:
                axes.plot(x, y, color=colour, linewidth=width, clip_on=False)
    axes.text(-0.5, -2 - STRIP, "tokens that are seen", fontsize=10, fontweight="bold")
    axes.text(-2 - STRIP, -2 - STRIP, "tokens that see", fontsize=10, fontweight="bold", ha="right")
    scored = pack.last_index.tolist()
    axes.scatter(scored, scored, s=14, color="black", zorder=3)
    axes.set_xlim(-0.5, total - 0.5)
    axes.set_ylim(total - 0.5, -0.5)
    axes.axis("off")


def main() -> None:
    """Writes the picture beside this file."""
    pack, names = example()
    figure, axes = plt.subplots(figsize=(9.5, 8.6))
    draw(pack, names, axes)
    marks = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, NAMES)]
    marks += [plt.Line2D([], [], marker="o", markersize=4, color="black", linewidth=0, label="scored here")]
    axes.legend(
        handles=marks,
        title="kind of the token that is seen",
        loc="upper right",
        borderaxespad=0.8,
        framealpha=1,
        fontsize=10,
        title_fontsize=10,
    )
    figure.savefig(Path(__file__).with_name("pack.png"), dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
