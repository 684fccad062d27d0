// a stable sort of 32-bit keys by all blocks of a grid, which run at once (see grid.cuh)

#pragma once

#include <algorithm>

#include <prism/grid.cuh>
#include <prism/warp.cuh>

namespace prism {

struct Sorted {
  const unsigned* keys;
  // the position that each key had
  const unsigned* order;
};

// a radix sort, lowest digit first, kBits to a digit. Each warp counts the digits of its run of positions, then moves
// the keys of its run to their new positions. The caller provides the memory
struct Sort {
  static constexpr int kBits = 4;
  static constexpr int kDigits = 1 << kBits;
  // the least positions in a run, and the most runs: each run reads the counts of all
  static constexpr int kLeast = 256;
  static constexpr int kMost = 1024;

  int size, bits;
  // the positions of a run, a multiple of kWarp; the number of runs
  int run_size, runs;
  unsigned* keys[2];
  unsigned* order[2];
  // [kDigits][runs]
  int* counts;

  // takes memory for n keys in [0, n] that so many warps will sort
  template <typename Scratch>
  void take(Scratch& scratch, int n, int warps) {
    size = n;
    bits = 1;
    while (n >> bits != 0) ++bits;
    const int most = std::min(warps, kMost);
    run_size = std::max(kLeast, ((n + most - 1) / most + kWarp - 1) / kWarp * kWarp);
    runs = (n + run_size - 1) / run_size;
    for (int i = 0; i < 2; ++i) {
      scratch.take(keys[i], n);
      scratch.take(order[i], n);
    }
    scratch.take(counts, static_cast<int64_t>(kDigits) * runs);
  }

  // sorts key(0), ..., key(size - 1); every thread of the grid must call it
  template <int kWarps, typename Key>
  __device__ __forceinline__ Sorted run(const Key& key) const {
    const int run = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
    const int from = run < runs ? run * run_size : 0, stop = run < runs ? min(from + run_size, size) : 0;
    int now = 0;
#pragma unroll 1
    for (int shift = 0; shift < bits; shift += kBits) {
      const unsigned* old_keys = now == 0 ? keys[0] : keys[1];
      const unsigned* old_order = now == 0 ? order[0] : order[1];
      unsigned* new_keys = now == 0 ? keys[1] : keys[0];
      unsigned* new_order = now == 0 ? order[1] : order[0];
      const auto key_at = [&](int i) { return shift == 0 ? key(i) : old_keys[i]; };
      int mine = 0;
#pragma unroll 1
      for (int window = from; window < stop; window += kWarp) {
        const int position = window + lane();
        const bool inside = position < stop;
        mine += __popc(alike(inside, inside ? key_at(position) >> shift : 0u, static_cast<unsigned>(lane())));
      }
      if (run < runs && lane() < kDigits) counts[lane() * runs + run] = mine;
      grid_sync();
      // the new position of the run's next key of the lane's digit
      int next = 0;
      if (run < runs) next = first_of(run);
#pragma unroll 1
      for (int window = from; window < stop; window += kWarp) {
        const int position = window + lane();
        const bool inside = position < stop;
        const unsigned value = inside ? key_at(position) : 0u;
        const unsigned digit = value >> shift & (kDigits - 1);
        // lanes with this lane's digit, and with the digit that this lane counts
        const unsigned same = alike(inside, value >> shift, digit);
        const unsigned counted = alike(inside, value >> shift, static_cast<unsigned>(lane()));
        const int first = __shfl_sync(kAllLanes, next, static_cast<int>(digit));
        if (inside) {
          const int to = first + __popc(same & ((1u << lane()) - 1));
          new_keys[to] = value;
          new_order[to] = shift == 0 ? static_cast<unsigned>(position) : old_order[position];
        }
        next += __popc(counted);
      }
      grid_sync();
      now ^= 1;
    }
    return {now == 0 ? keys[0] : keys[1], now == 0 ? order[0] : order[1]};
  }

 private:
  // the lanes inside whose value has `digit` as its lowest digit; no lane if `digit` is not one
  __device__ static __forceinline__ unsigned alike(bool inside, unsigned value, unsigned digit) {
    unsigned lanes = __ballot_sync(kAllLanes, inside);
#pragma unroll
    for (int b = 0; b < kBits; ++b) {
      const unsigned set = __ballot_sync(kAllLanes, (value >> b & 1) != 0);
      lanes &= (digit >> b & 1) != 0 ? set : ~set;
    }
    return digit < kDigits ? lanes : 0u;
  }

  // the new position of the run's first key of the lane's digit: after all lower digits, and this digit in earlier runs
  __device__ __forceinline__ int first_of(int run) const {
    int below = 0, first = 0;
#pragma unroll 1
    for (int d = 0; d < kDigits; ++d) {
      int sums[2] = {0, 0};
      for (int r = lane(); r < runs; r += kWarp) {
        const int count = counts[d * runs + r];
        sums[0] += count;
        sums[1] += r < run ? count : 0;
      }
      warp_sum(sums);
      if (lane() == d) first = below + sums[1];
      below += sums[0];
    }
    return first;
  }
};

}  // namespace prism
