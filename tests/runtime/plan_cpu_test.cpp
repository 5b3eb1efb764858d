#include "runtime/attention/plan_cpu.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "templates/shared/params.h"
#include "tests/support/oracle.h"
#include "tests/support/random_case.h"

namespace treeattn {
namespace {

using testing::oracle_sees;
using testing::OracleCase;
using testing::random_forest;

constexpr PlanView kViews[] = {{16, 16}, {64, 32}, {32, 128}, {128, 64}, {24, 64}, {4, 32}};
constexpr int kCanary = 0x5ca1ab1e;

/// A built plan; the ints behind the buffer prove that nothing was written there.
class BuiltPlan {
 public:
  BuiltPlan(const PlanShape& shape, const PlanInputs& inputs, int garbage = 0x7b7b7b7b)
      : shape_(shape), ints_(static_cast<std::size_t>(plan_offsets(shape).total_ints)) {
    buffer_.assign(ints_ + 64, garbage);
    std::fill(buffer_.begin() + static_cast<long>(ints_), buffer_.end(), kCanary);
    build_plan_cpu(shape, inputs, buffer_.data());
    EXPECT_TRUE(std::all_of(buffer_.begin() + static_cast<long>(ints_), buffer_.end(),
                            [](int value) { return value == kCanary; }));
  }
  PlanReader read() const { return {shape_, buffer_.data()}; }
  const int* data() const { return buffer_.data(); }
  int meta(int index) const { return buffer_[index]; }
  bool operator==(const BuiltPlan& other) const { return buffer_ == other.buffer_; }
  PlanReport report() const { return report_faults(shape_, buffer_.data()); }

 private:
  PlanShape shape_;
  std::size_t ints_;
  std::vector<int> buffer_;
};

/// Lengths and arrays without tensors; OracleCase carries them.
struct Problem {
  OracleCase rule;

