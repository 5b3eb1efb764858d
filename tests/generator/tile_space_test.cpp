#include "generator/tile_space.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "generator/arch.h"
#include "generator/launch_bounds.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::HasSubstr;

Problem problem(int head_dim, int head_dim_v, int cc = 90) {
  Problem p;
  p.target = {static_cast<std::uint16_t>(cc), false};
  p.head_dim = static_cast<std::uint16_t>(head_dim);
  p.head_dim_v = static_cast<std::uint16_t>(head_dim_v);
  return p;
}

Problem sm90_problem(int head_dim, int head_dim_v) {
  Problem p = problem(head_dim, head_dim_v);
  p.family = Family::kSm90;
  p.target = kSm90Target;
  return p;
}

std::string reason(const Problem& p, TileConfig tile) {
  return refuse_tile(p, tile).value_or("");
}

TEST(TileSpace, EveryHeadDimHasItsOwnDefaultSpec) {
  for (const ArchLimits& arch : known_targets()) {
    std::set<std::pair<int, int>> dims;
    for (const KernelSpec& spec : default_specs(Pass::kForward, arch.target)) {
      dims.insert({spec.problem.head_dim, spec.problem.head_dim_v});
      EXPECT_EQ(spec.problem.target, arch.target);
    }
    for (int dim = 16; dim <= 256; dim += 8) EXPECT_TRUE(dims.count({dim, dim})) << dim;
    EXPECT_TRUE(dims.count({192, 128}));
  }
}

// Any pair, not only the listed ones.
TEST(TileSpace, EveryPairOfHeadDimsHasALegalDefault) {
  for (const int cc : {80, 86, 90}) {
    for (int head_dim = 16; head_dim <= 256; head_dim += 8) {
      for (int head_dim_v = 16; head_dim_v <= 256; head_dim_v += 8) {
        Problem p = problem(head_dim, head_dim_v, cc);
        for (const Pass pass : {Pass::kForward, Pass::kBackward, Pass::kBackwardDq}) {
          p.pass = pass;
          EXPECT_EQ(refuse_tile(p, default_tile(p)), std::nullopt) << to_string(p);
        }
      }
    }
  }
}

TEST(TileSpace, EveryPairOfHeadDimsHasALegalDefaultInTheSm90Family) {
  for (int head_dim = 16; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 16; head_dim_v <= 256; head_dim_v += 8) {
      const Problem p = sm90_problem(head_dim, head_dim_v);
      EXPECT_EQ(refuse_tile(p, default_tile(p)), std::nullopt) << to_string(p);
    }
  }
}

TEST(TileSpace, Sm90TilesAreRefusedWithTheReason) {
  const Problem p = sm90_problem(128, 128);
  EXPECT_EQ(reason(p, {128, 128, 2, 8, 32}), "");
  EXPECT_THAT(reason(p, {64, 128, 2, 4, 32}), HasSubstr("block_m is 64, expected one of 128, 192"));
  EXPECT_THAT(reason(p, {128, 120, 2, 8, 32}), HasSubstr("block_n is 120, expected a multiple"));
  EXPECT_THAT(reason(p, {128, 128, 2, 8, 0}), HasSubstr("box_n is 0"));
  EXPECT_EQ(reason(p, {128, 80, 2, 8, 32}), "");  // of granules, not of boxes
  EXPECT_THAT(reason(p, {128, 128, 2, 8, 16}), HasSubstr("box_n is 16, expected one of 32, 64"));
  EXPECT_THAT(reason(p, {128, 256, 2, 8, 64}), HasSubstr("multiple of 16 from 16 to 240"));
  EXPECT_THAT(reason(p, {192, 176, 2, 12, 64}), HasSubstr("multiple of 16 from 16 to 160"));
  EXPECT_THAT(reason(sm90_problem(256, 256), {128, 144, 2, 8, 64}), HasSubstr("36 pieces"));
  EXPECT_THAT(reason(p, {128, 128, 1, 8, 64}), HasSubstr("stages is 1, expected 2"));
  EXPECT_THAT(reason(p, {128, 128, 2, 4, 64}), HasSubstr("warps is 4, expected 8"));
  EXPECT_THAT(reason(p, {192, 128, 2, 12, 64}), HasSubstr("registers"));
  EXPECT_THAT(reason(sm90_problem(256, 128), {128, 128, 2, 8, 64}),
              HasSubstr("bytes of shared memory"));
  EXPECT_THAT(reason(problem(128, 128), {128, 64, 2, 4, 64}), HasSubstr("no box_n"));
  Problem elsewhere = p;
  elsewhere.target = {100, true};
  EXPECT_THAT(refuse_problem(elsewhere).value_or(""), HasSubstr("compiled for sm_90a"));
  int legal = 0;
  for (const TileCandidate& candidate : tile_candidates(p)) {
    EXPECT_EQ(candidate.refused, reason(p, candidate.tile));
    legal += candidate.refused.empty() ? 1 : 0;
  }
  EXPECT_GT(legal, 5);
}

