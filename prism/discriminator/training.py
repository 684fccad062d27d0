"""One optimiser step of the discriminator on pairs, from warm-up data or from rollouts against their teacher.

P samples, N responses, E experts, L layers. The scores of the step's own forward pass are returned: they are the
rewards of an alignment step, so that nothing is scored twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from prism.discriminator.branches import CHANNELS
from prism.discriminator.model import Discriminator
from prism.discriminator.score import GroupScores, PreparedGroups, score_prepared
from prism_kernels import PairMetrics, Routing, check, pair_loss
from prism_kernels.integrations.transformers.moe_block import MoeBlock, collect_routing

NAME = "discriminator_step"
NO_PAIR = "no valid pair"


@dataclass(frozen=True)
class StepSettings:
    """What the loss is made of.

    Args:
        aux_coef: the factor of the load-balance loss, the mean over the layers.
        z_coef: the factor of the router's z loss, the mean over the layers.
        regularisation: see `pair_loss`: it keeps raw scores bounded.
        soft_clip: see `pair_loss`; None: no clip.
        max_grad_norm: the gradient is scaled down to this norm.
    """

    aux_coef: float = 0.01
    z_coef: float = 0.0
    regularisation: float = 1e-3
    soft_clip: float | None = 10.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("aux_coef", "z_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                check.fail(NAME, f"{name} >= 0 and finite", getattr(self, name))
        check.positive(NAME, "max_grad_norm", self.max_grad_norm)


class StepResult(NamedTuple):
    """What a step did. Tensors are on the discriminator's device, without gradient."""

    # raw, as they were before the step
    scores: GroupScores
    # the sum over the channels
    pair_loss: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    # by channel
    pairs: dict[str, PairMetrics]
    # (L, kinds, E), the tokens of each kind that chose each expert; None without experts
    expert_counts: Tensor | None
    # NaN where no step was taken
    grad_norm: float
    # why no step was taken; None: it was
    skipped: str | None


class _Losses(NamedTuple):
    pair: Tensor
    aux: Tensor
    z: Tensor


def discriminator_step(
    model: Discriminator,
    prepared: PreparedGroups,
    optimiser: Optimizer,
    settings: StepSettings | None = None,
    *,
    pairs: int | None = None,
) -> StepResult:
    """Runs forward and backward pack by pack and takes one step; returns the scores and what was measured.

    The pair loss is the mean over all valid pairs of both channels' losses, and the z loss that over all tokens,
    whatever the packs; where no pair is valid no step is taken, and neither where a score, the loss or the gradient is
    not finite. The load-balance loss is that of each pack, weighted by its tokens: a product of two means over tokens,
    which of all packs together would need the experts' counts before the first backward pass, and so another forward.

    Args:
        model: the discriminator.
        prepared: from `prepare_groups`.
        optimiser: over the model's parameters.
        settings: the loss.
        pairs: the number of valid pairs on all ranks; None: those of `prepared`.
    """
    settings = settings or StepSettings()
    device = model.value_head.weight.device
    valid = prepared.pairs.to(device)
    total = int(prepared.pairs.sum()) if pairs is None else pairs
    tokens = sum(len(part.pack.input_ids) for part in prepared.packs)
    scored = sum(len(part.slots) for part in prepared.packs)
    optimiser.zero_grad(set_to_none=True)
    parts: list[GroupScores] = []
    losses = _Losses(*(torch.zeros((), device=device) for _ in _Losses._fields))
    metrics: dict[str, PairMetrics] = {}
    counts: Tensor | None = None
    for index, part in enumerate(prepared.packs):
        with torch.set_grad_enabled(total > 0):
            scores, routings = _scores(model, prepared, index)
            pair, found = pairwise_losses(scores, valid, total or 1, settings)
            aux = len(part.pack.input_ids) / tokens * _balance_loss(routings, device)
            z = _z_loss(routings, device, {len(part.pack.input_ids): tokens, len(part.slots): scored})
            loss = pair + settings.aux_coef * aux + settings.z_coef * z
        if total:
            loss.backward()
        losses = _Losses(*(a + b.detach() for a, b in zip(losses, (pair, aux, z))))
        metrics = found if not metrics else {name: metrics[name] + found[name] for name in CHANNELS}
        if routings:
            here = torch.stack([r.counts for r in routings])
            counts = here if counts is None else counts + here
        parts.append(_detached(scores))
    scores = _merged(model, prepared, parts)
    columns = (scores.perception, scores.reasoning, scores.teacher_perception, scores.teacher_reasoning)
    finite = sum(int(column.isfinite().sum()) for column in columns) == scored
    norm, skipped = _take_step(model, optimiser, settings, losses, total, finite)
    return StepResult(scores, *losses, metrics, counts, norm, skipped)


def pairwise_losses(
    scores: GroupScores, valid: Tensor, pairs: int, settings: StepSettings
) -> tuple[Tensor, dict[str, PairMetrics]]:
    """Returns the sum of both channels' pair losses, each over `pairs`, and their metrics.

    Args:
        scores: of responses and teachers; those of another pack are NaN and do not count.
        valid: (N,), the responses that are compared with a teacher.
        pairs: what the losses are divided by.
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
    """Returns the mean over the layers of the load-balance loss; 0 without experts."""
    losses = [r.aux_loss for r in routings if r.aux_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=device)


def _z_loss(routings: Sequence[Routing], device: torch.device, totals: dict[int, int]) -> Tensor:
    """Returns a pack's share of the mean over the layers of the z loss; 0 without experts.

    Args:
        routings: of the layers.
        device: of the result.
        totals: of each number of tokens that a layer of this pack may have, how many it has in all packs: the top
            layer computes the scored ones alone.
    """
    losses = [len(r.index) / totals[len(r.index)] * r.z_loss for r in routings if r.z_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=device)


def _take_step(
    model: Discriminator, optimiser: Optimizer, settings: StepSettings, losses: _Losses, pairs: int, finite: bool
) -> tuple[float, str | None]:
    if not finite:
        optimiser.zero_grad(set_to_none=True)
        return math.nan, "a score is not finite"
    if not pairs:
        return math.nan, NO_PAIR
    if not math.isfinite(float(sum(losses))):
        optimiser.zero_grad(set_to_none=True)
        return math.nan, f"the loss is not finite: {', '.join(f'{n} {float(v)}' for n, v in losses._asdict().items())}"
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
    if not math.isfinite(norm):
        optimiser.zero_grad(set_to_none=True)
        return norm, f"the gradient's norm is not finite: {norm}"
    optimiser.step()
    return norm, None


def _detached(scores: GroupScores) -> GroupScores:
    return _each(scores, lambda name: getattr(scores, name).detach())


def _merged(model: Discriminator, prepared: PreparedGroups, parts: Sequence[GroupScores]) -> GroupScores:
    """Returns the scores of all packs, each of which has NaN where another has a score."""
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
