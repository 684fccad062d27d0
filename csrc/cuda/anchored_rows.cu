// the row kernels of linear_logprob and token_logprob on CUDA; prism_kernels/ops/anchored_rows/eager.py defines them.
// A block of threads handles a row; memory bandwidth is the limit

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include <prism/anchored_rows.h>
#include <prism/check.h>
#include <prism/launch.cuh>
#include <prism/vec.cuh>

namespace prism {
namespace {

constexpr int kThreads = 512;
// two blocks to a multiprocessor, with four 16-byte loads in flight to a thread, keep 64 KiB in flight, about twice as
// much as the latency of an H200's memory needs. kLoads below is less where four would not fit the registers
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// LOWEST of prism_kernels/ops/anchored_rows/eager.py: it replaces -inf, whose product with an exponential or a beta of
// 0 is NaN
constexpr double kLowest = -1e4;

// a vector of T, or one row of a matrix
template <typename T>
struct Vector {
  T* data;
  int64_t stride;

  __device__ T& operator[](int64_t i) const { return data[i * stride]; }
};

// rows of contiguous elements of any type
struct Matrix {
  void* data;
  int64_t stride;

  template <typename T>
  __device__ T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
};

// turns z into the logits of the softmax
template <typename A>
struct Transform {
  const void* bias;
  int64_t bias_stride;
  ScalarType bias_type;
  A softcap;

  __device__ A bias_at(int64_t v) const {
    v *= bias_stride;
    switch (bias_type) {
      case ScalarType::Double:
        return static_cast<A>(static_cast<const double*>(bias)[v]);
      case ScalarType::BFloat16:
        return widen<A>(static_cast<const __nv_bfloat16*>(bias)[v]);
      case ScalarType::Half:
        return widen<A>(static_cast<const __half*>(bias)[v]);
      default:
        return static_cast<A>(static_cast<const float*>(bias)[v]);
    }
  }

  // replaces z by the logits x; returns dx/dz
  template <int N>
  __device__ __forceinline__ Pack<A, N> apply(Pack<A, N>& x, int column) const {
    Pack<A, N> slope;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (bias != nullptr) x.value[j] += bias_at(column + j);
      slope.value[j] = 1;
      if (softcap != 0) {
        const A y = tanh(x.value[j] / softcap);
        x.value[j] = softcap * y;
        slope.value[j] = 1 - y * y;
      }
    }
    return slope;
  }
};

template <typename A>
struct Rows {
  Vector<const int64_t> target;
  Vector<const A> anchor;
  Vector<const A> inv_temperature;
  Transform<A> transform;
  int columns;

  // the target's column, or -1 if it is not in this slice
  __device__ int target_of(int64_t row) const {
    const int64_t column = target[row];
    return column >= 0 && column < columns ? static_cast<int>(column) : -1;
  }
};

template <typename A>
struct ForwardArguments {
  Rows<A> rows;
  Matrix z;
  Matrix exp;
  Vector<A> stats[kRowSums];
  bool in_place;
  bool chain;
};

template <typename A>
struct BackwardArguments {
  Rows<A> rows;
  Matrix source;
  Matrix out;
  Vector<const A> coefficients[kCoefficients];
};

// a thread's sums of e, e * t and e^2 over the columns that it has read
template <typename A>
struct Sums {
  A centre;
  A sums[3];

  // adds e = 2^t with t = (x - centre) * scale and writes it to `out`; e is 0 at the target
  template <int N>
  __device__ __forceinline__ void add(const Pack<A, N>& x, A scale, int target_at, Pack<A, N>& out) {
    Pack<A, N> t;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      t.value[j] = (x.value[j] - centre) * scale;
      out.value[j] = exp2_fast(t.value[j]);
      t.value[j] = max(t.value[j], static_cast<A>(kLowest));
    }
    if (static_cast<unsigned>(target_at) < N) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j == target_at) out.value[j] = 0;
      }
    }
    // summed within the pack first: a long sum then rounds less often
    A sum = out.value[0], dot = out.value[0] * t.value[0], square = out.value[0] * out.value[0];
#pragma unroll
    for (int j = 1; j < N; ++j) {
      sum += out.value[j];
      dot += out.value[j] * t.value[j];
      square += out.value[j] * out.value[j];
    }
    sums[0] += sum;
    sums[1] += dot;
    sums[2] += square;
  }

  __device__ __forceinline__ void move_to(A other, A scale) {
    if (centre == other) return;
    const A shift = max((centre - other) * scale, static_cast<A>(kLowest));
    const A factor = exp2_fast(shift);
    sums[1] = factor * (sums[1] + shift * sums[0]);
    sums[0] *= factor;
    sums[2] *= factor * factor;
    centre = other;
  }
};