TEST(TileSpace, BackwardOfTheSm90FamilyHasOneTileForSomeHeadDims) {
  for (int head_dim = 16; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 16; head_dim_v <= 256; head_dim_v += 8) {
      Problem p = sm90_problem(head_dim, head_dim_v);
      p.pass = Pass::kBackward;
      const bool has = head_dim > 64 && head_dim <= 128 && head_dim_v <= 128;
      ASSERT_EQ(!refuse_problem(p), has) << to_string(p);
      if (!has) continue;
      EXPECT_EQ(reason(p, default_tile(p)), "") << to_string(p);
      const BackwardSm90Config config = backward_sm90_config(default_spec(p));
      EXPECT_LE(config.smem_bytes(), 227 * 1024);
      EXPECT_EQ(config.ds_offset() % 1024, 0) << "the swizzle's period";
      EXPECT_EQ(config.barrier_offset() % 8, 0);
    }
  }
  Problem p = sm90_problem(128, 128);
  p.pass = Pass::kBackward;
  EXPECT_THAT(reason(p, {128, 128, 2, 8}), HasSubstr("expected m64n128s2w8"));
  EXPECT_EQ(tile_candidates(p).size(), 1U);
}

TEST(TileSpace, DefaultsFitTheirTarget) {
  for (const ArchLimits& arch : known_targets()) {
    for (const KernelSpec& spec : default_specs(Pass::kForward, arch.target)) {
      const ForwardConfig config = forward_config(spec);
      EXPECT_LE(config.smem_bytes(), arch.smem_per_block) << to_string(spec);
      EXPECT_LE(blocks_per_sm(spec) * (config.smem_bytes() + 1024), arch.smem_per_sm)
          << to_string(spec);
      EXPECT_LE(blocks_per_sm(spec) * config.threads(), arch.max_threads_per_sm);
    }
  }
}

TEST(TileSpace, SmallSharedMemoryGetsSmallerTilesRatherThanNone) {
  const Problem large = problem(128, 128, 90);
  const Problem small = problem(128, 128, 86);
  EXPECT_LT(forward_config({small, default_tile(small)}).smem_bytes(),
            forward_config({large, default_tile(large)}).smem_bytes());
}

/// The view that a plan of the sm90 family holds for its default tile.
PlanView sm90_view(int head_dim, int head_dim_v) {
  const TileConfig tile = default_tile(sm90_problem(head_dim, head_dim_v));
  return {tile.block_m, tile.view_block_n()};
}

// Its 192 rows are no multiple of what two, four or eight warps own.
TEST(TileSpace, AllButSmallHeadsOfTheSm80FamilyWalkAViewOfTheSm90Family) {
  for (int head_dim = 16; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 16; head_dim_v <= 256; head_dim_v += 8) {
      const PlanView view = sm90_view(head_dim, head_dim_v);
      const Problem p = problem(head_dim, head_dim_v);
      const auto tile = sm80_tile_for_views(p, {&view, 1});
      EXPECT_EQ(tile.has_value(), std::max(head_dim, head_dim_v) > 64) << to_string(p);
      if (!tile) continue;
      EXPECT_EQ(reason(p, *tile), "") << to_string(p);
      EXPECT_EQ(tile->block_m, view.block_m);
      EXPECT_EQ(tile->block_n, view.block_n);
    }
  }
}

