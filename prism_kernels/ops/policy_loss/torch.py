"""The policy loss and its gradient in plain torch: analytic, so that what is clipped or masked is 0 and not 0 * inf.

T tokens, S sequences. Three steps that `linear_policy_loss` also takes one by one: what each token weighs, the weights
of the rollout correction, and the loss itself with dL/dlogp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.policy_loss.options import Options


class Segments(NamedTuple):
    """Which tokens make a sequence, and which of them count."""

    cu_seqlens: Tensor
    # [T] the sequence of each token
    sequence: Tensor
    # [T] the valid tokens; None: all
    mask: Tensor | None
    # [S] the number of valid tokens
    counts: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, mask: Tensor | None, tokens: int, dtype: torch.dtype) -> "Segments":
        """Returns the sequences that cu_seqlens (S + 1,) cuts the tokens into."""
        # held within the tokens, since on a GPU the values are not checked
        bounds = cu_seqlens.to(torch.int64).clamp(0, tokens)
        place = torch.arange(tokens, device=bounds.device)
        index = torch.bucketize(place, bounds[1:], right=True)
        index.clamp_(max=max(bounds.numel() - 2, 0))
        count = bounds.diff().to(dtype) if mask is None else _sums(mask.to(dtype), bounds)
        return Segments(bounds, index, mask, count)

    def kept(self, x: Tensor) -> Tensor:
        """Returns x (T,), and 0 where a token is not valid."""
        return x if self.mask is None else torch.where(self.mask, x, 0)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of x (T,) over each sequence (S,)."""
        return _sums(x, self.cu_seqlens)

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean of x (T,), which is 0 where a token is not valid, over each sequence's valid tokens (S,)."""
        return self.sum(x) / self.counts.clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """Returns each sequence's entry of x (S,) at its tokens (T,)."""
        return x.index_select(0, self.sequence)


def _sums(x: Tensor, bounds: Tensor) -> Tensor:
    if bounds.numel() == 1 or x.numel() == 0:
        return x.new_zeros(bounds.numel() - 1)
    # not index_add_: its order of summation varies on a GPU
    return torch.segment_reduce(x, "sum", offsets=bounds, axis=0, initial=0, unsafe=True)


class Correction(NamedTuple):
    """The weight of each token for having been sampled by another policy: as it is, and as used."""

    raw: Tensor
    used: Tensor
    clipped: Tensor


def token_weights(segments: Segments, options: Options, denominator: Tensor | None) -> Tensor:
    """Returns by what each token's term counts in the loss, (T,): 0 where it is not valid."""
    count = segments.counts
    if denominator is not None:
        total = denominator.to(count.dtype)
    elif options.denominator:
        total = torch.full((), options.denominator, dtype=count.dtype, device=count.device)
    else:
        total = (count if options.aggregate == "token_mean" else count > 0).sum().to(count.dtype).clamp(min=1)
    weight = torch.where(total > 0, 1 / total, torch.nan).expand_as(count)
    if options.aggregate == "seq_mean_token_mean":
        weight = weight / count.clamp(min=1)
    elif options.aggregate == "seq_mean_token_sum_norm":
        weight = weight / options.horizon
    return segments.kept(segments.spread(weight))


def corrections(behind: Tensor | None, segments: Segments, options: Options, like: Tensor) -> Correction:
    """Returns the rollout correction's weights, given old_logp - rollout_logp (T,), which is 0 at invalid tokens."""
    if behind is None:
        one = torch.ones_like(like)
        return Correction(one, one, torch.zeros_like(one, dtype=torch.bool))
    if options.correction_unit == "sequence":
        behind = segments.spread(segments.sum(behind))
    elif options.correction_unit == "geometric":
        behind = segments.spread(segments.mean(behind))
    raw = behind.clamp(-options.log_ratio_bound, options.log_ratio_bound).exp()
    if options.correction is None:
        return Correction(raw, torch.ones_like(raw), torch.zeros_like(raw, dtype=torch.bool))
    if options.correction.endswith("tis"):
        clipped = raw > options.upper
        return Correction(raw, torch.where(clipped, options.upper, raw), clipped)
    clipped = (raw < options.lower) | (raw > options.upper)
    return Correction(raw, torch.where(clipped, 0.0, raw), clipped)


class Loss(NamedTuple):
    """The loss, its gradient with respect to logp and entropy (T,), and the metrics' totals.

    `grad_entropy` is empty where no entropy was given.
    """

    value: Tensor
    grad: Tensor
    grad_entropy: Tensor
    totals: Tensor


class _Gain(NamedTuple):
    """A token's part of the policy objective: the loss, its slope in the log-ratio (or in logp), and what was held."""

    value: Tensor
    slope: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor


