"""A duel between two programs that compute the same value with different peak memory, for the benchmarks' tests."""

import torch

from bench.versus import Duel, Rival

ELEMENTS = 32 * 2**20


def in_place(data):
    return lambda: {"double": torch.add(data, data)}


def by_copies(data):
    return lambda: {"double": (data + 1).mul(2).sub(2)}


DUELS = (
    Duel(
        op="doubling",
        label="",
        make=lambda: torch.ones(ELEMENTS),
        exact=lambda data: {"double": 2 * data},
        rivals=(Rival("in place", in_place, ours=True), Rival("by copies", by_copies)),
        tolerance=0,
    ),
)
