#include "tests/support/oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "tests/support/random_case.h"

namespace treeattn::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Oracle, MatchesNumbersWorkedOutByHand) {
  OracleCase p;
  p.total_q = p.total_k = 3;
  p.cu_q = p.cu_k = {0, 3};
  p.start = {0, 1, 2};
  p.end = {2, 1, 2};
  p.q = {1, 1, 1};
  p.k = {0, std::log(3.0), 50};
  p.v = {1, 5, 9};
  p.k[2] = std::log(7.0);
  const OracleResult result = oracle_forward(p);
  EXPECT_NEAR(result.out[0], 1, 1e-12);
  EXPECT_NEAR(result.out[1], (1 * 1 + 3 * 5) / 4.0, 1e-12);
  EXPECT_NEAR(result.out[2], (1 * 1 + 7 * 9) / 8.0, 1e-12);  // does not see its sibling
  EXPECT_NEAR(result.lse[1], std::log(4.0), 1e-12);
  EXPECT_NEAR(result.lse[2], std::log(8.0), 1e-12);
  p.softcap = 2;
  EXPECT_NEAR(oracle_forward(p).lse[1], std::log(1 + std::exp(2 * std::tanh(std::log(3.0) / 2))),
              1e-12);
}

TEST(Oracle, OffsetCountsFromTheEndOfTheKeys) {
  OracleCase p;
  p.rule = Lowering::kCausal;
  p.total_q = 2;
  p.total_k = 5;
  p.cu_q = {0, 2};
  p.cu_k = {0, 5};
  EXPECT_EQ(oracle_visibility(p, 0), (std::vector<std::uint8_t>{1, 1, 1, 1, 0, 1, 1, 1, 1, 1}));
  std::swap(p.cu_q, p.cu_k);
  EXPECT_EQ(oracle_visibility(p, 0), (std::vector<std::uint8_t>{0, 0, 0, 0, 0, 0, 1, 0, 1, 1}));
}

TEST(Oracle, BlockedAndPlainFormsAgreeOnRandomCases) {
  RandomCaseOptions options;
  options.gpu_limits = false;
  options.long_share = 0;
  options.most_short_tokens = 150;
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    const RandomCase c = random_case(seed, options);
    const OracleCase p = c.oracle();
    const OracleResult result = oracle_forward(p, Emulate::kNothing, 2);
    std::vector<double> out;
    for (int row = 0; row < c.total_q; ++row) {
      for (int head = 0; head < c.heads; ++head) {
        const double lse = oracle_row(p, row, head, out);
        const double blocked = result.lse[static_cast<std::size_t>(head) * c.total_q + row];
        if (lse == -kInfinity) {
          ASSERT_EQ(blocked, lse) << c.describe();
        } else {
          ASSERT_NEAR(blocked, lse, 1e-10) << c.describe();
        }
        for (int d = 0; d < c.head_dim_v; ++d) {
          ASSERT_NEAR(
              result.out[(static_cast<std::size_t>(row) * c.heads + head) * c.head_dim_v + d],
              out[d], 1e-10)
              << c.describe();
        }
      }
    }
  }
}

TEST(Oracle, ThreadsDoNotChangeABit) {
  RandomCaseOptions options;
  options.long_share = 0;
  const OracleCase p = random_case(5, options).oracle();
  const OracleResult one = oracle_forward(p, Emulate::kBF16, 1);
  const OracleResult many = oracle_forward(p, Emulate::kBF16, 5);
  EXPECT_EQ(one.out, many.out);
  EXPECT_EQ(one.lse, many.lse);
  EXPECT_EQ(one.emulated_out, many.emulated_out);
}

