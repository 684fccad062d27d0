// No include guard: each_isa.h includes this file once for each instruction set.

namespace prism::PRISM_ISA {

// columns whose sums are formed in the compute type before they join a row's, which are double
constexpr int64_t kBlock = 4096;
// as FAR in torch.py
constexpr double kFar = 28;

// calls `f` with a null pointer to the element type that the kernels for V read and write
template <class V, class F>
PRISM_INLINE void with_element(ScalarType type, F&& f) {
  if constexpr (std::is_same_v<V, double>) {
    f(static_cast<double*>(nullptr));
  } else if (type == ScalarType::Float) {
    f(static_cast<float*>(nullptr));
  } else if (type == ScalarType::BFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else {
    f(static_cast<Half*>(nullptr));
  }
}

// x = z + bias under the soft cap, and the slope dx/dz
template <class V>
struct Logit {
  V x, slope;
};

// how a row's logits come from memory; kPlain: neither bias nor soft cap
template <class V, bool kPlain>
struct Cap {
  using T = typename Lanes<V>::Value;
  const T* bias;
  T softcap;

  PRISM_INLINE V add_bias(V z, V b) const { return bias ? z + b : z; }

  PRISM_INLINE Logit<V> operator()(V z) const {
    const V one = broadcast<V>(1);
    if (kPlain || softcap == 0) return {z, one};
    const V ratio = tanh(z / softcap);
    return {ratio * softcap, one - ratio * ratio};
  }
};

template <class V>
struct Sums {
  V e{}, ed{}, ee{};
};

// E is void where the exponentials are not written
template <class V, class Z, class E, bool kPlain>
struct ForwardRow {
  using T = typename Lanes<V>::Value;
  static constexpr int64_t W = Lanes<V>::count;
  const Z *z, *next;
  E* exp;
  Cap<V, kPlain> cap;
  bool chain;
  V centre, inv_temperature;

  PRISM_INLINE V raw(int64_t i) const {
    const V x = load<V>(z + i);
    if constexpr (kPlain) return x;
    return cap.bias ? x + load<V>(cap.bias + i) : x;
  }
  PRISM_INLINE V raw_some(int64_t i, int64_t n) const {
    const V x = load_some<V>(z + i, n);
    if constexpr (kPlain) return x;
    return cap.bias ? x + load_some<V>(cap.bias + i, n) : x;
  }
  PRISM_INLINE V exponent(V x) const { return clamp_exponent((x - centre) * inv_temperature); }
  PRISM_INLINE static void accumulate(V e, V d, Sums<V>& sums) {
    sums.e += e;
    sums.ed += e * d;
    sums.ee += e * e;
  }
  PRISM_INLINE V written(V e, V slope) const { return !kPlain && chain ? e * slope : e; }

  PRISM_INLINE void step(int64_t i, Sums<V>& sums) const {
    const Logit<V> logit = cap(raw(i));
    const V d = exponent(logit.x);
    const V e = prism::PRISM_ISA::exp(d);
    accumulate(e, d, sums);
    if constexpr (!std::is_void_v<E>) store(exp + i, written(e, logit.slope));
  }

  // the n columns from i on as one vector; the lane `target` and those from n on count as e = 0
  __attribute__((noinline)) void step_some(int64_t i, int64_t n, int64_t target, Sums<V>& sums) const {
    const Logit<V> logit = cap(raw_some(i, n));
    T lanes[W];
    store(lanes, exponent(logit.x));
    for (int64_t lane = 0; lane < W; ++lane) {
      if (lane >= n || lane == target) lanes[lane] = Lanes<V>::lowest;
    }
    const V d = load<V>(lanes);
    const V e = prism::PRISM_ISA::exp(d);
    accumulate(e, d, sums);
    if constexpr (!std::is_void_v<E>) {
      // not a bare product: at the target the slope may be NaN
      V f = written(e, logit.slope);
      f = e == 0 ? e : f;
      store_some(exp + i, f, n);
    }
  }

  PRISM_INLINE void span(int64_t begin, int64_t end, Sums<V>& sums) const {
    Sums<V> even, odd;
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      // the next row comes to the cache while this one computes
      for (int64_t k = 0; k < 2 * W; k += 64 / sizeof(Z)) __builtin_prefetch(next + i + k, 0, 2);
      step(i, even);
      step(i + W, odd);
    }
    for (; i + W <= end; i += W) step(i, even);
    sums.e += even.e + odd.e;
    sums.ed += even.ed + odd.ed;
    sums.ee += even.ee + odd.ee;
    if (i < end) step_some(i, end - i, -1, sums);
  }

  // the largest logit, NaN aside
  PRISM_INLINE T top(int64_t columns) const {
    const V lowest = broadcast<V>(-std::numeric_limits<T>::infinity());
    V most[4] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + 4 * W <= columns; i += 4 * W) {
      for (int64_t k = 0; k < 4; ++k) {
        const V x = raw(i + k * W);
        most[k] = x > most[k] ? x : most[k];
      }
    }
    for (; i + W <= columns; i += W) {
      const V x = raw(i);
      most[0] = x > most[0] ? x : most[0];
    }
    for (; i < columns; ++i) {
      const V x = broadcast<V>(load_first(raw_some(i, 1)));
      most[1] = x > most[1] ? x : most[1];
    }
    for (int64_t k = 1; k < 4; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
    return load_first(cap(broadcast<V>(max_lanes(most[0]))).x);
  }

  bool has_nan(int64_t columns) const {
    for (int64_t i = 0; i < columns; ++i) {
      const T x = load_first(cap(raw_some(i, 1)).x);
      if (x != x) return true;
    }
    return false;
  }

  PRISM_INLINE static T load_first(V x) {
    T first;
    std::memcpy(&first, &x, sizeof first);
    return first;
  }
};

template <class V, class Z, class E, bool kPlain>
void forward_rows(const Forward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  using T = typename Lanes<V>::Value;
  constexpr int64_t W = Lanes<V>::count;
  for (int64_t t = begin; t < end; ++t) {
    ForwardRow<V, Z, E, kPlain> row{row_pointer<const Z>(a.z, t), row_pointer<const Z>(a.z, t + 1 < end ? t + 1 : t),
                                    static_cast<E*>(nullptr), {a.bias, a.softcap}, a.chain, V{}, V{}};
    if constexpr (!std::is_void_v<E>) row.exp = row_pointer<E>(a.exp, t);
    const T anchor = a.anchor[t], inv_temperature = a.inv_temperature[t], top = row.top(a.columns);
    // a NaN is the largest of its row, and lies not further than anything
    const bool far = (top - anchor) * inv_temperature > kFar && !row.has_nan(a.columns);
    const T centre = far ? top : anchor;
    row.centre = broadcast<V>(centre);
    row.inv_temperature = broadcast<V>(inv_temperature);

    const int64_t target = a.target[t];
    double e = 0, ed = 0, ee = 0;
    for (int64_t block = 0; block < a.columns; block += kBlock) {
      const int64_t stop = std::min(block + kBlock, a.columns);
      Sums<V> sums;
      if (target >= block && target < stop) {
        const int64_t first = block + (target - block) / W * W, last = std::min(first + W, stop);
        row.span(block, first, sums);
        row.step_some(first, last - first, target - first, sums);
        row.span(last, stop, sums);
      } else {
        row.span(block, stop, sums);
      }
      e += sum_lanes(sums.e);
      ed += sum_lanes(sums.ed);
      ee += sum_lanes(sums.ee);
    }
    a.stats[0][t] = centre;
    a.stats[1][t] = static_cast<T>(e);
    a.stats[2][t] = static_cast<T>(ed);
    a.stats[3][t] = static_cast<T>(ee);
    if constexpr (!std::is_void_v<E>) {
      if (!std::isfinite(a.stats[1][t])) std::memset(static_cast<void*>(row.exp), 0, a.columns * sizeof(E));
    }
  }
}

template <class V>
void forward(const Forward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  const bool plain = a.bias == nullptr && a.softcap == 0;
  with_element<V>(a.z.type, [&](auto* z) {
    using Z = std::remove_pointer_t<decltype(z)>;
    if (a.exp.data == nullptr) {
      plain ? forward_rows<V, Z, void, true>(a, begin, end) : forward_rows<V, Z, void, false>(a, begin, end);
      return;
    }
    with_element<V>(a.exp.type, [&](auto* exp) {
      using E = std::remove_pointer_t<decltype(exp)>;
      plain ? forward_rows<V, Z, E, true>(a, begin, end) : forward_rows<V, Z, E, false>(a, begin, end);
    });
  });
}

// what `source` holds and what its row's gradient needs of it
enum class Source {
  logits,          // without bias and soft cap
  general_logits,  // with either
  scaled_exp,      // only alpha * e is asked for
  exp              // d = log e is needed
};

template <class V, class S, class O, Source kSource>
struct BackwardRow {
  using T = typename Lanes<V>::Value;
  static constexpr int64_t W = Lanes<V>::count;
  const S* source;
  O* out;
  Cap<V, kSource == Source::logits> cap;
  V centre, inv_temperature, temperature, alpha, beta;

