"""Shortcut controls: what a discriminator still knows when it is shown less than it should need.

A discriminator that wins pairs by what no policy can change, such as the identity of the last token, gives no signal.
Each control scores the same pairs on a reduced view; what is left above one half is what the view alone gives away.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample, ScoreLimits, Segment, prepare_groups, score_prepared
from prism.discriminator.training import ChannelReport, channel_report
from prism.models.prompts import EncodedPrompt, PromptEncoder
from prism_kernels import check

NAME = "shortcut_controls"

View = Callable[[Segment], Segment]


def last_token_alone(segment: Segment) -> Segment:
    """Returns a segment's last token: the same for all, so that every pair is a tie."""
    return Segment(segment.token_ids[-1:], segment.kind[-1:])


def first_token_alone(segment: Segment) -> Segment:
    """Returns a segment's first token, which begins its opening tag."""
    return Segment(segment.token_ids[:1], segment.kind[:1])


def first_half(segment: Segment) -> Segment:
    """Returns the first half of a segment and its last token."""
    kept = len(segment.token_ids) // 2
    return Segment(segment.token_ids[:kept] + segment.token_ids[-1:], segment.kind[:kept] + segment.kind[-1:])


VIEWS: dict[str, View] = {
    "last token alone": last_token_alone,
    "first token alone": first_token_alone,
    "first half of the text": first_half,
}


def swap_images(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples that have images, each with those of the next that has as many; one without such is left out.

    Perception judged on the wrong image should be at chance; what is left is judged by the text alone.
    """
    by_count: dict[int, list[Sample]] = {}
    for sample in samples:
        # an encoded prompt holds its images already
        if sample.images and not isinstance(sample.prompt, EncodedPrompt):
            by_count.setdefault(len(sample.images), []).append(sample)
    swapped = []
    for alike in by_count.values():
        if len(alike) > 1:
            others = [*alike[1:], alike[0]]
            swapped += [replace(sample, images=other.images) for sample, other in zip(alike, others)]
    return swapped


@torch.no_grad()
def shortcut_controls(
    model: Discriminator,
    samples: Sequence[Sample],
    encoder: PromptEncoder,
    limits: ScoreLimits | None = None,
    *,
    views: Mapping[str, View] = VIEWS,
    style_equal: Sequence[Sample] = (),
    right: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, ChannelReport]]:
    """Returns the report of each channel for the pairs as they are, and under each control.

    Args:
        model: the discriminator.
        samples: each with a teacher.
        encoder: see `score_groups`.
        limits: see `score_groups`.
        views: what is shown of each segment, by name.
        style_equal: pairs whose texts differ in content alone, if there are such: here it should stay above chance.
        right: of the samples' responses, see `channel_report`; for the pairs as they are.
    """
    if not any(sample.teacher is not None for sample in samples):
        check.fail(NAME, "samples with a teacher to compare with", "none")

    def report(
        chosen: Sequence[Sample], view: View | None = None, right: Mapping[str, Tensor] | None = None
    ) -> dict[str, ChannelReport]:
        prepared = prepare_groups(chosen, encoder, limits, images=model.images, view=view)
        return channel_report(score_prepared(model, prepared), right)

    found = {"as it is": report(samples, right=right)}
    found |= {name: report(samples, view) for name, view in views.items()}
    if model.images and (swapped := swap_images(samples)):
        found["swapped images"] = report(swapped)
    if style_equal:
        found["equal style"] = report(style_equal)
    return found
