// moe_route's softmax and top-K, and the permutation that sorts assignments by expert, on CUDA.
// prism_kernels/ops/moe_route/reference.py is the specification. There are no atomics, so that the bits are the same
// from run to run, and no host synchronisation
//
// T tokens, E experts, K experts of a token, T * K assignments

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <prism/check.h>
#include <prism/launch.cuh>
#include <prism/warp.cuh>

namespace prism {
namespace {

constexpr int kThreads = 256;
// MOST_EXPERTS and TILE of prism_kernels/ops/moe_route/op.py: the most experts, and the assignments that a block sorts
constexpr int kMostExperts = 512;
constexpr int kTile = 1024;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// a warp to a token; lane l holds the experts l, l + 32, ...
template <typename A, int kEach>
__global__ void __launch_bounds__(kThreads)
    moe_route_fwd_kernel(const A* logits, int64_t* chosen, A* probability, A* lse, int64_t tokens, int experts,
                         int top_k) {
  const int lane = prism::lane();
  int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const bool live = token < tokens;
  // a warp past the last token repeats the last one and writes nothing: it must reach the barrier
  token = live ? token : tokens - 1;
  logits += token * experts;
  probability += token * experts;
  chosen += token * top_k;
  const A infinity = static_cast<A>(INFINITY);
  A p[kEach];
  A top = -infinity;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = lane + j * kWarp;
    p[j] = e < experts ? logits[e] : -infinity;
    top = max_nan(top, p[j]);
  }
  top = warp_max(top);
  A sum[1] = {0};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    // past the last expert -inf - top is NaN in a row whose top is -inf or NaN
    p[j] = lane + j * kWarp < experts ? exponential(p[j] - top) : 0;
    sum[0] += p[j];
  }
  warp_sum(sum);
  const bool broken = !(sum[0] < infinity);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int e = lane + j * kWarp;
    p[j] /= sum[0];
    if (live && e < experts) probability[e] = p[j];
    // from here on p is a key: equal in a broken row, so that the first K are chosen; -1 for chosen and missing experts
    p[j] = e >= experts ? -1 : broken ? 0 : p[j];
  }
  if (live && lane == 0) lse[token] = top + logarithm(sum[0]);
  for (int k = 0; k < top_k; ++k) {
    A best = p[0];
    int expert = lane;
#pragma unroll
    for (int j = 1; j < kEach; ++j) {
      if (p[j] > best) {
        best = p[j];
        expert = lane + j * kWarp;
      }
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const A other = __shfl_xor_sync(kAllLanes, best, mask);
      const int other_expert = __shfl_xor_sync(kAllLanes, expert, mask);
      if (other > best || (other == best && other_expert < expert)) {
        best = other;
        expert = other_expert;
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (expert == lane + j * kWarp) p[j] = -1;
    }
    if (live && lane == 0) chosen[k] = expert;
  }
  // the tests' emulation on the CPU takes a warp that returns early for a thread that misses a barrier
  __syncthreads();
}

// The work of a tile is divided into items: item i is the expert i % E in the part i / E of the tile. So the lanes of a
// warp mostly read the same assignment, each for its own expert
struct Items {
  int experts;
  int parts;
  int length;

  __device__ __forceinline__ explicit Items(int experts)
      : experts(experts), parts(experts < kThreads ? kThreads / experts : 1), length((kTile + parts - 1) / parts) {}

  __device__ __forceinline__ int count() const { return experts * parts; }
};

// the most items of a tile
constexpr int kItems = kMostExperts > kThreads ? kMostExperts : kThreads;

struct Tile {
  int expert[kTile];
  // the number of assignments to its expert in each item
  int items[kItems];
};

__device__ __forceinline__ void load_tile(Tile& tile, const int64_t* index, int64_t total, const Items& items) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int i = thread; i < kTile; i += kThreads) {
    tile.expert[i] = first + i < total ? static_cast<int>(index[first + i]) : -1;
  }
  __syncthreads();
  for (int item = thread; item < items.count(); item += kThreads) {
    const int e = item % items.experts;
    const int start = item / items.experts * items.length;
    const int end = min(kTile, start + items.length);
    int count = 0;
#pragma unroll 4
    for (int i = start; i < end; ++i) count += tile.expert[i] == e;
    tile.items[item] = count;
  }
  __syncthreads();
}

// writes the number of assignments of each tile to each expert, tiles (blocks, E)
__global__ void __launch_bounds__(kThreads)
    moe_count_kernel(const int64_t* index, int* tiles, int64_t total, int experts) {
  __shared__ Tile tile;
  const Items items(experts);
  load_tile(tile, index, total, items);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    int count = 0;
    for (int part = 0; part < items.parts; ++part) count += tile.items[part * experts + e];
    tiles[static_cast<int64_t>(blockIdx.x) * experts + e] = count;
  }
}

