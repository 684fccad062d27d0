// kernels whose blocks all run at once and may wait for each other, which allows several passes in one launch

#pragma once

#include <cooperative_groups.h>
#include <prism/launch.cuh>

#include <algorithm>
#include <atomic>

namespace prism {

// waits until every thread of the grid has called this; each may then read what the others wrote before. The driver
// owns the barrier's memory: nothing has to be zeroed, and launches on several streams share nothing
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// the blocks of a kernel that can run at once on the device of `tensor`, at most kMost to a multiprocessor
template <auto kKernel, int kMost>
int resident_blocks(const torch::stable::Tensor& tensor, int threads) {
  // the driver is asked once for each device; 0 is unknown
  static std::atomic<int> known[64];
  const int32_t device = tensor.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < 64, "resident_blocks: expected a device in [0, 64), got ", device);
  int blocks = known[device].load(std::memory_order_relaxed);
  if (blocks == 0) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    int each = 0, multiprocessors = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, 0));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    blocks = std::min(each, kMost) * multiprocessors;
    known[device].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

// queues kKernel(arguments) with at most `resident_blocks` blocks, which all run at once; raises if it does not start
template <auto kKernel, typename Arguments>
void launch_together(const torch::stable::Tensor& tensor, int blocks, int threads, const Arguments& arguments) {
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t started = cudaLaunchCooperativeKernel(kKernel, dim3(blocks), dim3(threads), pointers, 0,
                                                          static_cast<cudaStream_t>(stream));
  // torch clears the last error of its own copy of the runtime, not of this one
  if (started != cudaSuccess) cudaGetLastError();
  STD_CUDA_CHECK(started);
}

}  // namespace prism