TEST(TileSpace, SmallHeadsOfTheSm80FamilyWalkBackwardsViews) {
  for (int head_dim = 16; head_dim <= 64; head_dim += 8) {
    for (int head_dim_v = 16; head_dim_v <= 64; head_dim_v += 8) {
      std::vector<PlanView> views{sm90_view(head_dim, head_dim_v)};
      for (const Pass pass : {Pass::kBackward, Pass::kBackwardDq}) {
        Problem p = problem(head_dim, head_dim_v);
        p.pass = pass;
        const TileConfig tile = default_tile(p);
        views.push_back({tile.block_m, tile.block_n});
      }
      EXPECT_TRUE(sm80_tile_for_views(problem(head_dim, head_dim_v), views));
    }
  }
}

TEST(TileSpace, TheTileForViewsIsTheDefaultWhereItCanBe) {
  const Problem p = problem(128, 128);
  const TileConfig usual = default_tile(p);
  const PlanView other{64, 128};
  const std::vector<PlanView> both{other, {usual.block_m, usual.block_n}};
  EXPECT_EQ(sm80_tile_for_views(p, both), usual);
  const auto second = sm80_tile_for_views(p, {&other, 1});
  ASSERT_TRUE(second);
  EXPECT_EQ(second->block_m, 64);
  EXPECT_EQ(second->block_n, 128);
  EXPECT_EQ(sm80_tile_for_views(p, {}), std::nullopt);
}

TEST(TileSpace, ATileForViewsMayHaveRowsForSeveralHeadsOfAToken) {
  const Problem p = problem(128, 128);
  const TileConfig usual = default_tile(p);
  const auto block_n = static_cast<int>(usual.block_n);
  for (int log2 = 0; log2 <= kMostHeadsPerPackLog2; ++log2) {
    const PlanView packed{usual.block_m >> log2, block_n};
    EXPECT_EQ(sm80_tile_for_views(p, {&packed, 1}, log2), usual) << log2;
    EXPECT_EQ(sm80_tile_for_views(p, {&packed, 1}, kMostHeadsPerPackLog2), usual) << log2;
  }
  const PlanView of_eight{usual.block_m / 8, block_n};
  EXPECT_EQ(sm80_tile_for_views(p, {&of_eight, 1}, 2)->block_m, usual.block_m / 2);
  EXPECT_EQ(sm80_tile_for_views(p, {&of_eight, 1}, 0), std::nullopt);
}

// Whatever of its views a plan of the sm90 family holds.
TEST(TileSpace, AllButSmallHeadsOfTheSm80FamilyWalkPackedViewsOfTheSm90Family) {
  for (int head_dim = 72; head_dim <= 256; head_dim += 8) {
    for (int most = 0; most <= kMostHeadsPerPackLog2; ++most) {
      for (int log2 = 0; log2 <= most; ++log2) {
        PlanView view = sm90_view(head_dim, head_dim);
        view.block_m >>= log2;
        const Problem p = problem(head_dim, head_dim);
        const auto tile = sm80_tile_for_views(p, {&view, 1}, most);
        ASSERT_TRUE(tile) << to_string(p);
        EXPECT_EQ(reason(p, *tile), "") << to_string(p);
        EXPECT_EQ(tile->block_n, view.block_n);
        EXPECT_EQ(tile->block_m % view.block_m, 0);
        EXPECT_LE(tile->block_m, 128) << "no larger than without packs";
      }
    }
  }
}

TEST(TileSpace, HeadDimsAreRefusedWithTheirValue) {
  EXPECT_EQ(refuse_problem(problem(128, 128)), std::nullopt);
  EXPECT_THAT(refuse_problem(problem(100, 128)).value_or(""), HasSubstr("head_dim is 100"));
  EXPECT_THAT(refuse_problem(problem(128, 8)).value_or(""), HasSubstr("head_dim_v is 8"));
  EXPECT_THAT(refuse_problem(problem(264, 128)).value_or(""), HasSubstr("from 16 to 256"));
  EXPECT_THROW(default_tile(problem(0, 0)), Error);
}

