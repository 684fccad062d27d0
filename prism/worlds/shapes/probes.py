"""Probes of the shapes world: two texts of one style, of which one is wrong in one thing, as the careless teacher is.

What tells them apart looks at their content: their phrasing is the same.
"""

from dataclasses import replace
from random import Random

from prism.worlds.shapes.teachers import mistaken, write, wrong_answer
from prism.worlds.shapes.world import ShapesSample
from prism_kernels.grammar import Sections

# the errors of perception that are probed, in turns
CHANGES = ("colour", "kind", "dropped", "place")


def curated_text(sample: ShapesSample, seed: int = 0) -> str:
    """Returns the curated teacher's response, in a phrasing that follows from the sample and the seed."""
    return _curated(sample, seed).text


def wrong_caption(sample: ShapesSample, change: str, seed: int = 0) -> str:
    """Returns that response with one item of its caption changed; what it reasons and answers is as before.

    Args:
        sample: of the world.
        change: the kind of mistake, see CHANGES. Of a single item dropped means another colour.
        seed: of phrasing and mistake.
    """
    if change not in CHANGES:
        raise ValueError(f"wrong_caption: expected change to be one of {', '.join(map(repr, CHANGES))}, got {change!r}")
    seen = mistaken(change, _random(sample, seed, "mistake"), sample.scene.items)
    caption = write("curated", _random(sample, seed, "phrasing"), seen, sample.question, sample.answer).caption
    return replace(_curated(sample, seed), caption=caption).text


def wrong_conclusion(sample: ShapesSample, seed: int = 0) -> str:
    """Returns that response with a wrong last step and answer; its caption and its evidence are as before."""
    wrong = wrong_answer(_random(sample, seed, "mistake"), sample.question, frozenset({sample.answer}))
    return write("curated", _random(sample, seed, "phrasing"), sample.scene.items, sample.question, wrong).text


def _curated(sample: ShapesSample, seed: int) -> Sections:
    return write("curated", _random(sample, seed, "phrasing"), sample.scene.items, sample.question, sample.answer)


def _random(sample: ShapesSample, seed: int, what: str) -> Random:
    return Random(f"{sample.id}/{seed}/{what}")
