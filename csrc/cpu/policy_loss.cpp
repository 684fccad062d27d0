// The policy loss of ops/policy_loss for the CPU, with dL/dlogp and the metrics; eager.py there says what is computed.

#include <prism/check.h>
#include <prism/isa.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace prism {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// as the tuples of options.py count them
enum class Ratio { token, sequence };
enum class Objective { clip, cispo, reinforce };
enum class Aggregate { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Estimator { k1, k2, k3, k1_plus, k3_plus };
enum class Unit { token, sequence, geometric };
enum class Rule { none, truncate, mask };

// the places of PolicyMetrics
enum Total {
  kTokens, kSequences, kLow, kHigh, kDual, kLag, kKl, kRatioSum, kRaw, kUsed, kClipped, kWeight, kWeightSquare, kEntropy,
  kRatioMin, kRatioMax, kTotals
};

template <class T>
struct PolicyLoss {
  // T tokens; null where not given
  const T *logp, *old_logp, *advantage, *ref_logp, *rollout_logp, *entropy;
  const bool* mask;
  T *grad, *grad_entropy;
  // of each sequence: its bounds, its number of valid tokens, and by what each of these counts
  const int64_t* bounds;
  const int64_t* counts;
  const double* weights;
  Ratio ratio;
  Objective objective;
  Estimator estimator;
  Unit unit;
  Rule rule;
  bool per_token;
  T low, high, dual, bound, kl_coef, lower, upper, entropy_coef;
};

// the loss and the metrics of some sequences
struct Sums {
  double loss = 0;
  std::array<double, kTotals> totals{};
};

}  // namespace prism

#define PRISM_EACH_ISA <cpu/policy_loss_isa.h>
#include <prism/each_isa.h>

namespace prism {

// sequences are dealt out in runs of at least this many tokens. The runs depend on the sequences alone, and so do the
// sums, which are formed run by run
constexpr int64_t kRun = 8192;

struct Run {
  int64_t first, last;
};

std::vector<Run> runs_of(const int64_t* bounds, int64_t sequences) {
  std::vector<Run> runs;
  int64_t first = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    if (bounds[s + 1] - bounds[first] < kRun && s + 1 < sequences) continue;
    runs.push_back({first, s + 1});
    first = s + 1;
  }
  return runs;
}