class Measures : public ::testing::Test {
 protected:
  Measures() : case_(make()), expected_(oracle_forward(case_.oracle(), Emulate::kBF16)) {
    bound_ = emulated_vector_bound(expected_, case_.heads, case_.head_dim_v);
  }
  static RandomCase make() {
    RandomCaseOptions options;
    options.long_share = 1;
    options.most_long_tokens = 2200;
    options.most_heads = 1;
    options.dtype = DType::kBF16;
    options.head_dim = 64;
    options.head_dim_v = 64;
    options.softcap = false;
    options.lowering = Lowering::kCausal;
    return random_case(1, options);
  }
  ForwardError compare(const std::vector<double>& out, const std::vector<float>& lse = {}) const {
    return compare_forward(expected_.out, expected_.lse, out, lse, case_.heads, case_.head_dim_v);
  }
  /// The row that sees most.
  std::size_t last_row() const {
    std::size_t best = 0;
    for (std::size_t i = 0; i < expected_.lse.size(); ++i) {
      if (expected_.lse[i] > expected_.lse[best]) best = i;
    }
    return best;
  }
  RandomCase case_;
  OracleResult expected_;
  double bound_ = 0;
};

TEST_F(Measures, TheEmulationsOwnErrorIsThatOfItsType) {
  const ForwardError error = compare(expected_.emulated_out);
  EXPECT_GT(error.rel_l2, 5e-4);
  EXPECT_LT(error.rel_l2, 4e-3);
  EXPECT_LT(error.worst_vector, bound_);
  EXPECT_LT(bound_, 2e-2);
  const OracleResult f16 = oracle_forward(case_.oracle(), Emulate::kF16);
  EXPECT_LT(emulated_vector_bound(f16, case_.heads, case_.head_dim_v), bound_ / 4);
}

TEST_F(Measures, AZeroedRowBreaksTheVectorBound) {
  std::vector<double> out = expected_.emulated_out;
  const std::size_t row = last_row();
  std::fill_n(out.begin() + static_cast<long>(row) * 64, 64, 0.0);
  const ForwardError error = compare(out);
  EXPECT_GT(error.worst_vector, 10 * bound_);
  EXPECT_EQ(error.worst_row, static_cast<std::int64_t>(row));
}

TEST_F(Measures, ADroppedKeyTileBreaksTheVectorBound) {
  OracleCase p = case_.oracle();
  const std::size_t row = last_row();
  int b = 0;
  while (p.cu_q[b + 1] <= static_cast<int>(row)) ++b;
  ASSERT_GT(p.cu_k[b + 1] - p.cu_k[b], 500);
  const std::vector<double> full = p.v;
  for (int j = p.cu_k[b] + 64; j < p.cu_k[b] + 128; ++j) {
    for (int d = 0; d < 64; ++d) p.v[static_cast<std::size_t>(j) * p.heads_kv * 64 + d] = 0;
  }
  EXPECT_GT(compare(oracle_forward(p).out).worst_vector, 5 * bound_);
}

TEST_F(Measures, NaNAndWrongInfinitiesAreInfinitelyWrong) {
  std::vector<double> out = expected_.out;
  std::vector<float> lse(expected_.lse.begin(), expected_.lse.end());
  EXPECT_LT(compare(out, lse).lse, 1e-6);
  out[5] = std::nan("");
  lse[last_row()] = -std::numeric_limits<float>::infinity();
  const ForwardError error = compare(out, lse);
  EXPECT_EQ(error.rel_l2, kInfinity);
  EXPECT_EQ(error.max_abs, kInfinity);
  EXPECT_EQ(error.worst_vector, kInfinity);
  EXPECT_EQ(error.lse, kInfinity);
  lse[last_row()] = std::nanf("");
  EXPECT_EQ(compare(expected_.out, lse).lse, kInfinity);
}

TEST(CompareForward, ZerosWhereZerosBelongAreExact) {
  const std::vector<double> zeros(8, 0.0);
  EXPECT_EQ(compare_forward(zeros, {}, zeros, {}, 2, 2).rel_l2, 0);
  EXPECT_EQ(compare_forward(zeros, {}, {0, 0, 0, 1e-30, 0, 0, 0, 0}, {}, 2, 2).rel_l2, kInfinity);
}

TEST(HostTensor, StridesPlaceElementsAndGapsHoldNaN) {
  HostTensor t(DType::kF32, 2, 2, 3, 10, 4);
  EXPECT_EQ(t.size_bytes(), (10 + 4 + 3) * sizeof(float));
  t.set(1, 1, 2, 7.5);
  const auto* data = static_cast<const float*>(t.data());
  EXPECT_EQ(data[16], 7.5f);
  EXPECT_TRUE(std::isnan(data[3]));
  EXPECT_EQ(t.to_doubles().back(), 7.5);
  HostTensor half(DType::kBF16, 1, 1, 2, 99, 99);
  half.set(0, 0, 1, 1.001);
  EXPECT_EQ(half.get(0, 0, 1), 1.0);
  EXPECT_EQ(HostTensor(DType::kF16, 0, 4, 8).data(), nullptr);
}

