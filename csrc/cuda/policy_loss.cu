// policy_loss on CUDA, with dL/dlogp and the metrics, in one launch that the host does not wait for.
// prism_kernels/ops/policy_loss/reference.py is the specification
//
// T tokens, S sequences. All blocks run at once and wait for each other between four passes: sums over pieces (see
// packed.cuh), sums over sequences, the loss and the gradient, the merge. Every sum has a fixed order, so that the bits
// are the same from run to run.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <prism/grid.cuh>
#include <prism/outputs.h>
#include <prism/packed.cuh>
#include <prism/policy_token.cuh>
#include <prism/warp.cuh>

namespace prism {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// blocks to a multiprocessor, as many as the registers allow. A warp has 512 bytes of each column in flight
template <typename A, bool kPlain>
constexpr int kBlocks = sizeof(A) == 8 ? 1 : kPlain ? 3 : 2;

// the sums over a piece, and over a sequence
enum Statistic { kCount, kLogRatioSum, kRolloutSum, kCorrectionSum, kStatistics };

template <typename A>
struct Arguments {
  Column logp, old_logp, advantage, ref_logp, rollout_logp, entropy, given_denominator;
  Flags mask;
  Packed packed;
  TokenOptions<A> options;
  // 0: the batch's
  double denominator;
  // 1 where the aggregate has none
  double horizon;
  // whether pieces are summed, and whether the loss needs sums over whole sequences
  bool has_pieces, has_sequences;
  // [kStatistics][runs + sequences]
  double* pieces;
  // [sequences]
  Sequence<A>* statistics;
  // [kRecord][blocks]
  double* records;
  A *loss, *grad, *grad_entropy;
  double* totals;
};

template <typename A>
__device__ __forceinline__ Pack<A, kFour> zeros() {
  Pack<A, kFour> pack;
#pragma unroll
  for (int j = 0; j < kFour; ++j) pack.value[j] = 0;
  return pack;
}

// four tokens; a column that is not given is 0
template <typename A>
struct Four {
  Pack<A, kFour> logp, old, rollout;

  __device__ __forceinline__ Four(const Arguments<A>& p, int t, bool rollout_too) : old(zeros<A>()), rollout(old) {
    logp = p.logp.template four<A>(t, p.packed.tokens);
    if (p.options.old) old = p.old_logp.template four<A>(t, p.packed.tokens);
    if (rollout_too && p.options.rollout) rollout = p.rollout_logp.template four<A>(t, p.packed.tokens);
  }

  __device__ __forceinline__ A log_ratio(const Arguments<A>& p, int j) const {
    return p.options.old ? logp.value[j] - old.value[j] : static_cast<A>(0);
  }
  __device__ __forceinline__ A rollout_log_ratio(const Arguments<A>& p, int j) const {
    return p.options.rollout ? (p.options.old ? old.value[j] : logp.value[j]) - rollout.value[j] : static_cast<A>(0);
  }
};

// writes the sums over the pieces of a run; returns the number of its valid tokens, the same in each lane
template <typename A>
__device__ __forceinline__ double sum_pieces(const Arguments<A>& p, int run) {
  double tokens = 0;
  const int64_t stride = p.packed.pieces();
  for_each_piece(p.packed, run, [&](int s, int begin, int end) {
    if (s < 0) return;
    A log_ratio = 0, rollout_log_ratio = 0, correction = 0;
    int count = 0;
#pragma unroll 1
    for (int t = begin / kFour * kFour + lane() * kFour; t < end; t += kWindow) {
      const unsigned valid = inside(t, begin, end) & p.mask.four(t, p.packed.tokens);
      count += __popc(valid);
      if (!p.has_sequences) continue;
      const Four<A> four(p, t, true);
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        if ((valid >> j & 1) == 0) continue;
        const A rollout = four.rollout_log_ratio(p, j);
        log_ratio += four.log_ratio(p, j);
        rollout_log_ratio += rollout;
        if (p.options.unit == Unit::token) correction += correct(p.options, rollout).used;
      }
    }
    double sums[kStatistics] = {static_cast<double>(count), log_ratio, rollout_log_ratio, correction};
    warp_sum(sums);
    tokens += sums[kCount];
    if (lane() == 0) {
#pragma unroll
      for (int i = 0; i < kStatistics; ++i) p.pieces[i * stride + run + s] = sums[i];
    }
  });
  return tokens;
}

