"""How well scores tell better from worse: pairs won, gap, and within-group AUC, by channel.

N responses, P samples (groups).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prism.discriminator.branches import CHANNELS
from prism.discriminator.score import GroupScores
from prism_kernels import check

NAME = "channel_report"
# scores closer than this, relative to their size, differ by rounding: by where in a batch they were computed
TIE = 1e-5


@dataclass(frozen=True)
class ChannelReport:
    """What one channel's scores show. NaN where there was nothing to compare."""

    # valid pairs of a teacher and a response
    pairs: int
    # the share of pairs whose teacher scores higher; a tie counts a half, so that a constant score is at chance
    accuracy: float
    # mean of teacher - response
    gap: float
    # pairs of a right and a wrong response of one group, and the share that the right one wins
    compared: int
    auc: float


def channel_report(scores: GroupScores, right: Mapping[str, Tensor] | None = None) -> dict[str, ChannelReport]:
    """Returns the report of each channel.

    Args:
        scores: from `score_groups`.
        right: for a channel whose responses' rightness is known, (N,), bool. Pair accuracy alone misleads: a style
            that differs wins all pairs; within a group, right and wrong responses have the same style.
    """
    reports = {}
    for channel in CHANNELS:
        student = getattr(scores, channel)
        teacher = getattr(scores, f"teacher_{channel}")[scores.group]
        known = ~(teacher.isnan() | student.isnan())
        teacher, compared_with = teacher[known].double(), student[known].double()
        difference = teacher - compared_with
        labels = (right or {}).get(channel)
        auc, compared = (math.nan, 0) if labels is None else within_group_auc(student, labels, scores.group)
        pairs = len(difference)
        reports[channel] = ChannelReport(
            pairs,
            float(wins(teacher, compared_with).mean()) if pairs else math.nan,
            float(difference.mean()) if pairs else math.nan,
            compared,
            auc,
        )
    return reports


def within_group_auc(score: Tensor, right: Tensor, group: Tensor) -> tuple[float, int]:
    """Returns how often a right response outscores a wrong one of its group (a tie is a half), and of how many pairs.

    Args:
        score: (N,); NaN does not count.
        right: (N,), bool.
        group: (N,), which group each is of.
    """
    check.shape(NAME, "right", right, tuple(score.shape))
    known = ~score.isnan()
    score, right, group = (x[known] for x in (score.double(), right.to(score.device), group))
    winners, losers = (torch.nonzero(mask)[:, 0] for mask in (right, ~right))
    won, pairs = 0.0, 0
    # by group: all pairs at once would be N * N numbers
    for members in group.unique():
        above, below = score[winners[group[winners] == members]], score[losers[group[losers] == members]]
        if len(above) and len(below):
            won += float(wins(above[:, None], below).sum())
            pairs += len(above) * len(below)
    return (won / pairs if pairs else math.nan), pairs


def wins(a: Tensor, b: Tensor) -> Tensor:
    """Returns 1 where a is the higher, 0 where b is, a half where they are equal up to rounding."""
    size = torch.maximum(a.abs(), b.abs()).clamp(min=1.0)
    return ((a > b + TIE * size).double() - (b > a + TIE * size).double() + 1) / 2
