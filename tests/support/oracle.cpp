#include "tests/support/oracle.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <thread>

#include "runtime/attention/half.h"

namespace treeattn::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// Rows and keys of the micro kernel.
constexpr int kRows = 4;
constexpr int kKeys = 4;
/// Keys whose v stay in cache while the rows are multiplied with them.
constexpr std::int64_t kKeyBlock = 32;
using Lanes = double __attribute__((vector_size(kKeys * sizeof(double))));

double round_to(Emulate type, double value) {
  const auto narrow = static_cast<float>(value);
  if (type == Emulate::kF16) return static_cast<double>(f16_to_float(float_to_f16(narrow)));
  return static_cast<double>(bf16_to_float(float_to_bf16(narrow)));
}

double final_score(const OracleCase& problem, double dot) {
  const double score = dot * problem.softmax_scale;
  return problem.softcap > 0 ? problem.softcap * std::tanh(score / problem.softcap) : score;
}

/// Keys of one (sequence, kv head), laid out [key / kKeys][d][key % kKeys].
std::vector<Lanes> transpose_keys(const OracleCase& problem, int b, int head_kv) {
  const std::int64_t key0 = problem.cu_k[b];
  const std::int64_t keys = problem.cu_k[b + 1] - key0;
  const std::int64_t blocks = (keys + kKeys - 1) / kKeys;
  std::vector<Lanes> lanes(static_cast<std::size_t>(blocks * problem.head_dim), Lanes{});
  for (std::int64_t j = 0; j < keys; ++j) {
    const double* k = &problem.k[((key0 + j) * problem.heads_kv + head_kv) * problem.head_dim];
    Lanes* block = &lanes[(j / kKeys) * problem.head_dim];
    for (int d = 0; d < problem.head_dim; ++d) block[d][j % kKeys] = k[d];
  }
  return lanes;
}

/// A few rows of one (sequence, head): scores by the element rule, softmax, weighted sum.
class RowBlock {
 public:
  RowBlock(const OracleCase& problem, Emulate emulate, OracleResult& result)
      : p_(problem), emulate_(emulate), result_(result), zero_row_(problem.head_dim, 0.0) {}

  /// Rows from i0 on of sequence b, for all `heads` query heads of one kv head.
  void run(int b, int head0, int heads, std::int64_t i0, const std::vector<Lanes>& keys) {
    b_ = b;
    i0_ = i0;
    rows_ = static_cast<int>(std::min<std::int64_t>(kRows, p_.cu_q[b + 1] - p_.cu_q[b] - i0));
    len_k_ = p_.cu_k[b + 1] - p_.cu_k[b];
    look();
    for (head_ = head0; head_ < head0 + heads; ++head_) {
      for (std::int64_t block = 0; block * kKeys < len_k_; ++block) score(block, keys.data());
      softmax();
      weighted_sum(Emulate::kNothing, result_.out);
      if (emulate_ != Emulate::kNothing) weighted_sum(emulate_, result_.emulated_out);
    }
  }

 private:
  /// The element rule, for every pair.
  void look() {
    const auto slots = static_cast<std::size_t>((len_k_ + kKeys - 1) / kKeys * kKeys);
    seen_.assign(slots, 0);
    for (auto& row : weight_) row.resize(slots);
    for (std::int64_t j = 0; j < len_k_; ++j) {
      for (int r = 0; r < rows_; ++r) {
        if (oracle_sees(p_, b_, i0_ + r, j)) seen_[j] |= static_cast<std::uint8_t>(1 << r);
      }
    }
  }

  void score(std::int64_t block, const Lanes* keys) {
    const std::uint8_t* seen = &seen_[block * kKeys];
    if (std::all_of(seen, seen + kKeys, [](std::uint8_t bits) { return bits == 0; })) return;
    const double* q[kRows];
    for (int r = 0; r < kRows; ++r) {
      q[r] = r < rows_ ? &p_.q[((p_.cu_q[b_] + i0_ + r) * p_.heads + head_) * p_.head_dim]
                       : zero_row_.data();
    }
    Lanes dots[kRows] = {};
    const Lanes* k = keys + block * p_.head_dim;
    for (int d = 0; d < p_.head_dim; ++d) {
      for (int r = 0; r < kRows; ++r) dots[r] += q[r][d] * k[d];
    }
    for (int r = 0; r < rows_; ++r) {
      for (int n = 0; n < kKeys; ++n) {
        weight_[r][block * kKeys + n] = final_score(p_, dots[r][n]);
      }
    }
  }

