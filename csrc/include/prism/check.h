#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace prism {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

}  // namespace prism
