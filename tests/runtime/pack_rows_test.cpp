#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "runtime/attention/splitmix.h"
#include "tests/support/cpu_time.h"
#include "treeattn/error.h"
#include "treeattn/tree.h"

namespace treeattn {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Tokens = std::vector<std::int64_t>;

PackedRows pack(const std::vector<Tokens>& rows) {
  std::vector<std::span<const std::int64_t>> spans(rows.begin(), rows.end());
  return pack_rows(spans);
}

std::vector<std::int64_t> positions_of(const PackedRows& packed, std::size_t row) {
  return {packed.row_positions.begin() + packed.row_offsets[row],
          packed.row_positions.begin() + packed.row_offsets[row + 1]};
}

/// Every row reads back, its positions are exactly what its last token sees, and no prefix is
/// stored twice.
void check(const std::vector<Tokens>& rows, const PackedRows& packed) {
  std::vector<std::int32_t> start, end, ids;
  packed.tree.append_arrays(start, end);
  packed.tree.append_position_ids(ids);
  ASSERT_EQ(packed.position_ids, ids);
  ASSERT_EQ(packed.tokens.size(), start.size());
  ASSERT_EQ(packed.row_offsets.size(), rows.size() + 1);
  std::set<Tokens> prefixes;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::vector<std::int64_t> positions = positions_of(packed, r);
    ASSERT_EQ(positions.size(), rows[r].size());
    for (std::size_t t = 0; t < positions.size(); ++t) {
      ASSERT_EQ(packed.tokens[positions[t]], rows[r][t]);
      ASSERT_EQ(packed.position_ids[positions[t]], static_cast<std::int32_t>(t));
      prefixes.insert(Tokens(rows[r].begin(), rows[r].begin() + static_cast<long>(t) + 1));
    }
    if (positions.empty()) continue;
    std::vector<std::int64_t> seen;
    for (std::int64_t j = 0; j <= positions.back(); ++j) {
      if (start[positions.back()] <= end[j]) seen.push_back(j);
    }
    ASSERT_EQ(seen, positions) << "row " << r;
  }
  ASSERT_EQ(packed.tokens.size(), prefixes.size());
}

