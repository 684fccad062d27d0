// group_advantage and prism_advantage on CUDA, in double, in one launch that the host does not wait for. The
// specification is reference.py of prism_kernels/ops/group_advantage and prism_kernels/ops/prism_advantage
//
// N samples. All blocks run at once and wait for each other between the passes. They check first whether the ids rise;
// if not, they sort the samples by id (a stable radix sort). Then a warp takes each group, or a block a large one, and
// every sum has a fixed order, so that the bits are the same from run to run.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include <prism/advantage.h>
#include <prism/column.cuh>
#include <prism/grid.cuh>
#include <prism/outputs.h>
#include <prism/sort.cuh>
#include <prism/warp.cuh>

namespace prism {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 2;
// a block takes a group of at least this many samples
constexpr int kLarge = 1024;

// the threads that share a group; sums and maxima over them are the same in each
struct Warp {
  static constexpr int kSize = kWarp;
  __device__ static int thread() { return lane(); }
  template <int N>
  __device__ static void sum(double (&x)[N]) {
    warp_sum(x);
  }
  __device__ static double largest(double x) { return warp_max(x); }
};

struct Block {
  static constexpr int kSize = kThreads;
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  template <int N>
  __device__ static void sum(double (&x)[N]) {
    double none = 0;
    block_reduce<kThreads>(none, x);
  }
  __device__ static double largest(double x) {
    double none[1] = {0};
    block_reduce<kThreads>(x, none);
    return x;
  }
};

// the samples of one group, at the positions [begin, end) of the order; a null order is the samples' own
struct Members {
  const unsigned* order;
  int begin, end;

  __device__ int size() const { return end - begin; }
  __device__ int sample(int position) const { return order == nullptr ? position : static_cast<int>(order[position]); }

  // calls body(sample) for this thread's share
  template <class Team, typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll 1
    for (int i = begin + Team::thread(); i < end; i += Team::kSize) body(sample(i));
  }
};

struct Moments {
  double count, mean, deviation;
};

// of the values x(sample) over the samples for which take(sample) is true
template <class Team, typename Take, typename Value>
__device__ __forceinline__ Moments moments(const Members& group, const Take& take, const Value& x) {
  double sums[2] = {0, 0};
  group.each<Team>([&](int i) {
    if (!take(i)) return;
    sums[0] += 1;
    sums[1] += x(i);
  });
  Team::sum(sums);
  const double count = sums[0], mean = count > 0 ? sums[1] / count : 0;
  double square[1] = {0};
  group.each<Team>([&](int i) {
    if (!take(i)) return;
    const double deviation = x(i) - mean;
    square[0] += deviation * deviation;
  });
  Team::sum(square);
  return {count, mean, count > 1 ? sqrt(square[0] / (count - 1)) : 0};
}

template <typename Options>
struct Arguments {
  Options options;
  Integers group;
  int samples;
  // samples to a block
  int run;
  Sort sort;
  // [blocks] whether an id falls in the block's share
  int* falls;
  // [blocks][most] begin and end of the large groups that begin in each block's run
  int2* large;
  int most;
};

// the result, one number for each sample
struct Output {
  void* out;
  bool out_double;

  __device__ void write(int i, double x) const {
    if (out_double) {
      static_cast<double*>(out)[i] = x;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(x);
    }
  }
};

struct GroupOptions : Output {
  Column reward;
  Flags valid;
  Baseline baseline;
  Scale scale;
  double eps;
  // for Scale::batch: [N] the value and the kind of each sample; [3][blocks] the blocks' sums
  double* values;
  int* kinds;
  double* records;

  template <class Team>
  __device__ __forceinline__ void group(const Members& members) const {
    const auto take = [&](int i) { return valid.at(i); };
    const auto x = [&](int i) { return reward.at<double>(i); };
    const Moments m = moments<Team>(members, take, x);
    const double shift = baseline == Baseline::none ? 0 : m.mean;
    double factor = scale == Scale::deviation ? 1 / (m.deviation + eps) : 1;
    if (baseline == Baseline::leave_one_out) factor *= m.count / (m.count - 1);
    const bool alone = m.count == 1 && (baseline != Baseline::none || scale == Scale::deviation);
    members.each<Team>([&](int i) {
      const bool is_valid = take(i);
      const double value = is_valid && !alone ? (x(i) - shift) * factor : 0;
      if (scale != Scale::batch) {
        write(i, value);
      } else {
        values[i] = value;
        kinds[i] = is_valid ? alone ? kAlone : kValid : kInvalid;
      }
    });
  }

  __device__ void bad(int i) const {
    if (scale != Scale::batch) {
      write(i, static_cast<double>(NAN));
    } else {
      kinds[i] = kBad;
    }
  }