  void softmax() {
    for (int r = 0; r < rows_; ++r) {
      double highest = -kInfinity;
      sum_[r] = 0;
      for (std::int64_t j = 0; j < len_k_; ++j) {
        if ((seen_[j] >> r) & 1) highest = std::max(highest, weight_[r][j]);
      }
      for (std::int64_t j = 0; j < len_k_; ++j) {
        if (((seen_[j] >> r) & 1) == 0) continue;
        weight_[r][j] = std::exp(weight_[r][j] - highest);
        sum_[r] += weight_[r][j];
      }
      const std::int64_t row = p_.cu_q[b_] + i0_ + r;
      result_.lse[head_ * p_.total_q + row] =
          sum_[r] == 0 ? -kInfinity : highest + std::log(sum_[r]);
    }
  }

  void weighted_sum(Emulate emulate, std::vector<double>& out) {
    const int dim = p_.head_dim_v;
    const int head_kv = head_ / (p_.heads / p_.heads_kv);
    double* to[kRows];
    for (int r = 0; r < rows_; ++r) {
      to[r] = &out[((p_.cu_q[b_] + i0_ + r) * p_.heads + head_) * dim];
    }
    if (emulate != Emulate::kNothing) round_weights(emulate);
    for (std::int64_t j0 = 0; j0 < len_k_; j0 += kKeyBlock) {
      const std::int64_t j1 = std::min(len_k_, j0 + kKeyBlock);
      const double* v = &p_.v[((p_.cu_k[b_] + j0) * p_.heads_kv + head_kv) * dim];
      const bool all_seen = std::all_of(seen_.begin() + j0, seen_.begin() + j1,
                                        [](std::uint8_t bits) { return bits == (1 << kRows) - 1; });
      const int vectors = all_seen ? dim / kKeys * kKeys : 0;
      for (int d = 0; d < vectors; d += kKeys) add_block(v + d, j0, j1, d, to);
      add_seen(v, j0, j1, vectors, to);
    }
    for (int r = 0; r < rows_; ++r) {
      for (int d = 0; d < dim && sum_[r] != 0; ++d) {
        to[r][d] /= sum_[r];
        if (emulate != Emulate::kNothing) to[r][d] = round_to(emulate, to[r][d]);
      }
    }
  }

  void round_weights(Emulate emulate) {
    for (int r = 0; r < rows_; ++r) {
      for (std::int64_t j = 0; j < len_k_; ++j) {
        if ((seen_[j] >> r) & 1) weight_[r][j] = round_to(emulate, weight_[r][j]);
      }
    }
  }

  /// All rows times keys [j0, j1), which all of them see, for kKeys elements of v from d on.
  void add_block(const double* v, std::int64_t j0, std::int64_t j1, int d,
                 double* const* to) const {
    const std::int64_t step = static_cast<std::int64_t>(p_.heads_kv) * p_.head_dim_v;
    Lanes sums[kRows] = {};
    for (std::int64_t j = j0; j < j1; ++j, v += step) {
      Lanes values;
      std::memcpy(&values, v, sizeof values);
      for (int r = 0; r < kRows; ++r) sums[r] += weight_[r][j] * values;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kKeys; ++n) to[r][d + n] += sums[r][n];
    }
  }

  /// Elements from `begin` on, pair by pair: what a row does not see is not touched.
  void add_seen(const double* v, std::int64_t j0, std::int64_t j1, int begin,
                double* const* to) const {
    const int dim = p_.head_dim_v;
    if (begin == dim) return;
    for (std::int64_t j = j0; j < j1; ++j, v += static_cast<std::int64_t>(p_.heads_kv) * dim) {
      for (int r = 0; r < rows_; ++r) {
        if (((seen_[j] >> r) & 1) == 0) continue;
        const double w = weight_[r][j];
        double* row = to[r];
        for (int d = begin; d < dim; ++d) row[d] += w * v[d];
      }
    }
  }

  const OracleCase& p_;
  Emulate emulate_;
  OracleResult& result_;
  std::vector<double> zero_row_;
  std::vector<double> weight_[kRows];  ///< scores, then exp(score - max)
  std::vector<std::uint8_t> seen_;     ///< bit r: row r of the block sees the key
  double sum_[kRows] = {};
  int b_ = 0;
  int head_ = 0;
  int rows_ = 0;
  std::int64_t i0_ = 0;
  std::int64_t len_k_ = 0;
};

