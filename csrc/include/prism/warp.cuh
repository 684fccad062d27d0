// sums over the 32 lanes of a warp

#pragma once

#include <cuda_runtime.h>

namespace prism {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

// puts into each of `sums` its sum over the warp, the same bits in every lane and from run to run
template <typename A, int N>
__device__ __forceinline__ void warp_sum(A (&sums)[N]) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], mask);
  }
}

}  // namespace prism