  // kAlone: the one valid sample of its group; kBad: its id is out of range
  enum Kind { kInvalid, kValid, kAlone, kBad };

  // the sum of body(sample) over the valid samples of the batch, the same in each thread
  template <typename Body>
  __device__ __forceinline__ double batch_sum(int samples, double* record, const Body& body) const {
    const int blocks = static_cast<int>(gridDim.x);
    double sums[1] = {0};
    for (int i = static_cast<int>(blockIdx.x) * kThreads + Block::thread(); i < samples; i += blocks * kThreads) {
      if (kinds[i] == kValid || kinds[i] == kAlone) sums[0] += body(i);
    }
    Block::sum(sums);
    if (threadIdx.x == 0) record[blockIdx.x] = sums[0];
    grid_sync();
    sums[0] = 0;
    for (int b = Block::thread(); b < blocks; b += kThreads) sums[0] += record[b];
    Block::sum(sums);
    return sums[0];
  }

  __device__ __forceinline__ void finish(int samples) const {
    if (scale != Scale::batch) return;
    grid_sync();
    const int blocks = static_cast<int>(gridDim.x);
    const double count = batch_sum(samples, records, [](int) { return 1.0; });
    const double sum = batch_sum(samples, records + blocks, [&](int i) { return values[i]; });
    const double mean = count > 0 ? sum / count : 0;
    const double square = batch_sum(samples, records + 2 * blocks, [&](int i) {
      const double deviation = values[i] - mean;
      return deviation * deviation;
    });
    const double deviation = count > 1 ? sqrt(square / (count - 1)) : 0;
    for (int i = static_cast<int>(blockIdx.x) * kThreads + Block::thread(); i < samples; i += blocks * kThreads) {
      const int kind = kinds[i];
      const double value = kind == kValid && count > 1 ? (values[i] - mean) / (deviation + eps) : 0;
      write(i, kind == kBad ? static_cast<double>(NAN) : value);
    }
  }
};

struct PrismOptions : Output, PrismSettings {
  Column perception, reasoning, accuracy;
  Flags format_ok;

  // the z-score of one value of a group with these moments
  __device__ double z(double x, const Moments& m) const {
    if (m.count > 1) return (x - m.mean) / (m.deviation + eps);
    return invalid == Invalid::exclude ? 0 : x / (1 + eps);
  }

  template <class Team>
  __device__ __forceinline__ void group(const Members& members) const {
    const bool exclude = invalid == Invalid::exclude;
    const auto ok = [&](int i) { return format_ok.at(i); };
    const auto all = [](int) { return true; };
    const auto take = [&](int i) { return !exclude || ok(i); };
    double lowest[2] = {static_cast<double>(INFINITY), static_cast<double>(INFINITY)};
    double valid[1] = {0};
    members.each<Team>([&](int i) {
      if (!ok(i)) return;
      valid[0] += 1;
      if (exclude) return;
      lowest[0] = -max_nan(-lowest[0], -perception.at<double>(i));
      lowest[1] = -max_nan(-lowest[1], -reasoning.at<double>(i));
    });
    Team::sum(valid);
    const bool has_valid = valid[0] > 0;
    if (!exclude) {
#pragma unroll
      for (int k = 0; k < 2; ++k) lowest[k] = has_valid ? -Team::largest(-lowest[k]) - 1 : -1;
    }
    // the score of an invalid sample may be NaN, and must not be used
    const auto p = [&](int i) { return ok(i) ? perception.at<double>(i) : exclude ? 0 : lowest[0]; };
    const auto r = [&](int i) { return ok(i) ? reasoning.at<double>(i) : exclude ? 0 : lowest[1]; };
    const auto mixture = [&](int i) { return alpha * p(i) + (1 - alpha) * r(i); };
    const bool sum = normalize == Normalize::sum;
    // of the mixture, or of perception and reasoning
    Moments first, second{0, 0, 0};
    if (sum) {
      first = moments<Team>(members, take, mixture);
    } else {
      first = moments<Team>(members, take, p);
      second = moments<Team>(members, take, r);
    }
    const auto aligned = [&](int i) {
      if (!take(i)) return 0.0;
      return sum ? z(mixture(i), first) : alpha * z(p(i), first) + (1 - alpha) * z(r(i), second);
    };
    const auto wrong = [&](int i) { return mode != Mode::align && ok(i) && accuracy.at<double>(i) <= 0; };
    // for scores_rewards()
    const auto reward = [&](int i) {
      const bool well_formed = ok(i);
      const double gain = w_acc * accuracy.at<double>(i) + (well_formed ? w_fmt : 0);
      const double wrong_loss = wrong(i) ? wrong_penalty : 0, format_loss = well_formed ? 0 : format_penalty;
      if (mode == Mode::rlvr) return gain;
      if (mode == Mode::rlvr_v2) return gain - wrong_loss - format_loss;
      return well_formed ? gain - wrong_loss : -format_loss;
    };
    const bool scored = scores_rewards();
    Moments m{0, 0, 0};
    if (scored) m = moments<Team>(members, all, reward);
    members.each<Team>([&](int i) {
      const bool well_formed = ok(i), is_wrong = wrong(i);
      const double a = aligned(i);
      const double loss = (is_wrong ? wrong_penalty : 0) + (well_formed ? 0 : format_penalty);
      const double gate = well_formed && !is_wrong ? align_coef * a : 0;
      double result = a - loss;
      if (mode == Mode::acc_gating) result = align_coef * a - loss;
      if (mode == Mode::gated) result = gate - loss;
      if (scored) result = z(reward(i), m) + (mode != Mode::sign_align || !is_wrong ? gate : -align_coef * a);
      write(i, exclude && !has_valid ? 0 : result);
    });
  }