// a sequence's values for its tokens, from its sums; the weight is not divided by the denominator yet
template <typename A>
__device__ __forceinline__ Sequence<A> statistics_of(const Arguments<A>& p, const double (&sums)[kStatistics]) {
  const double n = max(sums[kCount], 1.0);
  Sequence<A> q{1, 0, static_cast<A>(sums[kLogRatioSum] / n), 0, 1};
  if (p.options.aggregate == Aggregate::seq_mean_token_mean) q.weight = static_cast<A>(1 / n);
  if (p.options.unit != Unit::token) {
    q.rollout_log_ratio = static_cast<A>(p.options.unit == Unit::geometric ? sums[kRolloutSum] / n : sums[kRolloutSum]);
    q.correction = correct(p.options, q.rollout_log_ratio).used;
  } else if (p.options.rule != Rule::none) {
    q.correction = static_cast<A>(sums[kCorrectionSum] / n);
  }
  return q;
}

// writes the values of this warp's sequences; returns how many of this lane's have a valid token, NaN if one ends
// before it begins. A lane sums a sequence of few pieces, the warp sums one of many
template <typename A>
__device__ __forceinline__ double sum_sequences(const Arguments<A>& p) {
  constexpr int kFew = kWarp;
  const int64_t stride = p.packed.pieces();
  const int warp = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  double valid_sequences = 0;
#pragma unroll 1
  for (int first = warp * kWarp; first < p.packed.sequences; first += static_cast<int>(gridDim.x) * kThreads) {
    const int s = first + lane();
    const bool mine = s < p.packed.sequences;
    const int begin = mine ? p.packed.bound(s) : 0, end = mine ? p.packed.bound(s + 1) : 0;
    double sums[kStatistics] = {static_cast<double>(end - begin), 0, 0, 0};
    if (p.has_pieces) {
      const int from = begin / p.packed.run + s;
      const int n = end > begin ? (end - 1) / p.packed.run + s + 1 - from : 0;
      sums[kCount] = 0;
      for (int i = 0; i < n && n <= kFew; ++i) {
#pragma unroll
        for (int k = 0; k < kStatistics; ++k) sums[k] += p.pieces[k * stride + from + i];
      }
      for (unsigned left = __ballot_sync(kAllLanes, n > kFew); left != 0; left &= left - 1) {
        const int owner = __ffs(static_cast<int>(left)) - 1;
        const int owner_from = __shfl_sync(kAllLanes, from, owner), owner_n = __shfl_sync(kAllLanes, n, owner);
        double all[kStatistics] = {0, 0, 0, 0};
        for (int i = lane(); i < owner_n; i += kWarp) {
#pragma unroll
          for (int k = 0; k < kStatistics; ++k) all[k] += p.pieces[k * stride + owner_from + i];
        }
        warp_sum(all);
        if (lane() == owner) {
#pragma unroll
          for (int k = 0; k < kStatistics; ++k) sums[k] = all[k];
        }
      }
    }
    if (!mine) continue;
    valid_sequences += end < begin ? static_cast<double>(NAN) : sums[kCount] > 0 ? 1.0 : 0.0;
    if (p.has_sequences) p.statistics[s] = statistics_of(p, sums);
  }
  return valid_sequences;
}

// writes the sum of the threads' values into the block's record
template <typename A>
__device__ __forceinline__ void publish(const Arguments<A>& p, Total total, double value) {
  double none = 0, sums[1] = {value};
  block_reduce<kThreads>(none, sums);
  if (threadIdx.x == 0) p.records[static_cast<int64_t>(total) * gridDim.x + blockIdx.x] = sums[0];
}

// the sum of a total over all blocks' records, the same in each thread
template <typename A>
__device__ __forceinline__ double recorded(const Arguments<A>& p, Total total) {
  double none = 0, sums[1] = {0};
  const int blocks = static_cast<int>(gridDim.x);
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kThreads) {
    sums[0] += p.records[static_cast<int64_t>(total) * blocks + b];
  }
  block_reduce<kThreads>(none, sums);
  return sums[0];
}