template <class F>
void for_runs(const std::vector<Run>& runs, F work) {
  torch::stable::parallel_for(0, static_cast<int64_t>(runs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

int64_t count(const bool* mask, int64_t n) {
  // in bytes, so that the compiler can sum them side by side; not more at a time than a byte holds
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += 255) {
    const int64_t some = std::min<int64_t>(255, n - i);
    uint8_t sum = 0;
    for (int64_t j = 0; j < some; ++j) sum += mask[i + j] ? 1 : 0;
    total += sum;
  }
  return total;
}

template <class T>
const T* column(const char* name, const std::optional<Tensor>& tensor, int64_t size, ScalarType type) {
  const char* op = "policy_loss_fwd";
  if (!tensor) return nullptr;
  check_shape(op, name, *tensor, {size});
  check_dtype(op, name, *tensor, {type});
  STD_TORCH_CHECK(size <= 1 || tensor->stride(0) == 1, op, ": expected ", name, " of stride 1, got ", tensor->stride(0));
  return static_cast<const T*>(tensor->data_ptr());
}

template <class T>
T* output(const char* name, const Tensor& tensor, int64_t size, ScalarType type) {
  return const_cast<T*>(column<T>(name, tensor, size, type));
}

template <class T>
void run(const Tensor& logp, const std::optional<Tensor>& old_logp, const Tensor& advantage, const Tensor& cu_seqlens,
         const std::optional<Tensor>& mask, const std::optional<Tensor>& ref_logp,
         const std::optional<Tensor>& rollout_logp, const std::optional<Tensor>& entropy, double denominator,
         const std::vector<int64_t>& choices, const std::vector<double>& numbers, const Tensor& loss, const Tensor& grad,
         const Tensor& grad_entropy, const Tensor& totals) {
  const char* op = "policy_loss_fwd";
  const ScalarType type = logp.scalar_type();
  const int64_t tokens = logp.numel(), sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(choices.size() == 6 && numbers.size() == 10 && sequences >= 0, op, ": bad options");
  const auto aggregate = static_cast<Aggregate>(choices[2]);
  const bool per_token = choices[5] != 0;
  const int64_t* bounds = column<int64_t>("cu_seqlens", cu_seqlens, sequences + 1, ScalarType::Long);
  bool rising = bounds[0] == 0 && bounds[sequences] == tokens;
  for (int64_t s = 0; s < sequences; ++s) rising = rising && bounds[s] <= bounds[s + 1];
  STD_TORCH_CHECK(rising, op, ": expected cu_seqlens that rise from 0 to ", tokens);

  const std::vector<Run> runs = runs_of(bounds, sequences);
  const bool* valid = column<bool>("mask", mask, tokens, ScalarType::Bool);
  std::vector<int64_t> counts(sequences);
  for_runs(runs, [&](int64_t i) {
    for (int64_t s = runs[i].first; s < runs[i].last; ++s) {
      const int64_t n = bounds[s + 1] - bounds[s];
      counts[s] = valid ? count(valid + bounds[s], n) : n;
    }
  });
  int64_t valid_tokens = 0, valid_sequences = 0;
  for (int64_t n : counts) {
    valid_tokens += n;
    valid_sequences += n > 0;
  }
  if (denominator == 0) {
    denominator = static_cast<double>(std::max<int64_t>(
        1, aggregate == Aggregate::token_mean ? valid_tokens : valid_sequences));
  }
  const double horizon = numbers[5];
  std::vector<double> weights(sequences);
  for (int64_t s = 0; s < sequences; ++s) {
    weights[s] = 1 / denominator;
    if (aggregate == Aggregate::seq_mean_token_mean) weights[s] /= static_cast<double>(std::max<int64_t>(1, counts[s]));
    if (aggregate == Aggregate::seq_mean_token_sum_norm) weights[s] /= horizon;
  }

  const int64_t correction = choices[4];
  const auto number = [&](int i) { return static_cast<T>(numbers[i]); };
  const PolicyLoss<T> arguments{
      .logp = column<T>("logp", logp, tokens, type),
      .old_logp = column<T>("old_logp", old_logp, tokens, type),
      .advantage = column<T>("advantage", advantage, per_token ? tokens : sequences, type),
      .ref_logp = column<T>("ref_logp", ref_logp, tokens, type),
      .rollout_logp = column<T>("rollout_logp", rollout_logp, tokens, type),
      .entropy = column<T>("entropy", entropy, tokens, type),
      .mask = valid,
      .grad = output<T>("grad", grad, tokens, type),
      .grad_entropy = entropy ? output<T>("grad_entropy", grad_entropy, tokens, type) : nullptr,
      .bounds = bounds,
      .counts = counts.data(),
      .weights = weights.data(),
      .ratio = static_cast<Ratio>(choices[0]),
      .objective = static_cast<Objective>(choices[1]),
      .estimator = static_cast<Estimator>(choices[3]),
      .unit = correction < 0 ? Unit::token : static_cast<Unit>(correction % 3),
      .rule = correction < 0 ? Rule::none : correction < 3 ? Rule::truncate : Rule::mask,
      .per_token = per_token,
      .low = static_cast<T>(1 - numbers[0]),
      .high = static_cast<T>(1 + numbers[1]),
      .dual = number(2),
      .bound = number(3),
      .kl_coef = number(6),
      .lower = number(7),
      .upper = number(8),
      .entropy_coef = number(9),
  };
  std::vector<Sums> parts(runs.size());
  for_runs(runs, [&](int64_t i) {
    if constexpr (std::is_same_v<T, double>) {
      parts[i] = baseline::loss_double(arguments, runs[i].first, runs[i].last);
    } else {
      parts[i] = PRISM_FOR_ISA(loss_float)(arguments, runs[i].first, runs[i].last);
    }
  });
  double value = 0;
  double* total = output<double>("totals", totals, kTotals, ScalarType::Double);
  std::fill_n(total, kTotals, 0.0);
  total[kRatioMin] = std::numeric_limits<double>::infinity();
  total[kRatioMax] = -total[kRatioMin];
  for (const Sums& part : parts) {
    value += part.loss;
    for (int i = 0; i < kRatioMin; ++i) total[i] += part.totals[i];
    // NaN stays NaN
    if (!(part.totals[kRatioMin] >= total[kRatioMin])) total[kRatioMin] = part.totals[kRatioMin];
    if (!(part.totals[kRatioMax] <= total[kRatioMax])) total[kRatioMax] = part.totals[kRatioMax];
  }
  total[kTokens] = static_cast<double>(valid_tokens);
  total[kSequences] = static_cast<double>(valid_sequences);
  if (!rollout_logp) total[kRaw] = total[kTokens];
  if (arguments.rule == Rule::none) total[kUsed] = total[kTokens];
  check_shape(op, "loss", loss, {});
  check_dtype(op, "loss", loss, {type});
  *static_cast<T*>(loss.data_ptr()) = static_cast<T>(value);
}

void policy_loss_fwd(const Tensor& logp, const std::optional<Tensor>& old_logp, const Tensor& advantage,
                     const Tensor& cu_seqlens, const std::optional<Tensor>& mask, const std::optional<Tensor>& ref_logp,
                     const std::optional<Tensor>& rollout_logp, const std::optional<Tensor>& entropy,
                     double denominator, const std::vector<int64_t>& choices, const std::vector<double>& numbers,
                     const Tensor& loss, const Tensor& grad, const Tensor& grad_entropy, const Tensor& totals) {
  const ScalarType type = logp.scalar_type();
  check_dtype("policy_loss_fwd", "logp", logp, {ScalarType::Float, ScalarType::Double});
  const auto f = type == ScalarType::Double ? run<double> : run<float>;
  f(logp, old_logp, advantage, cu_seqlens, mask, ref_logp, rollout_logp, entropy, denominator, choices, numbers, loss,
    grad, grad_entropy, totals);
}

}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CPU, m) {
  m.impl("policy_loss_fwd.out", TORCH_BOX(&prism::policy_loss_fwd));
}
