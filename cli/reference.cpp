#include "cli/reference.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "runtime/attention/arguments.h"
#include "runtime/attention/half.h"

namespace treeattn::cli {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_half(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16;
}

double rounded(DType dtype, double value) {
  const auto narrow = static_cast<float>(value);
  return static_cast<double>(dtype == DType::kF16 ? f16_to_float(float_to_f16(narrow))
                                                  : bf16_to_float(float_to_bf16(narrow)));
}

std::vector<double> to_doubles(DType dtype, const std::vector<std::byte>& array) {
  std::vector<double> values(array.size() / static_cast<std::size_t>(element_bytes(dtype)));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = element(dtype, array, i);
  return values;
}

/// Calls body(0) to body(count - 1) from one thread per core.
template <class Body>
void for_each_parallel(std::size_t count, const Body& body) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) body(i);
  };
  const std::size_t cores = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::jthread> threads;
  for (std::size_t t = 1; t < std::min(cores, count); ++t) threads.emplace_back(work);
  work();
}

int sequence_of(const AttentionCase& problem, std::int64_t row) {
  const auto after = std::upper_bound(problem.cu_q.begin(), problem.cu_q.end(), row);
  return static_cast<int>(after - problem.cu_q.begin()) - 1;
}

std::vector<std::int64_t> choose_rows(const AttentionCase& problem, std::int64_t most_rows) {
  const std::int64_t total = problem.total_q();
  std::vector<std::int64_t> rows;
  if (total <= most_rows) {
    for (std::int64_t i = 0; i < total; ++i) rows.push_back(i);
    return rows;
  }
  // Where masks change; of very many nodes, the first ones.
  for (std::int64_t i = 0; i < total && std::ssize(rows) < most_rows / 2; ++i) {
    const bool first = i == 0 || problem.start[i] != problem.start[i - 1];
    const bool last = i + 1 == total || problem.start[i] != problem.start[i + 1];
    if (first || last) rows.push_back(i);
  }
  const std::int64_t spread = most_rows - std::ssize(rows);
  for (std::int64_t n = 0; n < spread; ++n) rows.push_back(n * (total - 1) / (spread - 1));
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

/// One row at a time, all its heads.
class RowReference {
 public:
  RowReference(const AttentionCase& problem, Reference& result)
      : problem_(problem),
        shape_(problem.shape),
        q_(to_doubles(shape_.dtype, problem.q)),
        k_(to_doubles(shape_.dtype, problem.k)),
        v_(to_doubles(shape_.dtype, problem.v)),
        result_(result) {}

  void run(std::size_t n) const {
    const std::int64_t row = result_.rows[n];
    const int b = sequence_of(problem_, row);
    std::vector<std::int64_t> keys;
    for (std::int64_t key = problem_.cu_k[b]; key < problem_.cu_k[b + 1]; ++key) {
      if (sees(problem_, b, row, key)) keys.push_back(key);
    }
    for (int head = 0; head < shape_.heads; ++head) run_head(n, head, keys);
  }

 private:
  void run_head(std::size_t n, int head, const std::vector<std::int64_t>& keys) const {
    const std::int64_t vector = static_cast<std::int64_t>(n) * shape_.heads + head;
    std::vector<double> weights(keys.size());
    double highest = -kInfinity;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      weights[i] = score(result_.rows[n], head, keys[i]);
      highest = std::max(highest, weights[i]);
    }
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - highest);
    result_.lse[vector] = keys.empty() ? -kInfinity : highest + std::log(sum);
    if (keys.empty()) return;
    double* out = &result_.out[vector * shape_.dims.head_dim_v];
    add_values(head, keys, weights, sum, out);
    if (!is_half(shape_.dtype)) return;
    for (double& weight : weights) weight = rounded(shape_.dtype, weight);
    double* rounded_out = &result_.rounded_out[vector * shape_.dims.head_dim_v];
    add_values(head, keys, weights, sum, rounded_out);
    for (int d = 0; d < shape_.dims.head_dim_v; ++d) {
      rounded_out[d] = rounded(shape_.dtype, rounded_out[d]);
    }
  }

  double score(std::int64_t row, int head, std::int64_t key) const {
    const int dim = shape_.dims.head_dim;
    const double* q = &q_[(row * shape_.heads + head) * dim];
    const double* k = &k_[(key * shape_.heads_kv + kv_head(head)) * dim];
    double dot = 0;
    for (int d = 0; d < dim; ++d) dot += q[d] * k[d];
    const double scaled = dot * problem_.softmax_scale;
    return shape_.softcap > 0 ? shape_.softcap * std::tanh(scaled / shape_.softcap) : scaled;
  }

  void add_values(int head, const std::vector<std::int64_t>& keys,
                  const std::vector<double>& weights, double sum, double* out) const {
    const int dim = shape_.dims.head_dim_v;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double* v = &v_[(keys[i] * shape_.heads_kv + kv_head(head)) * dim];
      for (int d = 0; d < dim; ++d) out[d] += weights[i] / sum * v[d];
    }
  }

  int kv_head(int head) const { return head / (shape_.heads / shape_.heads_kv); }

  const AttentionCase& problem_;
  const CaseShape& shape_;
  std::vector<double> q_, k_, v_;
  Reference& result_;
};