// writes the offsets, and each assignment of the tile at its position in the permutation
__global__ void __launch_bounds__(kThreads)
    moe_place_kernel(const int64_t* index, const int* tiles, int* offsets, int* permutation, int64_t total, int experts,
                     int blocks) {
  __shared__ Tile tile;
  // the assignments to an expert in all tiles, and in the tiles before this one
  __shared__ int all[kItems];
  __shared__ int before[kItems];
  __shared__ int start[kMostExperts];
  const int thread = static_cast<int>(threadIdx.x);
  const int mine = static_cast<int>(blockIdx.x);
  const Items items(experts);
  load_tile(tile, index, total, items);
  for (int item = thread; item < items.count(); item += kThreads) {
    int total_count = 0, earlier_count = 0;
    for (int t = item / experts; t < blocks; t += items.parts) {
      const int count = tiles[static_cast<int64_t>(t) * experts + item % experts];
      total_count += count;
      earlier_count += t < mine ? count : 0;
    }
    all[item] = total_count;
    before[item] = earlier_count;
  }
  __syncthreads();
  for (int e = thread; e < experts; e += kThreads) {
    for (int part = 1; part < items.parts; ++part) {
      all[e] += all[part * experts + e];
      before[e] += before[part * experts + e];
    }
  }
  __syncthreads();
  for (int e = thread; e < experts; e += kThreads) {
    int sum = 0;
    for (int other = 0; other < e; ++other) sum += all[other];
    start[e] = sum + before[e];
    if (mine == 0) offsets[e] = sum + all[e];
  }
  __syncthreads();
  for (int item = thread; item < items.count(); item += kThreads) {
    const int e = item % experts;
    const int first = item / experts * items.length;
    const int end = min(kTile, first + items.length);
    int position = start[e];
    for (int other = e; other < item; other += experts) position += tile.items[other];
    for (int i = first; i < end; ++i) {
      if (tile.expert[i] == e) permutation[position++] = mine * kTile + i;
    }
  }
}

template <typename A, int kEach>
void launch_route(const Tensor& logits, const Tensor& chosen, const Tensor& probability, const Tensor& lse) {
  const int64_t tokens = logits.size(0);
  constexpr int kTokens = kThreads / kWarp;
  launch(logits, (tokens + kTokens - 1) / kTokens, kThreads, moe_route_fwd_kernel<A, kEach>,
         static_cast<const A*>(logits.data_ptr()), static_cast<int64_t*>(chosen.data_ptr()),
         static_cast<A*>(probability.data_ptr()), static_cast<A*>(lse.data_ptr()), tokens,
         static_cast<int>(logits.size(1)), static_cast<int>(chosen.size(1)));
}

template <typename A>
void route(const Tensor& logits, const Tensor& chosen, const Tensor& probability, const Tensor& lse) {
  const auto each = (logits.size(1) + kWarp - 1) / kWarp;
  const auto run = each <= 1   ? launch_route<A, 1>
                   : each <= 2 ? launch_route<A, 2>
                   : each <= 4 ? launch_route<A, 4>
                   : each <= 8 ? launch_route<A, 8>
                               : launch_route<A, 16>;
  run(logits, chosen, probability, lse);
}

void check_plain(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": expected ", name, " to be contiguous");
  check_device(op, name, tensor, first);
}

void moe_route_rows(const Tensor& logits, const Tensor& chosen, const Tensor& probability, const Tensor& lse) {
  const char* op = "moe_route_fwd";
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMostExperts, op,
                  ": expected logits of shape (T, E) with E from 1 to ", kMostExperts);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(chosen.dim() == 2 && chosen.size(0) == tokens && chosen.size(1) >= 1 && chosen.size(1) <= experts, op,
                  ": expected experts of shape (", tokens, ", K) with K from 1 to ", experts);
  check_shape(op, "probability", probability, {tokens, experts});
  check_shape(op, "lse", lse, {tokens});
  check_dtype(op, "logits", logits, {ScalarType::Float, ScalarType::Double});
  check_dtype(op, "experts", chosen, {ScalarType::Long});
  check_dtype(op, "probability", probability, {logits.scalar_type()});
  check_dtype(op, "lse", lse, {logits.scalar_type()});
  check_plain(op, "logits", logits, logits);
  check_plain(op, "experts", chosen, logits);
  check_plain(op, "probability", probability, logits);
  check_plain(op, "lse", lse, logits);
  const auto run = logits.scalar_type() == ScalarType::Double ? route<double> : route<float>;
  run(logits, chosen, probability, lse);
}

void moe_permutation(const Tensor& index, const Tensor& tiles, const Tensor& offsets, const Tensor& permutation) {
  const char* op = "moe_permutation_fwd";
  const int64_t total = index.numel(), experts = offsets.numel();
  const int64_t blocks = (total + kTile - 1) / kTile;
  STD_TORCH_CHECK(total <= INT32_MAX - kTile, op, ": expected fewer than 2**31 assignments, got ", total);
  STD_TORCH_CHECK(experts >= 1 && experts <= kMostExperts, op, ": expected 1 to ", kMostExperts, " experts, got ",
                  experts);
  check_shape(op, "offsets", offsets, {experts});
  check_shape(op, "permutation", permutation, {total});
  check_shape(op, "tiles", tiles, {blocks, experts});
  check_dtype(op, "index", index, {ScalarType::Long});
  check_plain(op, "index", index, index);
  for (const auto& [name, tensor] :
       {std::pair{"tiles", &tiles}, {"offsets", &offsets}, {"permutation", &permutation}}) {
    check_dtype(op, name, *tensor, {ScalarType::Int});
    check_plain(op, name, *tensor, index);
  }
  const auto* from = static_cast<const int64_t*>(index.data_ptr());
  auto* counts = static_cast<int*>(tiles.data_ptr());
  launch(index, blocks, kThreads, moe_count_kernel, from, counts, total, static_cast<int>(experts));
  // at least one block, which writes the offsets
  launch(index, blocks > 0 ? blocks : 1, kThreads, moe_place_kernel, from, static_cast<const int*>(counts),
         static_cast<int*>(offsets.data_ptr()), static_cast<int*>(permutation.data_ptr()), total,
         static_cast<int>(experts), static_cast<int>(blocks));
}

}  // namespace
}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CUDA, m) {
  m.impl("moe_route_fwd.rows", TORCH_BOX(&prism::moe_route_rows));
  m.impl("moe_permutation_fwd.out", TORCH_BOX(&prism::moe_permutation));
}