  PlanInputs inputs() const {
    PlanInputs in;
    in.lowering = rule.rule;
    in.cu_seqlens_q = rule.cu_q.data();
    in.cu_seqlens_k = rule.cu_k.data();
    in.tree_dfs_order_start_q = rule.start.data();
    in.tree_dfs_order_end_k = rule.end.data();
    in.first = rule.first.data();
    in.len = rule.len.data();
    return in;
  }
  PlanShape shape(std::span<const PlanView> views = kViews) const {
    PlanShape out{};
    out.total_q = static_cast<int>(rule.total_q);
    out.total_k = static_cast<int>(rule.total_k);
    out.batch = rule.batch();
    out.num_views = static_cast<int>(views.size());
    std::copy(views.begin(), views.end(), out.views);
    return out;
  }
  int len_q(int b) const { return rule.cu_q[b + 1] - rule.cu_q[b]; }
  int len_k(int b) const { return rule.cu_k[b + 1] - rule.cu_k[b]; }
};

/// One sequence of each relation of q to k by turns, sometimes a second, sometimes spare capacity.
Problem random_problem(std::uint64_t seed) {
  SplitMix64 rng(seed);
  Problem p;
  const int batch = static_cast<int>(rng.between(1, 3));
  for (int b = 0; b < batch; ++b) {
    const auto tokens = static_cast<int>(rng.below(b == 0 ? 170 : 60));
    int len_q = tokens;
    int len_k = tokens;
    if (seed % 3 == 1) len_q = static_cast<int>(rng.between(0, tokens));
    if (seed % 3 == 2) len_k = static_cast<int>(rng.between(0, tokens));
    std::vector<int> start, end;
    random_forest(rng, tokens, start, end);
    p.rule.start.insert(p.rule.start.end(), start.end() - len_q, start.end());
    p.rule.end.insert(p.rule.end.end(), end.end() - len_k, end.end());
    p.rule.cu_q.push_back(p.rule.cu_q.back() + len_q);
    p.rule.cu_k.push_back(p.rule.cu_k.back() + len_k);
  }
  p.rule.total_q = p.rule.cu_q.back() + (rng.chance(0.3) ? rng.below(100) : 0);
  p.rule.total_k = p.rule.cu_k.back() + (rng.chance(0.3) ? rng.below(100) : 0);
  p.rule.start.resize(static_cast<std::size_t>(p.rule.total_q), -99);
  p.rule.end.resize(static_cast<std::size_t>(p.rule.total_k), INT_MAX);
  return p;
}

int sequence_of(const std::vector<int>& cu, int token) {
  return static_cast<int>(std::upper_bound(cu.begin(), cu.end(), token) - cu.begin()) - 1;
}

/// Every pair of packed tokens, those of different sequences and past the last one included.
void expect_same_mask(const Problem& p, const PlanReader& plan) {
  for (int i = 0; i < p.rule.total_q; ++i) {
    const int b = sequence_of(p.rule.cu_q, i);
    for (int j = 0; j < p.rule.total_k; ++j) {
      const bool inside = b < p.rule.batch() && j >= p.rule.cu_k[b] && j < p.rule.cu_k[b + 1];
      const bool expected =
          inside && oracle_sees(p.rule, b, i - p.rule.cu_q[b], j - p.rule.cu_k[b]);
      ASSERT_EQ(plan.sees(i, j), expected) << "row " << i << " key " << j;
    }
  }
}

struct Seen {
  bool any = false;
  bool all = true;
};

Seen brute_force(const Problem& p, int b, int row0, int rows, int key0, int keys) {
  Seen seen;
  for (int i = row0; i < row0 + rows; ++i) {
    for (int j = key0; j < key0 + keys; ++j) {
      const bool sees = oracle_sees(p.rule, b, i - p.rule.cu_q[b], j - p.rule.cu_k[b]);
      seen.any |= sees;
      seen.all &= sees;
    }
  }
  return seen;
}

void expect_sound_classes(const Problem& p, const PlanReader& plan, int view) {
  const auto [block_m, block_n] = plan.shape().views[view];
  for (int b = 0; b < p.rule.batch(); ++b) {
    const int slot0 = tile_slot0(p.rule.cu_k[b], b, block_n);
    for (int i = 0; i < p.len_q(b); i += block_m) {
      const int rows = std::min(block_m, p.len_q(b) - i);
      const int m0 = p.rule.cu_q[b] + i;
      for (int j = 0; j < p.len_k(b); j += block_n) {
        const int keys = std::min(block_n, p.len_k(b) - j);
        const KeyTile& tile = plan.key_tiles(view)[slot0 + j / block_n];
        const Seen seen = brute_force(p, b, m0, rows, p.rule.cu_k[b] + j, keys);
        const bool skipped = tile_skipped(tile, m0, m0 + rows - 1);
        ASSERT_FALSE(skipped && seen.any) << "row " << m0 << " key " << j;
        if (p.len_k(b) >= p.len_q(b)) {
          ASSERT_EQ(skipped, !seen.any) << "row " << m0 << " key " << j;
        }
        ASSERT_EQ(tile_full(tile, m0, m0 + rows - 1), seen.all && keys == block_n)
            << "row " << m0 << " key " << j;
      }
    }
  }
}

void expect_query_tiles(const Problem& p, const PlanReader& plan, int view) {
  const auto [block_m, block_n] = plan.shape().views[view];
  std::vector<int> covered(static_cast<std::size_t>(p.rule.total_q), 0);
  int most = 0;
  for (const QueryTile& tile : plan.query_tiles(view)) most = std::max(most, tile.work);
  const int shift = plan_order_shift(most);
  const QueryTile* previous = nullptr;
  long long visits = 0;
  for (const QueryTile& tile : plan.query_tiles(view)) {
    ASSERT_GE(tile.rows, 1);
    ASSERT_LE(tile.rows, block_m);
    for (int i = tile.row0; i < tile.row0 + tile.rows; ++i) ++covered.at(i);
    if (previous != nullptr) {
      const int before = previous->work >> shift;
      const int bin = tile.work >> shift;
      ASSERT_TRUE(before > bin || (before == bin && previous->row0 < tile.row0));
    }
    previous = &tile;
    const int b = sequence_of(p.rule.cu_q, tile.row0);
    if (b == p.rule.batch()) {
      ASSERT_EQ((tile.row0 - p.rule.cu_q.back()) % block_m, 0);
      ASSERT_TRUE(tile.keys == 0 && tile.lo == 0 && tile.hi == 0 && tile.work == 0);
      continue;
    }
    ASSERT_EQ((tile.row0 - p.rule.cu_q[b]) % block_m, 0);
    ASSERT_EQ(tile.key0, p.rule.cu_k[b]);
    ASSERT_EQ(tile.keys, p.len_k(b));
    ASSERT_EQ(tile.slot0, tile_slot0(tile.key0, b, block_n));
    int lo = 0, hi = 0, work = 0;
    for (int t = 0; t * block_n < tile.keys; ++t) {
      const KeyTile& keys = plan.key_tiles(view)[tile.slot0 + t];
      if (tile_skipped(keys, tile.row0, tile.row0 + tile.rows - 1)) continue;
      if (work++ == 0) lo = t;
      hi = t + 1;
    }
    ASSERT_EQ(tile.work, work) << "row " << tile.row0;
    ASSERT_EQ(tile.lo, lo) << "row " << tile.row0;
    ASSERT_EQ(tile.hi, hi) << "row " << tile.row0;
    visits += work;
  }
  EXPECT_TRUE(std::all_of(covered.begin(), covered.end(), [](int n) { return n == 1; }));
  EXPECT_EQ(plan.meta()[kMetaVisits + view], visits);
}

void expect_key_order(const Problem& p, const PlanReader& plan, int view) {
  const int block_n = plan.shape().views[view].block_n;
  std::vector<int> covered(static_cast<std::size_t>(p.rule.total_k), 0);
  const std::span<const int> rank = plan.key_rank(view);
  EXPECT_EQ(std::count(rank.begin(), rank.end(), INT_MAX),
            std::ssize(rank) - std::ssize(plan.key_order(view)));
  int place = 0;
  std::int64_t spanned = 0;
  int previous_octave = INT_MAX;
  int previous_slot = -1;
  for (const KeyOrder& entry : plan.key_order(view)) {
    const int b = sequence_of(p.rule.cu_k, entry.key0);
    ASSERT_EQ(entry.sequence, b);
    ASSERT_EQ(entry.slot,
              tile_slot0(p.rule.cu_k[b], b, block_n) + (entry.key0 - p.rule.cu_k[b]) / block_n);
    for (int j = entry.key0; j < entry.key0 + entry.keys; ++j) ++covered.at(j);
    const int rows = rows_spanned(plan.key_tiles(view)[entry.slot]);
    spanned += rows;
    const int bits = std::bit_width(static_cast<unsigned>(rows));
    ASSERT_TRUE(bits < previous_octave || (bits == previous_octave && entry.slot > previous_slot));
    previous_octave = bits;
    ASSERT_EQ(rank[static_cast<std::size_t>(entry.slot)], place++);
    previous_slot = entry.slot;
  }
  std::int64_t stored;
  std::memcpy(&stored, &plan.meta()[kMetaKeyRows + 2 * view], sizeof(stored));
  EXPECT_EQ(stored, spanned);
  EXPECT_TRUE(std::all_of(covered.begin(), covered.end(), [](int n) { return n == 1; }));
}

TEST(PlanCpu, ThreeThousandForestsAgreeWithTheElementRule) {
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Problem p = random_problem(seed);
    const BuiltPlan plan(p.shape(), p.inputs());
    EXPECT_TRUE(plan.report().valid);
    EXPECT_EQ(plan.meta(kMetaFirstBadToken), INT_MAX);
    expect_same_mask(p, plan.read());
    const int view = static_cast<int>(seed % std::size(kViews));
    expect_sound_classes(p, plan.read(), view);
    expect_query_tiles(p, plan.read(), view);
    expect_key_order(p, plan.read(), view);
    if (HasFailure()) return;
  }
}

TEST(PlanCpu, AnyEndArrayIsAnIntervalEvenIfNoTreeHasIt) {
  SplitMix64 rng(77);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Problem p = random_problem(seed);
    for (int& end : p.rule.end) end = static_cast<int>(rng.between(-3, 60));
    const BuiltPlan plan(p.shape(), p.inputs());
    expect_same_mask(p, plan.read());
    expect_query_tiles(p, plan.read(), 1);
    if (HasFailure()) return;
  }
}

