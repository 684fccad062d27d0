// No include guard: each_isa.h includes this file once for each instruction set.
//
// A row is computed block by block. The inner loops read and write the type T that they compute with; a block of
// another element type goes through a buffer that fits the first-level cache.

namespace prism::PRISM_ISA {
namespace {

// columns of a block. The sums over a block are formed in T, and added to the row's sums in double
constexpr int64_t kBlock = 4096;

template <class T>
struct alignas(64) Buffer {
  T data[kBlock];
};

template <class V, class E>
void widen(const E* from, int64_t n, typename Lanes<V>::Value* to) {
  constexpr int64_t W = Lanes<V>::count;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load<V>(from + i));
  // a whole vector: the buffer's size is a multiple of one
  if (i < n) store(to + i, load_some<V>(from + i, n - i));
}

template <class V, class E>
void narrow(const typename Lanes<V>::Value* from, int64_t n, E* to) {
  constexpr int64_t W = Lanes<V>::count;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load<V>(from + i));
  if (i < n) store_some(to + i, load<V>(from + i), n - i);
}

// n columns of row t from `begin` on: in the matrix itself, or in the buffer if they have another type
template <class V, class T = typename Lanes<V>::Value>
const T* read(const Matrix& matrix, int64_t t, int64_t begin, int64_t n, Buffer<T>& buffer) {
  if constexpr (!std::is_same_v<T, double>) {
    if (matrix.type == ScalarType::BFloat16) {
      widen<V>(row_pointer<const BFloat16>(matrix, t) + begin, n, buffer.data);
      return buffer.data;
    }
    if (matrix.type == ScalarType::Half) {
      widen<V>(row_pointer<const Half>(matrix, t) + begin, n, buffer.data);
      return buffer.data;
    }
  }
  return row_pointer<const T>(matrix, t) + begin;
}

// where the kernel writes these columns, before `write` copies them into the matrix if they are in the buffer
template <class T>
T* destination(const Matrix& matrix, int64_t t, int64_t begin, Buffer<T>& buffer) {
  const bool same = matrix.type == ScalarType::Float || matrix.type == ScalarType::Double;
  return same ? row_pointer<T>(matrix, t) + begin : buffer.data;
}

template <class V, class T = typename Lanes<V>::Value>
void write(const Matrix& matrix, int64_t t, int64_t begin, int64_t n, const Buffer<T>& buffer) {
  if constexpr (!std::is_same_v<T, double>) {
    if (matrix.type == ScalarType::BFloat16) narrow<V>(buffer.data, n, row_pointer<BFloat16>(matrix, t) + begin);
    if (matrix.type == ScalarType::Half) narrow<V>(buffer.data, n, row_pointer<Half>(matrix, t) + begin);
  }
}

inline void zero(const Matrix& matrix, int64_t t, int64_t columns) {
  const int64_t size = matrix.element();
  std::memset(static_cast<char*>(matrix.data) + t * matrix.stride * size, 0, columns * size);
}

// the logit x, which is z + bias under the soft cap, and the slope dx/dz
template <class V>
struct Logit {
  V x, slope;
};

template <class V>
PRISM_INLINE Logit<V> soft_cap(V z, typename Lanes<V>::Value softcap) {
  const V one = broadcast<V>(1);
  if (softcap == 0) return {z, one};
  const V ratio = tanh(z / softcap);
  return {ratio * softcap, one - ratio * ratio};
}

// a vector of a block's logits from column i on; kPlain: there is neither bias nor soft cap
template <class V, bool kPlain, class T = typename Lanes<V>::Value>
PRISM_INLINE Logit<V> logit_at(const T* z, const T* bias, int64_t i, T softcap) {
  V x = load<V>(z + i);
  if constexpr (kPlain) return {x, broadcast<V>(1)};
  if (bias) x += load<V>(bias + i);
  return soft_cap(x, softcap);
}

template <class V, bool kPlain, class T = typename Lanes<V>::Value>
PRISM_INLINE Logit<V> logit_at_some(const T* z, const T* bias, int64_t i, int64_t n, T softcap) {
  V x = load_some<V>(z + i, n);
  if constexpr (kPlain) return {x, broadcast<V>(1)};
  if (bias) x += load_some<V>(bias + i, n);
  return soft_cap(x, softcap);
}