// the factor that all tokens' weights share: 1 / (denominator * horizon)
template <typename A>
__device__ __forceinline__ A share(const Arguments<A>& p) {
  double total = p.denominator;
  if (p.given_denominator.given()) {
    total = p.given_denominator.template at<double>(0);
  } else if (total == 0) {
    if (p.options.aggregate != Aggregate::token_mean) {
      total = recorded(p, kSequences);
    } else {
      total = p.has_pieces ? recorded(p, kTokens) : static_cast<double>(p.packed.tokens);
    }
    // NaN stays NaN
    total = total < 1 ? 1 : total;
  }
  return static_cast<A>(total > 0 ? 1 / (total * p.horizon) : static_cast<double>(NAN));
}

template <typename A>
__device__ __forceinline__ void write(A* to, int t, unsigned where, const Pack<A, kFour>& pack) {
  if (where == 15u) {
    store(to + t, pack);
    return;
  }
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    if ((where >> j & 1) != 0) to[t + j] = pack.value[j];
  }
}

// writes the gradients of a run's tokens and adds the tokens to the sums
template <bool kPlain, typename A>
__device__ __forceinline__ void add_run(const Arguments<A>& p, int run, A share, A (&sums)[kRecord]) {
  const auto& o = p.options;
  for_each_piece(p.packed, run, [&](int s, int begin, int end) {
    Sequence<A> q{1, 0, 0, 0, 1};
    if (s >= 0) {
      if (p.has_sequences) q = p.statistics[s];
      if (!o.per_token) q.advantage = p.advantage.template at<A>(s);
      if (!p.has_sequences && o.aggregate == Aggregate::seq_mean_token_mean) {
        q.weight = 1 / static_cast<A>(max(p.packed.bound(s + 1) - p.packed.bound(s), 1));
      }
      q.weight *= share;
    } else {
      // tokens of no sequence make the loss NaN, since the host does not check the values
      q.weight = static_cast<A>(NAN);
      sums[kLoss] += q.weight;
    }
#pragma unroll 1
    for (int t = begin / kFour * kFour + lane() * kFour; t < end; t += kWindow) {
      const unsigned where = inside(t, begin, end);
      const unsigned valid = s < 0 ? 0u : where & p.mask.four(t, p.packed.tokens);
      const Four<A> four(p, t, !kPlain);
      Pack<A, kFour> advantage = zeros<A>(), reference = advantage, entropy = advantage, grad = advantage;
      if constexpr (!kPlain) {
        if (o.per_token) advantage = p.advantage.template four<A>(t, p.packed.tokens);
        if (o.reference) reference = p.ref_logp.template four<A>(t, p.packed.tokens);
        if (o.entropy) entropy = p.entropy.template four<A>(t, p.packed.tokens);
      }
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        grad.value[j] = s < 0 ? q.weight : static_cast<A>(0);
        if ((valid >> j & 1) != 0) {
          const A rollout_log_ratio = kPlain ? static_cast<A>(0) : four.rollout_log_ratio(p, j);
          const Token<A> token{four.logp.value[j], four.log_ratio(p, j), rollout_log_ratio,
                               advantage.value[j], reference.value[j],   entropy.value[j]};
          grad.value[j] = add_token<kPlain>(o, q, token, sums);
        }
      }
      write(p.grad, t, where, grad);
      if constexpr (!kPlain) {
        if (o.entropy) {
#pragma unroll
          for (int j = 0; j < kFour; ++j) {
            grad.value[j] = s < 0 ? q.weight : (valid >> j & 1) != 0 ? -o.entropy_coef * q.weight : static_cast<A>(0);
          }
          write(p.grad_entropy, t, where, grad);
        }
      }
    }
  });
}

// merges two parts of a total
__device__ __forceinline__ double join(int total, double a, double b) {
  if (total == kRatioMin) return b < a ? b : a;
  if (total == kRatioMax) return b > a ? b : a;
  return a + b;
}

