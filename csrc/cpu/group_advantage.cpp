// group_advantage and prism_advantage on the CPU, in double, one group after the other. The specification is
// reference.py of prism_kernels/ops/group_advantage and prism_kernels/ops/prism_advantage

#include <prism/advantage.h>
#include <prism/check.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace prism {

// the samples of each group: those of group g are at the positions from begin[g] on of `order`, which is empty where
// the ids rise and the samples are in order already
struct Groups {
  std::vector<int64_t> begin;
  std::vector<int64_t> order;

  int64_t count() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t sample(int64_t i) const { return order.empty() ? i : order[i]; }
};

// fills `groups` and returns -1, or returns the index of the first id outside [0, n)
int64_t fill_groups(const int64_t* group, int64_t n, Groups& groups) {
  bool rises = true;
  int64_t previous = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t g = group[i];
    if (g < 0 || g >= n) return i;
    if (g == previous) continue;
    rises = rises && g > previous;
    if (rises) groups.begin.push_back(i);
    previous = g;
  }
  if (rises) {
    groups.begin.push_back(n);
    return -1;
  }
  // a stable counting sort
  groups.begin.assign(n + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++groups.begin[group[i] + 1];
  for (int64_t g = 0; g < n; ++g) groups.begin[g + 1] += groups.begin[g];
  groups.order.resize(n);
  std::vector<int64_t> next(groups.begin.begin(), groups.begin.end() - 1);
  for (int64_t i = 0; i < n; ++i) groups.order[next[group[i]]++] = i;
  return -1;
}

// a thread takes runs of groups with at least this many samples on average
constexpr int64_t kGrain = 1 << 13;

template <class F>
void for_groups(const Groups& groups, int64_t n, F work) {
  const int64_t count = groups.count();
  const int64_t grain = std::max<int64_t>(1, kGrain * std::max<int64_t>(1, count) / std::max<int64_t>(1, n));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { work(begin, end); });
}

struct Moments {
  double mean = 0, deviation = 0;
};

// the sum of f(0), ..., f(n - 1); four at a time, since each addition waits for the one before
template <class F>
inline double sum(int64_t n, F f) {
  double part[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t j = 0; j < 4; ++j) part[j] += f(i + j);
  }
  for (int64_t j = 0; i < n; ++i, ++j) part[j] += f(i);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// of n > 1 values; the deviation divides by n - 1
inline Moments moments(const double* x, int64_t n) {
  const double mean = sum(n, [x](int64_t i) { return x[i]; }) / static_cast<double>(n);
  const double square = sum(n, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return {mean, std::sqrt(square / static_cast<double>(n - 1))};
}

// the options of group_advantage
struct Options {
  Baseline baseline;
  Scale scale;
  double eps;
};

// replaces the rewards x of a group's n valid samples by their advantages
void advantages(double* x, int64_t n, const Options& o) {
  if (n == 0) return;
  if (n == 1) {
    if (o.baseline != Baseline::none || o.scale == Scale::deviation) x[0] = 0;
    return;
  }
  const Moments m = moments(x, n);
  const double shift = o.baseline == Baseline::none ? 0 : m.mean;
  double factor = o.scale == Scale::deviation ? 1 / (m.deviation + o.eps) : 1;
  if (o.baseline == Baseline::leave_one_out) factor *= static_cast<double>(n) / static_cast<double>(n - 1);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - shift) * factor;
}

template <class T>
int64_t group_advantage(const Tensor& reward, const Tensor& group, const std::optional<Tensor>& valid, const Options& o,
                        const Tensor& out) {
  const char* op = "group_advantage_fwd";
  const int64_t n = reward.numel();
  const ScalarType type = reward.scalar_type();
  const T* r = vector_data<T>(op, "reward", reward, n, type);
  const bool* keep = vector_data<bool>(op, "valid", valid, n, ScalarType::Bool);
  T* to = vector_data<T>(op, "out", out, n, type);
  Groups groups;
  const int64_t bad = fill_groups(vector_data<int64_t>(op, "group", group, n, ScalarType::Long), n, groups);
  if (bad >= 0) return bad;

  const bool batch = o.scale == Scale::batch;
  // for Scale::batch, in the order of the samples
  std::vector<double> values(batch ? n : 0);
  std::vector<uint8_t> alone(batch ? n : 0);
  for_groups(groups, n, [&](int64_t first, int64_t last) {
    std::vector<double> x;
    for (int64_t g = first; g < last; ++g) {
      x.clear();
      const int64_t begin = groups.begin[g], end = groups.begin[g + 1];
      if (!keep && !batch && groups.order.empty()) {
        x.assign(r + begin, r + end);
        advantages(x.data(), end - begin, o);
        std::copy(x.begin(), x.end(), to + begin);
        continue;
      }
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = groups.sample(i);
        if (!keep || keep[k]) x.push_back(static_cast<double>(r[k]));
      }
      const int64_t count = static_cast<int64_t>(x.size());
      advantages(x.data(), count, o);
      const double* from = x.data();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = groups.sample(i);
        const double value = !keep || keep[k] ? *from++ : 0;
        if (batch) {
          values[k] = value;
          alone[k] = count == 1 && o.baseline != Baseline::none;
        } else {
          to[k] = static_cast<T>(value);
        }
      }
    }
  });
  if (!batch) return -1;
  std::vector<double> taken;
  for (int64_t i = 0; i < n; ++i) {
    if (!keep || keep[i]) taken.push_back(values[i]);
  }
  const int64_t count = static_cast<int64_t>(taken.size());
  const Moments m = count > 1 ? moments(taken.data(), count) : Moments{};
  for (int64_t i = 0; i < n; ++i) {
    const bool zero = (keep && !keep[i]) || alone[i] || count <= 1;
    to[i] = static_cast<T>(zero ? 0 : (values[i] - m.mean) / (m.deviation + o.eps));
  }
  return -1;
}

