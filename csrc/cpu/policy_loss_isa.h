// No include guard: each_isa.h includes this file once for each instruction set.
//
// A sequence is worked through a vector of tokens at a time. Nothing that is not valid enters the arithmetic; what is
// clipped has gradient 0 by selection, never as 0 * inf.

namespace prism::PRISM_ISA {

// ---- masks: what a comparison of two vectors gives

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

// what is formed with the type computed with, before the sums join those in double. It is a local variable of the loop
// over tokens, so that it lives in registers
template <class V>
struct Partial {
  V loss{}, low{}, high{}, dual{}, lag{}, kl{}, ratio{}, raw{}, used{}, clipped{}, weight{}, weight_square{}, entropy{};
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

  explicit Kernel(const PolicyLoss<T>& arguments) : a(arguments) {}

  // one vector of tokens; lanes that are not valid hold zeros
  struct Tokens {
    Flags<V> valid;
    V x, lag, behind;
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
    k.x = k.valid ? read<kSome>(a.logp, t, n) : V{};
    V old = k.x;
    if (a.old_logp) old = k.valid ? read<kSome>(a.old_logp, t, n) : V{};
    k.lag = k.x - old;
    k.behind = V{};
    if (a.rollout_logp) k.behind = old - (k.valid ? read<kSome>(a.rollout_logp, t, n) : V{});
    return k;
  }

  PRISM_INLINE V bounded_exp(V x) const {
    return exp_clamped(between(x, broadcast<V>(-a.bound), broadcast<V>(a.bound)));
  }

  struct Correction {
    V raw, used;
    Flags<V> clipped;
  };

  PRISM_INLINE Correction correct(V behind) const {
    const V one = broadcast<V>(1);
    Correction c{one, one, V{} < V{}};
    if (!a.rollout_logp) return c;
    c.raw = bounded_exp(behind);
    if (a.rule == Rule::none) return c;
    c.clipped = c.raw > a.upper;
    if (a.rule == Rule::truncate) {
      c.used = c.clipped ? broadcast<V>(a.upper) : c.raw;
    } else {
      c.clipped = c.clipped | (c.raw < a.lower);
      c.used = c.clipped ? V{} : c.raw;
    }
    return c;
  }

  // what is the same for all tokens of a sequence
  struct Sequence {
    T weight, advantage;
    // means over the valid tokens, or sums for the product of a correction; used where the options ask for them
    T log_ratio, behind, used;
  };