/// Gradients of one kv head: dk and dv are its alone.
class HeadGradients {
 public:
  HeadGradients(const AttentionCase& problem, bool rounding, GradientReference& result)
      : problem_(problem),
        shape_(problem.shape),
        rounding_(rounding),
        dim_(shape_.dims.head_dim),
        dim_v_(shape_.dims.head_dim_v),
        q_(to_doubles(shape_.dtype, problem.q)),
        k_(to_doubles(shape_.dtype, problem.k)),
        v_(to_doubles(shape_.dtype, problem.v)),
        dout_(to_doubles(shape_.dtype, problem.dout)),
        result_(result) {}

  void run(int head_kv) const {
    const int group = shape_.heads / shape_.heads_kv;
    for (std::int64_t row = 0; row < problem_.cu_q.back(); ++row) {
      const int b = sequence_of(problem_, row);
      std::vector<std::int64_t> keys;
      for (std::int64_t key = problem_.cu_k[b]; key < problem_.cu_k[b + 1]; ++key) {
        if (sees(problem_, b, row, key)) keys.push_back(key);
      }
      if (keys.empty()) continue;
      for (int h = 0; h < group; ++h) add_row(row, head_kv * group + h, head_kv, keys);
    }
    const auto finish = [&](std::vector<double>& gradient, int dim, double scale) {
      for (std::int64_t key = 0; key < problem_.total_k(); ++key) {
        double* to = &gradient[(key * shape_.heads_kv + head_kv) * dim];
        for (int d = 0; d < dim; ++d) to[d] = store(to[d] * scale);
      }
    };
    finish(result_.dk, dim_, problem_.softmax_scale);
    finish(result_.dv, dim_v_, 1);
  }

 private:
  double store(double value) const { return rounding_ ? rounded(shape_.dtype, value) : value; }

  static double dot(const double* a, const double* b, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
  }

