// the options and the totals of policy_loss in C++ and CUDA; prism_kernels/ops/policy_loss/reference.py is the
// specification

#pragma once

#include <prism/check.h>
#include <prism/host_device.h>

#include <cstdint>
#include <vector>

namespace prism {

// in the order of the tuples of prism_kernels/ops/policy_loss/options.py
enum class Ratio { token, sequence };
enum class Objective { clip, cispo, reinforce };
enum class Aggregate { token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm };
enum class Estimator { k1, k2, k3, k1_plus, k3_plus };
// CORRECTIONS there has every unit with truncate, then every unit with mask; -1 is no correction
enum class Unit { token, sequence, geometric };
enum class Rule { none, truncate, mask };
constexpr int64_t kUnits = 3;

// the entries of `choices` and `numbers`, as Options.encoded of options.py writes them
enum Choice { kRatio, kObjective, kAggregate, kEstimator, kCorrection, kPerToken, kChoices };
enum Number {
  kClipLow, kClipHigh, kDualClip, kLogRatioBound, kDenominator, kHorizon, kKlCoef, kLower, kUpper, kEntropyCoef,
  kNumbers
};

// the entries of `totals`, in the order of POLICY_TOTALS of prism_kernels/metrics.py
enum Total {
  kTokens, kSequences, kClippedLow, kClippedHigh, kClippedDual, kApproxKl, kRefKl, kRatioSum, kCorrectionRaw,
  kCorrectionUsed, kCorrectionClipped, kEssSum, kEssSumSq, kEntropy, kRatioMin, kRatioMax, kTotals
};

template <typename T>
struct PolicyOptions {
  Ratio ratio;
  Objective objective;
  Aggregate aggregate;
  Estimator estimator;
  Unit unit;
  Rule rule;
  // whether the advantage is one number for each token
  bool per_token;
  // low and high bound the ratio, lower and upper the correction
  T low, high, dual, bound, kl_coef, lower, upper, entropy_coef;

  // whether the loss depends on a token only through the mean log-ratio of its sequence, to which all contribute alike
  PRISM_HOST_DEVICE bool through_mean() const {
    return ratio == Ratio::sequence && objective == Objective::clip && !per_token;
  }
};

template <typename T>
PolicyOptions<T> policy_options(const char* op, const std::vector<int64_t>& choices,
                                const std::vector<double>& numbers) {
  STD_TORCH_CHECK(choices.size() == kChoices && numbers.size() == kNumbers, op, ": expected ", int(kChoices),
                  " choices and ", int(kNumbers), " numbers, got ", choices.size(), " and ", numbers.size());
  const int64_t correction = choices[kCorrection];
  const auto number = [&](Number i) { return static_cast<T>(numbers[i]); };
  PolicyOptions<T> o{};
  o.ratio = static_cast<Ratio>(choices[kRatio]);
  o.objective = static_cast<Objective>(choices[kObjective]);
  o.aggregate = static_cast<Aggregate>(choices[kAggregate]);
  o.estimator = static_cast<Estimator>(choices[kEstimator]);
  o.unit = correction < 0 ? Unit::token : static_cast<Unit>(correction % kUnits);
  o.rule = correction < 0 ? Rule::none : correction < kUnits ? Rule::truncate : Rule::mask;
  o.per_token = choices[kPerToken] != 0;
  o.low = static_cast<T>(1 - numbers[kClipLow]);
  o.high = static_cast<T>(1 + numbers[kClipHigh]);
  o.dual = number(kDualClip);
  o.bound = number(kLogRatioBound);
  o.kl_coef = number(kKlCoef);
  o.lower = number(kLower);
  o.upper = number(kUpper);
  o.entropy_coef = number(kEntropyCoef);
  return o;
}

}  // namespace prism