  __device__ void bad(int i) const { write(i, static_cast<double>(NAN)); }
  __device__ void finish(int) const {}
};

// a sample's id as a sort key; an id out of range becomes N
template <typename Options>
__device__ __forceinline__ unsigned key_of(const Arguments<Options>& p, int i) {
  const int64_t id = p.group.at(i);
  return static_cast<unsigned>(id >= 0 && id < p.samples ? id : p.samples);
}

// computes the groups that begin in the block's run of positions: a warp takes each, then the block each large one
template <typename Options, typename Key>
__device__ __forceinline__ void for_groups(const Arguments<Options>& p, const unsigned* order, const Key& key) {
  __shared__ int large_groups;
  const int from = static_cast<int>(blockIdx.x) * p.run, stop = min(from + p.run, p.samples);
  if (threadIdx.x == 0) large_groups = 0;
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // positions of a warp, a multiple of kWarp
  const int share = (p.run + kWarps - 1) / kWarps;
  const int last = min(from + (warp + 1) * share, stop);
#pragma unroll 1
  for (int window = from + warp * share; window < last; window += kWarp) {
    const int position = window + lane();
    const bool inside = position < last;
    unsigned starts = __ballot_sync(kAllLanes, inside && (position == 0 || key(position) != key(position - 1)));
#pragma unroll 1
    for (; starts != 0; starts &= starts - 1) {
      const int begin = window + __ffs(static_cast<int>(starts)) - 1;
      const unsigned id = key(begin);
      int end = begin + 1;
      for (;;) {
        const int next = end + lane();
        const unsigned others = __ballot_sync(kAllLanes, next >= p.samples || key(next) != id);
        end += others == 0 ? kWarp : __ffs(static_cast<int>(others)) - 1;
        if (others != 0) break;
      }
      const Members members{order, begin, end};
      if (id == static_cast<unsigned>(p.samples)) {
        members.each<Warp>([&](int i) { p.options.bad(i); });
      } else if (members.size() < kLarge) {
        p.options.template group<Warp>(members);
      } else if (lane() == 0) {
        p.large[static_cast<int64_t>(blockIdx.x) * p.most + atomicAdd(&large_groups, 1)] = make_int2(begin, end);
      }
    }
  }
  __syncthreads();
  for (int i = 0; i < large_groups; ++i) {
    const int2 bounds = p.large[static_cast<int64_t>(blockIdx.x) * p.most + i];
    p.options.template group<Block>(Members{order, bounds.x, bounds.y});
  }
}

// whether the ids rise, the same in each thread of the grid
template <typename Options>
__device__ __forceinline__ bool rises(const Arguments<Options>& p) {
  const int blocks = static_cast<int>(gridDim.x);
  double falls[1] = {0};
  for (int i = static_cast<int>(blockIdx.x) * kThreads + Block::thread(); i + 1 < p.samples; i += blocks * kThreads) {
    if (key_of(p, i) > key_of(p, i + 1)) falls[0] = 1;
  }
  Block::sum(falls);
  if (threadIdx.x == 0) p.falls[blockIdx.x] = falls[0] > 0 ? 1 : 0;
  grid_sync();
  falls[0] = 0;
  for (int b = Block::thread(); b < blocks; b += kThreads) falls[0] += p.falls[b];
  Block::sum(falls);
  return falls[0] == 0;
}

template <typename Options>
__device__ __forceinline__ void advantages(const Arguments<Options>& p) {
  if (rises(p)) {
    for_groups(p, nullptr, [&](int i) { return key_of(p, i); });
  } else {
    const Sorted sorted = p.sort.template run<kWarps>([&](int i) { return key_of(p, i); });
    for_groups(p, sorted.order, [&](int i) { return sorted.keys[i]; });
  }
  p.options.finish(p.samples);
}

