// the row kernels of linear_logprob and token_logprob on the CPU; prism_kernels/ops/anchored_rows/eager.py defines
// them

#include <prism/anchored_rows.h>
#include <prism/check.h>
#include <prism/isa.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace prism {

// vec.h uses these two names
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

namespace {

// V columns of T rows, of the dtype `type`
struct Matrix {
  void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t stride = 0;

  // the bytes of an element
  int64_t element() const { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }
};

template <class T>
T* row_pointer(const Matrix& matrix, int64_t t) {
  return static_cast<T*>(matrix.data) + t * matrix.stride;
}

// one number for each row
template <class T>
struct Column {
  T* data;
  int64_t stride;

  T& operator[](int64_t t) const { return data[t * stride]; }
};

template <class T>
struct Forward {
  // exp.data is null where no exponentials are wanted
  Matrix z, exp;
  int64_t columns;
  Column<const int64_t> target;
  Column<const T> anchor, inv_temperature;
  Column<T> stats[kRowSums];
  const T* bias;
  T softcap;
  bool chain;
};

template <class T>
struct Backward {
  Matrix source, out;
  bool source_is_exp;
  int64_t columns;
  Column<const int64_t> target;
  Column<const T> anchor, inv_temperature, coefficients[kCoefficients];
  const T* bias;
  T softcap;
};

}  // namespace
}  // namespace prism

#define PRISM_EACH_ISA <cpu/anchored_rows_isa.h>
#include <prism/each_isa.h>

