// the constants of the row kernels in C++ and CUDA; prism_kernels/ops/anchored_rows/eager.py defines the sums and the
// coefficients

#pragma once

namespace prism {

// FAR there: exp(28) summed over 2**18 columns stays below 2**60, so that the squares still fit in fp32
constexpr double kFar = 28;

// the rows of `stats`: RowSums of prism_kernels/ops/rows.py without the target's logit
enum RowSum { kAnchor, kRest, kMoment, kSquare, kRowSums };

// the rows of `coefficients`, as coefficients() of rows.py returns them
enum Coefficient { kAlpha, kBeta, kAtTarget, kCoefficients };

}  // namespace prism
