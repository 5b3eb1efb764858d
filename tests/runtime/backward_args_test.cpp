#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "generator/launch_bounds.h"
#include "generator/tile_space.h"
#include "runtime/attention/backward.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::HasSubstr;

template <class T = void>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr int kTokens = 1000;

struct Fixture {
  Plan plan;
  BackwardArgs args;

  explicit Fixture(bool deterministic = false, int tokens = kTokens) {
    args.heads = 4;
    args.heads_kv = 2;
    args.head_dim = 64;
    args.deterministic = deterministic;
    args.q = {at(0x10000), 256, 64};
    args.k = {at(0x20000), 128, 64};
    args.v = {at(0x30000), 128, 64};
    args.out = {at(0x40000), 256, 64};
    args.dout = {at(0x50000), 256, 64};
    args.lse = at<const float>(0x60000);
    args.dq = {at(0x70000), 256, 64};
    args.dk = {at(0x80000), 128, 64};
    args.dv = {at(0x90000), 128, 64};
    args.softmax_scale = 0.125;
    PlanShape shape{};
    shape.total_q = shape.total_k = tokens;
    shape.batch = 1;
    shape.num_views = 2;
    shape.views[0] = {spec().tile.block_m, spec().tile.block_n};
    const TileConfig dq = spec(Pass::kBackwardDq).tile;
    shape.views[1] = {dq.block_m, dq.block_n};
    plan = to_plan(shape);
    args.plan = &plan;
    args.plan_buffer = at<const std::int32_t>(0xa0000);
    args.workspace = at(0xb0000);
    args.workspace_bytes = std::size_t{1} << 40;
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  KernelSpec spec(Pass pass = Pass::kBackward) const {
    return default_spec(problem_for(pass, shape_of(args), Target{90, false}));
  }
  BackwardLaunch launch() const {
    return make_backward_launch(args, check_backward(args, true), spec(), 132);
  }
};

std::string refusal(const std::function<void(BackwardArgs&)>& change) {
  Fixture f;
  change(f.args);
  try {
    f.launch();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    return error.what();
  }
  return "accepted";
}

TEST(BackwardArgs, EveryBadArgumentIsNamed) {
  EXPECT_EQ(refusal([](BackwardArgs&) {}), "accepted");
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.lse = nullptr; }), HasSubstr("lse is null"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.dout.data = nullptr; }), HasSubstr("dout.data is"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.dq.data = at(0x70002); }), HasSubstr("dq.data is"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.dk.token_stride = 0; }), HasSubstr("dk's strides"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.dv.head_stride = 8; }), HasSubstr("dv's strides"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.softmax_scale = 0; }), HasSubstr("softmax_scale"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.workspace = nullptr; }),
              HasSubstr("workspace is null, expected backward_workspace_bytes()"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.workspace = at(0xb0008); }),
              HasSubstr("workspace is 0xb0008"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.workspace_bytes = 16; }),
              HasSubstr("workspace_bytes is 16, expected at least"));
  EXPECT_THAT(refusal([](BackwardArgs& a) { a.head_dim = 68; }), HasSubstr("head_dim is 68"));
}

TEST(BackwardLaunch, TheWorkspaceIsExactlyWhatTheApiStates) {
  for (const bool deterministic : {false, true}) {
    Fixture f(deterministic);
    const std::size_t bytes = backward_workspace_bytes(to_plan_shape(f.plan), shape_of(f.args),
                                                       f.spec(), 132, deterministic);
    f.args.workspace_bytes = bytes;
    EXPECT_NO_THROW(f.launch());
    f.args.workspace_bytes = bytes - 1;
    EXPECT_THROW(f.launch(), Error);
    const std::size_t stats = 2 * sizeof(float) * 4 * kTokens;
    EXPECT_GE(bytes, deterministic ? stats : stats + sizeof(float) * 4 * kTokens * 64);
    if (deterministic) {
      EXPECT_LE(bytes, stats + 64) << "no accumulators";
    }
  }
}

// Whatever the tree, as few tiles are shared for balance as there are slots on the chip.
TEST(BackwardLaunch, SharesOfHeavyTilesAreBounded) {
  Fixture f;
  const BackwardParams p = f.launch().params;
  EXPECT_GT(p.max_units, 0);
  EXPECT_LE(p.max_units * p.heads_kv, 4 * p.slots + 2 * p.heads_kv);
  EXPECT_LE(p.max_split, p.max_key_tiles);
  EXPECT_EQ(p.slots, 132 * blocks_per_sm(f.spec()));
}