TEST(PlanCpu, OtherLoweringsAgreeWithTheirRules) {
  SplitMix64 rng(5);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Problem p = random_problem(seed);
    for (const Lowering lowering : {Lowering::kCausal, Lowering::kFull, Lowering::kIntervals}) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " lowering " +
                   std::to_string(static_cast<int>(lowering)));
      p.rule.rule = lowering;
      p.rule.first.assign(static_cast<std::size_t>(p.rule.total_k), INT_MIN);
      p.rule.len.assign(static_cast<std::size_t>(p.rule.total_k), INT_MAX);
      for (int b = 0; b < p.rule.batch(); ++b) {
        for (int j = p.rule.cu_k[b]; j < p.rule.cu_k[b + 1]; ++j) {
          const auto begin = static_cast<int>(rng.between(0, p.len_q(b)));
          p.rule.len[j] = static_cast<int>(rng.between(0, p.len_q(b) - begin));
          p.rule.first[j] = p.rule.len[j] == 0 ? -5 : p.rule.cu_q[b] + begin;
        }
      }
      const BuiltPlan plan(p.shape(), p.inputs());
      EXPECT_TRUE(plan.report().valid);
      expect_same_mask(p, plan.read());
      expect_query_tiles(p, plan.read(), 3);
      expect_key_order(p, plan.read(), 3);
      if (HasFailure()) return;
    }
  }
}

