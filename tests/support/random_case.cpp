#include "tests/support/random_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/attention/half.h"

namespace treeattn::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"f16", "bf16", "f32", "f64"};
  return kNames[static_cast<int>(dtype)];
}

const char* lowering_name(Lowering lowering) {
  constexpr const char* kNames[] = {"tree", "causal", "full", "intervals"};
  return kNames[static_cast<int>(lowering)];
}

template <class T>
const T* pointer_or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

double normal(SplitMix64& rng) {
  const double u = 1.0 - rng.uniform();
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * 3.14159265358979323846 * rng.uniform());
}

class CaseMaker {
 public:
  CaseMaker(std::uint64_t seed, const RandomCaseOptions& options)
      : rng_(seed ^ 0x74726565u), options_(options) {
    case_.seed = seed;
  }

  RandomCase make() {
    long_ = rng_.chance(options_.long_share);
    pick_types();
    pick_heads();
    pick_sequences();
    make_tensors();
    return std::move(case_);
  }

 private:
  std::int64_t pick(std::initializer_list<std::int64_t> choices) {
    return choices.begin()[rng_.below(static_cast<std::int64_t>(choices.size()))];
  }

  int pick_dim() {
    if (options_.gpu_limits) return static_cast<int>(rng_.between(2, 32)) * 8;
    return static_cast<int>(rng_.chance(0.5) ? pick({16, 64, 128}) : rng_.between(1, 160));
  }

  void pick_types() {
    const auto dtype = static_cast<DType>(rng_.below(options_.gpu_limits ? 2 : 4));
    case_.dtype = options_.dtype.value_or(dtype);
    const double draw = rng_.uniform();
    const Lowering lowering = draw < 0.7   ? Lowering::kTree
                              : draw < 0.8 ? Lowering::kCausal
                              : draw < 0.9 ? Lowering::kFull
                                           : Lowering::kIntervals;
    case_.lowering = options_.lowering.value_or(lowering);
    const int dim = pick_dim();
    const int other = pick_dim();
    const bool differs = rng_.chance(0.3);
    case_.head_dim = options_.head_dim.value_or(dim);
    case_.head_dim_v = options_.head_dim_v.value_or(differs ? other : case_.head_dim);
    const bool scale_is_odd = rng_.chance(0.25);
    case_.softmax_scale = scale_is_odd ? 0.02 + 0.2 * rng_.uniform()
                                       : 1 / std::sqrt(static_cast<double>(case_.head_dim));
    const bool capped = rng_.chance(0.25);
    const auto cap = static_cast<double>(pick({2, 15, 50}));
    case_.softcap = options_.softcap.value_or(capped) ? cap : 0;
    // Scores far beyond the cap are where an approximate tanh shows.
    const bool beyond = rng_.chance(0.5);
    q_size_ = case_.softcap > 0 && beyond ? 3 * case_.softcap : 1;
  }

  void pick_heads() {
    struct Ratio {
      int heads;
      int heads_kv;
    };
    constexpr Ratio kRatios[] = {{1, 1}, {2, 2}, {2, 1}, {3, 1}, {4, 2},
                                 {4, 1}, {6, 2}, {8, 2}, {8, 1}};
    const int most = std::min(options_.most_heads, long_ ? 4 : 8);
    Ratio ratio = kRatios[rng_.below(std::size(kRatios))];
    while (ratio.heads > most) ratio = kRatios[rng_.below(std::size(kRatios))];
    case_.heads = ratio.heads;
    case_.heads_kv = ratio.heads_kv;
  }