// the largest z + bias of a block, without NaN
template <class V, class T = typename Lanes<V>::Value>
T top_of(const T* z, const T* bias, int64_t columns) {
  constexpr int64_t W = Lanes<V>::count;
  constexpr T none = -std::numeric_limits<T>::infinity();
  V most[4] = {broadcast<V>(none), broadcast<V>(none), broadcast<V>(none), broadcast<V>(none)};
  const auto include = [&](int64_t i, V& top) __attribute__((always_inline)) {
    V x = load<V>(z + i);
    if (bias) x += load<V>(bias + i);
    top = x > top ? x : top;
  };
  int64_t i = 0;
  for (; i + 4 * W <= columns; i += 4 * W) {
    include(i, most[0]);
    include(i + W, most[1]);
    include(i + 2 * W, most[2]);
    include(i + 3 * W, most[3]);
  }
  for (; i + W <= columns; i += W) include(i, most[0]);
  most[0] = most[1] > most[0] ? most[1] : most[0];
  most[2] = most[3] > most[2] ? most[3] : most[2];
  T top = max_lanes(most[2] > most[0] ? most[2] : most[0]);
  for (; i < columns; ++i) {
    const T x = bias ? z[i] + bias[i] : z[i];
    top = x > top ? x : top;
  }
  return top;
}

// forward

template <class V>
struct Sums {
  V e{}, ed{}, ee{};
};

template <class V, bool kPlain, bool kWrite>
struct ForwardRow {
  using T = typename Lanes<V>::Value;
  static constexpr int64_t W = Lanes<V>::count;
  V centre, inv_temperature;
  Bounds<V> bounds;
  T softcap;
  bool chain;

  PRISM_INLINE V exponent(V x) const { return bounds.clamp((x - centre) * inv_temperature); }

  PRISM_INLINE V add(V d, Sums<V>& sums) const {
    const V e = exp_clamped(d);
    sums.e += e;
    sums.ed += e * d;
    sums.ee += e * e;
    return e;
  }

  PRISM_INLINE void step(const T* z, const T* bias, T* exp, int64_t i, Sums<V>& sums) const {
    const Logit<V> logit = logit_at<V, kPlain>(z, bias, i, softcap);
    const V e = add(exponent(logit.x), sums);
    if constexpr (kWrite) store(exp + i, !kPlain && chain ? e * logit.slope : e);
  }

  // n columns, at most a vector; e is 0 in the lane `target` and in the lanes from n on
  __attribute__((noinline)) void step_some(const T* z, const T* bias, T* exp, int64_t i, int64_t n, int64_t target,
                                           Sums<V>& sums) const {
    const Logit<V> logit = logit_at_some<V, kPlain>(z, bias, i, n, softcap);
    T lanes[W];
    store(lanes, exponent(logit.x));
    for (int64_t lane = 0; lane < W; ++lane) {
      if (lane >= n || lane == target) lanes[lane] = Lanes<V>::lowest;
    }
    const V e = add(load<V>(lanes), sums);
    if constexpr (kWrite) {
      V f = !kPlain && chain ? e * logit.slope : e;
      // the slope at the target may be NaN
      f = e == 0 ? e : f;
      store_some(exp + i, f, n);
    }
  }

