// Compiles a .cu file with g++ and runs its kernels on the CPU: this folder stands before csrc/include in the include
// path, so that this file and intrinsics.cuh replace the two headers that need nvcc. Each CUDA thread is a fiber; the
// fibers of a block take turns at barriers and shuffles. Blocks run one after the other, or, where they wait for each
// other (grid.cuh), in turns from one such barrier to the next. Its operators are registered for the CPU, as prism_emulated.

#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(prism_emulated, CPU, m, C10_UID)

// one block runs at a time, so what its threads share may be static; nothing of it may live across a barrier of the grid
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 gridDim;

using std::abs;
using std::exp;
using std::expm1;
using std::isnan;
using std::max;
using std::min;
using std::sqrt;
using std::tanh;
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf state;
  bool started = false;
  bool done = false;
  // the generation of the grid's barrier that it waits to see pass, or -1
  int waiting = -1;
  int shuffles = 0;
  std::vector<char> stack = std::vector<char>(kStack);
};

struct Block {
  unsigned index = 0;
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::function<void()> body;
  int current = 0;
  int finished = 0;
  std::string error;
  Barrier all;
  Barrier warps[32];
  alignas(16) char exchanged[2][1024][16];

  // swapcontext would do, but each costs two system calls
  void resume(int i) {
    current = i;
    threadIdx = {static_cast<unsigned>(i), 0, 0};
    blockIdx = {index, 0, 0};
    if (_setjmp(scheduler) != 0) return;
    if (std::exchange(fibers[i].started, true)) _longjmp(fibers[i].state, 1);
    setcontext(&fibers[i].entry);
  }

  void yield() {
    if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
  }

  // never comes back: the block is given up
  void fail(const std::string& reason) {
    error = reason;
    for (;;) yield();
  }

  void wait(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    // so many turns of all others are enough for any that will come: the rest wait for something else
    for (int turns = 0; barrier.generation == generation; ++turns) {
      if (finished > 0 || turns > 1000000) fail("a thread waits at a barrier that another will not reach");
      yield();
    }
  }
};

// the block whose turn it is
inline Block* turn = nullptr;
// how often all blocks have met at the barrier of the grid
inline int grid_generation = 0;

inline void fiber_main() {
  turn->body();
  Block& block = *turn;
  block.fibers[block.current].done = true;
  ++block.finished;
  block.yield();
}

inline void begin_block(Block& block, unsigned index, int threads, const std::function<void()>& body) {
  block.index = index;
  block.body = body;
  block.fibers.resize(threads);
  block.finished = 0;
  block.error.clear();
  block.all = {};
  for (Barrier& warp : block.warps) warp = {};
  for (Fiber& fiber : block.fibers) {
    fiber.started = fiber.done = false;
    fiber.waiting = -1;
    fiber.shuffles = 0;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
}

// runs a block until each of its threads is done or waits at the barrier of the grid; true if all are done
inline bool run_block(Block& block) {
  turn = &block;
  const int threads = static_cast<int>(block.fibers.size());
  for (;;) {
    int stopped = 0;
    for (int i = 0; i < threads && block.error.empty(); ++i) {
      const Fiber& fiber = block.fibers[i];
      if (fiber.done || fiber.waiting == grid_generation) {
        ++stopped;
      } else {
        block.resume(i);
      }
    }
    STD_TORCH_CHECK(block.error.empty(), "emulation: ", block.error);
    if (stopped == threads) return block.finished == threads;
  }
}

template <typename T>
void check_aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) {
    turn->fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::turn->wait(emulation::turn->all, emulation::turn->fibers.size()); }

namespace emulation {

// what each lane of the warp brought
template <typename T>
std::array<T, 32> exchange(T value) {
  Block& block = *turn;
  const int thread = threadIdx.x;
  // two buffers in turn: a lane may be at the next shuffle while another still reads this one
  auto& exchanged = block.exchanged[block.fibers[thread].shuffles++ % 2];
  std::memcpy(exchanged[thread], &value, sizeof(T));
  block.wait(block.warps[thread / 32], 32);
  std::array<T, 32> all;
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], exchanged[thread / 32 * 32 + i], sizeof(T));
  return all;
}

}  // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value)[threadIdx.x % 32 ^ mask];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value)[lane % 32];
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const auto flags = emulation::exchange(flag);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= flags[i] ? 1u << i : 0u;
  return bits;
}
inline void __syncwarp() { emulation::exchange(0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
// threads take turns only where they wait
inline int atomicAdd(int* to, int value) { return std::exchange(*to, *to + value); }

template <typename T>
T __ldcs(const T* from) {
  emulation::check_aligned(from);
  return *from;
}

template <typename T>
T __ldg(const T* from) {
  return __ldcs(from);
}

template <typename T>
void __stcs(T* to, T value) {
  emulation::check_aligned(to);
  *to = value;
}

namespace prism {

template <typename... Parameters, typename... Arguments>
void launch(const torch::stable::Tensor&, int64_t blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  static emulation::Block block;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t i = 0; i < blocks; ++i) {
    emulation::begin_block(block, i, threads, [&] { kernel(arguments...); });
    emulation::run_block(block);
  }
}

}  // namespace prism
