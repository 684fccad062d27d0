"""One update of the discriminator on pairs of a response and its teacher's, and reports on the pairs that it wins.

The step returns the scores of its own forward pass: they are the rewards of alignment, so nothing is scored twice.
P samples, N responses, E experts, L layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from prism.discriminator.model import Discriminator
from prism.discriminator.score import CHANNELS, GroupScores, PreparedGroups, score_prepared
from prism.runtime.optimiser import GuardedOptimiser
from prism_kernels import PairMetrics, Routing, check, pair_loss
from prism_kernels.integrations.transformers.moe_block import MoeBlock, collect_routing
from prism_kernels.packing import Kind

if TYPE_CHECKING:
    from prism.config import DiscriminatorSettings

NO_PAIR = "no valid pair"


class StepResult(NamedTuple):
    """What a step measured. Tensors are on the discriminator's device, without gradient."""

    # raw scores from before the update
    scores: GroupScores
    # summed over the channels
    pair_loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    # by channel
    pairs: dict[str, PairMetrics]
    # (L, kinds, E): how many tokens of each kind chose each expert; None without experts
    expert_counts: Tensor | None
    # NaN if the update was skipped before the gradient was looked at
    grad_norm: float
    # why the update was skipped; None: it was applied
    skipped: str | None

    def metrics(self) -> dict[str, Any]:
        """Returns what the log shows of a step."""
        values: dict[str, Any] = {
            "d_loss": float(self.pair_loss),
            "d_aux": float(self.aux_loss),
            "d_grad_norm": self.grad_norm,
        }
        for channel, report in channel_report(self.scores).items():
            values[f"score_{channel}"] = float(getattr(self.scores, channel).nanmean())
            values |= {f"d_accuracy_{channel}": report.accuracy, f"d_gap_{channel}": report.gap}
        if self.expert_counts is not None:
            # the top layer routes scored tokens only, so it is left out
            counts = self.expert_counts[:-1].sum(0)
            share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
            values["d_expert_load"] = {kind.name.lower(): share[kind].tolist() for kind in Kind}
            for name, kind in (("perception", Kind.PERCEPTION), ("reasoning", Kind.REASONING)):
                row = counts[kind]
                values[f"d_top_expert_{name}"] = float(row.max() / row.sum().clamp(min=1))
        return values


class _Losses(NamedTuple):
    pair: Tensor
    aux: Tensor
    z: Tensor


def discriminator_step(
    model: Discriminator,
    prepared: PreparedGroups,
    optimiser: GuardedOptimiser,
    settings: "DiscriminatorSettings",
) -> StepResult:
    """Runs forward and backward pack by pack and updates once; returns the scores and the measurements.

    The pair loss is the mean over all valid pairs of both channels, the z loss the mean over all tokens, independent
    of how groups are packed. The load-balance loss is a product of two means over tokens, so the loss of all packs
    together would need every expert count before the first backward pass: each pack has its own, weighted by its
    tokens. The update is skipped without a valid pair, and where a score, the loss or the gradient is not finite.

    Args:
        model: the discriminator.
        prepared: groups from `prepare_groups`.
        optimiser: the model's.
        settings: the loss.
    """
    device = model.value_head.weight.device
    valid = prepared.pairs.to(device)
    total = int(prepared.pairs.sum())
    tokens = sum(len(part.pack.input_ids) for part in prepared.packs)
    scored = sum(len(part.slots) for part in prepared.packs)
    parts: list[GroupScores] = []
    losses = _Losses(*(torch.zeros((), device=device) for _ in _Losses._fields))
    metrics: dict[str, PairMetrics] = {}
    counts: Tensor | None = None
    with optimiser.step(lambda: _saved(prepared)) as update:
        for index, part in enumerate(prepared.packs):
            with torch.set_grad_enabled(total > 0):
                scores, routings = _scores(model, prepared, index)
                pair, pair_metrics = pairwise_losses(scores, valid, total or 1, settings)
                aux = len(part.pack.input_ids) / tokens * _balance_loss(routings, device)
                z = _z_loss(routings, device, {len(part.pack.input_ids): tokens, len(part.slots): scored})
                loss = pair + settings.aux_coef * aux + settings.z_coef * z
            if total:
                update.backward(loss)
            losses = _Losses(*(a + b.detach() for a, b in zip(losses, (pair, aux, z))))
            metrics = {name: metrics[name] + pair_metrics[name] for name in CHANNELS} if metrics else pair_metrics
            if routings:
                here = torch.stack([r.counts for r in routings])
                counts = here if counts is None else counts + here
            parts.append(_detached(scores))
        merged = _merged(model, prepared, parts)
        columns = (merged.perception, merged.reasoning, merged.teacher_perception, merged.teacher_reasoning)
        if sum(int(column.isfinite().sum()) for column in columns) < scored:
            update.skip("a score is not finite")
        elif not total:
            # groups without a pair are no numerical failure
            update.skip(NO_PAIR, failed=False)
        elif not math.isfinite(float(sum(losses))):
            values = ", ".join(f"{name} {float(value)}" for name, value in losses._asdict().items())
            update.skip(f"the loss is not finite: {values}")
    return StepResult(merged, *losses, metrics, counts, update.grad_norm, update.skipped)