double norm(const double* v, int n) {
  double sum = 0;
  for (int d = 0; d < n; ++d) sum += v[d] * v[d];
  return std::sqrt(sum);
}

double ratio(double error, double size) {
  if (error == 0) return 0;
  return size > 0 && std::isfinite(error) ? error / size : kInfinity;
}

}  // namespace

bool oracle_sees(const OracleCase& problem, int b, std::int64_t i, std::int64_t j) {
  const std::int64_t q0 = problem.cu_q[b];
  const std::int64_t k0 = problem.cu_k[b];
  const std::int64_t offset = (problem.cu_k[b + 1] - k0) - (problem.cu_q[b + 1] - q0);
  switch (problem.rule) {
    case Lowering::kTree:
      return j <= i + offset && problem.start[q0 + i] <= problem.end[k0 + j];
    case Lowering::kCausal:
      return j <= i + offset;
    case Lowering::kFull:
      return true;
    case Lowering::kIntervals: {
      const std::int64_t first = problem.first[k0 + j];
      return q0 + i >= first && q0 + i < first + problem.len[k0 + j];
    }
  }
  return false;
}

std::vector<std::uint8_t> oracle_visibility(const OracleCase& problem, int b) {
  const std::int64_t rows = problem.cu_q[b + 1] - problem.cu_q[b];
  const std::int64_t keys = problem.cu_k[b + 1] - problem.cu_k[b];
  std::vector<std::uint8_t> seen;
  seen.reserve(static_cast<std::size_t>(rows * keys));
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < keys; ++j) seen.push_back(oracle_sees(problem, b, i, j));
  }
  return seen;
}

OracleResult oracle_forward(const OracleCase& problem, Emulate emulate, int threads) {
  OracleResult result;
  const auto out_size =
      static_cast<std::size_t>(problem.total_q * problem.heads * problem.head_dim_v);
  result.out.assign(out_size, 0.0);
  result.lse.assign(static_cast<std::size_t>(problem.total_q * problem.heads), -kInfinity);
  if (emulate != Emulate::kNothing) result.emulated_out.assign(out_size, 0.0);
  const int group = problem.heads / problem.heads_kv;
  const auto workers = static_cast<unsigned>(
      threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency()));
  for (int b = 0; b < problem.batch(); ++b) {
    const std::int64_t blocks = (problem.cu_q[b + 1] - problem.cu_q[b] + kRows - 1) / kRows;
    for (int head_kv = 0; head_kv < problem.heads_kv; ++head_kv) {
      const std::vector<Lanes> keys = transpose_keys(problem, b, head_kv);
      std::atomic<std::int64_t> next{0};
      const auto work = [&] {
        RowBlock rows(problem, emulate, result);
        // Late rows see most, so they go first.
        for (std::int64_t t = next++; t < blocks; t = next++) {
          rows.run(b, head_kv * group, group, (blocks - 1 - t) * kRows, keys);
        }
      };
      std::vector<std::jthread> pool;
      for (unsigned n = 1; n < workers && blocks > 16; ++n) pool.emplace_back(work);
      work();
    }
  }
  return result;
}

