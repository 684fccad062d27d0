// checks a routing's order and inverts its permutation; the checks in torch, which word the errors, are checked_order in
// prism_kernels/ops/moe_experts/eager.py

#include <prism/check.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>

namespace prism {

// the order that the steps use: a copy of the offsets and of the permutation, and the permutation's inverse
struct Order {
  int32_t *ends, *assignment, *row;
};

// false if the order does not belong to `index`
bool fill_order(const int64_t* index, const int32_t* offsets, int64_t experts, const int32_t* permutation,
                int64_t total, const Order& to) {
  int32_t end = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (offsets[e] < end) return false;
    end = offsets[e];
  }
  if (end != total) return false;
  std::copy(offsets, offsets + experts, to.ends);
  std::copy(permutation, permutation + total, to.assignment);
  std::fill(to.row, to.row + total, -1);
  int64_t expert = 0;
  for (int64_t i = 0; i < total; ++i) {
    while (offsets[expert] <= i) ++expert;
    const int32_t assignment = permutation[i];
    if (assignment < 0 || assignment >= total || to.row[assignment] >= 0 || index[assignment] != expert) return false;
    to.row[assignment] = static_cast<int32_t>(i);
  }
  return true;
}

void moe_experts_order(const Tensor& index, const Tensor& offsets, const Tensor& permutation, const Tensor& ends,
                       const Tensor& assignment, const Tensor& row, const Tensor& bad) {
  const char* op = "moe_experts_order";
  const int64_t total = index.numel(), experts = offsets.numel();
  const auto integers = [op](const char* name, const Tensor& tensor, int64_t size) {
    return vector_data<int32_t>(op, name, tensor, size, ScalarType::Int);
  };
  const Order to{integers("ends", ends, experts), integers("assignment", assignment, total),
                 integers("row", row, total)};
  const bool fits = fill_order(vector_data<int64_t>(op, "index", index, total, ScalarType::Long),
                               integers("offsets", offsets, experts), experts,
                               integers("permutation", permutation, total), total, to);
  *vector_data<int64_t>(op, "bad", bad, 1, ScalarType::Long) = fits ? 0 : 1;
}

}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CPU, m) {
  m.impl("moe_experts_order.out", TORCH_BOX(&prism::moe_experts_order));
}