  // prefetches `ahead` meanwhile, `ahead_size` bytes for each column
  void span(const T* z, const T* bias, T* exp, int64_t begin, int64_t end, const char* ahead, int64_t ahead_size,
            Sums<V>& sums) const {
    // a copy to which no pointer exists stays in registers
    const ForwardRow row = *this;
    Sums<V> even, odd;
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      for (int64_t k = 0; k < 2 * W; k += 16) __builtin_prefetch(ahead + (i + k) * ahead_size, 0, 2);
      row.step(z, bias, exp, i, even);
      row.step(z, bias, exp, i + W, odd);
    }
    for (; i + W <= end; i += W) row.step(z, bias, exp, i, even);
    sums.e += even.e + odd.e;
    sums.ed += even.ed + odd.ed;
    sums.ee += even.ee + odd.ee;
    if (i < end) step_some(z, bias, exp, i, end - i, -1, sums);
  }

  void block(const T* z, const T* bias, T* exp, int64_t columns, int64_t target, const char* ahead, int64_t ahead_size,
             Sums<V>& sums) const {
    if (target < 0 || target >= columns) {
      span(z, bias, exp, 0, columns, ahead, ahead_size, sums);
      return;
    }
    const int64_t first = target / W * W, last = std::min(first + W, columns);
    span(z, bias, exp, 0, first, ahead, ahead_size, sums);
    step_some(z, bias, exp, first, last - first, target - first, sums);
    span(z, bias, exp, last, columns, ahead, ahead_size, sums);
  }
};

template <class V, bool kPlain, bool kWrite, class T = typename Lanes<V>::Value>
void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  Buffer<T> buffer;
  const auto for_blocks = [&](int64_t t, auto&& f) {
    for (int64_t v = 0; v < a.columns; v += kBlock) {
      const int64_t n = std::min(kBlock, a.columns - v);
      f(v, n, read<V>(a.z, t, v, n, buffer), a.bias ? a.bias + v : nullptr);
    }
  };
  const int64_t size = a.z.element();
  for (int64_t t = begin; t < end; ++t) {
    const T anchor = a.anchor[t], inv_temperature = a.inv_temperature[t];
    T top = -std::numeric_limits<T>::infinity();
    for_blocks(t, [&](int64_t, int64_t n, const T* z, const T* bias) { top = std::max(top, top_of<V>(z, bias, n)); });
    if constexpr (!kPlain) top = max_lanes(soft_cap(broadcast<V>(top), a.softcap).x);
    bool far = (top - anchor) * inv_temperature > static_cast<T>(kFar);
    if (far) {
      // a row with a NaN is not far: its largest logit is NaN, which exceeds nothing
      for_blocks(t, [&](int64_t, int64_t n, const T* z, const T* bias) {
        for (int64_t i = 0; i < n; ++i) far = far && !std::isnan(bias ? z[i] + bias[i] : z[i]);
      });
    }
    const T centre = far ? top : anchor;
    const ForwardRow<V, kPlain, kWrite> row{broadcast<V>(centre), broadcast<V>(inv_temperature), Bounds<V>(),
                                            a.softcap, a.chain};
    // the next row is prefetched while this one is computed
    const char* next = static_cast<const char*>(a.z.data) + (t + 1 < end ? t + 1 : t) * a.z.stride * size;
    double e = 0, ed = 0, ee = 0;
    for_blocks(t, [&](int64_t v, int64_t n, const T* z, const T* bias) {
      Sums<V> sums;
      T* exp = nullptr;
      if constexpr (kWrite) exp = destination(a.exp, t, v, buffer);
      row.block(z, bias, exp, n, a.target[t] - v, next + v * size, size, sums);
      if constexpr (kWrite) write<V>(a.exp, t, v, n, buffer);
      e += sum_lanes(sums.e);
      ed += sum_lanes(sums.ed);
      ee += sum_lanes(sums.ee);
    });
    a.stats[kAnchor][t] = centre;
    a.stats[kRest][t] = static_cast<T>(e);
    a.stats[kMoment][t] = static_cast<T>(ed);
    a.stats[kSquare][t] = static_cast<T>(ee);
    if (kWrite && !std::isfinite(a.stats[kRest][t])) zero(a.exp, t, a.columns);
  }
}

template <class V>
void forward(const Forward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  const bool plain = a.bias == nullptr && a.softcap == 0, write = a.exp.data != nullptr;
  if (plain) {
    write ? forward_rows<V, true, true>(a, begin, end) : forward_rows<V, true, false>(a, begin, end);
  } else {
    write ? forward_rows<V, false, true>(a, begin, end) : forward_rows<V, false, false>(a, begin, end);
  }
}

// backward

// the content of `source`: logits without bias and soft cap; logits with either; e, where the gradient is alpha * e; e,
// where the gradient needs log e
enum class Source { logits, general_logits, scaled_exp, exp };

