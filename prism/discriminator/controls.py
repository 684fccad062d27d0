"""Shortcut controls: how well a discriminator tells pairs apart from less than it should need.

A discriminator that wins pairs by a property that no policy can change, such as the identity of the last token, gives
no signal. Each control scores the same pairs on a reduced view: an accuracy above one half measures the shortcut.
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
    """Returns a segment's last token, which all segments share: every pair is a tie."""
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
    """Returns the samples with images, each with the images of another sample that has as many.

    A sample without such a partner is left out. Perception should be at chance on the wrong images; an accuracy above
    that comes from the text alone.
    """
    by_count: dict[int, list[Sample]] = {}
    for sample in samples:
        # an encoded prompt already holds its images
        if sample.images and not isinstance(sample.prompt, EncodedPrompt):
            by_count.setdefault(len(sample.images), []).append(sample)
    swapped = []
    for group in by_count.values():
        if len(group) > 1:
            partners = [*group[1:], group[0]]
            swapped += [replace(sample, images=partner.images) for sample, partner in zip(group, partners)]
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
    """Returns the report of each channel for the unchanged pairs (`as it is`), and under each control.

    Args:
        model: the discriminator.
        samples: samples with teachers.
        encoder: see `score_groups`.
        limits: see `score_groups`.
        views: functions that reduce each segment, by name.
        style_equal: pairs whose texts differ only in content; the accuracy on them should stay above chance.
        right: rightness of the samples' responses, see `channel_report`; for the unchanged pairs only.
    """
    if not any(sample.teacher is not None for sample in samples):
        check.fail(NAME, "samples with a teacher to compare with", "none")

    def report(
        chosen: Sequence[Sample], view: View | None = None, right: Mapping[str, Tensor] | None = None
    ) -> dict[str, ChannelReport]:
        prepared = prepare_groups(chosen, encoder, limits, images=model.images, view=view)
        return channel_report(score_prepared(model, prepared), right)

    reports = {"as it is": report(samples, right=right)}
    reports |= {name: report(samples, view) for name, view in views.items()}
    if model.images and (swapped := swap_images(samples)):
        reports["swapped images"] = report(swapped)
    if style_equal:
        reports["equal style"] = report(style_equal)
    return reports
