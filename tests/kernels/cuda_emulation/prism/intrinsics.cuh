// see launch.cuh beside this

#pragma once

#include <cmath>

#include <prism/launch.cuh>

namespace prism {

inline float exp2_fast(float x) { return x < -126 ? 0 : std::exp2(x); }
inline double exp2_fast(double x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline double log2_fast(double x) { return std::log2(x); }
template <typename A>
A max_nan(A a, A b) {
  return a > b || std::isnan(a) ? a : b;
}

}  // namespace prism