  PRISM_INLINE V gradient(V x) const {
    if constexpr (kSource == Source::scaled_exp) {
      return x * alpha;
    } else if constexpr (kSource == Source::exp) {
      const V d = log_positive(x);
      const V f = (d * beta + alpha) * x;
      if (cap.softcap == 0) return f;
      const V ratio = (d * temperature + centre) / cap.softcap;
      return f * (broadcast<V>(1) - ratio * ratio);
    } else {
      const Logit<V> logit = cap(x);
      const V d = clamp_exponent((logit.x - centre) * inv_temperature);
      const V f = (d * beta + alpha) * prism::PRISM_ISA::exp(d);
      return kSource == Source::logits ? f : f * logit.slope;
    }
  }

  PRISM_INLINE void step(int64_t i) const {
    V x = load<V>(source + i);
    if constexpr (kSource == Source::general_logits) x = cap.bias ? x + load<V>(cap.bias + i) : x;
    store(out + i, gradient(x));
  }

  __attribute__((noinline)) void step_some(int64_t i, int64_t n) const {
    V x = load_some<V>(source + i, n);
    if constexpr (kSource == Source::general_logits) x = cap.bias ? x + load_some<V>(cap.bias + i, n) : x;
    store_some(out + i, gradient(x), n);
  }