template <class V, Source kSource>
struct BackwardRow {
  using T = typename Lanes<V>::Value;
  static constexpr int64_t W = Lanes<V>::count;
  static constexpr bool kPlain = kSource != Source::general_logits;
  V centre, inv_temperature, temperature, alpha, beta;
  Bounds<V> bounds;
  T softcap;

  PRISM_INLINE V gradient(Logit<V> logit) const {
    if constexpr (kSource == Source::scaled_exp) {
      return logit.x * alpha;
    } else if constexpr (kSource == Source::exp) {
      const V d = log_positive(logit.x);
      const V f = (d * beta + alpha) * logit.x;
      if (softcap == 0) return f;
      const V ratio = (d * temperature + centre) / softcap;
      return f * (1 - ratio * ratio);
    } else {
      const V d = bounds.clamp((logit.x - centre) * inv_temperature);
      const V f = (d * beta + alpha) * exp_clamped(d);
      return kPlain ? f : f * logit.slope;
    }
  }

  void block(const T* source, const T* bias, T* out, int64_t columns) const {
    const BackwardRow row = *this;
    int64_t i = 0;
    for (; i + W <= columns; i += W) {
      store(out + i, row.gradient(logit_at<V, kPlain>(source, bias, i, row.softcap)));
    }
    if (i < columns) {
      const int64_t n = columns - i;
      store_some(out + i, gradient(logit_at_some<V, kPlain>(source, bias, i, n, softcap)), n);
    }
  }
};

template <class V, Source kSource, class T = typename Lanes<V>::Value>
void backward_row(const Backward<T>& a, int64_t t) {
  const BackwardRow<V, kSource> row{broadcast<V>(a.anchor[t]),
                                    broadcast<V>(a.inv_temperature[t]),
                                    broadcast<V>(1 / a.inv_temperature[t]),
                                    broadcast<V>(a.coefficients[kAlpha][t]),
                                    broadcast<V>(a.coefficients[kBeta][t]),
                                    Bounds<V>(),
                                    a.softcap};
  Buffer<T> buffer;
  for (int64_t v = 0; v < a.columns; v += kBlock) {
    const int64_t n = std::min(kBlock, a.columns - v);
    const T* source = read<V>(a.source, t, v, n, buffer);
    T* out = destination(a.out, t, v, buffer);
    row.block(source, a.bias ? a.bias + v : nullptr, out, n);
    const int64_t target = a.target[t] - v;
    if (target >= 0 && target < n) out[target] = a.coefficients[kAtTarget][t];
    write<V>(a.out, t, v, n, buffer);
  }
}

template <class V>
void backward(const Backward<typename Lanes<V>::Value>& a, int64_t begin, int64_t end) {
  const bool plain = a.bias == nullptr && a.softcap == 0;
  for (int64_t t = begin; t < end; ++t) {
    const auto alpha = a.coefficients[kAlpha][t], beta = a.coefficients[kBeta][t];
    const auto at_target = a.coefficients[kAtTarget][t];
    if (alpha == 0 && beta == 0 && at_target == 0) {
      zero(a.out, t, a.columns);
    } else if (!a.source_is_exp) {
      plain ? backward_row<V, Source::logits>(a, t) : backward_row<V, Source::general_logits>(a, t);
    } else {
      const bool scaled = beta == 0 && a.softcap == 0;
      scaled ? backward_row<V, Source::scaled_exp>(a, t) : backward_row<V, Source::exp>(a, t);
    }
  }
}

inline void forward_float(const Forward<float>& a, int64_t begin, int64_t end) { forward<Vec>(a, begin, end); }
inline void backward_float(const Backward<float>& a, int64_t begin, int64_t end) { backward<Vec>(a, begin, end); }
// double serves gradient checks: the C library does its mathematics on every instruction set
inline void forward_double(const Forward<double>& a, int64_t begin, int64_t end) { forward<double>(a, begin, end); }
inline void backward_double(const Backward<double>& a, int64_t begin, int64_t end) { backward<double>(a, begin, end); }

}  // namespace
}  // namespace prism::PRISM_ISA