def _saved(prepared: PreparedGroups) -> dict[str, Any]:
    """Returns the packs, the place of each branch's score, and the pairs, to look at after a failed update."""
    return {
        "packs": [
            {
                "input_ids": part.pack.input_ids,
                "pixel_values": part.pixel_values,
                "image_grid_thw": part.image_grid_thw,
                "slots": part.slots,
            }
            for part in prepared.packs
        ],
        "group": prepared.group,
        "reason": list(prepared.reason),
        "teacher_reason": list(prepared.teacher_reason),
    }


def pairwise_losses(
    scores: GroupScores, valid: Tensor, pairs: int, settings: "DiscriminatorSettings"
) -> tuple[Tensor, dict[str, PairMetrics]]:
    """Returns the sum of both channels' pair losses, each over `pairs`, and their metrics.

    Args:
        scores: scores of responses and teachers; NaN for responses of another pack, which do not count.
        valid: (N,), whether a response is compared with a teacher.
        pairs: the losses are divided by this number.
        settings: the loss.
    """
    total: Tensor | None = None
    metrics = {}
    for channel in CHANNELS:
        student, teacher = getattr(scores, channel), getattr(scores, f"teacher_{channel}")
        loss, metrics[channel] = pair_loss(
            teacher,
            student,
            group=scores.group,
            valid=valid & ~student.detach().isnan(),
            denominator=float(pairs),
            regularisation=settings.regularisation,
            soft_clip=settings.soft_clip,
        )
        total = loss if total is None else total + loss
    assert total is not None
    return total, metrics


def _scores(model: Discriminator, prepared: PreparedGroups, index: int) -> tuple[GroupScores, list[Routing]]:
    if not any(isinstance(module, MoeBlock) for module in model.modules()):
        return score_prepared(model, prepared, [index]), []
    with collect_routing(model) as routings:
        return score_prepared(model, prepared, [index]), routings


def _balance_loss(routings: Sequence[Routing], device: torch.device) -> Tensor:
    """Returns the load-balance loss, averaged over the layers; 0 without experts."""
    losses = [r.aux_loss for r in routings if r.aux_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=device)


def _z_loss(routings: Sequence[Routing], device: torch.device, totals: dict[int, int]) -> Tensor:
    """Returns a pack's share of the z loss, averaged over the layers; 0 without experts.

    Args:
        routings: routing of each layer.
        device: device of the result.
        totals: tokens of all packs, by the tokens that a layer of this pack computes: the top layer computes only
            the scored ones.
    """
    losses = [len(r.index) / totals[len(r.index)] * r.z_loss for r in routings if r.z_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=device)


def _detached(scores: GroupScores) -> GroupScores:
    return _each(scores, lambda name: getattr(scores, name).detach())


def _merged(model: Discriminator, prepared: PreparedGroups, parts: Sequence[GroupScores]) -> GroupScores:
    """Joins the scores of all packs; each pack has NaN where another has a score."""
    if not parts:
        with torch.no_grad():
            return score_prepared(model, prepared, [])

    def join(name: str) -> Tensor:
        first, *others = (getattr(part, name) for part in parts)
        return reduce(lambda joined, column: torch.where(joined.isnan(), column, joined), others, first)

    return _each(parts[0], join)


def _each(scores: GroupScores, change: Callable[[str], Tensor]) -> GroupScores:
    return scores._replace(
        perception=change("perception"),
        reasoning=change("reasoning"),
        teacher_perception=change("teacher_perception"),
        teacher_reasoning=change("teacher_reasoning"),
    )


# scores closer than this, relative to their size, differ only by rounding, which depends on the batch
TIE = 1e-5


@dataclass(frozen=True)
class ChannelReport:
    """Figures of one channel's scores; NaN if there was nothing to compare."""

    # number of valid pairs of a teacher and a response
    pairs: int
    # share of pairs in which the teacher scores higher; a tie counts half, so that a constant score is at chance
    accuracy: float
    # mean of teacher - response
    gap: float
    # number of pairs of a right and a wrong response of one group, and the share in which the right one wins
    compared: int
    auc: float


def channel_report(scores: GroupScores, right: Mapping[str, Tensor] | None = None) -> dict[str, ChannelReport]:
    """Returns the report of each channel.

    Args:
        scores: scores from `score_groups`.
        right: (N,), bool, whether a response is right, for each channel in which this is known. Pair accuracy alone
            misleads, since another style can win all pairs; responses of one group have the same style.
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
    """Returns the share of pairs of one group in which the right response wins (a tie counts half), and their number.

    Args:
        score: (N,); NaN does not count.
        right: (N,), bool.
        group: (N,), the group of each.
    """
    check.shape("channel_report", "right", right, tuple(score.shape))
    known = ~score.isnan()
    score, right, group = (x[known] for x in (score.double(), right.to(score.device), group))
    winners, losers = (torch.nonzero(mask)[:, 0] for mask in (right, ~right))
    won, pairs = 0.0, 0
    # group by group, since all pairs at once would be N * N numbers
    for members in group.unique():
        above, below = score[winners[group[winners] == members]], score[losers[group[losers] == members]]
        if len(above) and len(below):
            won += float(wins(above[:, None], below).sum())
            pairs += len(above) * len(below)
    return (won / pairs if pairs else math.nan), pairs


def wins(a: Tensor, b: Tensor) -> Tensor:
    """Returns 1 where a is higher, 0 where b is higher, and 1/2 where they are equal up to rounding."""
    size = torch.maximum(a.abs(), b.abs()).clamp(min=1.0)
    return ((a > b + TIE * size).double() - (b > a + TIE * size).double() + 1) / 2