template <typename A, int N>
__device__ __forceinline__ A largest(A top, const Pack<A, N>& x) {
#pragma unroll
  for (int j = 0; j < N; ++j) top = max_nan(top, x.value[j]);
  return top;
}

// Out is void where no exponentials are wanted; kTransform: there is a bias or a soft cap
template <typename Z, typename Out, bool kTransform>
__global__ void __launch_bounds__(kThreads, kBlocks<Z>)
    anchored_rows_fwd_kernel(const ForwardArguments<compute_t<Z>> p) {
  using A = compute_t<Z>;
  constexpr bool kWrite = !std::is_void_v<Out>;
  constexpr int kLoads = kTransform ? 1 : kWrite && sizeof(Z) == 2 ? 2 : 4;
  const int64_t row = blockIdx.x;
  const int columns = p.rows.columns;
  const int target = p.rows.target_of(row);
  const A anchor = p.rows.anchor[row];
  const A inv_temperature = p.rows.inv_temperature[row];
  const A scale = inv_temperature * static_cast<A>(kLog2E);
  const Z* z = p.z.template row<const Z>(row);
  Split<Z> split(z, columns);
  const A infinity = static_cast<A>(INFINITY);
  A top = -infinity;
  Sums<A> sums{anchor, {0, 0, 0}};
  const auto is_far = [&] { return (top - anchor) * inv_temperature > static_cast<A>(kFar); };

  if constexpr (kWrite) {
    Out* exp = p.exp.template row<Out>(row);
    split.align_with(exp);
    bool settled = false;
    if (std::is_same_v<Z, Out> && p.in_place) {
      // a far row must be read again, so nothing may be written before
      for_each_pack<A, kThreads, kLoads>(z, split, [&](auto x, int column) {
        if constexpr (kTransform) p.rows.transform.apply(x, column);
        top = largest(top, x);
      });
      block_reduce<kThreads>(top, sums.sums);
      if (is_far()) sums.centre = top;
      settled = true;
    }
    // most rows are near: only a far one is read a second time
    for (;;) {
      for_each_pack<A, kThreads, kLoads>(z, split, [&](auto x, int column) {
        auto e = x;
        if constexpr (kTransform) {
          const auto slope = p.rows.transform.apply(x, column);
          sums.add(x, scale, target - column, e);
          if (p.chain) {
#pragma unroll
            for (int j = 0; j < x.kSize; ++j) {
              e.value[j] = column + j == target ? 0 : e.value[j] * slope.value[j];
            }
          }
        } else {
          sums.add(x, scale, target - column, e);
        }
        top = largest(top, x);
        store(exp + column, e);
      });
      block_reduce<kThreads>(top, sums.sums);
      if (settled || !is_far()) break;
      sums = {top, {0, 0, 0}};
      settled = true;
    }
    // for inf, and for NaN, which compares false
    if (!(abs(sums.sums[0]) < infinity)) zero_row<kThreads>(exp, columns);
  } else {
    // each thread raises its own centre when it must, so that the row is read once. the centre starts above -inf, since
    // -inf - -inf is NaN
    sums.centre = anchor == -infinity ? static_cast<A>(-1e38) : anchor;
    const A reach = static_cast<A>(kFar) / inv_temperature;
    for_each_pack<A, kThreads, kLoads>(z, split, [&](auto x, int column) {
      if constexpr (kTransform) p.rows.transform.apply(x, column);
      const A here = largest(-infinity, x);
      top = max_nan(top, here);
      if (here > sums.centre + reach) sums.move_to(here, scale);
      auto e = x;
      sums.add(x, scale, target - column, e);
    });
    A nothing[1] = {0};
    block_reduce<kThreads>(top, nothing);
    sums.move_to(is_far() ? top : anchor, scale);
    block_reduce<kThreads>(top, sums.sums);
  }

  if (threadIdx.x == 0) {
    p.stats[kAnchor][row] = sums.centre;
    p.stats[kRest][row] = sums.sums[0];
    p.stats[kMoment][row] = sums.sums[1] * static_cast<A>(kLn2);
    p.stats[kSquare][row] = sums.sums[2];
  }
}