TEST(PlanCpu, GranulesSummariseTheirKeys) {
  const Problem p = random_problem(12);
  const BuiltPlan built(p.shape(), p.inputs());
  const PlanReader plan = built.read();
  ASSERT_GT(p.len_k(0), 40);
  for (int g = 0; g * kGranuleKeys < p.len_k(0); ++g) {
    KeyTile expected{INT_MAX, -1, -1, INT_MAX};
    const int end = std::min(p.len_k(0), (g + 1) * kGranuleKeys);
    for (int j = g * kGranuleKeys; j < end; ++j) {
      ASSERT_GT(plan.len()[j], 0);  // q is as long as k: every key sees its own row
      const int last = plan.first()[j] + plan.len()[j] - 1;
      expected = {std::min(expected.min_first, plan.first()[j]), std::max(expected.max_last, last),
                  std::max(expected.max_first, plan.first()[j]), std::min(expected.min_last, last)};
    }
    if (end < (g + 1) * kGranuleKeys) expected.max_first = INT_MAX;
    const KeyTile& actual = plan.granules()[g];
    EXPECT_EQ(actual.min_first, expected.min_first);
    EXPECT_EQ(actual.max_last, expected.max_last);
    EXPECT_EQ(actual.max_first, expected.max_first);
    EXPECT_EQ(actual.min_last, expected.min_last);
  }
  const KeyTile& unused = plan.granules().back();
  EXPECT_EQ(unused.min_first, INT_MAX);
  EXPECT_EQ(unused.max_last, -1);
  EXPECT_EQ(unused.max_first, INT_MAX);
  EXPECT_EQ(unused.min_last, -1);
}

TEST(PlanCpu, WeightsBeyondTheBinsKeepTheOrder) {
  Problem p;
  p.rule.cu_q = p.rule.cu_k = {0, 40000, 40700};
  p.rule.total_q = p.rule.total_k = 40700;
  p.rule.rule = Lowering::kCausal;
  const BuiltPlan built(p.shape(), p.inputs());
  ASSERT_GT(built.read().query_tiles(0).front().work, kOrderBins);
  expect_query_tiles(p, built.read(), 0);
  expect_key_order(p, built.read(), 0);
}

TEST(PlanCpu, NothingOfTheOldBufferIsLeft) {
  const Problem p = random_problem(8);
  EXPECT_TRUE(BuiltPlan(p.shape(), p.inputs(), -1) == BuiltPlan(p.shape(), p.inputs(), 12345));
}

