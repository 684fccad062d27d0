// No include guard: each_isa.h includes this file once for each instruction set.
//
// One kernel source serves two vector types: Vec, the floats that a register of the instruction set holds, and double,
// a vector of one element, for which the C library does the mathematics.

#ifndef PRISM_INLINE
#define PRISM_INLINE inline __attribute__((always_inline))
#endif

namespace prism::PRISM_ISA {

typedef float Vec __attribute__((vector_size(PRISM_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(PRISM_VECTOR_BYTES)));
typedef uint32_t BitVec __attribute__((vector_size(PRISM_VECTOR_BYTES)));
typedef uint16_t ShortVec __attribute__((vector_size(PRISM_VECTOR_BYTES / 2)));

template <class V>
struct Lanes;
template <>
struct Lanes<Vec> {
  using Value = float;
  static constexpr int64_t count = PRISM_VECTOR_BYTES / sizeof(float);
  // exp(lowest) is exactly 0, and with d clamped to `lowest` exp(d) * d is 0 even for d = -inf
  static constexpr float lowest = -88.0f;
  static constexpr float highest = 88.72f;
};
template <>
struct Lanes<double> {
  using Value = double;
  static constexpr int64_t count = 1;
  static constexpr double lowest = -746.0;
  static constexpr double highest = 710.0;
};

template <class V>
PRISM_INLINE V broadcast(typename Lanes<V>::Value x) {
  // a difference, since a sum would turn -0 into 0
  return x - V{};
}

// [lowest, highest], to which an exponent must be clamped before exp_clamped
template <class V>
struct Bounds {
  V lowest, highest;

  Bounds() {
    typename Lanes<V>::Value low = Lanes<V>::lowest, high = Lanes<V>::highest;
#if defined(__x86_64__)
    // GCC uses the instructions for min and max only where it does not know the bound as a constant
    __asm__("" : "+x"(low), "+x"(high));
#endif
    lowest = broadcast<V>(low);
    highest = broadcast<V>(high);
  }

  // NaN stays NaN
  PRISM_INLINE V clamp(V d) const {
    d = lowest > d ? lowest : d;
    return highest < d ? highest : d;
  }
};

template <class V>
PRISM_INLINE double sum_lanes(V x) {
  typename Lanes<V>::Value lanes[Lanes<V>::count];
  std::memcpy(lanes, &x, sizeof x);
  double sum = 0;
  for (auto lane : lanes) sum += lane;
  return sum;
}
template <class V>
PRISM_INLINE typename Lanes<V>::Value max_lanes(V x) {
  typename Lanes<V>::Value lanes[Lanes<V>::count];
  std::memcpy(lanes, &x, sizeof x);
  auto top = lanes[0];
  for (auto lane : lanes) top = lane > top ? lane : top;
  return top;
}

// loads and stores. conversions round to nearest even, as torch's do

template <class V>
PRISM_INLINE V load(const double* p) {
  return *p;
}
template <class V>
PRISM_INLINE V load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PRISM_INLINE BitVec load_shorts(const void* p) {
  ShortVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, BitVec);
}
template <class V>
PRISM_INLINE V load(const BFloat16* p) {
  return (Vec)(load_shorts(p) << 16);
}
template <class V>
PRISM_INLINE V load(const Half* p) {
  const BitVec half = load_shorts(p);
  const BitVec magnitude = (half & 0x7fff) << 13;
  // the product moves the exponent's bias and makes subnormals normal; inf and NaN keep a full exponent instead
  const BitVec scaled = (BitVec)((Vec)magnitude * 0x1p112f);
  const BitVec special = magnitude | 0x7f800000;
  return (Vec)(((IntVec)magnitude >= 0x0f800000 ? special : scaled) | ((half & 0x8000) << 16));
}

PRISM_INLINE void store(double* p, double x) { *p = x; }
PRISM_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
PRISM_INLINE void store_shorts(void* p, BitVec x) {
  const ShortVec bits = __builtin_convertvector(x, ShortVec);
  std::memcpy(p, &bits, sizeof bits);
}
PRISM_INLINE void store(BFloat16* p, Vec x) {
  const BitVec bits = (BitVec)x;
  const BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_shorts(p, x == x ? rounded : BitVec{} + 0x7fc0);
}
PRISM_INLINE void store(Half* p, Vec x) {
  const BitVec sign = (BitVec)x & 0x80000000;
  const BitVec bits = (BitVec)x ^ sign;
  // the bias moves from 127 to 15; a carry out of the mantissa is the next exponent, or inf
  const BitVec normal = (bits - (112u << 23) + 0x0fff + ((bits >> 13) & 1)) >> 13;
  // the last bit of 0.5 is worth 2^-24, the smallest half: the sum's mantissa holds the half's bits
  const BitVec subnormal = (BitVec)((Vec)bits + 0.5f) - (126u << 23);
  BitVec half = (IntVec)bits < 0x38800000 ? subnormal : normal;
  half = (IntVec)bits >= 0x47800000 ? BitVec{} + 0x7c00 : half;
  half = x == x ? half : BitVec{} + 0x7e00;
  store_shorts(p, half | (sign >> 16));
}

// the first n elements; the other lanes are 0
template <class V, class T>
PRISM_INLINE V load_some(const T* p, int64_t n) {
  T some[Lanes<V>::count] = {};
  std::memcpy(static_cast<void*>(some), p, n * sizeof(T));
  return load<V>(some);
}
template <class V, class T>
PRISM_INLINE void store_some(T* p, V x, int64_t n) {
  T some[Lanes<V>::count];
  store(some, x);
  std::memcpy(static_cast<void*>(p), some, n * sizeof(T));
}

// mathematics. the polynomials are minimax fits on the reduced ranges

// exp(d) to about 1 ulp for d within Bounds, NaN for NaN; 0 at `lowest`, inf from 88.4 on
PRISM_INLINE Vec exp_clamped(Vec d) {
  // adding 1.5 * 2^23 rounds to an integer n = d / log 2; the 127 puts n + 127, an exponent, into the low bits
  constexpr float magic = 0x1.8p23f + 127;
  const Vec shifted = d * 1.44269504f + magic;
  const Vec n = shifted - magic;
  // log 2 in two parts, of which the first is so short that its product with n is exact
  Vec r = d - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 0.00138145371f + 0.00836874545f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n = -127 makes this 0 and n = 128 makes it inf
  return p * (Vec)((BitVec)shifted << 23);
}
PRISM_INLINE double exp_clamped(double d) { return std::exp(d); }

// log(x) to about 1 ulp for finite x > 0; some finite number for 0, inf and NaN
PRISM_INLINE Vec log_positive(Vec x) {
  const IntVec tiny = x < 0x1p-126f;
  const IntVec bits = (IntVec)(tiny ? x * 0x1p23f : x);
  // x = 2^k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const IntVec k = (bits - 0x3f3504f3) >> 23;
  const Vec f = (Vec)(bits - (k << 23)) - 1.0f;
  const Vec n = __builtin_convertvector(k - (tiny & 23), Vec);
  Vec p = f * -0.0763457716f + 0.127623498f;
  p = p * f - 0.131605044f;
  p = p * f + 0.142016768f;
  p = p * f - 0.166233197f;
  p = p * f + 0.200012296f;
  p = p * f - 0.250008225f;
  p = p * f + 0.333333313f;
  const Vec square = f * f;
  Vec low = p * f * square - n * 2.12194440e-4f;
  low = low - 0.5f * square;
  return n * 0.693359375f + (f + low);
}
PRISM_INLINE double log_positive(double x) { return x == 0 ? Lanes<double>::lowest : std::log(x); }

// tanh(x) to about 1.5 ulp, +-1 for +-inf, NaN for NaN
PRISM_INLINE Vec tanh(Vec x) {
  const BitVec sign = (BitVec)x & 0x80000000;
  const Vec magnitude = (Vec)((BitVec)x ^ sign);
  // 1 - 2 / (exp(20) + 1) is 1 already
  const Vec twice = magnitude > 10.0f ? broadcast<Vec>(20.0f) : magnitude + magnitude;
  const Vec large = 1.0f - 2.0f / (exp_clamped(twice) + 1.0f);
  const Vec square = magnitude * magnitude;
  Vec p = square * -0.0057175057f + 0.0206510536f;
  p = p * square - 0.0537436642f;
  p = p * square + 0.133314937f;
  p = p * square - 0.333332837f;
  const Vec small = magnitude + magnitude * square * p;
  return (Vec)((BitVec)(magnitude < 0.625f ? small : large) | sign);
}
PRISM_INLINE double tanh(double x) { return std::tanh(x); }

}  // namespace prism::PRISM_ISA
