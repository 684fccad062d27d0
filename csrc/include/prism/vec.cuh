// rows read and written 16 bytes at a time, and reductions over a block

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include <prism/intrinsics.cuh>
#include <prism/warp.cuh>

namespace prism {

// the type in which elements of type T are computed with
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// N consecutive elements, converted to A
template <typename A, int N>
struct Pack {
  static constexpr int kSize = N;
  A value[N];
};

template <typename A, typename T>
__device__ __forceinline__ A widen(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else {
    return static_cast<A>(x);
  }
}

template <typename T, typename A>
__device__ __forceinline__ T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// the 16 bytes of `raw`, which hold elements of type T
template <typename A, typename T>
__device__ __forceinline__ Pack<A, 16 / sizeof(T)> unpack(const uint4& raw) {
  Pack<A, 16 / sizeof(T)> pack;
  alignas(16) T element[16 / sizeof(T)];
  *reinterpret_cast<uint4*>(element) = raw;
#pragma unroll
  for (int j = 0; j < 16 / int(sizeof(T)); ++j) pack.value[j] = widen<A>(element[j]);
  return pack;
}

// writes a pack to `to`, which is aligned to the pack's size or to 16 bytes, whichever is less
template <typename T, typename A, int N>
__device__ __forceinline__ void store(T* to, const Pack<A, N>& pack) {
  constexpr int kBytes = N * sizeof(T);
  alignas(16) T element[N];
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    // the compiler does not join single conversions into one instruction for two elements
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      *reinterpret_cast<__nv_bfloat162*>(element + j) = __floats2bfloat162_rn(pack.value[j], pack.value[j + 1]);
    }
  } else if constexpr (std::is_same_v<T, __half> && N % 2 == 0) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      *reinterpret_cast<__half2*>(element + j) = __floats2half2_rn(pack.value[j], pack.value[j + 1]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) element[j] = narrow<T>(pack.value[j]);
  }
  if constexpr (N == 1) {
    *to = element[0];
  } else if constexpr (kBytes == 8) {
    __stcs(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(element));
  } else {
    static_assert(kBytes % 16 == 0);
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) {
      __stcs(reinterpret_cast<uint4*>(to) + k, reinterpret_cast<const uint4*>(element)[k]);
    }
  }
}

// how a row splits into columns before the first 16-byte boundary, whole 16-byte packs, and columns after the last
template <typename T>
struct Split {
  static constexpr int kPack = 16 / sizeof(T);
  int head;
  int packs;
  int edges;

  __device__ __forceinline__ Split(const T* row, int columns) {
    const int past = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
    head = min(columns, past == 0 ? 0 : kPack - past);
    packs = (columns - head) / kPack;
    edges = columns - packs * kPack;
  }

  // the column of edge i < edges
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + packs * kPack; }

  // drops the packs if they are not aligned in the row to be written, which then is written column by column
  template <typename U>
  __device__ __forceinline__ void align_with(const U* row) {
    constexpr int kBytes = kPack * sizeof(U) < 16 ? kPack * sizeof(U) : 16;
    if (reinterpret_cast<uintptr_t>(row + head) % kBytes != 0) {
      edges += packs * kPack;
      packs = 0;
    }
  }
};

// calls body(Pack, first column) for all columns of a row, which the kThreads threads of a block share. A column is
// always read by the same thread, which has kLoads 16-byte loads in flight. The body may write the columns that it was
// given
template <typename A, int kThreads, int kLoads, typename T, typename Body>
__device__ __forceinline__ void for_each_pack(const T* row, const Split<T>& split, const Body& body) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = thread; i < split.edges; i += kThreads) {
    const int column = split.edge(i);
    body(Pack<A, 1>{{widen<A>(row[column])}}, column);
  }
  const uint4* packs = reinterpret_cast<const uint4*>(row + split.head);
#pragma unroll 1
  for (int i = thread; i < split.packs; i += kLoads * kThreads) {
    uint4 raw[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + k * kThreads < split.packs) raw[k] = __ldcs(packs + i + k * kThreads);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (i + k * kThreads < split.packs) {
        body(unpack<A, T>(raw[k]), split.head + (i + k * kThreads) * Split<T>::kPack);
      }
    }
  }
}

// writes zeros to all columns of a row
template <int kThreads, typename T>
__device__ __forceinline__ void zero_row(T* row, int columns) {
  const Split<T> split(row, columns);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < split.edges) row[split.edge(thread)] = narrow<T>(0.0f);
  uint4* packs = reinterpret_cast<uint4*>(row + split.head);
#pragma unroll 1
  for (int i = thread; i < split.packs; i += kThreads) __stcs(packs + i, make_uint4(0, 0, 0, 0));
}

// replaces `top` by the largest of the block (NaN if any is) and each of `sums` by its sum over the block, the same
// bits in every thread and from run to run
template <int kThreads, typename A, int N>
__device__ __forceinline__ void block_reduce(A& top, A (&sums)[N]) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
  __shared__ A partial[N + 1][kWarps];
  const auto reduce = [&](int lanes) {
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      top = max_nan(top, __shfl_xor_sync(kAllLanes, top, mask));
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], mask);
    }
  };
  reduce(kWarp);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane() == 0) {
    partial[N][warp] = top;
#pragma unroll
    for (int n = 0; n < N; ++n) partial[n][warp] = sums[n];
  }
  __syncthreads();
  top = partial[N][lane() % kWarps];
#pragma unroll
  for (int n = 0; n < N; ++n) sums[n] = partial[n][lane() % kWarps];
  reduce(kWarps);
  // the next call may write `partial` at once
  __syncthreads();
}

}  // namespace prism
