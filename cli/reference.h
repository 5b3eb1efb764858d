// Attention by its definition, element by element in float64: who sees whom is asked of the tree
// arrays for every pair, never of a plan. Also how far an output is from it, and how far it may be.
// Pure functions; they use one thread per core.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/attention_case.h"

namespace treeattn::cli {

/// Results for some packed query rows.
struct Reference {
  std::vector<std::int64_t> rows;  ///< ascending
  std::vector<double> out;         ///< [rows, heads, head_dim_v]
  std::vector<double> lse;         ///< [rows, heads]
  /// As `out` with probabilities and result rounded to the case's dtype, for 16-bit ones.
  std::vector<double> rounded_out;
};

/// Whether packed row `row` of sequence `b` sees packed key `key` of it.
bool sees(const AttentionCase& problem, int b, std::int64_t row, std::int64_t key);

/// Keys that each packed row sees.
std::vector<std::int64_t> visible_counts(const AttentionCase& problem);

/// All rows, or about `most_rows` of them: the first and last of every sequence and node first,
/// then evenly spread.
Reference reference_forward(const AttentionCase& problem, std::int64_t most_rows);

/// The distance of an output from the reference; infinite where there is a NaN.
struct Comparison {
  double rel_l2 = 0;
  double worst_row = 0;        ///< worst relative distance of one (row, head)
  double lse = 0;              ///< worst difference
  std::int64_t worst_at = -1;  ///< the packed row of worst_row
  std::string failure;         ///< what is out of bounds; empty: all is well
};
Comparison compare(const AttentionCase& problem, const Reference& expected,
                   const std::vector<std::byte>& out, const std::vector<float>& lse);

/// Gradients by their formulas, of every row and key; slow, meant for some thousand tokens.
struct GradientReference {
  std::vector<double> dq, dk, dv;
};
/// `rounding`: out, probabilities, score gradients and results as a 16-bit case rounds them.
GradientReference reference_backward(const AttentionCase& problem, bool rounding);

/// The distance of gradients from the reference: the worst of the three.
Comparison compare_gradients(const AttentionCase& problem, const std::vector<std::byte>& dq,
                             const std::vector<std::byte>& dk, const std::vector<std::byte>& dv);

/// With q = 0 every visible key weighs the same, so exp(lse) counts them: the first row where it
/// does not, in words; empty if there is none.
std::string compare_counts(const AttentionCase& problem, const std::vector<float>& lse);

}  // namespace treeattn::cli