  void pick_sequences() {
    const auto batch = static_cast<int>(rng_.between(1, long_ ? 3 : 6));
    std::int64_t left = long_ ? rng_.between(2001, options_.most_long_tokens)
                              : rng_.between(0, options_.most_short_tokens);
    const auto shape = rng_.below(4);  // 0, 1: q as long as k; 2: per sequence; 3: all differ
    for (int b = 0; b < batch; ++b) {
      const std::int64_t tokens = b + 1 == batch ? left : rng_.between(0, left);
      const bool empty = batch > 1 && !long_ && rng_.chance(0.1);
      left -= empty ? 0 : tokens;
      const bool differs = shape == 3 || (shape == 2 && rng_.chance(0.5));
      add_sequence(empty ? 0 : static_cast<int>(tokens), differs);
    }
    // Totals are capacities in a third of the cases.
    const bool spare = rng_.chance(0.33);
    case_.total_q = case_.cu_q.back() + static_cast<int>(spare ? rng_.between(0, 300) : 0);
    case_.total_k = case_.cu_k.back() + static_cast<int>(spare ? rng_.between(0, 300) : 0);
    // What lies past the last sequence must not matter.
    case_.start.resize(case_.total_q, -7);
    case_.end.resize(case_.total_k, 1 << 30);
    case_.first.resize(case_.total_k, -5);
    case_.len.resize(case_.total_k, 1 << 30);
  }

  /// The shorter of q and k is the tail of the longer in DFS order.
  void add_sequence(int tokens, bool differs) {
    int len_q = tokens;
    int len_k = tokens;
    if (differs) {
      int& shorter = rng_.chance(0.6) ? len_q : len_k;
      shorter = rng_.chance(0.15) ? 0 : static_cast<int>(rng_.between(0, tokens));
    }
    std::vector<int> start;
    std::vector<int> end;
    random_forest(rng_, tokens, start, end);
    case_.start.insert(case_.start.end(), start.end() - len_q, start.end());
    case_.end.insert(case_.end.end(), end.end() - len_k, end.end());
    const int row0 = case_.cu_q.back();
    for (int j = 0; j < len_k; ++j) {
      const int begin = len_q == 0 ? 0 : static_cast<int>(rng_.below(len_q));
      const int most = rng_.chance(0.5) ? std::min(len_q - begin, 40) : len_q - begin;
      const bool padding = len_q == 0 || rng_.chance(0.05);
      case_.first.push_back(row0 + begin);
      case_.len.push_back(padding ? 0 : static_cast<int>(rng_.between(1, most)));
    }
    case_.cu_q.push_back(row0 + len_q);
    case_.cu_k.push_back(case_.cu_k.back() + len_k);
  }

  HostTensor tensor(std::int64_t tokens, int heads, int dim) {
    const std::int64_t step = options_.gpu_limits ? 8 : 1;
    std::int64_t head_stride = dim;
    std::int64_t token_stride = static_cast<std::int64_t>(heads) * dim;
    switch (rng_.below(4)) {
      case 0:
        break;
      case 1:  // head-major
        token_stride = dim;
        head_stride = std::max<std::int64_t>(1, tokens) * dim;
        break;
      case 2:  // padded both ways
        head_stride = dim + step * rng_.between(0, 3);
        token_stride = heads * head_stride + step * rng_.between(0, 5);
        break;
      default:  // as a slice of a packed qkv
        token_stride = 3 * token_stride + step;
        break;
    }
    // Ignored where the dimension has size 1, so nothing may depend on it.
    if (heads == 1 && rng_.chance(0.5)) head_stride = 13;
    if (tokens == 1 && rng_.chance(0.5)) token_stride = 5;
    return {case_.dtype, tokens, heads, dim, token_stride, head_stride};
  }

  void fill(HostTensor& to, std::int64_t tokens, double size) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int h = 0; h < to.heads(); ++h) {
        for (int d = 0; d < to.dim(); ++d) to.set(t, h, d, size * normal(rng_));
      }
    }
  }

  void make_tensors() {
    case_.q = tensor(case_.total_q, case_.heads, case_.head_dim);
    case_.k = tensor(case_.total_k, case_.heads_kv, case_.head_dim);
    case_.v = tensor(case_.total_k, case_.heads_kv, case_.head_dim_v);
    case_.out = tensor(case_.total_q, case_.heads, case_.head_dim_v);
    if (!options_.numbers) return;
    fill(case_.q, case_.cu_q.back(), q_size_);
    fill(case_.k, case_.cu_k.back(), 1);
    fill(case_.v, case_.cu_k.back(), 1);
  }

  SplitMix64 rng_;
  const RandomCaseOptions& options_;
  RandomCase case_;
  bool long_ = false;
  double q_size_ = 1;
};

}  // namespace

