#include "runtime/attention/plan_stats.h"

#include <gtest/gtest.h>

#include "runtime/attention/plan_cpu.h"
#include "runtime/attention/workload.h"

namespace treeattn {
namespace {

struct Built {
  PlanShape shape{};
  std::vector<int> buffer;
};

Built build(const Workload& work, int block_m, int block_n) {
  const PackedTrees packed = work.pack();
  Built built;
  built.shape.total_q = built.shape.total_k = static_cast<int>(work.tokens());
  built.shape.batch = static_cast<int>(work.trees.size());
  built.shape.num_views = 1;
  built.shape.views[0] = {block_m, block_n};
  built.buffer.resize(static_cast<std::size_t>(plan_offsets(built.shape).total_ints));
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = packed.cu_seqlens.data();
  inputs.tree_dfs_order_start_q = packed.start.data();
  inputs.tree_dfs_order_end_k = packed.end.data();
  build_plan_cpu(built.shape, inputs, built.buffer.data());
  return built;
}

PlanStats stats_of(const std::string& spec, int block_m, int block_n) {
  const Built built = build(parse_workload(spec), block_m, block_n);
  return analyse_plan(built.shape, built.buffer.data(), 0);
}

TEST(PlanStats, UsefulSharesAreThePublishedOnes) {
  EXPECT_NEAR(stats_of("binary:6,512", 128, 128).useful_share, 0.97, 0.006);
  EXPECT_NEAR(stats_of("binary:6,500", 128, 128).useful_share, 0.88, 0.006);
  EXPECT_NEAR(stats_of("binary:9,64", 128, 128).useful_share, 0.60, 0.006);
  EXPECT_NEAR(stats_of("binary:9,64", 128, 64).useful_share, 0.83, 0.006);
  EXPECT_NEAR(stats_of("binary:9,64", 64, 64).useful_share, 0.94, 0.006);
  const PlanStats ragged = stats_of("binary:9,61", 128, 128);
  EXPECT_NEAR(ragged.useful_share, 0.49, 0.006);
  EXPECT_NEAR(
      static_cast<double>(ragged.tiles_partial) / static_cast<double>(ragged.tiles_visited()), 0.90,
      0.01);
}

TEST(PlanStats, AChainSkipsNothingOfTheCausalTriangle) {
  const PlanStats stats = stats_of("chain:1024", 128, 64);
  EXPECT_EQ(stats.tiles_skipped, 0);
  EXPECT_EQ(stats.tiles_visited(), 2 * 8 * 9 / 2);
  EXPECT_EQ(stats.tiles_partial, 8 * 2);
  EXPECT_EQ(stats.tokens_saved, 0);
}

TEST(PlanStats, TokensAndPairsAreTheTrees) {
  for (const char* spec : {"fork:100,5x33", "comb:50,7,20,11", "binary:5,9", "3*random:8,40,30",
                           "random:1,60,12", "2*fork:17,3x1"}) {
    const Workload work = parse_workload(spec);
    const PlanStats stats = stats_of(spec, 32, 16);
    EXPECT_EQ(stats.keys, work.tokens()) << spec;
    EXPECT_EQ(stats.rows, work.tokens()) << spec;
    EXPECT_EQ(stats.visible_pairs, work.visible_pairs()) << spec;
    EXPECT_EQ(stats.unshared_tokens, work.unshared_tokens()) << spec;
    EXPECT_EQ(stats.tokens_saved, work.unshared_tokens() - work.tokens()) << spec;
  }
}

TEST(PlanStats, GridAndCountsAgree) {
  const Built built = build(parse_workload("2*random:21,30,40"), 64, 32);
  const PlanStats stats = analyse_plan(built.shape, built.buffer.data(), 0);
  std::int64_t full = 0, partial = 0;
  for (int b = 0; b < 2; ++b) {
    const TileGrid grid = tile_grid(built.shape, built.buffer.data(), 0, b);
    for (const TileClass c : grid.classes) {
      full += c == TileClass::kFull;
      partial += c == TileClass::kPartial;
    }
    EXPECT_EQ(grid.at(0, 0), TileClass::kPartial);  // the diagonal is never full
  }
  EXPECT_GT(full, 0);
  EXPECT_GT(stats.tiles_skipped, 0);
  EXPECT_EQ(stats.tiles_full, full);
  EXPECT_EQ(stats.tiles_partial, partial);
}

TEST(PlanStats, BadSequencesAreLeftOut) {
  const Workload work = parse_workload("2*chain:64");
  PackedTrees packed = work.pack();
  packed.start[10] = 5;
  Built built = build(work, 32, 32);
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = packed.cu_seqlens.data();
  inputs.tree_dfs_order_start_q = packed.start.data();
  inputs.tree_dfs_order_end_k = packed.end.data();
  build_plan_cpu(built.shape, inputs, built.buffer.data());
  const PlanStats stats = analyse_plan(built.shape, built.buffer.data(), 0);
  EXPECT_EQ(stats.bad_sequences, 1);
  EXPECT_EQ(stats.rows, 64);
  EXPECT_EQ(stats.visible_pairs, 64 * 65 / 2);
  EXPECT_EQ(stats.tiles_visited(), 3);
}

}  // namespace
}  // namespace treeattn