TEST(BackwardLaunch, WhereManyRowsMaySeeATileEveryTileHasAccumulators) {
  const auto params = [](int tokens, int heads_kv) {
    Fixture f(false, tokens);
    f.args.heads_kv = heads_kv;
    f.args.k.token_stride = f.args.v.token_stride = f.args.dk.token_stride =
        f.args.dv.token_stride = 256;
    return f.launch().params;
  };
  const int many = 1 << 19;
  const BackwardParams grouped = params(many, 2);
  EXPECT_EQ(grouped.max_split, grouped.max_key_tiles);
  EXPECT_GE(grouped.max_units, grouped.max_split * 2) << "a query head each";
  const BackwardParams single = params(many, 4);
  EXPECT_LT(single.max_split, single.max_key_tiles / 10) << "there are no heads to walk apart";
  EXPECT_EQ(params(2047, 2).max_split, params(2047, 2).max_key_tiles) << "all may be heavy";
}

// A tile's rows are those of one sequence.
TEST(BackwardLaunch, ManyShortSequencesTakeNoAccumulatorsForHeadsApart) {
  const auto split = [](int tokens, int batch) {
    Fixture f(false, tokens);
    f.plan.batch = batch;
    return f.launch().params.max_split;
  };
  const int tokens = 1 << 18;
  const int few = 2 * 132 * blocks_per_sm(Fixture().spec()) / 2 + 1;
  const int block_n = Fixture().spec().tile.block_n;
  EXPECT_LE(split(tokens, 1 << 16), few + (tokens / block_n + tokens / 2048));
  EXPECT_GE(split(tokens, 64), tokens / block_n) << "they may be long";
  EXPECT_LE(split(2000, 500), few);
}

TEST(BackwardLaunch, DeterministicModeSharesNothingAndMakesDqElsewhere) {
  Fixture f(true);
  const BackwardLaunch launch = f.launch();
  EXPECT_EQ(launch.params.max_units, 0);
  EXPECT_EQ(launch.params.dq_accumulator, nullptr);
  EXPECT_EQ(launch.sum.x, 0U);
  BackwardParams params = launch.params;
  const Grid grid = add_dq_launch(params, to_plan_shape(f.plan), f.spec(Pass::kBackwardDq));
  EXPECT_GE(grid.x, 4U * kTokens / f.spec(Pass::kBackwardDq).tile.block_m);
  EXPECT_NE(params.key_tiles, launch.params.key_tiles) << "another view";
}

// The kernel numbers its blocks as this sum: those of dk and dv, then those of dq.
TEST(BackwardLaunch, OneLaunchSumsWhatTheMainKernelLeft) {
  Fixture f;
  const BackwardLaunch launch = f.launch();
  const BackwardConfig config = backward_config(f.spec());
  const unsigned dk_dv =
      static_cast<unsigned>(launch.params.max_split * f.args.heads_kv * config.tile_sum_blocks());
  ASSERT_GT(dk_dv, 0U);
  const unsigned dq_threads = kTokens * 64 / 16;
  EXPECT_EQ(launch.sum.x - dk_dv, 4 * ((dq_threads + 255) / 256));
  EXPECT_EQ(launch.sum.y * launch.sum.z, 1U);
  // Every key's 4 x 16 dims have a thread, for dk and for dv.
  EXPECT_GE(config.tile_sum_blocks() * kElementwiseThreads, 2 * config.block_n * 4);
}

TEST(BackwardLaunch, WideValuesNeedAsManyBlocksAsWideKeys) {
  const auto blocks = [](const char* text) {
    return backward_config(parse_kernel_spec(text)).tile_sum_blocks();
  };
  EXPECT_EQ(blocks("bwd/sm80@sm_90/bf16/d64v128/m64n128s2w8"), 2 * 128 * 8 / 256);
  EXPECT_EQ(blocks("bwd/sm80@sm_90/bf16/d128v64/m64n128s2w8"), 2 * 128 * 8 / 256);
  EXPECT_EQ(blocks("bwd/sm80@sm_90/bf16/d72v72/m64n64s2w8"), 2 * 2) << "80 dims: 320 threads";
}

TEST(BackwardLaunch, WithoutKeysOrQueriesOnlyTheOthersGetTheirZeros) {
  Fixture no_queries;
  no_queries.plan.total_q = 0;
  EXPECT_GT(no_queries.launch().main.x, 0U);
  EXPECT_EQ(no_queries.launch().sum.x, 0U);
  Fixture no_keys;
  no_keys.plan.total_k = 0;
  EXPECT_EQ(no_keys.launch().main.x, 0U);
  EXPECT_EQ(no_keys.launch().sum.x, 4U * 16) << "dq alone";
}

TEST(BackwardLaunch, APlanWithoutTheTilesIsRefused) {
  Fixture f;
  f.plan.num_views = 0;
  try {
    f.launch();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("the plan holds no tile lists"));
    EXPECT_THAT(error.what(), HasSubstr("bwd/sm80@sm_90"));
  }
}

}  // namespace
}  // namespace treeattn
