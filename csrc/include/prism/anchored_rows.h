// the constants of the row kernels in C++ and CUDA. eager.py of prism_kernels/ops/anchored_rows says what the sums
// and the coefficients are

#pragma once

namespace prism {

// FAR there: exp(28) summed over 2**18 columns stays below 2**60, so that the squares still fit in fp32
constexpr double kFar = 28;

// the rows of `stats`: RowSums of eager.py without the target's logit
enum RowSum { kAnchor, kRest, kMoment, kSquare, kRowSums };

// the rows of `coefficients`, as coefficients() of eager.py returns them
enum Coefficient { kAlpha, kBeta, kAtTarget, kCoefficients };

}  // namespace prism
