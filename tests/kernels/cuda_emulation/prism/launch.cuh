// Compiles a .cu file with g++ and runs its kernels on the CPU: this folder stands before csrc/include in the include
// path, so that this file and intrinsics.cuh replace the two headers that need nvcc. Each CUDA thread is a fiber; the
// fibers of a block take turns at barriers and shuffles. Its operators are registered for the CPU, as prism_emulated.

#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(prism_emulated, CPU, m, C10_UID)

// one block runs at a time, so what its threads share may be static
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;

using std::abs;
using std::min;
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
  int shuffles = 0;
  std::vector<char> stack = std::vector<char>(kStack);
};

struct Block {
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
    while (barrier.generation == generation) {
      if (finished > 0) fail("a thread waits at a barrier that another will not reach");
      yield();
    }
  }
};

inline Block block;

inline void fiber_main() {
  block.body();
  block.fibers[block.current].done = true;
  ++block.finished;
  block.yield();
}

inline void run_block(int threads, std::function<void()> body) {
  block.body = std::move(body);
  block.fibers.resize(threads);
  block.finished = 0;
  block.all = {};
  for (Barrier& warp : block.warps) warp = {};
  for (Fiber& fiber : block.fibers) {
    fiber.started = fiber.done = false;
    fiber.shuffles = 0;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.data();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
  while (block.finished < threads && block.error.empty()) {
    for (int i = 0; i < threads && block.error.empty(); ++i) {
      if (!block.fibers[i].done) block.resume(i);
    }
  }
}

template <typename T>
void check_aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) {
    block.fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.wait(emulation::block.all, emulation::block.fibers.size()); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = emulation::block;
  const int thread = threadIdx.x;
  // two buffers in turn: a lane may be at the next shuffle while another still reads this one
  auto& exchanged = block.exchanged[block.fibers[thread].shuffles++ % 2];
  std::memcpy(exchanged[thread], &value, sizeof(T));
  block.wait(block.warps[thread / 32], 32);
  std::memcpy(&value, exchanged[thread ^ mask], sizeof(T));
  return value;
}

template <typename T>
T __ldcs(const T* from) {
  emulation::check_aligned(from);
  return *from;
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
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    emulation::run_block(threads, [&] { kernel(arguments...); });
    const std::string error = std::exchange(emulation::block.error, {});
    STD_TORCH_CHECK(error.empty(), "emulation: ", error);
  }
}

}  // namespace prism
