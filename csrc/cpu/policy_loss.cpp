// policy_loss on the CPU, with dL/dlogp and the metrics; prism_kernels/ops/policy_loss/reference.py is the
// specification

#include <prism/check.h>
#include <prism/isa.h>
#include <prism/policy_loss.h>
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

template <class T>
struct PolicyLoss {
  // [tokens], null where not given
  const T *logp, *old_logp, *advantage, *ref_logp, *rollout_logp, *entropy;
  const bool* mask;
  T *grad, *grad_entropy;
  // cu_seqlens; for each sequence the number of its valid tokens, and the weight of each of them
  const int64_t* bounds;
  const int64_t* counts;
  const double* weights;
  PolicyOptions<T> options;
};

// the loss and the totals of some sequences
struct Sums {
  double loss = 0;
  std::array<double, kTotals> totals{};
};

}  // namespace prism

#define PRISM_EACH_ISA <cpu/policy_loss_isa.h>
#include <prism/each_isa.h>

namespace prism {

// a thread takes a run of sequences with at least this many tokens. The runs, and so the order of the sums, depend on
// the sequences alone, not on the number of threads
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
  // sums of bytes, which the compiler vectorises; 255 is the largest
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
void run(const Tensor& logp, const std::optional<Tensor>& old_logp, const Tensor& advantage, const Tensor& cu_seqlens,
         const std::optional<Tensor>& mask, const std::optional<Tensor>& ref_logp,
         const std::optional<Tensor>& rollout_logp, const std::optional<Tensor>& entropy, double denominator,
         const std::vector<int64_t>& choices, const std::vector<double>& numbers, const Tensor& loss,
         const Tensor& grad, const Tensor& grad_entropy, const Tensor& totals) {
  const char* op = "policy_loss_fwd";
  const ScalarType type = logp.scalar_type();
  const int64_t tokens = logp.numel(), sequences = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(sequences >= 0, op, ": expected cu_seqlens of shape (S + 1,), got (0,)");
  const PolicyOptions<T> options = policy_options<T>(op, choices, numbers);
  const int64_t* bounds = vector_data<int64_t>(op, "cu_seqlens", cu_seqlens, sequences + 1, ScalarType::Long);
  bool rising = bounds[0] == 0 && bounds[sequences] == tokens;
  for (int64_t s = 0; s < sequences; ++s) rising = rising && bounds[s] <= bounds[s + 1];
  STD_TORCH_CHECK(rising, op, ": expected cu_seqlens that rise from 0 to ", tokens);

  const std::vector<Run> runs = runs_of(bounds, sequences);
  const bool* valid = vector_data<bool>(op, "mask", mask, tokens, ScalarType::Bool);
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
        1, options.aggregate == Aggregate::token_mean ? valid_tokens : valid_sequences));
  }
  std::vector<double> weights(sequences);
  for (int64_t s = 0; s < sequences; ++s) {
    weights[s] = 1 / denominator;
    if (options.aggregate == Aggregate::seq_mean_token_mean) {
      weights[s] /= static_cast<double>(std::max<int64_t>(1, counts[s]));
    }
    if (options.aggregate == Aggregate::seq_mean_token_sum_norm) weights[s] /= numbers[kHorizon];
  }

  const PolicyLoss<T> arguments{
      .logp = vector_data<T>(op, "logp", logp, tokens, type),
      .old_logp = vector_data<T>(op, "old_logp", old_logp, tokens, type),
      .advantage = vector_data<T>(op, "advantage", advantage, options.per_token ? tokens : sequences, type),
      .ref_logp = vector_data<T>(op, "ref_logp", ref_logp, tokens, type),
      .rollout_logp = vector_data<T>(op, "rollout_logp", rollout_logp, tokens, type),
      .entropy = vector_data<T>(op, "entropy", entropy, tokens, type),
      .mask = valid,
      .grad = vector_data<T>(op, "grad", grad, tokens, type),
      .grad_entropy = entropy ? vector_data<T>(op, "grad_entropy", grad_entropy, tokens, type) : nullptr,
      .bounds = bounds,
      .counts = counts.data(),
      .weights = weights.data(),
      .options = options,
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
  double* total = vector_data<double>(op, "totals", totals, kTotals, ScalarType::Double);
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
  if (!rollout_logp) total[kCorrectionRaw] = total[kTokens];
  if (options.rule == Rule::none) total[kCorrectionUsed] = total[kTokens];
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