TEST(PackRows, SharedPromptIsStoredOnce) {
  const std::vector<Tokens> rows{{5, 6, 7, 1, 2}, {5, 6, 7, 3}, {5, 6, 7, 1, 4}};
  const PackedRows packed = pack(rows);
  EXPECT_THAT(packed.tokens, ElementsAre(5, 6, 7, 1, 2, 4, 3));
  EXPECT_THAT(packed.position_ids, ElementsAre(0, 1, 2, 3, 4, 4, 3));
  EXPECT_THAT(positions_of(packed, 0), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(positions_of(packed, 1), ElementsAre(0, 1, 2, 6));
  EXPECT_THAT(positions_of(packed, 2), ElementsAre(0, 1, 2, 3, 5));
  EXPECT_EQ(packed.tree.nodes().size(), 5u);
  check(rows, packed);
}

TEST(PackRows, ChildrenComeInOrderOfFirstAppearanceThroughSplits) {
  // The split of {1, 2, 3} must keep its place before {9} and after {4}.
  const PackedRows packed = pack({{4}, {1, 2, 3}, {9}, {1, 2, 8}, {1, 5}});
  EXPECT_THAT(packed.tokens, ElementsAre(4, 1, 2, 3, 8, 5, 9));
}

TEST(PackRows, PrefixesDuplicatesAndEmptyRowsAreLegal) {
  const std::vector<Tokens> rows{{}, {1, 2, 3}, {1, 2}, {1, 2, 3}, {}, {1, 2, 3, 4}, {7}};
  const PackedRows packed = pack(rows);
  check(rows, packed);
  EXPECT_THAT(packed.tokens, ElementsAre(1, 2, 3, 4, 7));
  EXPECT_THAT(positions_of(packed, 0), IsEmpty());
  EXPECT_THAT(positions_of(packed, 2), ElementsAre(0, 1));
}

TEST(PackRows, ARowMakesTheSameNodesBeforeOrAfterItsPrefix) {
  const auto lengths = [](const PackedRows& packed) {
    std::vector<std::int64_t> out;
    for (const TreeNode& node : packed.tree.nodes()) out.push_back(node.length);
    return out;
  };
  EXPECT_EQ(lengths(pack({{1, 2}, {1, 2, 3}})), lengths(pack({{1, 2, 3}, {1, 2}})));
}

TEST(PackRows, NothingPacksToNothing) {
  const PackedRows none = pack({});
  EXPECT_EQ(none.tree.tokens(), 0);
  EXPECT_THAT(none.row_offsets, ElementsAre(0));
  const PackedRows hollow = pack({{}, {}});
  EXPECT_THAT(hollow.row_offsets, ElementsAre(0, 0, 0));
  EXPECT_THAT(hollow.row_positions, IsEmpty());
}

TEST(PackRows, ExtremeTokenIdsAreOrdinary) {
  const std::vector<Tokens> rows{{INT64_MIN, -1, INT64_MAX}, {INT64_MIN, -1, 0}, {-1}, {0, 0, 0}};
  check(rows, pack(rows));
}

TEST(PackRows, RowsNameTheNodeThatTheyEndAt) {
  const PackedRows packed = pack({{5, 6, 7, 1, 2}, {}, {5, 6, 7, 3}, {5, 6, 7, 1, 4}, {5, 6, 7}});
  EXPECT_THAT(packed.row_nodes, ElementsAre(2, -1, 4, 3, 0));
}

PackedRows pack(const std::vector<Tokens>& rows, const PackOptions& options) {
  std::vector<std::span<const std::int64_t>> spans(rows.begin(), rows.end());
  return pack_rows(spans, options);
}

std::vector<std::int64_t> parents_of(const PackedRows& packed) {
  std::vector<std::int64_t> parents;
  for (const TreeNode& node : packed.tree.nodes()) parents.push_back(node.parent);
  return parents;
}

TEST(PackRows, PrefixesBelowTheMinimumAreNotShared) {
  // The first three share {0, 1, 2}; of the others none shares three tokens with another row.
  const std::vector<Tokens> rows{{0, 1, 2, 3}, {0, 1, 2, 4}, {0, 1, 2}, {0, 5, 6}, {0}, {0}};
  const PackedRows packed = pack(rows, {.min_shared = 3});
  EXPECT_THAT(packed.tokens, ElementsAre(0, 1, 2, 3, 4, 0, 5, 6, 0, 0));
  EXPECT_THAT(parents_of(packed), ElementsAre(-1, 0, 0, -1, -1, -1));
  EXPECT_THAT(packed.row_nodes, ElementsAre(1, 2, 0, 3, 4, 5));
  EXPECT_THAT(positions_of(packed, 3), ElementsAre(5, 6, 7));
  const PackedRows apart = pack(rows, {.min_shared = INT64_MAX});
  EXPECT_EQ(apart.tokens.size(), 16u);
  EXPECT_THAT(parents_of(apart), Each(-1));
}

TEST(PackRows, TokensBeyondTheMaximumAreNotShared) {
  const std::vector<Tokens> rows{{1, 2, 8, 8}, {1, 2, 8, 9}, {1, 2, 8, 8}, {1, 2}};
  const std::vector<std::int64_t> two(4, 2);
  EXPECT_THAT(pack(rows, {.max_shared = two}).tokens, ElementsAre(1, 2, 8, 8, 8, 9, 8, 8));
  const std::vector<std::int64_t> mixed{2, 4, 9, 0};
  const PackedRows packed = pack(rows, {.max_shared = mixed});
  EXPECT_THAT(packed.tokens, ElementsAre(1, 2, 8, 8, 8, 9, 8, 1, 2));
  EXPECT_THAT(positions_of(packed, 0), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(positions_of(packed, 2), ElementsAre(0, 1, 4, 6));
  EXPECT_THAT(positions_of(packed, 3), ElementsAre(7, 8));
}

TEST(PackRows, AMinimumCountsOnlyWhatMayBeShared) {
  const std::vector<Tokens> rows{{1, 2, 3}, {1, 2, 3}, {1, 2, 3}};
  const std::vector<std::int64_t> most{3, 1, 3};
  const PackedRows packed = pack(rows, {.min_shared = 2, .max_shared = most});
  EXPECT_THAT(packed.tokens, ElementsAre(1, 2, 3, 1, 2, 3));
  EXPECT_THAT(packed.row_nodes, ElementsAre(0, 1, 0));
}

TEST(PackRows, OptionsOutOfRangeAreRefused) {
  const auto message = [](const PackOptions& options) {
    try {
      pack({{1}, {2}}, options);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::vector<std::int64_t> negative{0, -1};
  const std::vector<std::int64_t> few{1};
  EXPECT_THAT(message({.min_shared = 0}), HasSubstr("min_shared is 0, expected at least 1"));
  EXPECT_THAT(message({.max_shared = negative}), HasSubstr("max_shared[1] is -1"));
  EXPECT_THAT(message({.max_shared = few}), HasSubstr("max_shared has 1 elements, expected"));
}

TEST(PackRows, RandomRowsReadBack) {
  SplitMix64 rng(3);
  for (int n = 0; n < 400; ++n) {
    std::vector<Tokens> rows(static_cast<std::size_t>(rng.below(30)));
    const std::int64_t vocabulary = rng.between(1, 4);
    for (Tokens& row : rows) {
      row.resize(static_cast<std::size_t>(rng.below(12)));
      for (std::int64_t& token : row) token = rng.below(vocabulary);
    }
    check(rows, pack(rows));
    if (HasFatalFailure()) FAIL() << "case " << n;
  }
}

/// A quadratic builder takes minutes here; the bound only has to tell those apart on a slow
/// machine.
TEST(PackRows, AMillionTokensPackInLinearTime) {
  SplitMix64 rng(4);
  std::vector<Tokens> group(64, Tokens(16384));
  for (std::size_t r = 0; r < group.size(); ++r) {
    for (std::size_t t = 0; t < group[r].size(); ++t) {
      group[r][t] = t < 8192 && r > 0 ? group[0][t] : rng.below(50000);
    }
  }
  std::vector<Tokens> singles(300'000);
  for (Tokens& row : singles) row = {rng.below(1 << 20), rng.below(4), rng.below(4)};
  for (const auto& rows : {group, singles}) {
    std::vector<std::span<const std::int64_t>> spans(rows.begin(), rows.end());
    const double begin = testing::cpu_ms();
    const PackedRows packed = pack_rows(spans);
    const double took = testing::cpu_ms() - begin;
    EXPECT_LT(took, 3000);
    RecordProperty(rows.size() == 64 ? "group_ms" : "singles_ms", static_cast<int>(took));
    EXPECT_EQ(static_cast<std::size_t>(packed.row_offsets.back()), packed.row_positions.size());
  }
}

}  // namespace
}  // namespace treeattn