  void all(int64_t columns) const {
    int64_t i = 0;
    for (; i + W <= columns; i += W) step(i);
    if (i < columns) step_some(i, columns - i);
  }
};

template <class V, class S, class O, Source kSource>
void backward_row(const Backward<typename Lanes<V>::Value>& a, int64_t t) {
  using T = typename Lanes<V>::Value;
  const BackwardRow<V, S, O, kSource> row{row_pointer<const S>(a.source, t),
                                          row_pointer<O>(a.out, t),
                                          {a.bias, a.softcap},
                                          broadcast<V>(a.anchor[t]),
                                          broadcast<V>(a.inv_temperature[t]),
                                          broadcast<V>(T(1) / a.inv_temperature[t]),
                                          broadcast<V>(a.coefficients[0][t]),
                                          broadcast<V>(a.coefficients[1][t])};
  row.all(a.columns);
}

template <class V, class S, class O>
void backward_rows(const Backward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    O* out = row_pointer<O>(a.out, t);
    const auto alpha = a.coefficients[0][t], beta = a.coefficients[1][t], at_target = a.coefficients[2][t];
    if (alpha == 0 && beta == 0 && at_target == 0) {
      std::memset(static_cast<void*>(out), 0, a.columns * sizeof(O));
      continue;
    }
    if (a.source_is_exp) {
      const bool scaled = beta == 0 && a.softcap == 0;
      scaled ? backward_row<V, S, O, Source::scaled_exp>(a, t) : backward_row<V, S, O, Source::exp>(a, t);
    } else {
      const bool plain = a.bias == nullptr && a.softcap == 0;
      plain ? backward_row<V, S, O, Source::logits>(a, t) : backward_row<V, S, O, Source::general_logits>(a, t);
    }
    const int64_t target = a.target[t];
    if (target >= 0 && target < a.columns) out[target] = static_cast<O>(at_target);
  }
}

template <class V>
void backward(const Backward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  with_element<V>(a.source.type, [&](auto* source) {
    with_element<V>(a.out.type, [&](auto* out) {
      using S = std::remove_pointer_t<decltype(source)>;
      using O = std::remove_pointer_t<decltype(out)>;
      backward_rows<V, S, O>(a, begin, end);
    });
  });
}

inline void forward_float(const Forward<float>& a, int64_t begin, int64_t end) { forward<Vec>(a, begin, end); }
inline void backward_float(const Backward<float>& a, int64_t begin, int64_t end) { backward<Vec>(a, begin, end); }
// double is for checks of gradients: as fast as the C library, so one copy of it will do
inline void forward_double(const Forward<double>& a, int64_t begin, int64_t end) { forward<double>(a, begin, end); }
inline void backward_double(const Backward<double>& a, int64_t begin, int64_t end) { backward<double>(a, begin, end); }

}  // namespace prism::PRISM_ISA
