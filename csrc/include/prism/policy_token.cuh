// the terms that one token adds to the policy loss, to its gradient and to the totals

#pragma once

#include <cmath>

#include <prism/column.cuh>
#include <prism/policy_loss.h>

namespace prism {

// a block's record: its share of the totals, then of the loss
constexpr int kLoss = kTotals;
constexpr int kRecord = kTotals + 1;

// the options, and which of the columns are given
template <typename A>
struct TokenOptions : PolicyOptions<A> {
  bool old, reference, rollout, entropy;
};

// the values that all tokens of a sequence share: the mean of logp - old_logp, the mean of old_logp - rollout_logp
// (their sum where the correction is a product), and the correction as used or its mean
template <typename A>
struct Sequence {
  A weight, advantage, log_ratio, rollout_log_ratio, correction;
};

// one valid token; log_ratio is logp - old_logp, rollout_log_ratio is old_logp - rollout_logp
template <typename A>
struct Token {
  A logp, log_ratio, rollout_log_ratio, advantage, reference, entropy;
};

// the sums over the tokens of one thread
template <typename A>
struct PolicySums {
  A sums[kRecord];

  __device__ __forceinline__ PolicySums() {
#pragma unroll
    for (int i = 0; i < kRecord; ++i) sums[i] = 0;
    sums[kRatioMin] = static_cast<A>(INFINITY);
    sums[kRatioMax] = -static_cast<A>(INFINITY);
  }
};

template <typename A>
__device__ __forceinline__ A between(A x, A low, A high) {
  // NaN stays NaN
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <typename A>
struct Correction {
  A raw, used;
  bool clipped;
};

template <typename A>
__device__ __forceinline__ Correction<A> correct(const TokenOptions<A>& o, A rollout_log_ratio) {
  Correction<A> c{1, 1, false};
  if (!o.rollout) return c;
  c.raw = exp(between(rollout_log_ratio, -o.bound, o.bound));
  if (o.rule == Rule::none) return c;
  c.clipped = c.raw > o.upper;
  if (o.rule == Rule::truncate) {
    c.used = c.clipped ? o.upper : c.raw;
  } else {
    c.clipped = c.clipped || c.raw < o.lower;
    c.used = c.clipped ? static_cast<A>(0) : c.raw;
  }
  return c;
}

// adds a valid token to the sums and returns dL/dlogp. kPlain: PPO's loss with an advantage per sequence, without KL,
// correction and entropy
template <bool kPlain, typename A>
__device__ __forceinline__ A add_token(const TokenOptions<A>& o, const Sequence<A>& q, const Token<A>& k,
                                       A (&sums)[kRecord]) {
  const A log_ratio = o.ratio == Ratio::sequence ? q.log_ratio : k.log_ratio;
  const A r = exp(between(log_ratio, -o.bound, o.bound));
  const A advantage = !kPlain && o.per_token ? k.advantage : q.advantage;
  bool below = r < o.low, above = r > o.high;
  A value, slope;
  if (kPlain || o.objective == Objective::clip) {
    below = below && advantage < 0;
    above = above && advantage > 0;
    A clipped = below ? o.low : above ? o.high : r;
    const bool dual = advantage < 0 && clipped > o.dual;
    clipped = dual ? o.dual : clipped;
    value = -advantage * clipped;
    // a selection, since a product with 0 could be NaN. beyond the bound the derivative of the clamp is 0
    slope = below || above || dual || log_ratio > o.bound || log_ratio < -o.bound ? static_cast<A>(0) : value;
    sums[kClippedDual] += dual ? 1 : 0;
  } else if (o.objective == Objective::cispo) {
    slope = -advantage * between(r, o.low, o.high);
    value = slope * k.logp;
  } else {
    slope = -advantage;
    value = slope * k.logp;
    below = above = false;
  }
  sums[kClippedLow] += below ? 1 : 0;
  sums[kClippedHigh] += above ? 1 : 0;

  A term = value, grad = slope, weight = r;
  if constexpr (!kPlain) {
    const Correction<A> c = correct(o, o.unit == Unit::token ? k.rollout_log_ratio : q.rollout_log_ratio);
    term *= c.used;
    grad *= o.through_mean() ? q.correction : c.used;
    weight *= c.used;
    sums[kCorrectionRaw] += c.raw;
    sums[kCorrectionUsed] += c.used;
    sums[kCorrectionClipped] += c.clipped ? 1 : 0;
    if (o.reference) {
      const A delta = k.logp - k.reference;
      A kl = delta, kl_slope = delta;
      if (o.estimator == Estimator::k1) kl_slope = 1;
      if (o.estimator == Estimator::k2) kl = delta * delta * static_cast<A>(0.5);
      if (o.estimator == Estimator::k3 || o.estimator == Estimator::k3_plus) {
        const A bounded = between(delta, -o.bound, o.bound);
        const A growth = expm1(-bounded);
        kl = growth + bounded;
        if (o.estimator == Estimator::k3) kl_slope = delta > o.bound || delta < -o.bound ? static_cast<A>(0) : -growth;
      }
      term += o.kl_coef * kl;
      grad += o.kl_coef * kl_slope;
      sums[kRefKl] += kl;
    }
    if (o.entropy) {
      term -= o.entropy_coef * k.entropy;
      sums[kEntropy] += k.entropy;
    }
  }
  sums[kLoss] += q.weight * term;
  sums[kApproxKl] -= k.log_ratio;
  sums[kRatioSum] += r;
  sums[kEssSum] += weight;
  sums[kEssSumSq] += weight * weight;
  // min and max drop NaN, which the sum of the ratios keeps
  sums[kRatioMin] = min(sums[kRatioMin], r);
  sums[kRatioMax] = max(sums[kRatioMax], r);
  return q.weight * grad;
}

}  // namespace prism