  void add_row(std::int64_t row, int head, int head_kv,
               const std::vector<std::int64_t>& keys) const {
    const double* q = &q_[(row * shape_.heads + head) * dim_];
    const double* dout = &dout_[(row * shape_.heads + head) * dim_v_];
    double* dq = &result_.dq[(row * shape_.heads + head) * dim_];
    std::vector<double> weight(keys.size());
    std::vector<double> slope(keys.size(), 1.0);
    std::vector<double> out(static_cast<std::size_t>(dim_v_), 0.0);
    double highest = -kInfinity;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double* k = &k_[(keys[i] * shape_.heads_kv + head_kv) * dim_];
      weight[i] = dot(q, k, dim_) * problem_.softmax_scale;
      if (shape_.softcap > 0) {
        const double t = std::tanh(weight[i] / shape_.softcap);
        weight[i] = shape_.softcap * t;
        slope[i] = 1 - t * t;
      }
      highest = std::max(highest, weight[i]);
    }
    double sum = 0;
    for (double& w : weight) sum += w = std::exp(w - highest);
    // Forward rounds the weights that it multiplies v by, and delta inherits that.
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double* v = &v_[(keys[i] * shape_.heads_kv + head_kv) * dim_v_];
      const double of_v = store(weight[i]) / sum;
      for (int d = 0; d < dim_v_; ++d) out[d] += of_v * v[d];
      weight[i] /= sum;
    }
    for (double& x : out) x = store(x);
    const double delta = dot(out.data(), dout, dim_v_);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const std::int64_t at = keys[i] * shape_.heads_kv + head_kv;
      const double dp = dot(dout, &v_[at * dim_v_], dim_v_);
      const double ds = store(weight[i] * (dp - delta) * slope[i]);
      const double p = store(weight[i]);
      for (int d = 0; d < dim_; ++d) dq[d] += ds * k_[at * dim_ + d];
      for (int d = 0; d < dim_; ++d) result_.dk[at * dim_ + d] += ds * q[d];
      for (int d = 0; d < dim_v_; ++d) result_.dv[at * dim_v_ + d] += p * dout[d];
    }
    for (int d = 0; d < dim_; ++d) dq[d] = store(dq[d] * problem_.softmax_scale);
  }

  const AttentionCase& problem_;
  const CaseShape& shape_;
  bool rounding_;
  int dim_, dim_v_;
  std::vector<double> q_, k_, v_, dout_;
  GradientReference& result_;
};

double norm(const double* vector, std::size_t dim) {
  double squares = 0;
  for (std::size_t d = 0; d < dim; ++d) squares += vector[d] * vector[d];
  return std::sqrt(squares);
}

double ratio(double part, double whole) {
  if (part == 0) return 0;
  return whole > 0 ? part / whole : kInfinity;
}

/// Errors of vectors relative to their norms. A mean of many numbers that happens to cancel has no
/// meaningful relative error, so a norm counts as at least a share of the usual one.
struct VectorErrors {
  double rel_l2 = 0;
  double worst = 0;
  std::size_t worst_at = 0;
};
VectorErrors vector_errors(const std::vector<double>& expected, const std::vector<double>& actual,
                           std::size_t dim) {
  constexpr double kFloor = 0.05;
  const std::size_t vectors = expected.size() / dim;
  double total = 0;
  std::size_t filled = 0;
  for (std::size_t n = 0; n < vectors; ++n) {
    const double size = norm(&expected[n * dim], dim);
    total += size * size;
    filled += size > 0;
  }
  const double floor = filled == 0 ? 0 : kFloor * std::sqrt(total / static_cast<double>(filled));
  VectorErrors errors;
  double differences = 0;
  std::vector<double> difference(dim);
  for (std::size_t n = 0; n < vectors; ++n) {
    for (std::size_t d = 0; d < dim; ++d) {
      difference[d] = actual[n * dim + d] - expected[n * dim + d];
      if (std::isnan(difference[d])) difference[d] = kInfinity;
    }
    const double size = norm(difference.data(), dim);
    differences += size * size;
    const double relative = ratio(size, std::max(floor, norm(&expected[n * dim], dim)));
    if (relative > errors.worst) {
      errors.worst = relative;
      errors.worst_at = n;
    }
  }
  errors.rel_l2 = ratio(std::sqrt(differences), std::sqrt(total));
  return errors;
}

double rel_l2_bound(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return 1e-3;
    case DType::kBF16:
      return 4e-3;
    case DType::kF32:
      return 1e-5;
    case DType::kF64:
      return 1e-12;
  }
  return 0;
}

constexpr double kLseBound = 1e-4;

}  // namespace