// writes the index of the first bad id: the caller raises the error that every backend raises
void report(const char* op, int64_t index, const Tensor& bad) {
  check_shape(op, "bad", bad, {1});
  check_dtype(op, "bad", bad, {ScalarType::Long});
  *static_cast<int64_t*>(bad.data_ptr()) = index;
}

void group_advantage_fwd(const Tensor& reward, const Tensor& group, const std::optional<Tensor>& valid,
                         int64_t baseline, int64_t scale, double eps, const Tensor& out, const Tensor& bad) {
  check_dtype("group_advantage_fwd", "reward", reward, {ScalarType::Float, ScalarType::Double});
  const Options options{static_cast<Baseline>(baseline), static_cast<Scale>(scale), eps};
  const auto f = reward.scalar_type() == ScalarType::Double ? group_advantage<double> : group_advantage<float>;
  report("group_advantage_fwd", f(reward, group, valid, options, out), bad);
}

// the samples of one group of prism_advantage; the next group reuses the memory
struct Group {
  std::vector<double> perception, reasoning, aligned, accuracy, reward, taken;
  std::vector<uint8_t> ok;
};

// replaces x by its z-scores over the samples that `take` marks, or over all; the others become 0
void z_score(std::vector<double>& x, const std::vector<uint8_t>* take, std::vector<double>& taken, Invalid invalid,
             double eps) {
  taken.clear();
  for (size_t i = 0; i < x.size(); ++i) {
    if (!take || (*take)[i]) taken.push_back(x[i]);
  }
  const int64_t n = static_cast<int64_t>(taken.size());
  Moments m{0, 1};
  if (n > 1) m = moments(taken.data(), n);
  const bool zero = n <= 1 && invalid == Invalid::exclude;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = zero || (take && !(*take)[i]) ? 0 : (x[i] - m.mean) / (m.deviation + eps);
  }
}

// an invalid sample's score becomes the smallest valid one - 1, or -1 if none is valid
void lower_invalid(std::vector<double>& x, const std::vector<uint8_t>& ok) {
  double lowest = std::numeric_limits<double>::infinity();
  bool has_valid = false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!ok[i]) continue;
    has_valid = true;
    if (!(x[i] >= lowest)) lowest = x[i];
  }
  for (size_t i = 0; i < x.size(); ++i) {
    if (!ok[i]) x[i] = has_valid ? lowest - 1 : -1;
  }
}

