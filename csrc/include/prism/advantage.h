// the options of group_advantage and prism_advantage in C++ and CUDA. The specification is reference.py of
// prism_kernels/ops/group_advantage and prism_kernels/ops/prism_advantage

#pragma once

#include <prism/check.h>
#include <prism/host_device.h>

#include <cstdint>
#include <vector>

namespace prism {

// in the order of BASELINES, SCALES, NORMALIZE, INVALID and MODES of op.py there
enum class Baseline { mean, leave_one_out, none };
enum class Scale { deviation, none, batch };
enum class Normalize { channel, sum };
enum class Invalid { exclude, below_min };
enum class Mode { align, acc_gating, gated, rlvr, rlvr_v2, sign_align };

struct PrismSettings {
  Normalize normalize;
  Invalid invalid;
  Mode mode;
  // `numbers` of the operator, in the order of Settings of eager.py there
  double alpha, format_penalty, align_coef, wrong_penalty, w_acc, w_fmt, eps;

  // whether the rewards are z-scored within the group
  PRISM_HOST_DEVICE bool scores_rewards() const {
    return mode == Mode::rlvr || mode == Mode::rlvr_v2 || mode == Mode::sign_align;
  }
};

inline PrismSettings prism_settings(const char* op, int64_t normalize, int64_t invalid, int64_t mode,
                                    const std::vector<double>& numbers, bool has_accuracy) {
  STD_TORCH_CHECK(numbers.size() == 7, op, ": expected 7 numbers, got ", numbers.size());
  const PrismSettings settings{static_cast<Normalize>(normalize),
                               static_cast<Invalid>(invalid),
                               static_cast<Mode>(mode),
                               numbers[0],
                               numbers[1],
                               numbers[2],
                               numbers[3],
                               numbers[4],
                               numbers[5],
                               numbers[6]};
  STD_TORCH_CHECK(has_accuracy || settings.mode == Mode::align, op, ": expected accuracy with mode ", mode);
  return settings;
}

}  // namespace prism