bool sees(const AttentionCase& problem, int b, std::int64_t row, std::int64_t key) {
  const std::int64_t rows = problem.cu_q[b + 1] - problem.cu_q[b];
  const std::int64_t keys = problem.cu_k[b + 1] - problem.cu_k[b];
  const std::int64_t i = row - problem.cu_q[b];
  const std::int64_t j = key - problem.cu_k[b];
  return j <= i + keys - rows && problem.start[row] <= problem.end[key];
}

std::vector<std::int64_t> visible_counts(const AttentionCase& problem) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(problem.total_q()), 0);
  for_each_parallel(counts.size(), [&](std::size_t row) {
    const int b = sequence_of(problem, static_cast<std::int64_t>(row));
    for (std::int64_t key = problem.cu_k[b]; key < problem.cu_k[b + 1]; ++key) {
      counts[row] += sees(problem, b, static_cast<std::int64_t>(row), key);
    }
  });
  return counts;
}

Reference reference_forward(const AttentionCase& problem, std::int64_t most_rows) {
  Reference result;
  result.rows = choose_rows(problem, most_rows);
  const auto vectors = result.rows.size() * static_cast<std::size_t>(problem.shape.heads);
  const auto numbers = vectors * static_cast<std::size_t>(problem.shape.dims.head_dim_v);
  result.out.assign(numbers, 0);
  result.lse.assign(vectors, 0);
  if (is_half(problem.shape.dtype)) result.rounded_out.assign(numbers, 0);
  const RowReference rows(problem, result);
  for_each_parallel(result.rows.size(), [&](std::size_t n) { rows.run(n); });
  return result;
}

Comparison compare(const AttentionCase& problem, const Reference& expected,
                   const std::vector<std::byte>& out, const std::vector<float>& lse) {
  const CaseShape& shape = problem.shape;
  const auto dim = static_cast<std::size_t>(shape.dims.head_dim_v);
  const auto heads = static_cast<std::size_t>(shape.heads);
  Comparison comparison;
  std::vector<double> actual(expected.out.size());
  for (std::size_t n = 0; n < expected.rows.size(); ++n) {
    const auto row = static_cast<std::size_t>(expected.rows[n]);
    for (std::size_t i = 0; i < heads * dim; ++i) {
      actual[n * heads * dim + i] = element(shape.dtype, out, row * heads * dim + i);
    }
    for (std::size_t head = 0; head < heads; ++head) {
      const auto found =
          static_cast<double>(lse[head * static_cast<std::size_t>(problem.total_q()) + row]);
      const double wanted = expected.lse[n * heads + head];
      if (found == wanted) continue;
      const double difference = std::abs(found - wanted);
      comparison.lse = std::max(comparison.lse, std::isnan(difference) ? kInfinity : difference);
    }
  }
  const VectorErrors errors = vector_errors(expected.out, actual, dim);
  comparison.rel_l2 = errors.rel_l2;
  comparison.worst_row = errors.worst;
  if (errors.worst > 0) comparison.worst_at = expected.rows[errors.worst_at / heads];

  const double bound = rel_l2_bound(shape.dtype);
  // Twice what rounding alone does to the same numbers; wide types get room for the order of sums.
  const double row_bound =
      is_half(shape.dtype)
          ? std::max(bound, 2 * vector_errors(expected.out, expected.rounded_out, dim).worst)
          : 100 * bound;
  const auto judge = [&](std::string_view what, double value, double most) {
    if (value <= most) return;
    comparison.failure += fmt::format("{}{} {:.2e}, expected at most {:.2e}",
                                      comparison.failure.empty() ? "" : "; ", what, value, most);
  };
  judge("rel_l2", comparison.rel_l2, bound);
  judge(fmt::format("row {}", comparison.worst_at), comparison.worst_row, row_bound);
  judge("lse", comparison.lse, kLseBound);
  return comparison;
}

