// a stable sort of 32-bit keys by all blocks of a grid, which run at once (grid.cuh)

#pragma once

#include <algorithm>

#include <prism/grid.cuh>
#include <prism/warp.cuh>

namespace prism {

struct Sorted {
  const unsigned* keys;
  // the places that the keys had
  const unsigned* order;
};

// least digit first, kBits at a time: each warp counts the digits in its run of places, and then moves its run behind
// what comes before it. Memory is the caller's
struct Sort {
  static constexpr int kBits = 4;
  static constexpr int kDigits = 1 << kBits;
  // a run has at least so many places; and there are at most so many runs, since each reads the counts of all
  static constexpr int kLeast = 256;
  static constexpr int kMost = 1024;

  int size, bits;
  // of places, a multiple of 32, and their number
  int run_size, runs;
  unsigned* keys[2];
  unsigned* order[2];
  // [kDigits][runs]
  int* counts;

  // takes memory for keys in [0, n] where there are so many warps
  template <typename Scratch>
  void take(Scratch& scratch, int n, int warps) {
    size = n;
    bits = 1;
    while (n >> bits != 0) ++bits;
    const int most = std::min(warps, kMost);
    run_size = std::max(kLeast, ((n + most - 1) / most + 31) / 32 * 32);
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
    const int run = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
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
      for (int window = from; window < stop; window += 32) {
        const int place = window + lane();
        const bool inside = place < stop;
        mine += __popc(alike(inside, inside ? key_at(place) >> shift : 0u, static_cast<unsigned>(lane())));
      }
      if (run < runs && lane() < kDigits) counts[lane() * runs + run] = mine;
      grid_sync();
      // where the run's next key of the lane's digit goes
      int next = 0;
      if (run < runs) next = first_of(run);
#pragma unroll 1
      for (int window = from; window < stop; window += 32) {
        const int place = window + lane();
        const bool inside = place < stop;
        const unsigned value = inside ? key_at(place) : 0u;
        const unsigned digit = value >> shift & (kDigits - 1);
        // lanes with this lane's digit, and with the digit that this lane counts
        const unsigned same = alike(inside, value >> shift, digit);
        const unsigned counted = alike(inside, value >> shift, static_cast<unsigned>(lane()));
        const int first = __shfl_sync(kAllLanes, next, static_cast<int>(digit));
        if (inside) {
          const int to = first + __popc(same & ((1u << lane()) - 1));
          new_keys[to] = value;
          new_order[to] = shift == 0 ? static_cast<unsigned>(place) : old_order[place];
        }
        next += __popc(counted);
      }
      grid_sync();
      now ^= 1;
    }
    return {now == 0 ? keys[0] : keys[1], now == 0 ? order[0] : order[1]};
  }

 private:
  // the lanes inside whose value has `digit` as its last; no lane for a digit that there is not
  __device__ static __forceinline__ unsigned alike(bool inside, unsigned value, unsigned digit) {
    unsigned lanes = __ballot_sync(kAllLanes, inside);
#pragma unroll
    for (int b = 0; b < kBits; ++b) {
      const unsigned set = __ballot_sync(kAllLanes, (value >> b & 1) != 0);
      lanes &= (digit >> b & 1) != 0 ? set : ~set;
    }
    return digit < kDigits ? lanes : 0u;
  }

  // where the first key of the lane's digit goes in a run: behind the lower digits, and this one's in earlier runs
  __device__ __forceinline__ int first_of(int run) const {
    int below = 0, first = 0;
#pragma unroll 1
    for (int d = 0; d < kDigits; ++d) {
      int sums[2] = {0, 0};
      for (int r = lane(); r < runs; r += 32) {
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
