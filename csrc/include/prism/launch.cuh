// launches on the tensor's device and torch's current stream, through the LibTorch stable ABI

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// a CPU-only torch, into which the library must load too, does not have these functions
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace prism {

// queues kernel(arguments...) with `blocks` blocks on the device of `tensor`; raises if it does not start. 0 blocks are
// no launch
template <typename... Parameters, typename... Arguments>
void launch(const torch::stable::Tensor& tensor, int64_t blocks, int threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "launch: expected fewer than 2**31 blocks, got ", blocks);
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace prism