namespace prism {
namespace {

template <class T>
Column<T> column(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
}

template <class T>
Column<T> row_of(const Tensor& tensor, int64_t i) {
  return {static_cast<T*>(tensor.data_ptr()) + i * tensor.stride(0), tensor.stride(1)};
}

Matrix matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows, int64_t columns,
              ScalarType compute) {
  check_shape(op, name, tensor, {rows, columns});
  check_rows(op, name, tensor);
  if (compute == ScalarType::Double) {
    check_dtype(op, name, tensor, {compute});
  } else {
    check_dtype(op, name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  }
  return {tensor.data_ptr(), tensor.scalar_type(), tensor.stride(0)};
}

// checks the arguments of both operators that have one number for each row
void check_row_arguments(const char* op, const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
                         int64_t rows) {
  check_shape(op, "target", target, {rows});
  check_dtype(op, "target", target, {ScalarType::Long});
  check_shape(op, "anchor", anchor, {rows});
  check_dtype(op, "anchor", anchor, {ScalarType::Float, ScalarType::Double});
  check_shape(op, "inv_temperature", inv_temperature, {rows});
  check_dtype(op, "inv_temperature", inv_temperature, {anchor.scalar_type()});
}

template <class T, class From>
std::vector<T> converted(const Tensor& bias) {
  std::vector<T> values(bias.numel());
  const auto from = column<const From>(bias);
  for (size_t v = 0; v < values.size(); ++v) values[v] = static_cast<T>(from[static_cast<int64_t>(v)]);
  return values;
}

// the bias, converted to T; empty without one
template <class T>
std::vector<T> bias_values(const char* op, const std::optional<Tensor>& bias, int64_t columns) {
  if (!bias) return {};
  check_shape(op, "bias", *bias, {columns});
  switch (bias->scalar_type()) {
    case ScalarType::Double:
      return converted<T, double>(*bias);
    case ScalarType::Float:
      return converted<T, float>(*bias);
    case ScalarType::BFloat16:
      return converted<T, BFloat16>(*bias);
    case ScalarType::Half:
      return converted<T, Half>(*bias);
    default:
      STD_TORCH_CHECK(false, op, ": expected bias of a floating dtype, got ",
                      torch::headeronly::toString(bias->scalar_type()));
  }
}

// a thread takes runs of rows with at least this many elements: fewer do not repay the cost of a thread
constexpr int64_t kGrain = 1 << 15;

template <class Kernel, class Arguments>
void for_rows(int64_t rows, Kernel kernel, const Arguments& arguments) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, arguments.columns));
  torch::stable::parallel_for(0, rows, grain,
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

template <class T>
void run_forward(const Tensor& z, const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
                 const std::optional<Tensor>& bias, double softcap, bool chain, const std::optional<Tensor>& exp,
                 const Tensor& stats) {
  const char* op = "anchored_rows_fwd";
  const int64_t rows = z.size(0), columns = z.size(1);
  const ScalarType compute = anchor.scalar_type();
  check_shape(op, "stats", stats, {kRowSums, rows});
  check_dtype(op, "stats", stats, {compute});
  const std::vector<T> bias_T = bias_values<T>(op, bias, columns);
  Forward<T> arguments{
      .z = matrix(op, "z", z, rows, columns, compute),
      .exp = exp ? matrix(op, "exp", *exp, rows, columns, compute) : Matrix{},
      .columns = columns,
      .target = column<const int64_t>(target),
      .anchor = column<const T>(anchor),
      .inv_temperature = column<const T>(inv_temperature),
      .stats = {row_of<T>(stats, kAnchor), row_of<T>(stats, kRest), row_of<T>(stats, kMoment),
                row_of<T>(stats, kSquare)},
      .bias = bias ? bias_T.data() : nullptr,
      .softcap = static_cast<T>(softcap),
      .chain = chain,
  };
  if constexpr (std::is_same_v<T, double>) {
    for_rows(rows, baseline::forward_double, arguments);
  } else {
    for_rows(rows, PRISM_FOR_ISA(forward_float), arguments);
  }
}

void anchored_rows_fwd(const Tensor& z, const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
                       const std::optional<Tensor>& bias, double softcap, bool chain, const std::optional<Tensor>& exp,
                       const Tensor& stats) {
  const char* op = "anchored_rows_fwd";
  STD_TORCH_CHECK(z.dim() == 2, op, ": expected z of shape (T, V), got ", z.dim(), " dimensions");
  check_row_arguments(op, target, anchor, inv_temperature, z.size(0));
  const auto run = anchor.scalar_type() == ScalarType::Double ? run_forward<double> : run_forward<float>;
  run(z, target, anchor, inv_temperature, bias, softcap, chain, exp, stats);
}

template <class T>
void run_backward(const Tensor& source, bool source_is_exp, const Tensor& target, const Tensor& anchor,
                  const Tensor& inv_temperature, const Tensor& coefficients, const std::optional<Tensor>& bias,
                  double softcap, const Tensor& out) {
  const char* op = "anchored_rows_bwd";
  const int64_t rows = source.size(0), columns = source.size(1);
  const ScalarType compute = anchor.scalar_type();
  check_shape(op, "coefficients", coefficients, {kCoefficients, rows});
  check_dtype(op, "coefficients", coefficients, {compute});
  const std::vector<T> bias_T = bias_values<T>(op, bias, columns);
  Backward<T> arguments{
      .source = matrix(op, "source", source, rows, columns, compute),
      .out = matrix(op, "out", out, rows, columns, compute),
      .source_is_exp = source_is_exp,
      .columns = columns,
      .target = column<const int64_t>(target),
      .anchor = column<const T>(anchor),
      .inv_temperature = column<const T>(inv_temperature),
      .coefficients = {row_of<const T>(coefficients, kAlpha), row_of<const T>(coefficients, kBeta),
                       row_of<const T>(coefficients, kAtTarget)},
      .bias = bias ? bias_T.data() : nullptr,
      .softcap = static_cast<T>(softcap),
  };
  if constexpr (std::is_same_v<T, double>) {
    for_rows(rows, baseline::backward_double, arguments);
  } else {
    for_rows(rows, PRISM_FOR_ISA(backward_float), arguments);
  }
}

void anchored_rows_bwd(const Tensor& source, bool source_is_exp, const Tensor& target, const Tensor& anchor,
                       const Tensor& inv_temperature, const Tensor& coefficients, const std::optional<Tensor>& bias,
                       double softcap, const Tensor& out) {
  const char* op = "anchored_rows_bwd";
  STD_TORCH_CHECK(source.dim() == 2, op, ": expected source of shape (T, V), got ", source.dim(), " dimensions");
  check_row_arguments(op, target, anchor, inv_temperature, source.size(0));
  const auto run = anchor.scalar_type() == ScalarType::Double ? run_backward<double> : run_backward<float>;
  run(source, source_is_exp, target, anchor, inv_temperature, coefficients, bias, softcap, out);
}

}  // namespace
}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CPU, m) {
  m.impl("anchored_rows_fwd", TORCH_BOX(&prism::anchored_rows_fwd));
  m.impl("anchored_rows_bwd", TORCH_BOX(&prism::anchored_rows_bwd));
}
