// The bar that forward results are held to, on the GPU and, to show that the bar itself can fail,
// on the CPU executor. Functions are pure; those that judge return what is wrong, empty for
// nothing.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/support/random_case.h"

namespace treeattn::testing {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline Emulate emulation_of(DType dtype) {
  return dtype == DType::kF16 ? Emulate::kF16 : Emulate::kBF16;
}

/// Half the distance between neighbouring 16-bit numbers just below 1.
inline double half_ulp(DType dtype) {
  return dtype == DType::kF16 ? 1.0 / 4096 : 1.0 / 512;
}

/// The whole numeric bar. `expected` holds an emulation in the case's type; `lse` may be empty.
inline std::string judge_forward(const RandomCase& c, const OracleResult& expected,
                                 const std::vector<double>& out, const std::vector<float>& lse) {
  const auto compare = [&](const std::vector<double>& to, const std::vector<float>& to_lse) {
    return compare_forward(expected.out, expected.lse, to, to_lse, c.heads, c.head_dim_v);
  };
  const ForwardError error = compare(out, lse);
  const ForwardError emulated = compare(expected.emulated_out, {});
  double largest = 0;
  for (const double x : expected.out) largest = std::max(largest, std::abs(x));
  const double rel_l2 = c.dtype == DType::kF16 ? 1e-3 : 4e-3;
  // A few numbers may all round luckily in the emulation; one more rounding is always allowed.
  const double max_abs = 2 * emulated.max_abs + 2 * half_ulp(c.dtype) * largest;
  std::string trouble;
  const auto hold = [&](const char* what, double value, double bound) {
    if (value > bound) trouble += fmt::format("{} is above {:.3e}; ", what, bound);
  };
  hold("rel_l2", error.rel_l2, rel_l2);
  hold("the worst vector", error.worst_vector,
       emulated_vector_bound(expected, c.heads, c.head_dim_v));
  hold("max abs", error.max_abs, max_abs);
  hold("lse", error.lse, 1e-4);
  return trouble.empty() ? trouble : trouble + error.describe() + "\n" + c.describe();
}

/// lse of a case after apply_count_probe(): exp(lse) is the exact number of visible keys.
inline std::string judge_count_probe(const RandomCase& c, const std::vector<float>& lse) {
  const OracleCase rule = c.oracle();
  for (int b = 0; b < c.batch(); ++b) {
    const std::ptrdiff_t keys = c.cu_k[b + 1] - c.cu_k[b];
    const std::vector<std::uint8_t> seen = oracle_visibility(rule, b);
    for (int i = c.cu_q[b]; i < c.cu_q[b + 1]; ++i) {
      const auto row = seen.begin() + (i - c.cu_q[b]) * keys;
      const auto count = std::count(row, row + keys, 1);
      for (int h = 0; h < c.heads; ++h) {
        const float value = lse[static_cast<std::size_t>(h) * c.total_q + i];
        const bool right =
            count == 0 ? value == kMinusInfinity
                       : std::isfinite(value) && std::llround(std::exp(double{value})) == count;
        if (right) continue;
        return fmt::format("row {} head {} saw {} keys (lse {}), expected {}\n{}", i, h,
                           std::exp(value), value, count, c.describe());
      }
    }
  }
  return {};
}

/// out of an f16 case after apply_bits_probe(): element d is the share of the seen keys whose
/// packed index has bit d % 32 set, correctly rounded.
inline std::string judge_bits_probe(const RandomCase& c) {
  constexpr int kBits = 32;
  const OracleCase rule = c.oracle();
  for (int b = 0; b < c.batch(); ++b) {
    const int keys = c.cu_k[b + 1] - c.cu_k[b];
    const std::vector<std::uint8_t> seen = oracle_visibility(rule, b);
    for (int i = c.cu_q[b]; i < c.cu_q[b + 1]; ++i) {
      std::array<int, kBits> ones{};
      int count = 0;
      for (int j = 0; j < keys; ++j) {
        if (seen[static_cast<std::size_t>(i - c.cu_q[b]) * keys + j] == 0) continue;
        ++count;
        for (int d = 0; d < kBits; ++d) ones[d] += (c.cu_k[b] + j) >> d & 1;
      }
      for (int h = 0; h < c.heads; ++h) {
        for (int d = 0; d < c.head_dim_v; ++d) {
          const double expected = count == 0 ? 0 : static_cast<double>(ones[d % kBits]) / count;
          const double got = c.out.get(i, h, d);
          if (std::abs(got - expected) <= half_ulp(DType::kF16) + 1e-6) continue;
          return fmt::format("row {} head {}: {} of the {} keys seen have bit {}, expected {}\n{}",
                             i, h, got, count, d, expected, c.describe());
        }
      }
    }
  }
  return {};
}

inline std::vector<std::byte> bytes_of(const HostTensor& t) {
  const auto* data = static_cast<const std::byte*>(t.data());
  return {data, data + t.size_bytes()};
}

/// Sequence b of a case as a case of its own, in contiguous tensors.
inline RandomCase alone(const RandomCase& c, int b) {
  RandomCase one = c;
  const int q0 = c.cu_q[b];
  const int k0 = c.cu_k[b];
  one.total_q = c.cu_q[b + 1] - q0;
  one.total_k = c.cu_k[b + 1] - k0;
  one.cu_q = {0, one.total_q};
  one.cu_k = {0, one.total_k};
  const auto part = [](const std::vector<int>& from, int begin, int count) {
    return std::vector<int>(from.begin() + begin, from.begin() + begin + count);
  };
  one.start = part(c.start, q0, one.total_q);
  one.end = part(c.end, k0, one.total_k);
  one.first = part(c.first, k0, one.total_k);
  one.len = part(c.len, k0, one.total_k);
  for (int& row : one.first) row -= q0;
  const auto tensor = [](const HostTensor& from, int t0, int tokens) {
    HostTensor to(from.dtype(), tokens, from.heads(), from.dim());
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < from.heads(); ++h) {
        for (int d = 0; d < from.dim(); ++d) to.set(t, h, d, from.get(t0 + t, h, d));
      }
    }
    return to;
  };
  one.q = tensor(c.q, q0, one.total_q);
  one.k = tensor(c.k, k0, one.total_k);
  one.v = tensor(c.v, k0, one.total_k);
  one.out = tensor(c.out, q0, one.total_q);
  return one;
}

