#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace prism {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// CUDA kernels count elements in 32 bits, also the steps that they take past the last element
constexpr int64_t kMostElements = 1 << 30;

// raises unless the tensor has these sizes: "op: expected name of shape (4, 3), got (4, 2)"
inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  const auto shape = tensor.sizes();
  bool same = shape.size() == sizes.size();
  auto size = sizes.begin();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] == size[i];
  if (same) return;
  auto text = [](auto begin, auto end) {
    std::string joined;
    for (auto it = begin; it != end; ++it) joined += (it == begin ? "" : ", ") + std::to_string(*it);
    return "(" + joined + ")";
  };
  STD_TORCH_CHECK(false, op, ": expected ", name, " of shape ", text(sizes.begin(), sizes.end()), ", got ",
                  text(shape.begin(), shape.end()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<ScalarType> types) {
  std::string wanted;
  for (ScalarType type : types) {
    if (tensor.scalar_type() == type) return;
    wanted += (wanted.empty() ? "" : " or ") + std::string(torch::headeronly::toString(type));
  }
  STD_TORCH_CHECK(false, op, ": expected ", name, " of dtype ", wanted, ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// raises unless the elements of a row lie side by side
inline void check_rows(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, ": expected ", name,
                  " with rows of stride 1, got stride ", tensor.stride(1));
}

// raises unless two tensors are on one device
inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index() && tensor.is_cuda() == first.is_cuda(), op,
                  ": expected ", name, " on the device of the first argument");
}

// raises unless the tensor is a vector of this size and one of these dtypes whose elements lie side by side
inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t size,
                         std::initializer_list<ScalarType> types) {
  check_shape(op, name, tensor, {size});
  check_dtype(op, name, tensor, types);
  STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, op, ": expected ", name, " of stride 1, got ", tensor.stride(0));
}

// the elements of such a vector; null without one
template <class T>
T* vector_data(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t size, ScalarType type) {
  if (!tensor) return nullptr;
  check_vector(op, name, *tensor, size, {type});
  return static_cast<T*>(tensor->data_ptr());
}

}  // namespace prism
