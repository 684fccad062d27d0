"""The policy loss and its gradient in plain torch. The gradient is analytic: a clipped or masked token gets an exact 0.

T tokens, S sequences. `linear_policy_loss` also takes these three steps one by one: the weight of each token, the
weights of the rollout correction, and the loss itself with dL/dlogp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.policy_loss.options import Options


class Segments(NamedTuple):
    """The tokens of each sequence, and which of them are valid."""

    # [S + 1]
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
        # clamped, since on a GPU the values are not checked
        bounds = cu_seqlens.to(torch.int64).clamp(0, tokens)
        sequence = torch.bucketize(torch.arange(tokens, device=bounds.device), bounds[1:], right=True)
        sequence.clamp_(max=max(bounds.numel() - 2, 0))
        counts = bounds.diff().to(dtype) if mask is None else _sums(mask.to(dtype), bounds)
        return Segments(bounds, sequence, mask, counts)

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
    """The importance weight of each token, sampled by another policy: `raw`, and `used` after the bounds; (T,) each."""

    raw: Tensor
    used: Tensor
    clipped: Tensor


def token_weights(segments: Segments, options: Options, denominator: Tensor | None) -> Tensor:
    """Returns the factor of each token's term in the loss, (T,): 0 where it is not valid."""
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


def corrections(log_ratio: Tensor | None, segments: Segments, options: Options, like: Tensor) -> Correction:
    """Returns the rollout correction's weights, given old_logp - rollout_logp (T,), which is 0 at invalid tokens."""
    if log_ratio is None:
        one = torch.ones_like(like)
        return Correction(one, one, torch.zeros_like(one, dtype=torch.bool))
    if options.correction_unit == "sequence":
        log_ratio = segments.spread(segments.sum(log_ratio))
    elif options.correction_unit == "geometric":
        log_ratio = segments.spread(segments.mean(log_ratio))
    raw = log_ratio.clamp(-options.log_ratio_bound, options.log_ratio_bound).exp()
    if options.correction is None:
        return Correction(raw, torch.ones_like(raw), torch.zeros_like(raw, dtype=torch.bool))
    if options.correction.endswith("tis"):
        clipped = raw > options.upper
        return Correction(raw, torch.where(clipped, options.upper, raw), clipped)
    clipped = (raw < options.lower) | (raw > options.upper)
    return Correction(raw, torch.where(clipped, 0.0, raw), clipped)


class PolicyLoss(NamedTuple):
    """The loss, its gradient with respect to logp and entropy (T,), and the metrics' totals.

    `grad_entropy` is empty where no entropy was given.
    """

    value: Tensor
    grad: Tensor
    grad_entropy: Tensor
    totals: Tensor


class _TokenLoss(NamedTuple):
    """Each token's loss by the objective, its slope in the log-ratio (or in logp), and where each clip applied."""

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
) -> PolicyLoss:
    """Returns the loss of whole sequences; with a token ratio, of any tokens.

    Every tensor is (T,) and of one dtype; `weight` is from `token_weights`, `advantage` one number per token.
    """
    kept = segments.kept
    x = kept(logp)
    token_log_ratio = torch.zeros_like(x) if old_logp is None else x - kept(old_logp)
    log_ratio = token_log_ratio
    if options.ratio == "sequence":
        log_ratio = segments.spread(segments.mean(log_ratio))
    bound = options.log_ratio_bound
    ratio = log_ratio.clamp(-bound, bound).exp()
    token_loss = _token_loss(x, ratio, log_ratio.abs() > bound, kept(advantage), options)

    share = weight * correction.used
    grad = share * token_loss.slope
    if options.ratio == "sequence" and options.objective == "clip" and not options.per_token:
        # each token contributes equally to the sequence's mean log-ratio
        grad = kept(segments.spread(segments.mean(grad)))
    loss = share * token_loss.value
    kl = torch.zeros_like(x)
    if ref_logp is not None:
        kl, slope = _kl(x - kept(ref_logp), options.kl_estimator, bound)
        loss = loss + weight * (options.kl_coef * kl)
        grad = grad + weight * (options.kl_coef * slope)
    grad_entropy = x.new_empty(0)
    bonus = torch.zeros_like(x)
    if entropy is not None:
        bonus = kept(entropy)
        loss = loss - weight * (options.entropy_coef * bonus)
        grad_entropy = -options.entropy_coef * weight

    importance = kept(ratio * correction.used).double()
    # in the order of POLICY_TOTALS
    summands = [
        segments.counts,
        segments.counts > 0,
        kept(token_loss.low),
        kept(token_loss.high),
        kept(token_loss.dual),
        -token_log_ratio,
        kl,
        kept(ratio),
        kept(correction.raw),
        kept(correction.used),
        kept(correction.clipped),
        importance,
        importance.square(),
        bonus,
    ]
    totals = [t.sum(dtype=torch.float64) for t in summands]
    inf = x.new_full((1,), torch.inf)
    totals.append(torch.cat((_where_valid(segments, ratio, inf), inf)).amin().double())
    totals.append(torch.cat((_where_valid(segments, ratio, -inf), -inf)).amax().double())
    return PolicyLoss(loss.sum(), grad, grad_entropy, torch.stack(totals))