// writes the group's advantages into `reward`
void combine(Group& g, const PrismSettings& s) {
  const size_t n = g.ok.size();
  const bool exclude = s.invalid == Invalid::exclude;
  const bool sum = s.normalize == Normalize::sum;
  const std::vector<uint8_t>* take = exclude ? &g.ok : nullptr;
  if (!exclude) {
    lower_invalid(g.perception, g.ok);
    lower_invalid(g.reasoning, g.ok);
  }
  g.aligned.resize(n);
  if (!sum) {
    z_score(g.perception, take, g.taken, s.invalid, s.eps);
    z_score(g.reasoning, take, g.taken, s.invalid, s.eps);
  }
  for (size_t i = 0; i < n; ++i) g.aligned[i] = s.alpha * g.perception[i] + (1 - s.alpha) * g.reasoning[i];
  if (sum) z_score(g.aligned, take, g.taken, s.invalid, s.eps);

  g.reward.assign(n, 0);
  for (size_t i = 0; i < n; ++i) {
    const bool ok = g.ok[i];
    const double penalty = ok ? 0 : s.format_penalty;
    if (s.mode == Mode::align) {
      g.reward[i] = g.aligned[i] - penalty;
      continue;
    }
    const bool wrong = ok && g.accuracy[i] <= 0;
    const double wrong_loss = wrong ? s.wrong_penalty : 0;
    const double reward = s.w_acc * g.accuracy[i] + (ok ? s.w_fmt : 0);
    // added after the rewards are z-scored
    double& gate = g.aligned[i];
    switch (s.mode) {
      case Mode::acc_gating:
        g.reward[i] = s.align_coef * gate - wrong_loss - penalty;
        continue;
      case Mode::sign_align:
        gate = ok ? s.align_coef * (wrong ? -gate : gate) : 0;
        g.reward[i] = ok ? reward - wrong_loss : -penalty;
        continue;
      default:
        gate = ok && !wrong ? s.align_coef * gate : 0;
    }
    g.reward[i] = s.mode == Mode::gated  ? gate - wrong_loss - penalty
                  : s.mode == Mode::rlvr ? reward
                                         : reward - wrong_loss - penalty;
  }
  if (s.scores_rewards()) {
    z_score(g.reward, nullptr, g.taken, s.invalid, s.eps);
    for (size_t i = 0; i < n; ++i) g.reward[i] += g.aligned[i];
  }
  if (exclude && std::none_of(g.ok.begin(), g.ok.end(), [](uint8_t ok) { return ok != 0; })) g.reward.assign(n, 0);
}

template <class T>
int64_t prism_advantage(const Tensor& perception, const Tensor& reasoning, const Tensor& group,
                        const std::optional<Tensor>& format_ok, const std::optional<Tensor>& accuracy,
                        const PrismSettings& s, const Tensor& out) {
  const char* op = "prism_advantage_fwd";
  const int64_t n = perception.numel();
  const ScalarType type = perception.scalar_type();
  const T* p = vector_data<T>(op, "perception", perception, n, type);
  const T* r = vector_data<T>(op, "reasoning", reasoning, n, type);
  const T* correct = vector_data<T>(op, "accuracy", accuracy, n, type);
  const bool* ok = vector_data<bool>(op, "format_ok", format_ok, n, ScalarType::Bool);
  T* to = vector_data<T>(op, "out", out, n, type);
  Groups groups;
  const int64_t bad = fill_groups(vector_data<int64_t>(op, "group", group, n, ScalarType::Long), n, groups);
  if (bad >= 0) return bad;
  for_groups(groups, n, [&](int64_t first, int64_t last) {
    Group g;
    for (int64_t index = first; index < last; ++index) {
      const int64_t begin = groups.begin[index], size = groups.begin[index + 1] - begin;
      if (size == 0) continue;
      for (auto* x : {&g.perception, &g.reasoning, &g.accuracy}) x->resize(size);
      g.ok.resize(size);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t k = groups.sample(begin + i);
        g.ok[i] = !ok || ok[k];
        g.perception[i] = static_cast<double>(p[k]);
        g.reasoning[i] = static_cast<double>(r[k]);
        g.accuracy[i] = correct ? static_cast<double>(correct[k]) : 0;
        // the score of an invalid sample may be NaN, and must not be used
        if (s.invalid == Invalid::exclude && !g.ok[i]) g.perception[i] = g.reasoning[i] = 0;
      }
      combine(g, s);
      for (int64_t i = 0; i < size; ++i) to[groups.sample(begin + i)] = static_cast<T>(g.reward[i]);
    }
  });
  return -1;
}

void prism_advantage_fwd(const Tensor& perception, const Tensor& reasoning, const Tensor& group,
                         const std::optional<Tensor>& format_ok, const std::optional<Tensor>& accuracy,
                         int64_t normalize, int64_t invalid, int64_t mode, const std::vector<double>& numbers,
                         const Tensor& out, const Tensor& bad) {
  const char* op = "prism_advantage_fwd";
  check_dtype(op, "perception", perception, {ScalarType::Float, ScalarType::Double});
  const PrismSettings settings = prism_settings(op, normalize, invalid, mode, numbers, accuracy.has_value());
  const auto f = perception.scalar_type() == ScalarType::Double ? prism_advantage<double> : prism_advantage<float>;
  report(op, f(perception, reasoning, group, format_ok, accuracy, settings, out), bad);
}

}  // namespace prism

STABLE_TORCH_LIBRARY_IMPL(prism_kernels, CPU, m) {
  m.impl("group_advantage_fwd.out", TORCH_BOX(&prism::group_advantage_fwd));
  m.impl("prism_advantage_fwd.out", TORCH_BOX(&prism::prism_advantage_fwd));
}
