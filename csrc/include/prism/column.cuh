// columns: one number of any floating type for each token or sample, read one or four at a time

#pragma once

#include <prism/check.h>
#include <prism/vec.cuh>

#include <initializer_list>
#include <optional>

namespace prism {

// the elements that a thread reads at once
constexpr int kFour = 4;

// contiguous elements; `data` is null where the column is not given
struct Column {
  const void* data;
  ScalarType type;
  // whether each four elements that begin at a multiple of four are aligned for one wide access
  bool wide;

  __device__ __forceinline__ bool given() const { return data != nullptr; }

  // element i
  template <typename A>
  __device__ __forceinline__ A at(int64_t i) const {
    switch (type) {
      case ScalarType::Double:
        return static_cast<A>(static_cast<const double*>(data)[i]);
      case ScalarType::BFloat16:
        return widen<A>(static_cast<const __nv_bfloat16*>(data)[i]);
      case ScalarType::Half:
        return widen<A>(static_cast<const __half*>(data)[i]);
      case ScalarType::Long:
        return static_cast<A>(static_cast<const int64_t*>(data)[i]);
      case ScalarType::Int:
        return static_cast<A>(static_cast<const int32_t*>(data)[i]);
      default:
        return static_cast<A>(static_cast<const float*>(data)[i]);
    }
  }

  // the elements i, ..., i + 3, where i is a multiple of four; 0 from `size` on
  template <typename A>
  __device__ __forceinline__ Pack<A, kFour> four(int i, int size) const {
    switch (type) {
      case ScalarType::Double:
        return four_of<A, double>(i, size);
      case ScalarType::BFloat16:
        return four_of<A, __nv_bfloat16>(i, size);
      case ScalarType::Half:
        return four_of<A, __half>(i, size);
      default:
        return four_of<A, float>(i, size);
    }
  }

 private:
  template <typename A, typename T>
  __device__ __forceinline__ Pack<A, kFour> four_of(int i, int size) const {
    const T* from = static_cast<const T*>(data) + i;
    alignas(16) T element[kFour];
    if (wide && i + kFour <= size) {
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint2*>(element) = __ldg(reinterpret_cast<const uint2*>(from));
      } else {
#pragma unroll
        for (int k = 0; k < int(sizeof(T)) / 4; ++k) {
          reinterpret_cast<uint4*>(element)[k] = __ldg(reinterpret_cast<const uint4*>(from) + k);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kFour; ++j) element[j] = i + j < size ? from[j] : narrow<T>(0.0f);
    }
    Pack<A, kFour> pack;
#pragma unroll
    for (int j = 0; j < kFour; ++j) pack.value[j] = widen<A>(element[j]);
    return pack;
  }
};

// one flag for each token or sample; all are set where none are given
struct Flags {
  const bool* data;
  bool wide;

  __device__ __forceinline__ bool at(int64_t i) const { return data == nullptr || data[i]; }

  // bit j is the flag at i + j, where i is a multiple of four; 0 from `size` on
  __device__ __forceinline__ unsigned four(int i, int size) const {
    const unsigned inside = i + kFour <= size ? 15u : (1u << max(size - i, 0)) - 1;
    if (data == nullptr) return inside;
    unsigned bits = 0;
    if (wide && inside == 15u) {
      const unsigned bytes = __ldg(reinterpret_cast<const unsigned*>(data + i));
#pragma unroll
      for (int j = 0; j < kFour; ++j) bits |= (bytes >> 8 * j & 0xff) != 0 ? 1u << j : 0u;
    } else {
#pragma unroll
      for (int j = 0; j < kFour; ++j) bits |= i + j < size && data[i + j] ? 1u << j : 0u;
    }
    return bits;
  }
};

// integers of 32 or 64 bits
struct Integers {
  const void* data;
  bool is_long;

  __device__ __forceinline__ int64_t at(int64_t i) const {
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// checks the arguments of one call, which must be on the device of the first one
struct Columns {
  const char* op;
  const Tensor& first;

  void check(const char* name, const Tensor& tensor, int64_t size, std::initializer_list<ScalarType> types) const {
    check_vector(op, name, tensor, size, types);
    check_device(op, name, tensor, first);
  }

  // a number without dimensions
  Column scalar(const char* name, const Tensor& tensor) const {
    check_shape(op, name, tensor, {});
    check_dtype(op, name, tensor, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half,
                                   ScalarType::Long, ScalarType::Int});
    check_device(op, name, tensor, first);
    return {tensor.data_ptr(), tensor.scalar_type(), false};
  }

  Column floats(const char* name, const std::optional<Tensor>& tensor, int64_t size) const {
    if (!tensor) return {nullptr, ScalarType::Float, false};
    check(name, *tensor, size, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
    const ScalarType type = tensor->scalar_type();
    const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
    return {tensor->data_ptr(), type, aligned(*tensor, half ? 8 : 16)};
  }

  Flags flags(const char* name, const std::optional<Tensor>& tensor, int64_t size) const {
    if (!tensor) return {nullptr, false};
    check(name, *tensor, size, {ScalarType::Bool});
    return {static_cast<const bool*>(tensor->data_ptr()), aligned(*tensor, 4)};
  }

  Integers integers(const char* name, const Tensor& tensor, int64_t size) const {
    check(name, tensor, size, {ScalarType::Long, ScalarType::Int});
    return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Long};
  }

 private:
  static bool aligned(const Tensor& tensor, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
  }
};

}  // namespace prism