__device__ __forceinline__ double join_lanes(int total, double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = join(total, x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// writes the loss, and the totals that `publish` has not written, into the block's record
template <typename A>
__device__ __forceinline__ void publish_sums(const Arguments<A>& p, const A (&sums)[kRecord]) {
  __shared__ double partial[kRecord][kWarps];
#pragma unroll
  for (int i = kSequences + 1; i < kRecord; ++i) {
    const double x = join_lanes(i, static_cast<double>(sums[i]));
    if (lane() == 0) partial[i][threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i <= kSequences || i >= kRecord) return;
  double x = partial[i][0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = join(i, x, partial[i][w]);
  p.records[static_cast<int64_t>(i) * gridDim.x + blockIdx.x] = x;
}

// merges the records, a warp to each total, and writes the results; for one block
template <typename A>
__device__ __forceinline__ void merge(const Arguments<A>& p) {
  __shared__ double result[kRecord];
  const int blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < kRecord; i += kWarps) {
    const double infinity = static_cast<double>(INFINITY);
    double x = i == kRatioMin ? infinity : i == kRatioMax ? -infinity : 0;
    for (int b = lane(); b < blocks; b += kWarp) x = join(i, x, p.records[static_cast<int64_t>(i) * blocks + b]);
    x = join_lanes(i, x);
    if (i == kTokens && !p.has_pieces) x = static_cast<double>(p.packed.tokens);
    if (lane() == 0) result[i] = x;
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kRecord) return;
  double x = result[i];
  if ((i == kRatioMin || i == kRatioMax) && isnan(result[kRatioSum])) x = result[kRatioSum];
  if (i == kCorrectionRaw && !p.options.rollout) x = result[kTokens];
  if (i == kCorrectionUsed && p.options.rule == Rule::none) x = result[kTokens];
  if (i < kTotals) {
    p.totals[i] = x;
  } else {
    *p.loss = static_cast<A>(isnan(result[kSequences]) ? result[kSequences] : x);
  }
}

template <typename A, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocks<A, kPlain>) policy_loss_fwd_kernel(const Arguments<A> p) {
  const int run = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  if (p.has_pieces) {
    const double tokens = run < p.packed.runs ? sum_pieces(p, run) : 0;
    publish(p, kTokens, lane() == 0 ? tokens : 0);
    grid_sync();
  }
  publish(p, kSequences, sum_sequences(p));
  if (p.has_sequences) grid_sync();
  PolicySums<A> sums;
  const A token_share = share(p);
  if (run < p.packed.runs) add_run<kPlain>(p, run, token_share, sums.sums);
  publish_sums(p, sums.sums);
  grid_sync();
  if (blockIdx.x == 0) merge(p);
}

struct Inputs {
  const Tensor& logp;
  const std::optional<Tensor>& old_logp;
  const Tensor& advantage;
  const Tensor& cu_seqlens;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& ref_logp;
  const std::optional<Tensor>& rollout_logp;
  const std::optional<Tensor>& entropy;
  const std::optional<Tensor>& denominator;
  const std::vector<int64_t>& choices;
  const std::vector<double>& numbers;
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename A>
TokenOptions<A> options_of(const char* op, const Inputs& in) {
  return {policy_options<A>(op, in.choices, in.numbers), in.old_logp.has_value(), in.ref_logp.has_value(),
          in.rollout_logp.has_value(), in.entropy.has_value()};
}

template <typename A, bool kPlain>
void launch_with(Arguments<A>& p, const Tensor& like) {
  constexpr auto kernel = policy_loss_fwd_kernel<A, kPlain>;
  const int most = resident_blocks<kernel, kBlocks<A, kPlain>>(like, kThreads);
  // no more blocks than give each warp a window, so that few wait for each other
  const int blocks = std::max(1, std::min(most, (p.packed.tokens + kWarps * kWindow - 1) / (kWarps * kWindow)));
  const int warps = blocks * kWarps;
  p.packed.run = std::max(1, (p.packed.tokens + warps * kWindow - 1) / (warps * kWindow)) * kWindow;
  p.packed.runs = (p.packed.tokens + p.packed.run - 1) / p.packed.run;
  const int64_t pieces = p.has_pieces ? kStatistics * p.packed.pieces() : 0;
  const int64_t records = static_cast<int64_t>(kRecord) * blocks;
  const int64_t statistics = p.has_sequences ? p.packed.sequences * (sizeof(Sequence<A>) / 4) : 0;
  const Tensor scratch = empty(like, {pieces + records + (statistics + 1) / 2}, ScalarType::Double);
  p.records = static_cast<double*>(scratch.data_ptr());
  p.pieces = p.records + records;
  p.statistics = reinterpret_cast<Sequence<A>*>(p.pieces + pieces);
  launch_together<kernel>(like, blocks, kThreads, p);
}

template <typename A>
Outputs run(const Inputs& in) {
  const char* op = "policy_loss_fwd";
  constexpr ScalarType kType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t tokens = in.logp.numel(), sequences = in.cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(tokens <= kMostElements && sequences <= kMostElements, op,
                  ": expected at most 2**30 tokens and sequences, got ", tokens, " and ", sequences);
  STD_TORCH_CHECK(sequences >= 0, op, ": expected cu_seqlens of shape (S + 1,), got (0,)");
  const Columns columns{op, in.logp};
  Arguments<A> p{};
  p.options = options_of<A>(op, in);
  const auto& o = p.options;
  p.logp = columns.floats("logp", in.logp, tokens);
  p.old_logp = columns.floats("old_logp", in.old_logp, tokens);
  p.advantage = columns.floats("advantage", in.advantage, o.per_token ? tokens : sequences);
  p.ref_logp = columns.floats("ref_logp", in.ref_logp, tokens);
  p.rollout_logp = columns.floats("rollout_logp", in.rollout_logp, tokens);
  p.entropy = columns.floats("entropy", in.entropy, tokens);
  p.mask = columns.flags("mask", in.mask, tokens);
  p.packed.cu_seqlens = columns.integers("cu_seqlens", in.cu_seqlens, sequences + 1);
  if (in.denominator) p.given_denominator = columns.scalar("denominator", *in.denominator);
  p.denominator = in.numbers[kDenominator];
  p.horizon = o.aggregate == Aggregate::seq_mean_token_sum_norm ? in.numbers[kHorizon] : 1;
  p.packed.tokens = static_cast<int>(tokens);
  p.packed.sequences = static_cast<int>(sequences);

  const bool counts_sequences = o.aggregate != Aggregate::token_mean && !in.denominator && p.denominator == 0;
  const bool sums_sequences = (o.ratio == Ratio::sequence && o.old) || (o.rollout && o.unit != Unit::token) ||
                              (o.through_mean() && o.rollout && o.rule != Rule::none);
  p.has_pieces = in.mask.has_value() || sums_sequences;
  p.has_sequences = sums_sequences || counts_sequences ||
                    (in.mask.has_value() && o.aggregate == Aggregate::seq_mean_token_mean);

  Tensor loss = empty(in.logp, {}, kType), grad = empty(in.logp, {tokens}, kType);
  Tensor grad_entropy = empty(in.logp, {o.entropy ? tokens : 0}, kType);
  Tensor totals = empty(in.logp, {kTotals}, ScalarType::Double);
  p.loss = static_cast<A*>(loss.data_ptr());
  p.grad = static_cast<A*>(grad.data_ptr());
  p.grad_entropy = static_cast<A*>(grad_entropy.data_ptr());
  p.totals = static_cast<double*>(totals.data_ptr());
  if (o.objective == Objective::clip && !o.per_token && !o.rollout && !o.reference && !o.entropy) {
    launch_with<A, true>(p, in.logp);
  } else {
    launch_with<A, false>(p, in.logp);
  }
  return {std::move(loss), std::move(grad), std::move(grad_entropy), std::move(totals)};
}

Outputs policy_loss_fwd(const Tensor& logp, const std::optional<Tensor>& old_logp, const Tensor& advantage,
                        const Tensor& cu_seqlens, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& ref_logp, const std::optional<Tensor>& rollout_logp,
                        const std::optional<Tensor>& entropy, const std::optional<Tensor>& denominator,
                        const std::vector<int64_t>& choices, const std::vector<double>& numbers) {
  const Inputs in{logp,         old_logp, advantage,   cu_seqlens, mask,   ref_logp,
                  rollout_logp, entropy,  denominator, choices,    numbers};
  return logp.scalar_type() == ScalarType::Double ? run<double>(in) : run<float>(in);
}

}  // namespace
}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CUDA, m) {
  m.impl("policy_loss_fwd.cuda", TORCH_BOX(&prism::policy_loss_fwd));
}