def loss_terms(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    weight: Tensor,
    correction: Correction,
    segments: Segments,
    options: Options,
) -> Loss:
    """Returns the loss of some whole sequences, or of any tokens if the ratio is that of the token.

    Everything is (T,) and of one dtype; `weight` as from `token_weights`, `advantage` already spread over tokens.
    """
    kept = segments.kept
    x = kept(logp)
    log_ratio = torch.zeros_like(x) if old_logp is None else x - kept(old_logp)
    lag = log_ratio
    if options.ratio == "sequence":
        log_ratio = segments.spread(segments.mean(log_ratio))
    bound = options.log_ratio_bound
    ratio = log_ratio.clamp(-bound, bound).exp()
    gain = _gain(x, ratio, log_ratio.abs() > bound, kept(advantage), options)

    share = weight * correction.used
    grad = share * gain.slope
    if options.ratio == "sequence" and options.objective == "clip" and not options.per_token:
        # the gradient of the mean over the sequence, to which each token contributes alike
        grad = kept(segments.spread(segments.mean(grad)))
    loss = share * gain.value
    kl = torch.zeros_like(x)
    if ref_logp is not None:
        kl, slope = _kl(x - kept(ref_logp), options.kl_estimator, bound)
        loss = loss + weight * (options.kl_coef * kl)
        grad = grad + weight * (options.kl_coef * slope)
    grad_entropy = x.new_empty(0)
    surprise = torch.zeros_like(x)
    if entropy is not None:
        surprise = kept(entropy)
        loss = loss - weight * (options.entropy_coef * surprise)
        grad_entropy = -options.entropy_coef * weight

    weights = kept(ratio * correction.used).double()
    sums = [
        segments.counts,
        segments.counts > 0,
        kept(gain.low),
        kept(gain.high),
        kept(gain.dual),
        -lag,
        kl,
        kept(ratio),
        kept(correction.raw),
        kept(correction.used),
        kept(correction.clipped),
        weights,
        weights.square(),
        surprise,
    ]
    totals = [t.sum(dtype=torch.float64) for t in sums]
    inf = x.new_full((1,), torch.inf)
    totals.append(torch.cat((_but(segments, ratio, inf), inf)).amin().double())
    totals.append(torch.cat((_but(segments, ratio, -inf), -inf)).amax().double())
    return Loss(loss.sum(), grad, grad_entropy, torch.stack(totals))


def _but(segments: Segments, x: Tensor, otherwise: Tensor) -> Tensor:
    return x if segments.mask is None else torch.where(segments.mask, x, otherwise)


def _gain(x: Tensor, ratio: Tensor, outside: Tensor, advantage: Tensor, options: Options) -> _Gain:
    low, high = 1 - options.clip_low, 1 + options.clip_high
    below, above = ratio < low, ratio > high
    none = torch.zeros_like(below)
    if options.objective == "reinforce":
        return _Gain(-advantage * x, -advantage, none, none, none)
    if options.objective == "cispo":
        slope = -advantage * ratio.clamp(low, high)
        return _Gain(slope * x, slope, below, above, none)
    below &= advantage < 0
    above &= advantage > 0
    held = torch.where(below, low, torch.where(above, high, ratio))
    dual = (advantage < 0) & (held > options.dual_clip)
    held = torch.where(dual, options.dual_clip, held)
    value = -advantage * held
    # selected, not multiplied: beyond the bound the derivative of the clamp is 0
    slope = torch.where(below | above | dual | outside, 0.0, value)
    return _Gain(value, slope, below, above, dual)


def _kl(delta: Tensor, estimator: str, bound: float) -> tuple[Tensor, Tensor]:
    """Returns the estimate of KL(new, reference) of each token, delta = logp - ref_logp, and its slope."""
    if estimator == "k1":
        return delta, torch.ones_like(delta)
    if estimator == "k1+":
        return delta, delta
    if estimator == "k2":
        return delta.square() / 2, delta
    held = delta.clamp(-bound, bound)
    less = torch.expm1(-held)
    if estimator == "k3+":
        return less + held, delta
    return less + held, torch.where(delta.abs() > bound, 0.0, -less)


def forward(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    entropy: Tensor | None,
    denominator: Tensor | None,
    options: Options,
) -> Loss:
    """Returns the policy loss, dL/dlogp, dL/dentropy and the totals of `PolicyMetrics`."""
    segments = Segments.of(cu_seqlens, mask, logp.shape[0], logp.dtype)
    weight = token_weights(segments, options, denominator)
    if not options.per_token:
        # with no sequence at all there is no token either
        advantage = segments.spread(advantage) if advantage.numel() else torch.zeros_like(logp)
    behind = None
    if rollout_logp is not None:
        behind = segments.kept((logp if old_logp is None else old_logp) - rollout_logp)
    correction = corrections(behind, segments, options, logp)
    return loss_terms(logp, old_logp, advantage, ref_logp, entropy, weight, correction, segments, options)