GradientReference reference_backward(const AttentionCase& problem, bool rounding) {
  const auto numbers = [&](const std::vector<std::byte>& array) {
    return array.size() / static_cast<std::size_t>(element_bytes(problem.shape.dtype));
  };
  GradientReference result;
  result.dq.assign(numbers(problem.q), 0.0);
  result.dk.assign(numbers(problem.k), 0.0);
  result.dv.assign(numbers(problem.v), 0.0);
  const HeadGradients heads(problem, rounding, result);
  for_each_parallel(static_cast<std::size_t>(problem.shape.heads_kv),
                    [&](std::size_t head) { heads.run(static_cast<int>(head)); });
  return result;
}

Comparison compare_gradients(const AttentionCase& problem, const std::vector<std::byte>& dq,
                             const std::vector<std::byte>& dk, const std::vector<std::byte>& dv) {
  const DType dtype = problem.shape.dtype;
  const GradientReference expected = reference_backward(problem, false);
  GradientReference near;
  if (is_half(dtype)) near = reference_backward(problem, true);
  // lse reaches backward as f32, whatever the dtype.
  const double bound = std::max(rel_l2_bound(dtype), 2e-6);
  Comparison comparison;
  const auto judge = [&](const char* name, const std::vector<double>& wanted,
                         const std::vector<double>& rounded_ones,
                         const std::vector<std::byte>& found, int dim) {
    const std::vector<double> actual = to_doubles(dtype, found);
    double largest = 0;
    double off = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      largest = std::max(largest, std::abs(wanted[i]));
      const double difference = std::abs(actual[i] - wanted[i]);
      off = std::max(off, std::isnan(difference) ? kInfinity : difference);
    }
    // Rows with a single key have no gradient: nothing to be relative to.
    if (largest < 1e-4 && off < 1e-4) return;
    const auto width = static_cast<std::size_t>(dim);
    const VectorErrors errors = vector_errors(wanted, actual, width);
    VectorErrors allowed;
    if (is_half(dtype)) allowed = vector_errors(wanted, rounded_ones, width);
    const double most = std::max(bound, 2 * allowed.rel_l2);
    const double most_vector = is_half(dtype) ? std::max(bound, 2 * allowed.worst) : 100 * bound;
    comparison.rel_l2 = std::max(comparison.rel_l2, errors.rel_l2);
    comparison.worst_row = std::max(comparison.worst_row, errors.worst);
    if (errors.rel_l2 <= most && errors.worst <= most_vector) return;
    comparison.failure += fmt::format(
        "{}{}: rel_l2 {:.2e}, expected at most {:.2e}; vector {} {:.2e}, at most {:.2e}",
        comparison.failure.empty() ? "" : "; ", name, errors.rel_l2, most, errors.worst_at,
        errors.worst, most_vector);
  };
  judge("dq", expected.dq, near.dq, dq, problem.shape.dims.head_dim);
  judge("dk", expected.dk, near.dk, dk, problem.shape.dims.head_dim);
  judge("dv", expected.dv, near.dv, dv, problem.shape.dims.head_dim_v);
  return comparison;
}

std::string compare_counts(const AttentionCase& problem, const std::vector<float>& lse) {
  const std::vector<std::int64_t> counts = visible_counts(problem);
  const auto total = static_cast<std::size_t>(problem.total_q());
  for (std::size_t i = 0; i < lse.size(); ++i) {
    const std::int64_t count = counts[i % total];
    const auto found = static_cast<double>(lse[i]);
    const double counted = std::exp(found);
    // Half a key is the most that a count may be off; float's last place is more beyond 2^20 keys.
    const double slack = std::max(0.5, static_cast<double>(count) * 1e-5);
    if (count == 0 ? found == -kInfinity : std::abs(counted - static_cast<double>(count)) < slack) {
      continue;
    }
    return fmt::format("row {} of head {} saw {:.2f} keys, expected {}", i % total, i / total,
                       counted, count);
  }
  return {};
}

}  // namespace treeattn::cli
