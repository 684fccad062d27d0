// single instructions for which CUDA C++ has no function

#pragma once

#include <cuda_runtime.h>

namespace prism {

// 2^x with a relative error below 2^-22. results under 2^-126 become 0: they are too small to change a sum, and with
// subnormals this takes four instructions
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }

// log2(x) with an absolute error below 2^-22 for x in (0.5, 2) and a relative error below 2^-22 elsewhere; -inf for 0
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double log2_fast(double x) { return log2(x); }

// the larger of two, NaN if either is (fmax drops NaN)
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ double max_nan(double a, double b) { return a > b || a != a ? a : b; }

}  // namespace prism
