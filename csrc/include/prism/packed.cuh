// the tokens of packed sequences, divided among warps in runs of equal length, whatever the sequences' lengths
//
// A piece is the tokens that a run and a sequence share. Its number is run + sequence. The next piece is in the next
// run, the next sequence, or both, so that no two pieces have the same number and a sequence's pieces are consecutive.

#pragma once

#include <prism/column.cuh>
#include <prism/warp.cuh>

namespace prism {

// tokens that a warp reads at once
constexpr int kWindow = kWarp * kFour;

struct Packed {
  Integers cu_seqlens;
  int tokens, sequences;
  // the tokens of a run, a multiple of kWindow; the number of runs
  int run, runs;

  // the first token of sequence s, clamped since the values are not checked
  __device__ __forceinline__ int bound(int s) const {
    return static_cast<int>(max(min(cu_seqlens.at(s), static_cast<int64_t>(tokens)), static_cast<int64_t>(0)));
  }

  // greater than the number of any piece
  __host__ __device__ __forceinline__ int64_t pieces() const { return static_cast<int64_t>(runs) + sequences; }
};

// the first sequence that ends after token t, or the number of sequences if none does
__device__ __forceinline__ int sequence_after(const Packed& p, int t) {
  int low = 0, high = p.sequences;
  while (low < high) {
    const int step = (high - low + kWarp - 1) / kWarp;
    const int probe = low + lane() * step;
    const unsigned before = __ballot_sync(kAllLanes, probe < high && p.bound(probe + 1) <= t);
    const int passed = __popc(before);
    high = passed == 0 ? low : min(high, low + passed * step);
    low = passed == 0 ? low : low + (passed - 1) * step + 1;
  }
  return low;
}

// calls body(sequence, first token, last token + 1) for the pieces of a run; tokens of no sequence have sequence -1
template <typename Body>
__device__ __forceinline__ void for_each_piece(const Packed& p, int run, const Body& body) {
  int at = run * p.run;
  const int stop = min(at + p.run, p.tokens);
  int s = sequence_after(p, at);
#pragma unroll 1
  while (at < stop) {
    int piece = -1, end = stop;
    if (s < p.sequences) {
      const int begin = p.bound(s);
      if (begin > at) {
        end = min(begin, stop);
      } else {
        piece = s++;
        end = min(p.bound(s), stop);
      }
    }
    if (end > at) {
      body(piece, at, end);
      at = end;
    }
  }
}

// which of the tokens t, ..., t + 3 lie in [begin, end)
__device__ __forceinline__ unsigned inside(int t, int begin, int end) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kFour; ++j) bits |= t + j >= begin && t + j < end ? 1u << j : 0u;
  return bits;
}

}  // namespace prism
