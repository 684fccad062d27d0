"""Where the pieces of a pack lie. P groups, S branches, T tokens; a piece is a prefix or a branch."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.packing import Layout


class Piece(NamedTuple):
    """Consecutive tokens that attend causally to themselves; and the prefix that they all see (empty for a prefix)."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int


class Family(NamedTuple):
    """A group that has both a prefix and branches: its branches' tokens lie directly behind the prefix."""

    prefix_start: int
    start: int
    end: int


def pieces(layout: Layout) -> list[Piece]:
    """Returns the pieces in their order in T; empty prefixes too."""
    found = []
    start = 0
    lengths = iter(layout.branch)
    for prefix, branches in zip(layout.prefix, layout.branches):
        prefix_start = start
        found.append(Piece(start, prefix, start, 0))
        start += prefix
        for _ in range(branches):
            length = next(lengths)
            found.append(Piece(start, length, prefix_start, prefix))
            start += length
    return found


def families(layout: Layout) -> list[Family]:
    """Returns the groups in which queries of branches see a prefix."""
    found: list[Family] = []
    for piece in pieces(layout):
        if piece.prefix_length == 0 or piece.length == 0:
            continue
        start, end = piece.start, piece.start + piece.length
        if found and found[-1].prefix_start == piece.prefix_start:
            found[-1] = found[-1]._replace(end=end)
        else:
            found.append(Family(piece.prefix_start, start, end))
    return found


# the layers of a model share one pack, forward and backward
@lru_cache(maxsize=8)
def plan(layout: Layout) -> tuple[tuple[Tensor, ...], tuple[Family, ...]]:
    """Returns the rows (n, L) of the n pieces of each length L > 0, shortest first, and the families."""
    starts: dict[int, list[int]] = {}
    for piece in pieces(layout):
        starts.setdefault(piece.length, []).append(piece.start)
    starts.pop(0, None)
    rows = (torch.tensor(places)[:, None] + torch.arange(length) for length, places in sorted(starts.items()))
    return tuple(rows), tuple(families(layout))