template <typename Source, typename Out, bool kFromExp, bool kTransform>
__global__ void __launch_bounds__(kThreads, kBlocks<Source>)
    anchored_rows_bwd_kernel(const BackwardArguments<compute_t<Source>> p) {
  using A = compute_t<Source>;
  constexpr int kLoads = kTransform ? 1 : 4;
  const int64_t row = blockIdx.x;
  const int columns = p.rows.columns;
  const A alpha = p.coefficients[kAlpha][row];
  const A beta = p.coefficients[kBeta][row];
  const A at_target = p.coefficients[kAtTarget][row];
  Out* out = p.out.template row<Out>(row);
  if (alpha == 0 && beta == 0 && at_target == 0) {
    zero_row<kThreads>(out, columns);
    return;
  }
  const int target = p.rows.target_of(row);
  const A anchor = p.rows.anchor[row];
  const A inv_temperature = p.rows.inv_temperature[row];
  const A scale = inv_temperature * static_cast<A>(kLog2E);
  const A beta_log2 = beta * static_cast<A>(kLn2);
  const Source* source = p.source.template row<const Source>(row);
  Split<Source> split(source, columns);
  split.align_with(out);
  const auto lowest = static_cast<A>(kLowest);

  for_each_pack<A, kThreads, kLoads>(source, split, [&](auto x, int column) {
    constexpr int N = decltype(x)::kSize;
    auto f = x;
    if constexpr (kFromExp) {
      if (beta != 0 || kTransform) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A e = x.value[j];
          const A t = max(log2_fast(e), lowest);
          f.value[j] = e * (alpha + beta_log2 * t);
          if constexpr (kTransform) {
            const A y = (t / scale + anchor) / p.rows.transform.softcap;
            f.value[j] = e == 0 ? 0 : f.value[j] * (1 - y * y);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j) f.value[j] = alpha * x.value[j];
      }
    } else {
      auto slope = x;
      if constexpr (kTransform) slope = p.rows.transform.apply(x, column);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A t = (x.value[j] - anchor) * scale;
        f.value[j] = exp2_fast(t) * (alpha + beta_log2 * max(t, lowest));
        if constexpr (kTransform) f.value[j] *= slope.value[j];
      }
    }
    if (static_cast<unsigned>(target - column) < N) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (column + j == target) f.value[j] = at_target;
      }
    }
    store(out + column, f);
  });
}

template <typename T>
struct Type {
  using type = T;
};

// calls call(Type<T>) with the type T of a tensor's elements, which are computed with as A
template <typename A, typename Call>
void with_type(const Tensor& tensor, const Call& call) {
  if constexpr (std::is_same_v<A, double>) {
    call(Type<double>{});
  } else if (tensor.scalar_type() == ScalarType::BFloat16) {
    call(Type<__nv_bfloat16>{});
  } else if (tensor.scalar_type() == ScalarType::Half) {
    call(Type<__half>{});
  } else {
    call(Type<float>{});
  }
}

template <typename Call>
void with_flag(bool flag, const Call& call) {
  if (flag) {
    call(std::true_type{});
  } else {
    call(std::false_type{});
  }
}

// checks the arguments of one call; the first one is the matrix of its rows
template <typename A>
struct Checked {
  static constexpr ScalarType kCompute = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const char* op;
  const Tensor& first;

