// The test oracle: dense attention in float64, straight from the element rule of the semantics. It
// shares no code with the plan. Also the error measures that kernels are judged by. Functions are
// pure and thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "treeattn/treeattn.h"

namespace treeattn::testing {

/// A problem in float64; tensors are contiguous [tokens, heads, dim].
struct OracleCase {
  Lowering rule = Lowering::kTree;
  int heads = 1;
  int heads_kv = 1;
  int head_dim = 1;
  int head_dim_v = 1;
  double softmax_scale = 1;
  double softcap = 0;
  std::int64_t total_q = 0;
  std::int64_t total_k = 0;
  std::vector<int> cu_q{0};
  std::vector<int> cu_k{0};
  std::vector<int> start;  ///< kTree: [total_q]
  std::vector<int> end;    ///< kTree: [total_k]
  std::vector<int> first;  ///< kIntervals: [total_k]
  std::vector<int> len;    ///< kIntervals: [total_k]
  std::vector<double> q, k, v;

  int batch() const { return static_cast<int>(cu_q.size()) - 1; }
};

struct OracleResult {
  std::vector<double> out;  ///< [total_q, heads, head_dim_v]
  std::vector<double> lse;  ///< [heads, total_q]
  /// out of an emulated kernel: probabilities and out rounded to a 16-bit type; empty if not asked
  /// for.
  std::vector<double> emulated_out;
};

/// Whether row i sees key j; both are positions inside sequence b.
bool oracle_sees(const OracleCase& problem, int b, std::int64_t i, std::int64_t j);

/// Row-major [len_q, len_k] of 0 and 1 for sequence b.
std::vector<std::uint8_t> oracle_visibility(const OracleCase& problem, int b);

enum class Emulate { kNothing, kF16, kBF16 };

/// The whole forward pass; keys that a row does not see are never used. threads = 0: one per core.
OracleResult oracle_forward(const OracleCase& problem, Emulate emulate = Emulate::kNothing,
                            int threads = 0);

/// One (packed row, head) alone, written as plainly as possible. Returns lse.
double oracle_row(const OracleCase& problem, std::int64_t row, int head, std::vector<double>& out);

/// Distance of a kernel's output from the oracle's. NaN anywhere makes the measures infinite.
struct ForwardError {
  double rel_l2 = 0;        ///< ||actual - expected|| / ||expected||
  double worst_vector = 0;  ///< worst rel_l2 of one (row, head), see kVectorFloor
  double max_abs = 0;
  double lse = 0;  ///< worst |actual - expected|; -inf against -inf is 0
  std::int64_t worst_row = -1;
  int worst_head = -1;

  std::string describe() const;
};

/// A vector's norm counts as at least this share of the root mean square norm of all vectors that
/// are not zero: a mean that happens to cancel has no meaningful relative error.
inline constexpr double kVectorFloor = 0.05;

/// `out` is contiguous [rows, heads, dim_v]; `lse` is [heads, rows] or empty (not compared).
ForwardError compare_forward(const std::vector<double>& expected_out,
                             const std::vector<double>& expected_lse,
                             const std::vector<double>& out, const std::vector<float>& lse,
                             int heads, int dim_v);

/// Bound for ForwardError::worst_vector: twice what the emulation reaches on the same numbers.
double emulated_vector_bound(const OracleResult& result, int heads, int dim_v);

}  // namespace treeattn::testing