double oracle_row(const OracleCase& problem, std::int64_t row, int head, std::vector<double>& out) {
  out.assign(static_cast<std::size_t>(problem.head_dim_v), 0.0);
  int b = 0;
  while (b < problem.batch() && problem.cu_q[b + 1] <= row) ++b;
  if (b == problem.batch()) return -kInfinity;
  const int head_kv = head / (problem.heads / problem.heads_kv);
  const std::int64_t key0 = problem.cu_k[b];
  std::vector<std::pair<std::int64_t, double>> scores;
  double highest = -kInfinity;
  for (std::int64_t j = 0; j < problem.cu_k[b + 1] - key0; ++j) {
    if (!oracle_sees(problem, b, row - problem.cu_q[b], j)) continue;
    double dot = 0;
    for (int d = 0; d < problem.head_dim; ++d) {
      dot += problem.q[(row * problem.heads + head) * problem.head_dim + d] *
             problem.k[((key0 + j) * problem.heads_kv + head_kv) * problem.head_dim + d];
    }
    scores.emplace_back(key0 + j, final_score(problem, dot));
    highest = std::max(highest, scores.back().second);
  }
  if (scores.empty()) return -kInfinity;
  double sum = 0;
  for (const auto& [key, score] : scores) sum += std::exp(score - highest);
  for (const auto& [key, score] : scores) {
    const double* v = &problem.v[(key * problem.heads_kv + head_kv) * problem.head_dim_v];
    for (int d = 0; d < problem.head_dim_v; ++d) out[d] += std::exp(score - highest) / sum * v[d];
  }
  return highest + std::log(sum);
}

std::string ForwardError::describe() const {
  return fmt::format(
      "rel_l2 {:.3e}, worst vector {:.3e} (row {}, head {}), max abs {:.3e}, lse {:.3e}", rel_l2,
      worst_vector, worst_row, worst_head, max_abs, lse);
}

ForwardError compare_forward(const std::vector<double>& expected_out,
                             const std::vector<double>& expected_lse,
                             const std::vector<double>& out, const std::vector<float>& lse,
                             int heads, int dim_v) {
  ForwardError error;
  if (out.size() != expected_out.size() || (!lse.empty() && lse.size() != expected_lse.size())) {
    error.rel_l2 = error.worst_vector = error.max_abs = error.lse = kInfinity;
    return error;
  }
  const std::size_t vectors = out.size() / static_cast<std::size_t>(dim_v);
  double sizes = 0;
  std::int64_t nonzero = 0;
  for (std::size_t n = 0; n < vectors; ++n) {
    const double size = norm(&expected_out[n * dim_v], dim_v);
    sizes += size * size;
    nonzero += size > 0;
  }
  const double floor =
      nonzero == 0 ? 0 : kVectorFloor * std::sqrt(sizes / static_cast<double>(nonzero));
  double errors = 0;
  for (std::size_t n = 0; n < vectors; ++n) {
    double squares = 0;
    for (std::size_t at = n * dim_v; at < (n + 1) * dim_v; ++at) {
      const double difference = std::abs(out[at] - expected_out[at]);
      const double magnitude = std::isnan(difference) ? kInfinity : difference;
      error.max_abs = std::max(error.max_abs, magnitude);
      squares += magnitude * magnitude;
    }
    errors += squares;
    const double relative =
        ratio(std::sqrt(squares), std::max(floor, norm(&expected_out[n * dim_v], dim_v)));
    if (relative > error.worst_vector) {
      error.worst_vector = relative;
      error.worst_row = static_cast<std::int64_t>(n) / heads;
      error.worst_head = static_cast<int>(static_cast<std::int64_t>(n) % heads);
    }
  }
  error.rel_l2 = ratio(std::sqrt(errors), std::sqrt(sizes));
  for (std::size_t n = 0; n < lse.size(); ++n) {
    const auto actual = static_cast<double>(lse[n]);
    if (actual == expected_lse[n]) continue;
    const double difference = std::abs(actual - expected_lse[n]);
    error.lse = std::max(error.lse, std::isnan(difference) ? kInfinity : difference);
  }
  return error;
}

double emulated_vector_bound(const OracleResult& result, int heads, int dim_v) {
  return 2 * compare_forward(result.out, result.lse, result.emulated_out, {}, heads, dim_v)
                 .worst_vector;
}

}  // namespace treeattn::testing