  Matrix matrix(const char* name, const Tensor& tensor) const {
    check_shape(op, name, tensor, {first.size(0), first.size(1)});
    check_rows(op, name, tensor);
    if constexpr (kCompute == ScalarType::Double) {
      check_dtype(op, name, tensor, {ScalarType::Double});
    } else {
      check_dtype(op, name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    }
    check_device(op, name, tensor, first);
    return {tensor.data_ptr(), tensor.stride(0)};
  }

  template <typename T>
  Vector<T> vector(const char* name, const Tensor& tensor, ScalarType type) const {
    check_shape(op, name, tensor, {first.size(0)});
    check_dtype(op, name, tensor, {type});
    check_device(op, name, tensor, first);
    return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
  }

  // the rows of a matrix (N, T)
  template <typename T, int N>
  void vectors(const char* name, const Tensor& tensor, Vector<T> (&rows)[N]) const {
    check_shape(op, name, tensor, {N, first.size(0)});
    check_dtype(op, name, tensor, {kCompute});
    check_device(op, name, tensor, first);
    for (int n = 0; n < N; ++n) {
      rows[n] = {static_cast<T*>(tensor.data_ptr()) + n * tensor.stride(0), tensor.stride(1)};
    }
  }

  Rows<A> rows(const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
               const std::optional<Tensor>& bias, double softcap) const {
    STD_TORCH_CHECK(first.size(1) <= kMostElements, op, ": expected at most 2**30 columns, got ", first.size(1));
    Transform<A> transform{nullptr, 0, ScalarType::Float, static_cast<A>(softcap)};
    if (bias) {
      check_shape(op, "bias", *bias, {first.size(1)});
      check_dtype(op, "bias", *bias,
                  {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
      check_device(op, "bias", *bias, first);
      transform = {bias->data_ptr(), bias->stride(0), bias->scalar_type(), static_cast<A>(softcap)};
    }
    return {vector<const int64_t>("target", target, ScalarType::Long), vector<const A>("anchor", anchor, kCompute),
            vector<const A>("inv_temperature", inv_temperature, kCompute), transform,
            static_cast<int>(first.size(1))};
  }
};

template <typename A>
void forward(const Tensor& z, const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
             const std::optional<Tensor>& bias, double softcap, bool chain, const std::optional<Tensor>& exp,
             const Tensor& stats) {
  const Checked<A> checked{"anchored_rows_fwd", z};
  ForwardArguments<A> arguments{};
  arguments.z = checked.matrix("z", z);
  arguments.rows = checked.rows(target, anchor, inv_temperature, bias, softcap);
  if (exp) arguments.exp = checked.matrix("exp", *exp);
  checked.vectors("stats", stats, arguments.stats);
  arguments.in_place = exp && exp->data_ptr() == z.data_ptr();
  arguments.chain = chain && softcap != 0;
  with_flag(bias || softcap != 0, [&](auto transform) {
    with_type<A>(z, [&](auto z_type) {
      using Z = typename decltype(z_type)::type;
      constexpr bool kTransform = decltype(transform)::value;
      if (!exp) {
        launch(z, z.size(0), kThreads, anchored_rows_fwd_kernel<Z, void, kTransform>, arguments);
        return;
      }
      with_type<A>(*exp, [&](auto exp_type) {
        using Out = typename decltype(exp_type)::type;
        launch(z, z.size(0), kThreads, anchored_rows_fwd_kernel<Z, Out, kTransform>, arguments);
      });
    });
  });
}

template <typename A>
void backward(const Tensor& source, bool source_is_exp, const Tensor& target, const Tensor& anchor,
              const Tensor& inv_temperature, const Tensor& coefficients, const std::optional<Tensor>& bias,
              double softcap, const Tensor& out) {
  const Checked<A> checked{"anchored_rows_bwd", source};
  BackwardArguments<A> arguments{};
  arguments.source = checked.matrix("source", source);
  arguments.rows = checked.rows(target, anchor, inv_temperature, bias, softcap);
  arguments.out = checked.matrix("out", out);
  checked.vectors("coefficients", coefficients, arguments.coefficients);
  with_flag(softcap != 0 || (bias && !source_is_exp), [&](auto transform) {
    with_flag(source_is_exp, [&](auto from_exp) {
      with_type<A>(source, [&](auto source_type) {
        with_type<A>(out, [&](auto out_type) {
          using Source = typename decltype(source_type)::type;
          using Out = typename decltype(out_type)::type;
          constexpr bool kFromExp = decltype(from_exp)::value;
          constexpr bool kTransform = decltype(transform)::value;
          launch(source, source.size(0), kThreads, anchored_rows_bwd_kernel<Source, Out, kFromExp, kTransform>,
                 arguments);
        });
      });
    });
  });
}

void anchored_rows_fwd(const Tensor& z, const Tensor& target, const Tensor& anchor, const Tensor& inv_temperature,
                       const std::optional<Tensor>& bias, double softcap, bool chain, const std::optional<Tensor>& exp,
                       const Tensor& stats) {
  STD_TORCH_CHECK(z.dim() == 2, "anchored_rows_fwd: expected z of shape (T, V), got ", z.dim(), " dimensions");
  const auto run = anchor.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  run(z, target, anchor, inv_temperature, bias, softcap, chain, exp, stats);
}

void anchored_rows_bwd(const Tensor& source, bool source_is_exp, const Tensor& target, const Tensor& anchor,
                       const Tensor& inv_temperature, const Tensor& coefficients, const std::optional<Tensor>& bias,
                       double softcap, const Tensor& out) {
  STD_TORCH_CHECK(source.dim() == 2, "anchored_rows_bwd: expected source of shape (T, V), got ", source.dim(),
                  " dimensions");
  const auto run = anchor.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(source, source_is_exp, target, anchor, inv_temperature, coefficients, bias, softcap, out);
}

}  // namespace
}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CUDA, m) {
  m.impl("anchored_rows_fwd", TORCH_BOX(&prism::anchored_rows_fwd));
  m.impl("anchored_rows_bwd", TORCH_BOX(&prism::anchored_rows_bwd));
}