  template <bool kSome>
  PRISM_INLINE void step(const Sequence& q, int64_t t, int64_t n, Partial<V>& partial) const {
    const Tokens k = tokens<kSome>(t, n);
    const Flags<V> valid = k.valid;
    const V zero{}, one = broadcast<V>(1);
    const bool whole = a.ratio == Ratio::sequence;
    const V log_ratio = whole ? broadcast<V>(q.log_ratio) : k.lag;
    const V r = bounded_exp(log_ratio);
    const Flags<V> outside = (log_ratio > a.bound) | (log_ratio < -a.bound);
    const V advantage = a.per_token ? read<kSome>(a.advantage, t, n) : broadcast<V>(q.advantage);
    const Correction c = correct(a.unit == Unit::token ? k.behind : broadcast<V>(q.behind));

    Flags<V> below = r < a.low, above = r > a.high;
    V value, slope;
    if (a.objective == Objective::clip) {
      below = below & (advantage < zero);
      above = above & (advantage > zero);
      V held = below ? broadcast<V>(a.low) : above ? broadcast<V>(a.high) : r;
      const Flags<V> dual = (advantage < zero) & (held > a.dual);
      held = dual ? broadcast<V>(a.dual) : held;
      value = -advantage * held;
      slope = (below | above | dual | outside) ? zero : value;
      partial.dual += (valid & dual) ? one : zero;
    } else if (a.objective == Objective::cispo) {
      slope = -advantage * between(r, broadcast<V>(a.low), broadcast<V>(a.high));
      value = slope * k.x;
    } else {
      slope = -advantage;
      value = slope * k.x;
      below = above = zero < zero;
    }
    partial.low += (valid & below) ? one : zero;
    partial.high += (valid & above) ? one : zero;

    const V weight = broadcast<V>(q.weight);
    // through the mean over the sequence each token contributes alike
    const bool alike = whole && a.objective == Objective::clip && !a.per_token;
    V grad = weight * (alike ? broadcast<V>(q.used) : c.used) * slope;
    V term = c.used * value;
    if (a.ref_logp) {
      const V delta = k.x - (valid ? read<kSome>(a.ref_logp, t, n) : zero);
      V kl = delta, kl_slope = delta;
      if (a.estimator == Estimator::k1) kl_slope = one;
      if (a.estimator == Estimator::k2) kl = delta * delta * static_cast<T>(0.5);
      if (a.estimator == Estimator::k3 || a.estimator == Estimator::k3_plus) {
        const V held = between(delta, broadcast<V>(-a.bound), broadcast<V>(a.bound));
        const V less = expm1_of(-held, exp_clamped(-held));
        kl = less + held;
        if (a.estimator == Estimator::k3) kl_slope = ((delta > a.bound) | (delta < -a.bound)) ? zero : -less;
      }
      term += a.kl_coef * kl;
      grad += weight * (a.kl_coef * kl_slope);
      partial.kl += valid ? kl : zero;
    }
    if (a.entropy) {
      const V entropy = valid ? read<kSome>(a.entropy, t, n) : zero;
      term -= a.entropy_coef * entropy;
      partial.entropy += entropy;
      const V grad_entropy = valid ? -a.entropy_coef * weight : zero;
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
    partial.lag -= k.lag;
    partial.ratio += valid ? r : zero;
    const V importance = valid ? r * c.used : zero;
    partial.weight += importance;
    partial.weight_square += importance * importance;
    if (a.rollout_logp) {
      partial.raw += valid ? c.raw : zero;
      partial.used += valid ? c.used : zero;
      partial.clipped += (valid & c.clipped) ? one : zero;
    }
    // NaN stays NaN
    partial.smallest = (valid & ((r < partial.smallest) | (r != r))) ? r : partial.smallest;
    partial.largest = (valid & ((r > partial.largest) | (r != r))) ? r : partial.largest;
  }

  // what `step` does where the loss is PPO's with an advantage per sequence, and nothing else is asked for: the sign of
  // the advantage then says for the whole sequence on which sides the ratio is held
  struct Plain {
    V weight, loss, advantage, log_ratio, floor, ceiling, bound;
  };

  PRISM_INLINE Plain plain(const Sequence& q) const {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T ceiling = q.advantage > 0 ? a.high : q.advantage < 0 ? a.dual : inf;
    return {broadcast<V>(q.weight),    broadcast<V>(-q.weight * q.advantage),
            broadcast<V>(q.advantage), broadcast<V>(q.log_ratio),
            broadcast<V>(q.advantage < 0 ? a.low : -inf), broadcast<V>(ceiling), broadcast<V>(a.bound)};
  }

  template <bool kMask>
  PRISM_INLINE void plain_step(const Plain& q, int64_t t, Partial<V>& partial, V& over) const {
    const V zero{}, one = broadcast<V>(1);
    const Flags<V> valid = kMask ? flags_of(a.mask + t, static_cast<V*>(nullptr)) : zero == zero;
    V lag = load<V>(a.logp + t) - load<V>(a.old_logp + t);
    if constexpr (kMask) lag = valid ? lag : zero;
    const V log_ratio = a.ratio == Ratio::sequence ? q.log_ratio : lag;
    V r = exp_clamped(between(log_ratio, -q.bound, q.bound));
    const Flags<V> below = r < q.floor, above = r > q.ceiling;
    const Flags<V> still = below | above | (log_ratio > q.bound) | (log_ratio < -q.bound);
    const V held = between(r, q.floor, q.ceiling);
    V loss = q.loss * held;
    V grad = still ? zero : loss;
    Flags<V> low = below, high = above;
    if constexpr (kMask) {
      // a mask may hide a whole sequence, whose advantage may be NaN
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
    partial.low += low ? one : zero;
    over += high ? one : zero;
    partial.lag -= lag;
    partial.ratio += r;
    partial.weight += r;
    partial.weight_square += r * r;
  }

  // sums over a sequence's valid tokens, each block of them in T and then in double
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
    Sequence q{static_cast<T>(a.weights[s]), a.per_token ? T(0) : a.advantage[s], T(0), T(0), T(1)};
    const auto lag = [](const Tokens& k, V& total) __attribute__((always_inline)) { total += k.lag; };
    const auto behind = [](const Tokens& k, V& total) __attribute__((always_inline)) { total += k.behind; };
    const auto used = [this](const Tokens& k, V& total) __attribute__((always_inline)) {
      total += k.valid ? correct(k.behind).used : V{};
    };
    if (a.ratio == Ratio::sequence && a.old_logp) q.log_ratio = static_cast<T>(sum(begin, end, lag) / n);
    if (!a.rollout_logp) return q;
    if (a.unit != Unit::token) {
      const double total = sum(begin, end, behind);
      q.behind = static_cast<T>(a.unit == Unit::geometric ? total / n : total);
      q.used = first_lane(correct(broadcast<V>(q.behind)).used);
    } else if (a.ratio == Ratio::sequence && a.rule != Rule::none) {
      q.used = static_cast<T>(sum(begin, end, used) / n);
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
    add(total[kLow], p.low);
    add(total[kHigh], p.high);
    add(total[kDual], p.dual);
    add(total[kLag], p.lag);
    add(total[kKl], p.kl);
    add(total[kRatioSum], p.ratio);
    add(total[kRaw], p.raw);
    add(total[kUsed], p.used);
    add(total[kClipped], p.clipped);
    add(total[kWeight], p.weight);
    add(total[kWeightSquare], p.weight_square);
    add(total[kEntropy], p.entropy);
  }

  Sums run(int64_t first, int64_t last) const {
    Sums sums;
    Partial<V> partial;
    int64_t since = 0;
    const bool simple = a.objective == Objective::clip && !a.per_token && a.old_logp && !a.rollout_logp && !a.ref_logp &&
                        !a.entropy;
    for (int64_t s = first; s < last; ++s) {
      const Sequence q = sequence(s);
      const Plain p = plain(q);
      // held from above: by the clip, or for a negative advantage by the dual clip
      V over{};
      int64_t t = a.bounds[s];
      const int64_t end = a.bounds[s + 1];
      while (end - t >= W) {
        const int64_t stop = std::min(end - W, t + kFlush);
        const int64_t begin = t;
        if (!simple) {
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
        partial.dual += over;
      } else {
        partial.high += over;
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
// double is for checking gradients: the C library does its mathematics, whatever the instruction set
inline Sums loss_double(const PolicyLoss<double>& a, int64_t first, int64_t last) {
  return Kernel<double>(a).run(first, last);
}

}  // namespace prism::PRISM_ISA
