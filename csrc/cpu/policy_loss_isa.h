// No include guard: each_isa.h includes this file once for each instruction set.
//
// A sequence is computed a vector of tokens at a time. Invalid tokens are replaced by 0 before the arithmetic, and a
// selection makes the gradient of clipped ones 0, since a product with 0 could be NaN.

namespace prism::PRISM_ISA {

// the result of comparing two vectors
template <class V>
using Flags = decltype(V{} < V{});

PRISM_INLINE IntVec flags_of(const bool* p, Vec*) {
  typedef uint8_t ByteVec __attribute__((vector_size(PRISM_VECTOR_BYTES / 4)));
  ByteVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, BitVec) != 0;
}
PRISM_INLINE bool flags_of(const bool* p, double*) { return *p; }

// exp(x) - 1 without cancellation
PRISM_INLINE Vec expm1_of(Vec x, Vec exp_x) { return tanh(x * 0.5f) * (exp_x + 1.0f); }
PRISM_INLINE double expm1_of(double x, double) { return std::expm1(x); }

template <class V>
PRISM_INLINE V between(V x, V low, V high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// sums in T, which are added to those in double every kFlush tokens. A local variable of the loop over tokens, so that
// it stays in registers
template <class V>
struct Partial {
  V loss{}, clipped_low{}, clipped_high{}, clipped_dual{}, approx_kl{}, ref_kl{}, ratio{};
  V correction_raw{}, correction_used{}, correction_clipped{}, ess_sum{}, ess_sum_sq{}, entropy{};
  V smallest{}, largest{};

  PRISM_INLINE Partial() {
    smallest = broadcast<V>(std::numeric_limits<typename Lanes<V>::Value>::infinity());
    largest = -smallest;
  }
};
constexpr int64_t kFlush = 4096;

template <class V>
struct Kernel {
  using T = typename Lanes<V>::Value;
  static constexpr int64_t W = Lanes<V>::count;

  const PolicyLoss<T>& a;
  const PolicyOptions<T>& o;

  explicit Kernel(const PolicyLoss<T>& arguments) : a(arguments), o(arguments.options) {}

  // one vector of tokens, 0 in the lanes that are not valid; log_ratio is logp - old_logp, rollout_log_ratio is
  // old_logp - rollout_logp
  struct Tokens {
    Flags<V> valid;
    V logp, log_ratio, rollout_log_ratio;
  };

  template <bool kSome>
  PRISM_INLINE V read(const T* p, int64_t t, int64_t n) const {
    if constexpr (kSome) return load_some<V>(p + t, n);
    return load<V>(p + t);
  }

  template <bool kSome>
  PRISM_INLINE Flags<V> valid_at(int64_t t, int64_t n) const {
    if constexpr (kSome) {
      bool some[W] = {};
      for (int64_t i = 0; i < n; ++i) some[i] = a.mask == nullptr || a.mask[t + i];
      return flags_of(some, static_cast<V*>(nullptr));
    }
    return a.mask ? flags_of(a.mask + t, static_cast<V*>(nullptr)) : V{} == V{};
  }

  template <bool kSome>
  PRISM_INLINE Tokens tokens(int64_t t, int64_t n) const {
    Tokens k;
    k.valid = valid_at<kSome>(t, n);
    k.logp = k.valid ? read<kSome>(a.logp, t, n) : V{};
    V old = k.logp;
    if (a.old_logp) old = k.valid ? read<kSome>(a.old_logp, t, n) : V{};
    k.log_ratio = k.logp - old;
    k.rollout_log_ratio = V{};
    if (a.rollout_logp) k.rollout_log_ratio = old - (k.valid ? read<kSome>(a.rollout_logp, t, n) : V{});
    return k;
  }

  PRISM_INLINE V bounded_exp(V x) const {
    return exp_clamped(between(x, broadcast<V>(-o.bound), broadcast<V>(o.bound)));
  }

  struct Correction {
    V raw, used;
    Flags<V> clipped;
  };

  PRISM_INLINE Correction correct(V rollout_log_ratio) const {
    const V one = broadcast<V>(1);
    Correction c{one, one, V{} < V{}};
    if (!a.rollout_logp) return c;
    c.raw = bounded_exp(rollout_log_ratio);
    if (o.rule == Rule::none) return c;
    c.clipped = c.raw > o.upper;
    if (o.rule == Rule::truncate) {
      c.used = c.clipped ? broadcast<V>(o.upper) : c.raw;
    } else {
      c.clipped = c.clipped | (c.raw < o.lower);
      c.used = c.clipped ? V{} : c.raw;
    }
    return c;
  }

  // the values that all tokens of a sequence share: the mean of log_ratio, the mean of rollout_log_ratio (the sum where
  // the correction is a product), and the correction as used or its mean, each where the options need it
  struct Sequence {
    T weight, advantage, log_ratio, rollout_log_ratio, correction;
  };

  template <bool kSome>
  PRISM_INLINE void step(const Sequence& q, int64_t t, int64_t n, Partial<V>& partial) const {
    const Tokens k = tokens<kSome>(t, n);
    const Flags<V> valid = k.valid;
    const V zero{}, one = broadcast<V>(1);
    const V log_ratio = o.ratio == Ratio::sequence ? broadcast<V>(q.log_ratio) : k.log_ratio;
    const V r = bounded_exp(log_ratio);
    const Flags<V> outside = (log_ratio > o.bound) | (log_ratio < -o.bound);
    const V advantage = o.per_token ? read<kSome>(a.advantage, t, n) : broadcast<V>(q.advantage);
    const Correction c = correct(o.unit == Unit::token ? k.rollout_log_ratio : broadcast<V>(q.rollout_log_ratio));

    Flags<V> below = r < o.low, above = r > o.high;
    V value, slope;
    if (o.objective == Objective::clip) {
      below = below & (advantage < zero);
      above = above & (advantage > zero);
      V clipped = below ? broadcast<V>(o.low) : above ? broadcast<V>(o.high) : r;
      const Flags<V> dual = (advantage < zero) & (clipped > o.dual);
      clipped = dual ? broadcast<V>(o.dual) : clipped;
      value = -advantage * clipped;
      slope = (below | above | dual | outside) ? zero : value;
      partial.clipped_dual += (valid & dual) ? one : zero;
    } else if (o.objective == Objective::cispo) {
      slope = -advantage * between(r, broadcast<V>(o.low), broadcast<V>(o.high));
      value = slope * k.logp;
    } else {
      slope = -advantage;
      value = slope * k.logp;
      below = above = zero < zero;
    }
    partial.clipped_low += (valid & below) ? one : zero;
    partial.clipped_high += (valid & above) ? one : zero;

    const V weight = broadcast<V>(q.weight);
    V grad = weight * (o.through_mean() ? broadcast<V>(q.correction) : c.used) * slope;
    V term = c.used * value;
    if (a.ref_logp) {
      const V delta = k.logp - (valid ? read<kSome>(a.ref_logp, t, n) : zero);
      V kl = delta, kl_slope = delta;
      if (o.estimator == Estimator::k1) kl_slope = one;
      if (o.estimator == Estimator::k2) kl = delta * delta * static_cast<T>(0.5);
      if (o.estimator == Estimator::k3 || o.estimator == Estimator::k3_plus) {
        const V bounded = between(delta, broadcast<V>(-o.bound), broadcast<V>(o.bound));
        const V growth = expm1_of(-bounded, exp_clamped(-bounded));
        kl = growth + bounded;
        if (o.estimator == Estimator::k3) kl_slope = ((delta > o.bound) | (delta < -o.bound)) ? zero : -growth;
      }
      term += o.kl_coef * kl;
      grad += weight * (o.kl_coef * kl_slope);
      partial.ref_kl += valid ? kl : zero;
    }
    if (a.entropy) {
      const V entropy = valid ? read<kSome>(a.entropy, t, n) : zero;
      term -= o.entropy_coef * entropy;
      partial.entropy += entropy;
      const V grad_entropy = valid ? -o.entropy_coef * weight : zero;
      if constexpr (kSome) {
        store_some(a.grad_entropy + t, grad_entropy, n);
      } else {
        store(a.grad_entropy + t, grad_entropy);
      }
    }
    grad = valid ? grad : zero;
    if constexpr (kSome) {
      store_some(a.grad + t, grad, n);
    } else {
      store(a.grad + t, grad);
    }

    partial.loss += valid ? weight * term : zero;
    partial.approx_kl -= k.log_ratio;
    partial.ratio += valid ? r : zero;
    const V importance = valid ? r * c.used : zero;
    partial.ess_sum += importance;
    partial.ess_sum_sq += importance * importance;
    if (a.rollout_logp) {
      partial.correction_raw += valid ? c.raw : zero;
      partial.correction_used += valid ? c.used : zero;
      partial.correction_clipped += (valid & c.clipped) ? one : zero;
    }
    // NaN stays NaN
    partial.smallest = (valid & ((r < partial.smallest) | (r != r))) ? r : partial.smallest;
    partial.largest = (valid & ((r > partial.largest) | (r != r))) ? r : partial.largest;
  }

  // the values that all tokens of a sequence share in PPO's loss with an advantage per sequence, without KL, correction
  // and entropy: the sign of the advantage says for the whole sequence on which side the ratio is clipped
  struct Plain {
    V weight, loss, advantage, log_ratio, floor, ceiling, bound;
  };

  PRISM_INLINE Plain plain(const Sequence& q) const {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T ceiling = q.advantage > 0 ? o.high : q.advantage < 0 ? o.dual : inf;
    return {broadcast<V>(q.weight),    broadcast<V>(-q.weight * q.advantage),
            broadcast<V>(q.advantage), broadcast<V>(q.log_ratio),
            broadcast<V>(q.advantage < 0 ? o.low : -inf), broadcast<V>(ceiling), broadcast<V>(o.bound)};
  }

  // `step` for this loss; counts in `over` the tokens clipped from above
  template <bool kMask>
  PRISM_INLINE void plain_step(const Plain& q, int64_t t, Partial<V>& partial, V& over) const {
    const V zero{}, one = broadcast<V>(1);
    const Flags<V> valid = kMask ? flags_of(a.mask + t, static_cast<V*>(nullptr)) : zero == zero;
    V token_log_ratio = load<V>(a.logp + t) - load<V>(a.old_logp + t);
    if constexpr (kMask) token_log_ratio = valid ? token_log_ratio : zero;
    const V log_ratio = o.ratio == Ratio::sequence ? q.log_ratio : token_log_ratio;
    V r = exp_clamped(between(log_ratio, -q.bound, q.bound));
    const Flags<V> below = r < q.floor, above = r > q.ceiling;
    const Flags<V> flat = below | above | (log_ratio > q.bound) | (log_ratio < -q.bound);
    V loss = q.loss * between(r, q.floor, q.ceiling);
    V grad = flat ? zero : loss;
    Flags<V> low = below, high = above;
    if constexpr (kMask) {
      // a sequence without a valid token may have an advantage of NaN
      grad = valid ? grad : zero;
      loss = valid ? loss : zero;
      low = low & valid;
      high = high & valid;
      partial.smallest = (valid & (r < partial.smallest)) ? r : partial.smallest;
      partial.largest = (valid & (r > partial.largest)) ? r : partial.largest;
      r = valid ? r : zero;
    } else {
      partial.smallest = r < partial.smallest ? r : partial.smallest;
      partial.largest = r > partial.largest ? r : partial.largest;
    }
    store(a.grad + t, grad);
    partial.loss += loss;
    partial.clipped_low += low ? one : zero;
    over += high ? one : zero;
    partial.approx_kl -= token_log_ratio;
    partial.ratio += r;
    partial.ess_sum += r;
    partial.ess_sum_sq += r * r;
  }

  // the sum over a sequence's valid tokens: in T over each block of kFlush tokens, in double over the blocks
  template <class F>
  double sum(int64_t begin, int64_t end, F add) const {
    double total = 0;
    for (int64_t block = begin; block < end; block += kFlush) {
      const int64_t stop = std::min(block + kFlush, end);
      V part{};
      int64_t t = block;
      for (; t + W <= stop; t += W) add(tokens<false>(t, W), part);
      if (t < stop) add(tokens<true>(t, stop - t), part);
      total += sum_lanes(part);
    }
    return total;
  }

  Sequence sequence(int64_t s) const {
    const int64_t begin = a.bounds[s], end = a.bounds[s + 1];
    const double n = static_cast<double>(std::max<int64_t>(1, a.counts[s]));
    Sequence q{static_cast<T>(a.weights[s]), o.per_token ? T(0) : a.advantage[s], T(0), T(0), T(1)};
    const auto log_ratio = [](const Tokens& k, V& total) __attribute__((always_inline)) { total += k.log_ratio; };
    const auto rollout_log_ratio = [](const Tokens& k, V& total) __attribute__((always_inline)) {
      total += k.rollout_log_ratio;
    };
    const auto correction = [this](const Tokens& k, V& total) __attribute__((always_inline)) {
      total += k.valid ? correct(k.rollout_log_ratio).used : V{};
    };
    if (o.ratio == Ratio::sequence && a.old_logp) q.log_ratio = static_cast<T>(sum(begin, end, log_ratio) / n);
    if (!a.rollout_logp) return q;
    if (o.unit != Unit::token) {
      const double total = sum(begin, end, rollout_log_ratio);
      q.rollout_log_ratio = static_cast<T>(o.unit == Unit::geometric ? total / n : total);
      q.correction = first_lane(correct(broadcast<V>(q.rollout_log_ratio)).used);
    } else if (o.ratio == Ratio::sequence && o.rule != Rule::none) {
      q.correction = static_cast<T>(sum(begin, end, correction) / n);
    }
    return q;
  }

  PRISM_INLINE static T first_lane(V x) {
    T lanes[W];
    std::memcpy(lanes, &x, sizeof x);
    return lanes[0];
  }

  PRISM_INLINE static void flush(Partial<V>& p, Sums& sums) {
    const auto add = [](double& to, V& from) __attribute__((always_inline)) {
      to += sum_lanes(from);
      from = V{};
    };
    add(sums.loss, p.loss);
    auto& total = sums.totals;
    add(total[kClippedLow], p.clipped_low);
    add(total[kClippedHigh], p.clipped_high);
    add(total[kClippedDual], p.clipped_dual);
    add(total[kApproxKl], p.approx_kl);
    add(total[kRefKl], p.ref_kl);
    add(total[kRatioSum], p.ratio);
    add(total[kCorrectionRaw], p.correction_raw);
    add(total[kCorrectionUsed], p.correction_used);
    add(total[kCorrectionClipped], p.correction_clipped);
    add(total[kEssSum], p.ess_sum);
    add(total[kEssSumSq], p.ess_sum_sq);
    add(total[kEntropy], p.entropy);
  }

  Sums run(int64_t first, int64_t last) const {
    Sums sums;
    Partial<V> partial;
    int64_t since = 0;
    const bool is_plain = o.objective == Objective::clip && !o.per_token && a.old_logp && !a.rollout_logp &&
                          !a.ref_logp && !a.entropy;
    for (int64_t s = first; s < last; ++s) {
      const Sequence q = sequence(s);
      const Plain p = plain(q);
      // clipped from above: by the clip, or for a negative advantage by the dual clip
      V over{};
      int64_t t = a.bounds[s];
      const int64_t end = a.bounds[s + 1];
      while (end - t >= W) {
        const int64_t stop = std::min(end - W, t + kFlush);
        const int64_t begin = t;
        if (!is_plain) {
          for (; t <= stop; t += W) step<false>(q, t, W, partial);
        } else if (a.mask) {
          for (; t <= stop; t += W) plain_step<true>(p, t, partial, over);
        } else {
          for (; t <= stop; t += W) plain_step<false>(p, t, partial, over);
        }
        since += t - begin;
        if (since >= kFlush) {
          flush(partial, sums);
          since = 0;
        }
      }
      if (t < end) {
        step<true>(q, t, end - t, partial);
        since += W;
      }
      if (q.advantage < 0) {
        partial.clipped_dual += over;
      } else {
        partial.clipped_high += over;
      }
    }
    flush(partial, sums);
    T lanes[2][W];
    std::memcpy(lanes[0], &partial.smallest, sizeof partial.smallest);
    std::memcpy(lanes[1], &partial.largest, sizeof partial.largest);
    double low = lanes[0][0], high = lanes[1][0];
    for (int64_t i = 1; i < W; ++i) {
      if (!(lanes[0][i] >= low)) low = lanes[0][i];
      if (!(lanes[1][i] <= high)) high = lanes[1][i];
    }
    if (std::isnan(sums.totals[kRatioSum])) low = high = sums.totals[kRatioSum];
    sums.totals[kRatioMin] = low;
    sums.totals[kRatioMax] = high;
    return sums;
  }
};

inline Sums loss_float(const PolicyLoss<float>& a, int64_t first, int64_t last) {
  return Kernel<Vec>(a).run(first, last);
}
// double serves gradient checks: the C library does its mathematics on every instruction set
inline Sums loss_double(const PolicyLoss<double>& a, int64_t first, int64_t last) {
  return Kernel<double>(a).run(first, last);
}

}  // namespace prism::PRISM_ISA