HostTensor::HostTensor(DType dtype, std::int64_t tokens, int heads, int dim,
                       std::int64_t token_stride, std::int64_t head_stride)
    : dtype_(dtype),
      tokens_(tokens),
      heads_(heads),
      dim_(dim),
      token_stride_(token_stride),
      head_stride_(head_stride) {
  if (tokens == 0) return;
  bytes_.resize((index(tokens - 1, heads - 1, dim - 1) + 1) * dtype_bytes(dtype));
  fill(kNaN);
}

HostTensor::HostTensor(DType dtype, std::int64_t tokens, int heads, int dim)
    : HostTensor(dtype, tokens, heads, dim, static_cast<std::int64_t>(heads) * dim, dim) {}

double HostTensor::load(std::size_t at) const {
  const std::byte* from = bytes_.data() + at * dtype_bytes(dtype_);
  if (dtype_ == DType::kF64) {
    double value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  if (dtype_ == DType::kF32) {
    float value = 0;
    std::memcpy(&value, from, sizeof value);
    return static_cast<double>(value);
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  return static_cast<double>(dtype_ == DType::kF16 ? f16_to_float(bits) : bf16_to_float(bits));
}

void HostTensor::store(std::size_t at, double value) {
  std::byte* to = bytes_.data() + at * dtype_bytes(dtype_);
  const auto narrow = static_cast<float>(value);
  if (dtype_ == DType::kF64) {
    std::memcpy(to, &value, sizeof value);
  } else if (dtype_ == DType::kF32) {
    std::memcpy(to, &narrow, sizeof narrow);
  } else {
    const std::uint16_t bits = dtype_ == DType::kF16 ? float_to_f16(narrow) : float_to_bf16(narrow);
    std::memcpy(to, &bits, sizeof bits);
  }
}

double HostTensor::get(std::int64_t token, int head, int d) const {
  return load(index(token, head, d));
}

void HostTensor::set(std::int64_t token, int head, int d, double value) {
  store(index(token, head, d), value);
}

void HostTensor::fill(double value) {
  const std::size_t count = bytes_.size() / dtype_bytes(dtype_);
  for (std::size_t at = 0; at < count; ++at) store(at, value);
}

std::vector<double> HostTensor::to_doubles() const {
  std::vector<double> values;
  values.reserve(static_cast<std::size_t>(tokens_ * heads_ * dim_));
  for (std::int64_t t = 0; t < tokens_; ++t) {
    for (int h = 0; h < heads_; ++h) {
      for (int d = 0; d < dim_; ++d) values.push_back(get(t, h, d));
    }
  }
  return values;
}

OracleCase RandomCase::oracle() const {
  OracleCase problem;
  problem.rule = lowering;
  problem.heads = heads;
  problem.heads_kv = heads_kv;
  problem.head_dim = head_dim;
  problem.head_dim_v = head_dim_v;
  problem.softmax_scale = softmax_scale;
  problem.softcap = softcap;
  problem.total_q = total_q;
  problem.total_k = total_k;
  problem.cu_q = cu_q;
  problem.cu_k = cu_k;
  problem.start = start;
  problem.end = end;
  problem.first = first;
  problem.len = len;
  problem.q = q.to_doubles();
  problem.k = k.to_doubles();
  problem.v = v.to_doubles();
  return problem;
}

PlanInputs RandomCase::plan_inputs() const {
  PlanInputs inputs;
  inputs.lowering = lowering;
  inputs.cu_seqlens_q = cu_q.data();
  inputs.cu_seqlens_k = cu_k.data();
  inputs.tree_dfs_order_start_q = pointer_or_null(start);
  inputs.tree_dfs_order_end_k = pointer_or_null(end);
  inputs.first = pointer_or_null(first);
  inputs.len = pointer_or_null(len);
  return inputs;
}

PlanShape RandomCase::plan_shape(std::span<const PlanView> views) const {
  PlanShape shape{};
  shape.total_q = total_q;
  shape.total_k = total_k;
  shape.batch = batch();
  shape.num_views = static_cast<int>(views.size());
  std::copy(views.begin(), views.end(), shape.views);
  return shape;
}

ForwardArgs RandomCase::forward_args() {
  ForwardArgs args;
  args.dtype = dtype;
  args.heads = heads;
  args.heads_kv = heads_kv;
  args.head_dim = head_dim;
  args.head_dim_v = head_dim_v;
  args.q = q.const_view();
  args.k = k.const_view();
  args.v = v.const_view();
  args.out = out.view();
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  return args;
}

std::string RandomCase::describe() const {
  std::string lengths;
  for (int b = 0; b < batch(); ++b) {
    lengths += fmt::format(" {}/{}", cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]);
  }
  return fmt::format(
      "seed {} {} {} heads {}/{} dims {}/{} scale {:.4f} softcap {} totals {}/{} lengths q/k:{} "
      "strides q {}x{} k {}x{} v {}x{} out {}x{}",
      seed, dtype_name(dtype), lowering_name(lowering), heads, heads_kv, head_dim, head_dim_v,
      softmax_scale, softcap, total_q, total_k, lengths, q.token_stride(), q.head_stride(),
      k.token_stride(), k.head_stride(), v.token_stride(), v.head_stride(), out.token_stride(),
      out.head_stride());
}

RandomCase random_case(std::uint64_t seed, const RandomCaseOptions& options) {
  return CaseMaker(seed, options).make();
}

void apply_count_probe(RandomCase& problem) {
  for (std::int64_t t = 0; t < problem.cu_q.back(); ++t) {
    for (int h = 0; h < problem.heads; ++h) {
      for (int d = 0; d < problem.head_dim; ++d) problem.q.set(t, h, d, 0);
    }
  }
}

void apply_bits_probe(RandomCase& problem) {
  apply_count_probe(problem);
  for (std::int64_t t = 0; t < problem.cu_k.back(); ++t) {
    for (int h = 0; h < problem.heads_kv; ++h) {
      for (int d = 0; d < problem.head_dim_v; ++d) {
        problem.v.set(t, h, d, static_cast<double>((t >> (d % 32)) & 1));
      }
    }
  }
}

void random_forest(SplitMix64& rng, int tokens, std::vector<int>& start, std::vector<int>& end) {
  enum Form { kChain, kStar, kOneToken, kDeep, kBushy, kForest, kForms };
  const auto form = static_cast<Form>(rng.below(kForms));
  const bool some_empty = rng.chance(0.2);
  const std::int64_t count = form == kOneToken ? tokens
                             : tokens == 0
                                 ? 0
                                 : rng.between(1, std::min(tokens, rng.chance(0.5) ? 8 : 200));
  std::vector<TreeNode> nodes;
  std::int64_t left = tokens;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t share = 2 * left / (count - i);
    std::int64_t length =
        rng.between(std::min<std::int64_t>(1, left), std::max<std::int64_t>(1, share));
    length = std::min(length, left);
    if (form == kOneToken) length = 1;
    if (some_empty && rng.chance(0.2)) length = 0;
    if (i + 1 == count) length = left;
    left -= length;
    std::int64_t parent = i == 0 ? -1 : rng.below(i);
    if (form == kChain) parent = i - 1;
    if (form == kStar) parent = i == 0 ? -1 : 0;
    if (form == kDeep && i > 0) parent = std::max<std::int64_t>(0, i - 1 - rng.below(3));
    if (form == kForest && rng.chance(0.3)) parent = -1;
    nodes.push_back({parent, length});
  }
  start.clear();
  end.clear();
  Tree::from_nodes(nodes).append_arrays(start, end);
}

}  // namespace treeattn::testing