TEST(RandomCase, SameSeedSameNumbers) {
  const RandomCase a = random_case(42);
  const RandomCase b = random_case(42);
  EXPECT_EQ(a.describe(), b.describe());
  EXPECT_EQ(a.start, b.start);
  ASSERT_EQ(a.k.size_bytes(), b.k.size_bytes());
  EXPECT_EQ(std::memcmp(a.k.data(), b.k.data(), a.k.size_bytes()), 0);
  EXPECT_NE(a.describe(), random_case(43).describe());
}

/// The composition that the semantics ask for, over as many cases as the kernels are judged on.
TEST(RandomCase, ThreeHundredSeedsCoverTheComposition) {
  std::set<int> dims;
  std::set<std::pair<int, int>> ratios, lowerings;
  int longs = 0, longer_q = 0, longer_k = 0, empty = 0, no_keys = 0, no_rows = 0, capped = 0;
  int other_v = 0, spare = 0, strided = 0;
  RandomCaseOptions options;
  options.most_long_tokens = 2300;
  options.numbers = false;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const RandomCase c = random_case(seed, options);
    dims.insert(c.head_dim);
    ratios.insert({c.heads, c.heads_kv});
    lowerings.insert({static_cast<int>(c.dtype), static_cast<int>(c.lowering)});
    longs += std::max(c.cu_q.back(), c.cu_k.back()) > 2000;
    capped += c.softcap > 0;
    other_v += c.head_dim_v != c.head_dim;
    spare += c.total_q > c.cu_q.back();
    strided += c.q.token_stride() != c.heads * c.head_dim;
    for (int b = 0; b < c.batch(); ++b) {
      const int len_q = c.cu_q[b + 1] - c.cu_q[b];
      const int len_k = c.cu_k[b + 1] - c.cu_k[b];
      longer_q += len_q > len_k;
      longer_k += len_k > len_q;
      empty += len_q == 0 && len_k == 0;
      no_keys += len_q > 0 && len_k == 0;
      no_rows += len_q == 0 && len_k > 0;
    }
    EXPECT_EQ(c.heads % c.heads_kv, 0);
    EXPECT_TRUE(c.heads == 1 || c.q.head_stride() % 8 == 0) << c.describe();
    EXPECT_TRUE(c.total_k <= 1 || c.k.token_stride() % 8 == 0) << c.describe();
  }
  EXPECT_EQ(dims.size(), 31u);
  EXPECT_EQ(ratios.size(), 9u);
  EXPECT_EQ(lowerings.size(), 8u);
  EXPECT_GE(longs, 80);
  for (const int count :
       {longer_q, longer_k, empty, no_keys, no_rows, capped, other_v, spare, strided}) {
    EXPECT_GE(count, 10);
  }
}

TEST(RandomForest, HasTheTokensAndReachesTheDegenerateForms) {
  SplitMix64 rng(6);
  bool chain = false, one_token = false, star = false, forest = false;
  for (int n = 0; n < 300; ++n) {
    std::vector<int> start, end;
    random_forest(rng, 60, start, end);
    ASSERT_EQ(start.size(), 60u);
    ASSERT_EQ(end.size(), 60u);
    const Tree tree = Tree::from_arrays(start, end);
    const auto nodes = static_cast<std::int64_t>(tree.nodes().size());
    chain |= nodes > 5 && tree.depth() == nodes;
    star |= nodes > 5 && tree.depth() == 2 && tree.leaves() == nodes - 1;
    one_token |= nodes == 60;
    forest |= std::count_if(tree.nodes().begin(), tree.nodes().end(),
                            [](const TreeNode& node) { return node.parent < 0; }) > 2;
  }
  EXPECT_TRUE(chain && one_token && star && forest);
}

}  // namespace
}  // namespace treeattn::testing