TEST(PlanCpu, ASequencesTilesDoNotDependOnItsNeighbours) {
  const Problem alone = random_problem(9);
  Problem among;
  SplitMix64 rng(10);
  std::vector<int> start, end;
  random_forest(rng, 77, start, end);
  among.rule.start = start;
  among.rule.end = end;
  among.rule.cu_q = among.rule.cu_k = {0, 77, 77 + alone.len_q(0)};
  among.rule.start.insert(among.rule.start.end(), alone.rule.start.begin(),
                          alone.rule.start.begin() + alone.len_q(0));
  among.rule.end.insert(among.rule.end.end(), alone.rule.end.begin(),
                        alone.rule.end.begin() + alone.len_k(0));
  among.rule.total_q = among.rule.total_k = among.rule.cu_q.back();
  const BuiltPlan a(alone.shape(), alone.inputs());
  const BuiltPlan b(among.shape(), among.inputs());
  const auto tiles_of = [](const PlanReader& plan, int sequence) {
    std::vector<std::vector<int>> out;
    const int row0 = plan.cu_q()[sequence];
    for (const QueryTile& t : plan.query_tiles(1)) {
      if (t.row0 < row0 || t.row0 >= plan.cu_q()[sequence + 1]) continue;
      out.push_back({t.row0 - row0, t.rows, t.keys, t.lo, t.hi, t.work});
    }
    return out;
  };
  ASSERT_FALSE(tiles_of(a.read(), 0).empty());
  EXPECT_EQ(tiles_of(a.read(), 0), tiles_of(b.read(), 1));
}

TEST(PlanCpu, EmptyShapesHaveNoTiles) {
  Problem p;
  PlanInputs in = p.inputs();
  in.tree_dfs_order_start_q = in.tree_dfs_order_end_k = nullptr;
  const BuiltPlan none(p.shape(), in);
  EXPECT_TRUE(none.report().valid);
  EXPECT_EQ(none.meta(kMetaQueryTiles), 0);
  EXPECT_EQ(none.meta(kMetaKeyTiles), 0);
  p.rule.cu_q = p.rule.cu_k = {0, 0, 0};
  const BuiltPlan hollow(p.shape(), p.inputs());
  EXPECT_TRUE(hollow.report().valid);
  EXPECT_EQ(hollow.meta(kMetaQueryTiles + 2), 0);
}

class PlanFaults : public ::testing::Test {
 protected:
  /// Three chains of 40 tokens.
  PlanFaults() {
    p_.rule.cu_q = p_.rule.cu_k = {0, 40, 80, 120};
    p_.rule.total_q = p_.rule.total_k = 120;
    p_.rule.start.assign(120, 0);
    p_.rule.end.assign(120, 0);
    for (int j = 0; j < 120; ++j) {
      p_.rule.first.push_back(j);
      p_.rule.len.push_back(40 - j % 40);
    }
  }
  /// Builds, checks the meta section, and that only the faulty sequences lose their work.
  void expect_fault(std::vector<int> faults, int first_bad_token) {
    const BuiltPlan built(p_.shape(), p_.inputs());
    const PlanReader plan = built.read();
    int count = 0, kinds = 0;
    for (int b = 0; b < 3; ++b) {
      EXPECT_EQ(plan.seq_fault()[b], faults[b]) << "sequence " << b;
      count += faults[b] != 0;
      kinds |= faults[b];
    }
    EXPECT_EQ(built.meta(kMetaBadSequences), count);
    EXPECT_EQ(built.meta(kMetaBadKind), kinds);
    EXPECT_EQ(built.meta(kMetaFirstBadToken), first_bad_token);
    EXPECT_EQ(built.meta(kMetaMagic), kPlanMagic);
    for (const QueryTile& tile : plan.query_tiles(1)) {
      if (tile.row0 >= plan.cu_q()[3]) continue;
      const int b = static_cast<int>(std::upper_bound(plan.cu_q(), plan.cu_q() + 4, tile.row0) -
                                     plan.cu_q()) -
                    1;
      EXPECT_EQ(tile.work < 0, faults[b] != 0) << "row " << tile.row0;
      if (tile.work < 0) {
        EXPECT_TRUE(tile.work == -1 && tile.lo == 0 && tile.hi == 0) << "row " << tile.row0;
      }
    }
    const PlanReport report = built.report();
    EXPECT_FALSE(report.valid);
    EXPECT_EQ(report.bad_sequences, count);
    EXPECT_EQ(report.first_bad_token, first_bad_token);
    EXPECT_THAT(report.message, ::testing::HasSubstr(std::to_string(first_bad_token)));
  }
  Problem p_;
};

