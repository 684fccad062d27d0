// sums and maxima over the lanes of a warp

#pragma once

#include <cuda_runtime.h>

#include <prism/intrinsics.cuh>

namespace prism {

// lanes of a warp
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// replaces each of `sums` by its sum over the warp, the same bits in every lane and from run to run
template <typename A, int N>
__device__ __forceinline__ void warp_sum(A (&sums)[N]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], mask);
  }
}

// the largest x of the warp, NaN if any is, the same in every lane
template <typename A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max_nan(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

}  // namespace prism
