// what one token adds to the policy loss; prism_kernels/ops/policy_loss/eager.py says what is computed

#pragma once

#include <cmath>

#include <prism/column.cuh>

namespace prism {

// as the tuples of options.py count them
enum class Ratio { token, sequence };
enum class Objective { clip, cispo, reinforce };
enum class Aggregate { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Estimator { k1, k2, k3, k1_plus, k3_plus };
enum class Unit { token, sequence, geometric };
enum class Rule { none, truncate, mask };

// the places of PolicyMetrics, and the loss
enum Total {
  kTokens, kSequences, kLow, kHigh, kDual, kLag, kKl, kRatioSum, kRaw, kUsed, kClipped, kWeight, kWeightSquare,
  kEntropy, kRatioMin, kRatioMax, kTotals, kLoss = kTotals, kRecord
};

template <typename A>
struct PolicyOptions {
  Ratio ratio;
  Objective objective;
  Aggregate aggregate;
  Estimator estimator;
  Unit unit;
  Rule rule;
  bool per_token;
  // which of the columns are given
  bool old, reference, rollout, entropy;
  A low, high, dual, bound, kl_coef, lower, upper, entropy_coef;

  // whether a token's gradient comes through the mean over its sequence, to which each contributes alike
  __device__ __forceinline__ bool alike() const {
    return ratio == Ratio::sequence && objective == Objective::clip && !per_token;
  }
};

// what is the same for all tokens of a sequence; the mean log-ratios are sums where the correction is a product
template <typename A>
struct Sequence {
  A weight, advantage, log_ratio, behind, used;
};

// one valid token
template <typename A>
struct Token {
  A x, lag, behind, advantage, reference, entropy;
};

// sums over the tokens of one thread, in the type computed with
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
__device__ __forceinline__ Correction<A> correct(const PolicyOptions<A>& o, A behind) {
  Correction<A> c{1, 1, false};
  if (!o.rollout) return c;
  c.raw = exp(between(behind, -o.bound, o.bound));
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

// adds a valid token to the sums and returns dL/dlogp. kPlain: PPO's loss with an advantage per sequence, and nothing
// else is asked for
template <bool kPlain, typename A>
__device__ __forceinline__ A add_token(const PolicyOptions<A>& o, const Sequence<A>& q, const Token<A>& k,
                                       A (&sums)[kRecord]) {
  const bool whole = o.ratio == Ratio::sequence;
  const A log_ratio = whole ? q.log_ratio : k.lag;
  const A r = exp(between(log_ratio, -o.bound, o.bound));
  const A advantage = !kPlain && o.per_token ? k.advantage : q.advantage;
  bool below = r < o.low, above = r > o.high;
  A value, slope;
  if (kPlain || o.objective == Objective::clip) {
    below = below && advantage < 0;
    above = above && advantage > 0;
    A held = below ? o.low : above ? o.high : r;
    const bool dual = advantage < 0 && held > o.dual;
    held = dual ? o.dual : held;
    value = -advantage * held;
    // selected, not multiplied: beyond the bound the derivative of the clamp is 0
    slope = below || above || dual || log_ratio > o.bound || log_ratio < -o.bound ? static_cast<A>(0) : value;
    sums[kDual] += dual ? 1 : 0;
  } else if (o.objective == Objective::cispo) {
    slope = -advantage * between(r, o.low, o.high);
    value = slope * k.x;
  } else {
    slope = -advantage;
    value = slope * k.x;
    below = above = false;
  }
  sums[kLow] += below ? 1 : 0;
  sums[kHigh] += above ? 1 : 0;

  A term = value, grad = slope, weight = r;
  if constexpr (!kPlain) {
    const Correction<A> c = correct(o, o.unit == Unit::token ? k.behind : q.behind);
    term *= c.used;
    grad *= o.alike() ? q.used : c.used;
    weight *= c.used;
    sums[kRaw] += c.raw;
    sums[kUsed] += c.used;
    sums[kClipped] += c.clipped ? 1 : 0;
    if (o.reference) {
      const A delta = k.x - k.reference;
      A kl = delta, kl_slope = delta;
      if (o.estimator == Estimator::k1) kl_slope = 1;
      if (o.estimator == Estimator::k2) kl = delta * delta * static_cast<A>(0.5);
      if (o.estimator == Estimator::k3 || o.estimator == Estimator::k3_plus) {
        const A held = between(delta, -o.bound, o.bound);
        const A less = expm1(-held);
        kl = less + held;
        if (o.estimator == Estimator::k3) kl_slope = delta > o.bound || delta < -o.bound ? static_cast<A>(0) : -less;
      }
      term += o.kl_coef * kl;
      grad += o.kl_coef * kl_slope;
      sums[kKl] += kl;
    }
    if (o.entropy) {
      term -= o.entropy_coef * k.entropy;
      sums[kEntropy] += k.entropy;
    }
  }
  sums[kLoss] += q.weight * term;
  sums[kLag] -= k.lag;
  sums[kRatioSum] += r;
  sums[kWeight] += weight;
  sums[kWeightSquare] += weight * weight;
  // these drop NaN, which the sum of the ratios tells
  sums[kRatioMin] = min(sums[kRatioMin], r);
  sums[kRatioMax] = max(sums[kRatioMax], r);
  return q.weight * grad;
}

}  // namespace prism