TEST_F(PlanFaults, DecreasingStartIsFoundInItsSequence) {
  p_.rule.start[50] = 3;  // token 51 goes back to 0
  expect_fault({0, kFaultStartDecreases, 0}, 51);
  p_.rule.start[119] = -1;
  expect_fault({0, kFaultStartDecreases, kFaultStartDecreases}, 51);
}

TEST_F(PlanFaults, ALowerStartInTheNextSequenceIsLegal) {
  std::fill_n(p_.rule.start.begin(), 40, 5);
  std::fill_n(p_.rule.end.begin(), 40, 5);
  EXPECT_TRUE(BuiltPlan(p_.shape(), p_.inputs()).report().valid);
}

TEST_F(PlanFaults, CuSeqlensAreClampedAndBothSidesOfAMovedBoundaryAreWrong) {
  p_.rule.cu_q = {0, 40, 30, 120};
  expect_fault({0, kFaultCuSeqlensQ, kFaultCuSeqlensQ}, 40);
  p_.rule.cu_q = {0, 40, 80, 121};
  expect_fault({0, 0, kFaultCuSeqlensQ}, 80);
  p_.rule.cu_q = {3, 40, 80, 120};
  expect_fault({kFaultCuSeqlensQ, 0, 0}, 0);
  p_.rule.cu_q = {0, 40, 80, 120};
  p_.rule.cu_k = {0, INT_MIN, 80, INT_MAX};
  expect_fault({kFaultCuSeqlensK, kFaultCuSeqlensK, kFaultCuSeqlensK}, 0);
}

TEST_F(PlanFaults, IntervalsThatLeaveTheirSequenceAreClamped) {
  p_.rule.rule = Lowering::kIntervals;
  p_.rule.first[45] = 39;
  expect_fault({0, kFaultInterval, 0}, 45);
  p_.rule.first[45] = 45;
  p_.rule.len[47] = 40;
  expect_fault({0, kFaultInterval, 0}, 47);
  p_.rule.len[47] = -1;
  expect_fault({0, kFaultInterval, 0}, 47);
  p_.rule.len[47] = 0;
  p_.rule.first[100] = INT_MAX;
  p_.rule.len[100] = INT_MAX;
  expect_fault({0, 0, kFaultInterval}, 100);
}

TEST(PlanCpu, GarbageNeverLeavesTheBuffer) {
  SplitMix64 rng(99);
  const auto wild = [&] {
    constexpr int kEdges[] = {INT_MIN, -1, 0, 1, INT_MAX};
    return rng.chance(0.3) ? kEdges[rng.below(5)] : static_cast<int>(rng.between(-20, 150));
  };
  for (int n = 0; n < 2000; ++n) {
    Problem p;
    p.rule.rule = static_cast<Lowering>(rng.below(4));
    p.rule.total_q = rng.below(120);
    p.rule.total_k = rng.below(120);
    const auto batch = rng.below(5);
    p.rule.cu_q[0] = wild();
    for (std::int64_t b = 0; b < batch; ++b) {
      p.rule.cu_q.push_back(wild());
      p.rule.cu_k.push_back(wild());
    }
    for (auto* array : {&p.rule.start, &p.rule.end, &p.rule.first, &p.rule.len}) {
      for (int i = 0; i < 120; ++i) array->push_back(wild());
    }
    const BuiltPlan built(p.shape(), p.inputs());
    const PlanReader plan = built.read();
    for (int b = 0; b < p.rule.batch(); ++b) {
      for (int j = plan.cu_k()[b]; j < plan.cu_k()[b + 1]; ++j) {
        if (plan.len()[j] == 0) continue;
        ASSERT_GE(plan.first()[j], plan.cu_q()[b]);
        ASSERT_GT(plan.len()[j], 0);
        ASSERT_LE(plan.first()[j] + plan.len()[j], plan.cu_q()[b + 1]);
      }
    }
    for (int v = 0; v < 4; ++v) {
      std::vector<int> covered(static_cast<std::size_t>(p.rule.total_q), 0);
      for (const QueryTile& tile : plan.query_tiles(v)) {
        for (int i = tile.row0; i < tile.row0 + tile.rows; ++i) ++covered.at(i);
      }
      ASSERT_TRUE(std::all_of(covered.begin(), covered.end(), [](int c) { return c == 1; }));
    }
  }
}

}  // namespace
}  // namespace treeattn
