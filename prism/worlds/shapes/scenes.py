"""Scenes of coloured shapes on a 3x3 grid, and their images.

N images, H height and W width of an image, S side of a cell in pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

GRID = 3
# two patches of 16 pixels, which the vision tower merges into one token
CELL = 32
SIDE = GRID * CELL
BACKGROUND = (245, 245, 245)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "green": (60, 165, 70),
    "teal": (20, 160, 160),
    "blue": (45, 95, 215),
    "purple": (140, 65, 190),
}
KINDS = ("circle", "square", "triangle", "diamond")
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
MOST_ITEMS = 5
# by number of items; few scenes have one item, so even a low weight repeats each of them often
ITEM_WEIGHTS = (1, 4, 5, 5, 5)

_RADII = (9.0, 11.0, 13.0)
_SHIFTS = (-2, -1, 0, 1, 2)
_SAMPLES = 4

Bytes = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Item:
    """A shape in a cell of the grid, cells counted in reading order."""

    cell: int
    colour: str
    kind: str

    @property
    def place(self) -> str:
        """The cell's name."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """One to five items, in reading order, no two in a cell."""

    items: tuple[Item, ...]

    @cached_property
    def key(self) -> str:
        """A text that identifies the scene."""
        return ";".join(f"{item.colour} {item.kind} {item.place}" for item in self.items)

    @cached_property
    def digest(self) -> bytes:
        """64 bytes that depend on the scene alone and decide its split and the look of its image."""
        return hashlib.blake2b(self.key.encode()).digest()


def pick(rng: Random, options: Sequence[T]) -> T:
    """Returns one of the options, all equally likely.

    Only `random()` of Python's generator gives the same numbers in every Python version.
    """
    return options[int(rng.random() * len(options))]


def random_scene(rng: Random) -> Scene:
    """Returns a scene of one to five shapes."""
    counts = [count for count, weight in enumerate(ITEM_WEIGHTS, 1) for _ in range(weight)]
    free = list(range(GRID * GRID))
    items = []
    for _ in range(pick(rng, counts)):
        cell = free.pop(int(rng.random() * len(free)))
        items.append(Item(cell, pick(rng, tuple(COLOURS)), pick(rng, KINDS)))
    return Scene(tuple(sorted(items)))


def draw(scenes: Sequence[Scene]) -> Bytes:
    """Returns the images, [N, H, W, 3]. Shapes vary in size and position, but a scene always looks the same."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.uint8)
    images[:] = BACKGROUND
    colours, kinds = {c: i for i, c in enumerate(COLOURS)}, {k: i for i, k in enumerate(KINDS)}
    placed = [
        (n, *divmod(item.cell, GRID), colours[item.colour], kinds[item.kind], *_looks(scene, i))
        for n, scene in enumerate(scenes)
        for i, item in enumerate(scene.items)
    ]
    if placed:
        n, row, column, colour, kind, radius, down, right = np.array(placed).T
        # [N, GRID, S, GRID, S, 3], a view
        cells = images.reshape(len(scenes), GRID, CELL, GRID, CELL, 3)
        cells[n, row, :, column] = _tiles()[colour, kind, radius, down, right]
    return images


def _looks(scene: Scene, index: int) -> tuple[int, int, int]:
    size, down, right = scene.digest[3 * index + 1 : 3 * index + 4]
    return size % len(_RADII), down % len(_SHIFTS), right % len(_SHIFTS)


@cache
def _tiles() -> Bytes:
    """Returns the image of a cell for each colour, kind, size and shift, [6, 4, 3, 5, 5, S, S, 3]."""
    centres = (np.arange(CELL * _SAMPLES) + 0.5) / _SAMPLES - CELL / 2
    masks = np.empty((len(KINDS), len(_RADII), len(_SHIFTS), len(_SHIFTS), CELL, CELL), dtype=np.float32)
    for r, radius in enumerate(_RADII):
        for i, down in enumerate(_SHIFTS):
            for j, right in enumerate(_SHIFTS):
                y, x = (centres - down)[:, None], (centres - right)[None, :]
                # in the order of KINDS; the square is a little smaller, so that area alone does not tell kinds apart
                inside = (
                    x * x + y * y <= radius * radius,
                    np.maximum(abs(x), abs(y)) <= 0.85 * radius,
                    (y <= 0.75 * radius) & (y >= 2 * abs(x) - radius),
                    abs(x) + abs(y) <= radius,
                )
                for k, mask in enumerate(inside):
                    masks[k, r, i, j] = mask.reshape(CELL, _SAMPLES, CELL, _SAMPLES).mean((1, 3))
    paint, paper = np.array(list(COLOURS.values()), dtype=np.float32), np.array(BACKGROUND, dtype=np.float32)
    alpha = masks[None, ..., None]
    return np.rint(paper + alpha * (paint.reshape(-1, 1, 1, 1, 1, 1, 1, 3) - paper)).astype(np.uint8)