__global__ void __launch_bounds__(kThreads, kBlocks) group_advantage_fwd_kernel(const Arguments<GroupOptions> p) {
  advantages(p);
}

__global__ void __launch_bounds__(kThreads, kBlocks) prism_advantage_fwd_kernel(const Arguments<PrismOptions> p) {
  advantages(p);
}

// the memory of one call. every array is taken twice: once to add up the sizes, then, allocated, to get its address
class Scratch {
 public:
  template <typename T>
  void take(T*& pointer, int64_t count) {
    used_ = (used_ + alignof(T) - 1) / alignof(T) * alignof(T);
    pointer = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += count * sizeof(T);
  }
  void allocate(const Tensor& like) {
    memory_.emplace(empty(like, {used_}, ScalarType::Byte));
    base_ = static_cast<char*>(memory_->data_ptr());
    used_ = 0;
  }

 private:
  std::optional<Tensor> memory_;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

template <auto kKernel, typename Options, typename Extra>
void launch_for(const Tensor& like, const Columns& columns, const Tensor& group, Options& options, const Extra& extra) {
  const int64_t n = like.numel();
  STD_TORCH_CHECK(n <= kMostElements, columns.op, ": expected at most 2**30 samples, got ", n);
  if (n == 0) return;
  Arguments<Options> p{};
  p.group = columns.integers("group", group, n);
  p.samples = static_cast<int>(n);
  const int most = resident_blocks<kKernel, kBlocks>(like, kThreads);
  const int blocks = std::max(1, std::min(most, (p.samples + kThreads - 1) / kThreads));
  p.run = ((p.samples + blocks - 1) / blocks + kThreads - 1) / kThreads * kThreads;
  p.most = p.run / kLarge + 1;
  Scratch scratch;
  const auto take = [&] {
    p.sort.take(scratch, p.samples, blocks * kWarps);
    scratch.take(p.falls, blocks);
    scratch.take(p.large, static_cast<int64_t>(blocks) * p.most);
    extra(scratch, options, blocks);
  };
  take();
  scratch.allocate(like);
  take();
  p.options = options;
  launch_together<kKernel>(like, blocks, kThreads, p);
}

template <typename Options>
Tensor output(const Tensor& like, Options& options) {
  options.out_double = like.scalar_type() == ScalarType::Double;
  Tensor out = empty(like, {like.numel()}, options.out_double ? ScalarType::Double : ScalarType::Float);
  options.out = out.data_ptr();
  return out;
}

Tensor group_advantage_fwd(const Tensor& reward, const Tensor& group, const std::optional<Tensor>& valid,
                           int64_t baseline, int64_t scale, double eps) {
  const Columns columns{"group_advantage_fwd", reward};
  const int64_t n = reward.numel();
  GroupOptions options{};
  options.reward = columns.floats("reward", reward, n);
  options.valid = columns.flags("valid", valid, n);
  options.baseline = static_cast<Baseline>(baseline);
  options.scale = static_cast<Scale>(scale);
  options.eps = eps;
  Tensor out = output(reward, options);
  const auto extra = [&](Scratch& scratch, GroupOptions& o, int blocks) {
    const bool batch = o.scale == Scale::batch;
    scratch.take(o.records, batch ? 3 * blocks : 0);
    scratch.take(o.values, batch ? n : 0);
    scratch.take(o.kinds, batch ? n : 0);
  };
  launch_for<group_advantage_fwd_kernel>(reward, columns, group, options, extra);
  return out;
}

Tensor prism_advantage_fwd(const Tensor& perception, const Tensor& reasoning, const Tensor& group,
                           const std::optional<Tensor>& format_ok, const std::optional<Tensor>& accuracy,
                           int64_t normalize, int64_t invalid, int64_t mode, const std::vector<double>& numbers) {
  const char* op = "prism_advantage_fwd";
  const Columns columns{op, perception};
  const int64_t n = perception.numel();
  PrismOptions options{};
  static_cast<PrismSettings&>(options) = prism_settings(op, normalize, invalid, mode, numbers, accuracy.has_value());
  options.perception = columns.floats("perception", perception, n);
  options.reasoning = columns.floats("reasoning", reasoning, n);
  options.accuracy = columns.floats("accuracy", accuracy, n);
  options.format_ok = columns.flags("format_ok", format_ok, n);
  Tensor out = output(perception, options);
  launch_for<prism_advantage_fwd_kernel>(perception, columns, group, options, [](Scratch&, PrismOptions&, int) {});
  return out;
}

}  // namespace
}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CUDA, m) {
  m.impl("group_advantage_fwd.cuda", TORCH_BOX(&prism::group_advantage_fwd));
  m.impl("prism_advantage_fwd.cuda", TORCH_BOX(&prism::prism_advantage_fwd));
}