TEST(TileSpace, TilesAreRefusedWithTheReason) {
  const Problem p = problem(128, 128);
  EXPECT_EQ(reason(p, {128, 64, 2, 4}), "");
  EXPECT_THAT(reason(p, {96, 64, 2, 4}), HasSubstr("block_m is 96, expected one of"));
  EXPECT_THAT(reason(p, {128, 48, 2, 4}), HasSubstr("block_n is 48"));
  EXPECT_THAT(reason(p, {128, 64, 3, 4}), HasSubstr("stages is 3"));
  EXPECT_THAT(reason(p, {128, 64, 2, 3}), HasSubstr("warps is 3"));
  EXPECT_THAT(reason(p, {256, 64, 2, 4}), HasSubstr("own 64 rows"));
  EXPECT_THAT(reason(p, {128, 128, 2, 4}), HasSubstr("accumulators take 256 registers"));
  EXPECT_THAT(reason(problem(256, 256, 86), {128, 64, 2, 8}), HasSubstr("sm_86 offers 101376"));
  Problem plan;
  plan.pass = Pass::kPlan;
  EXPECT_EQ(reason(plan, {}), "");
  EXPECT_NE(reason(plan, {128, 64, 2, 4}), "");
}

TEST(TileSpace, BackwardTilesAreRefusedWithTheReason) {
  Problem p = problem(128, 128);
  p.pass = Pass::kBackward;
  EXPECT_EQ(reason(p, {64, 128, 2, 8}), "");
  EXPECT_THAT(reason(p, {64, 128, 2, 2}), HasSubstr("warps is 2, expected 4 or 8"));
  EXPECT_THAT(reason(p, {64, 32, 2, 8}), HasSubstr("block_n is 32, expected a multiple of 64"));
  EXPECT_THAT(reason(p, {128, 128, 2, 8}), HasSubstr("accumulators"));
  p.pass = Pass::kBackwardDq;
  EXPECT_EQ(reason(p, {64, 64, 2, 4}), "");
  EXPECT_THAT(reason(p, {128, 64, 2, 4}), HasSubstr("own 32 rows, expected 16"));
}

TEST(TileSpace, CandidatesAreTheLegalTilesAndReasonsForTheRest) {
  const Problem p = problem(256, 256);
  const auto candidates = tile_candidates(p);
  std::set<TileConfig> seen;
  int legal = 0;
  for (const TileCandidate& candidate : candidates) {
    EXPECT_TRUE(seen.insert(candidate.tile).second);
    EXPECT_EQ(candidate.refused, reason(p, candidate.tile));
    legal += candidate.refused.empty() ? 1 : 0;
  }
  EXPECT_GT(legal, 3);
  EXPECT_LT(legal, static_cast<int>(candidates.size()));
  EXPECT_TRUE(seen.count(default_tile(p)));
}

TEST(Arch, DevicesGetTheirTarget) {
  EXPECT_EQ(target_for_device(8, 6), (Target{86, false}));
  EXPECT_EQ(target_for_device(9, 0), (Target{90, false}));
  EXPECT_THROW(target_for_device(7, 5), Error);
}

TEST(Arch, HopperIsDescribedByBothOfItsTargets) {
  EXPECT_EQ(describe_targets({86, false}), "sm_86");
  EXPECT_EQ(describe_targets({90, false}), "sm_90");
  EXPECT_EQ(describe_targets(kSm90Target), "sm_90a (family sm90) and sm_90 (family sm80)");
}

TEST(Arch, TargetsNewerThanTheTableGetTheLimitsBelowThem) {
  EXPECT_EQ(arch_limits({88, false}).smem_per_block, arch_limits({87, false}).smem_per_block);
  EXPECT_EQ(arch_limits({89, false}).smem_per_block, 99 * 1024);
  EXPECT_EQ(arch_limits({90, true}).smem_per_block, 227 * 1024);
  EXPECT_TRUE(
      std::is_sorted(known_targets().begin(), known_targets().end(),
                     [](const ArchLimits& a, const ArchLimits& b) { return a.target < b.target; }));
}

}  // namespace
}  // namespace treeattn