def _where_valid(segments: Segments, x: Tensor, otherwise: Tensor) -> Tensor:
    return x if segments.mask is None else torch.where(segments.mask, x, otherwise)


def _token_loss(x: Tensor, ratio: Tensor, out_of_bound: Tensor, advantage: Tensor, options: Options) -> _TokenLoss:
    low, high = 1 - options.clip_low, 1 + options.clip_high
    below, above = ratio < low, ratio > high
    none = torch.zeros_like(below)
    if options.objective == "reinforce":
        return _TokenLoss(-advantage * x, -advantage, none, none, none)
    if options.objective == "cispo":
        slope = -advantage * ratio.clamp(low, high)
        return _TokenLoss(slope * x, slope, below, above, none)
    below &= advantage < 0
    above &= advantage > 0
    clipped = torch.where(below, low, torch.where(above, high, ratio))
    dual = (advantage < 0) & (clipped > options.dual_clip)
    clipped = torch.where(dual, options.dual_clip, clipped)
    value = -advantage * clipped
    # selected, not multiplied by 0: a product with an infinite value would be NaN
    slope = torch.where(below | above | dual | out_of_bound, 0.0, value)
    return _TokenLoss(value, slope, below, above, dual)


def _kl(delta: Tensor, estimator: str, bound: float) -> tuple[Tensor, Tensor]:
    """Returns each token's estimate of KL(new, reference) from delta = logp - ref_logp, and its slope in delta."""
    if estimator == "k1":
        return delta, torch.ones_like(delta)
    if estimator == "k1+":
        return delta, delta
    if estimator == "k2":
        return delta.square() / 2, delta
    clamped = delta.clamp(-bound, bound)
    expm1 = torch.expm1(-clamped)
    if estimator == "k3+":
        return expm1 + clamped, delta
    return expm1 + clamped, torch.where(delta.abs() > bound, 0.0, -expm1)


def policy_loss_eager(
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
) -> PolicyLoss:
    """Returns the policy loss, dL/dlogp, dL/dentropy and the totals of `PolicyMetrics`."""
    segments = Segments.of(cu_seqlens, mask, logp.shape[0], logp.dtype)
    weight = token_weights(segments, options, denominator)
    if not options.per_token:
        # without a sequence there is no token, and nothing to select from
        advantage = segments.spread(advantage) if advantage.numel() else torch.zeros_like(logp)
    rollout_log_ratio = None
    if rollout_logp is not None:
        rollout_log_ratio = segments.kept((logp if old_logp is None else old_logp) - rollout_logp)
    correction = corrections(rollout_log_ratio, segments, options, logp)
    return loss_terms(logp, old_logp, advantage, ref_logp, entropy, weight, correction, segments, options)
