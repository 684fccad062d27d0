"""How far a policy has drifted from its teachers on the same prompts, in perception and in reasoning."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from prism_kernels.grammar import Sections, caption_items, reasoning_steps, split_response

# the number whose distribution is compared, by channel
COUNTS: dict[str, Callable[[Sections], int]] = {
    "perception": lambda sections: caption_items(sections.caption),
    "reasoning": lambda sections: reasoning_steps(sections.think),
}


def drift(texts: Sequence[str], teachers: Sequence[str | None]) -> dict[str, float]:
    """Returns the share of valid responses, and the distance from the teachers in each channel.

    The distance is Wasserstein's, between the numbers of caption items (perception) and of reasoning steps (reasoning)
    in the valid responses. It is NaN where there is nothing to compare.

    Args:
        texts: the policy's responses.
        teachers: the teachers' responses, one for each prompt; None for a prompt without one.
    """
    student, teacher = (
        [sections for text in part if text is not None and (sections := split_response(text)) is not None]
        for part in (texts, teachers)
    )
    distances = {
        f"drift_{channel}": wasserstein([count(one) for one in student], [count(one) for one in teacher])
        for channel, count in COUNTS.items()
    }
    return {"valid": len(student) / max(1, len(texts)), **distances}


def wasserstein(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the Wasserstein distance of two samples of numbers; NaN if one is empty."""
    if not (a and b):
        return math.nan
    a, b = sorted(a), sorted(b)
    return sum(
        abs(bisect_right(a, low) / len(a) - bisect_right(b, low) / len(b)) * (high - low)
        for low, high in pairwise(sorted({*a, *b}))
    )