/// Whether rows [row, row + rows) of a result are, bit by bit, rows [other_row, ...) of another.
inline std::string judge_same_rows(const RandomCase& c, const std::vector<float>& lse, int row,
                                   int rows, const RandomCase& other,
                                   const std::vector<float>& other_lse, int other_row) {
  for (int i = 0; i < rows; ++i) {
    for (int h = 0; h < c.heads; ++h) {
      const auto at = [&](int total, int r) { return static_cast<std::size_t>(h) * total + r + i; };
      if (std::bit_cast<int>(lse[at(c.total_q, row)]) !=
          std::bit_cast<int>(other_lse[at(other.total_q, other_row)])) {
        return fmt::format("lse of row {} head {} differs\n{}", row + i, h, c.describe());
      }
      for (int d = 0; d < c.head_dim_v; ++d) {
        const double x = c.out.get(row + i, h, d);
        const double y = other.out.get(other_row + i, h, d);
        if (std::bit_cast<std::int64_t>(x) == std::bit_cast<std::int64_t>(y)) continue;
        return fmt::format("out of row {} head {} dim {} is {} and {}\n{}", row + i, h, d, x, y,
                           c.describe());
      }
    }
  }
  return {};
}

/// Trees of one dtype and head dim, without softcap.
inline RandomCaseOptions plain_trees(DType dtype, int head_dim) {
  RandomCaseOptions options;
  options.dtype = dtype;
  options.head_dim = head_dim;
  options.head_dim_v = head_dim;
  options.softcap = false;
  options.lowering = Lowering::kTree;
  return options;
}

/// A tree case without softcap whose sequence 1 spans several tiles and has neighbours.
inline RandomCase several_trees(DType dtype) {
  const RandomCaseOptions options = plain_trees(dtype, 64);
  for (std::uint64_t seed = 900;; ++seed) {
    RandomCase c = random_case(seed, options);
    if (c.batch() < 3) continue;
    const int rows = c.cu_q[2] - c.cu_q[1];
    const int keys = c.cu_k[2] - c.cu_k[1];
    if (std::min(rows, keys) > 150 && c.cu_k.back() - keys > 50) return c;
  }
}

/// Overwrites q, k or v of the packed tokens [begin, end).
inline void spoil(HostTensor& tensor, int begin, int end, double value) {
  for (int t = begin; t < end; ++t) {
    for (int h = 0; h < tensor.heads(); ++h) {
      for (int d = 0; d < tensor.dim(); ++d) tensor.set(t, h, d, value);
    }
  }
}

/// Large, and its products with normal numbers still finite.
inline double finite_garbage(DType dtype) {
  return dtype == DType::kF16 ? 3e4 : 1e30;
}

/// Spoils every key, value and query that row `row` of sequence b neither sees nor is. Returns how
/// many keys that was.
inline int spoil_unseen(RandomCase& c, int b, int row, double garbage) {
  const OracleCase rule = c.oracle();
  int spoilt = 0;
  for (int j = 0; j < c.total_k; ++j) {
    const bool inside = j >= c.cu_k[b] && j < c.cu_k[b + 1];
    if (inside && oracle_sees(rule, b, row - c.cu_q[b], j - c.cu_k[b])) continue;
    spoil(c.k, j, j + 1, garbage);
    spoil(c.v, j, j + 1, garbage);
    ++spoilt;
  }
  spoil(c.q, 0, row, garbage);
  spoil(c.q, row + 1, c.total_q, garbage);
  return spoilt;
}

}  // namespace treeattn::testing
