// see launch.cuh beside this

#pragma once

#include <algorithm>
#include <cstdlib>
#include <deque>

#include <prism/launch.cuh>

namespace prism {

inline void grid_sync() {
  emulation::Block& block = *emulation::turn;
  block.fibers[block.current].waiting = emulation::grid_generation;
  block.yield();
}

// as many as PRISM_EMULATED_BLOCKS says
template <auto kKernel, int kMost>
int resident_blocks(const torch::stable::Tensor&, int) {
  const char* blocks = std::getenv("PRISM_EMULATED_BLOCKS");
  return blocks == nullptr ? 3 : std::atoi(blocks);
}

template <auto kKernel, typename Arguments>
void launch_together(const torch::stable::Tensor&, int blocks, int threads, const Arguments& arguments) {
  // kept for their stacks
  static std::deque<emulation::Block> grid;
  while (static_cast<int>(grid.size()) < blocks) grid.emplace_back();
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int i = 0; i < blocks; ++i) emulation::begin_block(grid[i], i, threads, [&] { kKernel(arguments); });
  for (int done = 0; done < blocks; ++emulation::grid_generation) {
    done = 0;
    for (int i = 0; i < blocks; ++i) done += emulation::run_block(grid[i]) ? 1 : 0;
    STD_TORCH_CHECK(done == 0 || done == blocks, "emulation: a block waits for others that are done");
  }
}

}  // namespace prism
