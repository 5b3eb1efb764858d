// From forward's arguments to its launch: every bad argument is named with its value, good ones
// become the parameters that the kernel reads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "generator/tile_space.h"
#include "runtime/attention/forward.h"
#include "tests/support/allocation_counter.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

using ::testing::HasSubstr;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kBigL2 = std::int64_t{1} << 40;

const void* at(std::uintptr_t address) {
  return reinterpret_cast<const void*>(address);  // NOLINT(performance-no-int-to-ptr)
}
void* writable_at(std::uintptr_t address) {
  return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

/// Good arguments on a GPU: 4 heads over 2, head dims 64 and 128. Nothing is ever read.
struct Fixture {
  Plan plan;
  ForwardArgs args;

  Fixture() {
    plan.total_q = 10;
    plan.total_k = 12;
    plan.batch = 2;
    plan.num_views = 1;
    const TileConfig tile = spec().tile;
    plan.views[0] = {tile.block_m, tile.block_n};
    args.heads = 4;
    args.heads_kv = 2;
    args.head_dim = 64;
    args.head_dim_v = 128;
    args.q = {at(0x10000), 4 * 64, 64};
    args.k = {at(0x20000), 2 * 64, 64};
    args.v = {at(0x30000), 2 * 128, 128};
    args.out = {writable_at(0x40000), 4 * 128, 128};
    args.lse = static_cast<float*>(writable_at(0x50000));
    args.softmax_scale = 0.125;
    args.plan = &plan;
    args.plan_buffer = static_cast<const std::int32_t*>(at(0x60000));
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  static KernelSpec spec(bool softcap = false) {
    Shape shape{DType::kBF16, 4, 2, 64, 128};
    shape.softcap = softcap;
    return default_spec(problem_for(Pass::kForward, shape, Target{90, false}));
  }
  ForwardLaunch launch(int sm_count = 132, std::int64_t l2_bytes = kBigL2) const {
    return make_forward_launch(args, check_forward(args, true), spec(args.softcap > 0), sm_count,
                               l2_bytes);
  }
};

using Change = std::function<void(ForwardArgs&, Plan&)>;

/// The refusal of changed arguments; "accepted" if there is none.
std::string refusal(const Change& change, bool cuda = true) {
  Fixture f;
  change(f.args, f.plan);
  try {
    check_forward(f.args, cuda);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    return error.what();
  }
  return "accepted";
}

struct Bad {
  const char* name;
  Change change;
  const char* message;
};

/// A change that is one expression on the arguments `a` or the plan's header `p`.
#define CHANGE(expression) [](ForwardArgs& a, Plan& p) { (void)a, (void)p, (expression); }

const std::vector<Bad>& bad_everywhere() {
  static const std::vector<Bad> table{
      {"no heads", CHANGE(a.heads = 0), "heads is 0, expected at least 1"},
      {"negative heads", CHANGE(a.heads = -4), "heads is -4, expected at least 1"},
      {"no kv heads", CHANGE(a.heads_kv = 0), "heads_kv is 0, expected at least 1"},
      {"ratio", CHANGE(a.heads = 5), "heads is 5, expected a multiple of heads_kv = 2"},
      {"more kv heads", CHANGE(a.heads_kv = 8), "heads is 4, expected a multiple of heads_kv = 8"},
      {"dtype", CHANGE(a.dtype = static_cast<DType>(7)), "dtype is 7, expected 0 (f16)"},
      {"negative dtype", CHANGE(a.dtype = static_cast<DType>(-1)), "dtype is -1"},
      {"head_dim", CHANGE(a.head_dim = 0), "head_dim is 0, expected"},
      {"head_dim_v", CHANGE(a.head_dim_v = -8), "head_dim_v is -8, expected"},
      {"no scale", CHANGE(a.softmax_scale = 0), "softmax_scale is 0, expected a positive"},
      {"scale", CHANGE(a.softmax_scale = -0.5), "softmax_scale is -0.5, expected a positive"},
      {"nan scale", CHANGE(a.softmax_scale = kNaN), "softmax_scale is nan, expected a positive"},
      {"inf scale", CHANGE(a.softmax_scale = kInfinity), "softmax_scale is inf"},
      {"softcap", CHANGE(a.softcap = -1), "softcap is -1, expected 0 (off) or a positive"},
      {"nan softcap", CHANGE(a.softcap = kNaN), "softcap is nan, expected 0 (off)"},
      {"inf softcap", CHANGE(a.softcap = kInfinity), "softcap is inf, expected 0 (off)"},
      {"no plan", CHANGE(a.plan = nullptr), "plan is null, expected the header that plan_for()"},
      {"no buffer", CHANGE(a.plan_buffer = nullptr), "plan_buffer is null, expected the buffer"},
      {"plan version", CHANGE(p.version = 2), "plan.version is 2, expected 1"},
      {"plan size", CHANGE(p.struct_size = 12), "plan.struct_size is 12"},
      {"plan batch", CHANGE(p.batch = -1), "plan.batch is -1"},
      {"plan tile", CHANGE(p.views[0].block_m = 0), "plan.views[0].block_m is 0"},
      {"no q", CHANGE(a.q.data = nullptr), "q.data is null, expected a pointer"},
      {"no k", CHANGE(a.k.data = nullptr), "k.data is null, expected a pointer"},
      {"no v", CHANGE(a.v.data = nullptr), "v.data is null, expected a pointer"},
      {"no out", CHANGE(a.out.data = nullptr), "out.data is null, expected a pointer"},
      {"one out row", CHANGE(a.out.token_stride = 0), "out's strides is token_stride 0"},
      {"one out head", CHANGE(a.out.head_stride = 0), "head_stride 0, expected strides that keep"},
      {"out heads overlap", CHANGE(a.out.head_stride = 120), "head_stride 120, expected strides"},
      {"out rows overlap", CHANGE(a.out.token_stride = 504), "token_stride 504, head_stride 128"},
      {"out strides beyond int64",
       CHANGE(a.out.token_stride = a.out.head_stride = std::int64_t{1} << 62), "expected strides"},
      {"tiny scale", CHANGE(a.softmax_scale = 1e-60), "softmax_scale is 1e-60, expected 1e-37 to"},
      {"huge scale", CHANGE(a.softmax_scale = 1e60), "softmax_scale is 1e+60, expected 1e-37 to"},
      {"huge ratio", CHANGE((a.softcap = 1.5e-37, a.softmax_scale = 4)), "softmax_scale / softcap"},
      {"buffer alignment", CHANGE(a.plan_buffer += 1), "expected a pointer aligned to 16 bytes"},
      {"lse alignment", CHANGE(a.lse = reinterpret_cast<float*>(0x50002)),
       "lse is 0x50002, expected a pointer aligned to 4 bytes"},
  };
  return table;
}

const std::vector<Bad>& bad_on_a_gpu() {
  static const std::vector<Bad> table{
      {"f32", CHANGE(a.dtype = DType::kF32), "dtype is f32, expected f16 or bf16 on a GPU"},
      {"f64", CHANGE(a.dtype = DType::kF64), "dtype is f64, expected f16 or bf16 on a GPU"},
      {"dim 8", CHANGE(a.head_dim = 8), "head_dim is 8, expected a multiple of 8 from 16 to 256"},
      {"dim 68", CHANGE(a.head_dim = 68), "head_dim is 68, expected a multiple of 8"},
      {"dim 264", CHANGE(a.head_dim = 264), "head_dim is 264, expected a multiple of 8"},
      {"v dim", CHANGE(a.head_dim_v = 100), "head_dim_v is 100, expected a multiple of 8"},
      {"q data", CHANGE(a.q.data = at(0x10008)), "q.data is 0x10008, expected a pointer aligned"},
      {"k data", CHANGE(a.k.data = at(0x20002)), "k.data is 0x20002, expected a pointer aligned"},
      {"v data", CHANGE(a.v.data = at(0x30001)), "v.data is 0x30001, expected a pointer aligned"},
      {"out data", CHANGE(a.out.data = writable_at(0x40004)), "out.data is 0x40004, expected"},
      {"q token", CHANGE(a.q.token_stride = 257),
       "q.token_stride is 257 elements, expected a multiple of 8 elements (16 bytes)"},
      {"q head", CHANGE(a.q.head_stride = 68), "q.head_stride is 68 elements"},
      {"k token", CHANGE(a.k.token_stride = -4), "k.token_stride is -4 elements"},
      {"k head", CHANGE(a.k.head_stride = 65), "k.head_stride is 65 elements"},
      {"v token", CHANGE(a.v.token_stride = 12), "v.token_stride is 12 elements"},
      {"v head", CHANGE(a.v.head_stride = 1), "v.head_stride is 1 elements"},
      {"out token", CHANGE(a.out.token_stride = 516), "out.token_stride is 516 elements"},
      {"out head", CHANGE((a.out.token_stride = 1024, a.out.head_stride = 129)),
       "out.head_stride is 129 elements"},
  };
  return table;
}

TEST(ForwardArgsTest, GoodArgumentsAreAccepted) {
  EXPECT_EQ(refusal(CHANGE(a.lse = nullptr)), "accepted");
  EXPECT_EQ(refusal(CHANGE(a.dtype = DType::kF16)), "accepted");
  EXPECT_EQ(refusal(CHANGE(a.softcap = 30)), "accepted");
  EXPECT_EQ(refusal(CHANGE(a.heads_kv = 4)), "accepted");
  EXPECT_EQ(refusal(CHANGE(a.heads_kv = 1)), "accepted");
}

TEST(ForwardArgsTest, EveryBadArgumentIsNamedWithItsValue) {
  for (const Bad& bad : bad_everywhere()) {
    EXPECT_THAT(refusal(bad.change), HasSubstr(bad.message)) << bad.name;
    EXPECT_THAT(refusal(bad.change, false), HasSubstr(bad.message)) << bad.name << " on the CPU";
  }
}

TEST(ForwardArgsTest, WhatOnlyAGpuAsksForIsRefusedOnlyThere) {
  for (const Bad& bad : bad_on_a_gpu()) {
    EXPECT_THAT(refusal(bad.change), HasSubstr(bad.message)) << bad.name;
    EXPECT_EQ(refusal(bad.change, false), "accepted") << bad.name;
  }
}

TEST(ForwardArgsTest, AHeadDimVOfZeroIsTheHeadDim) {
  Fixture f;
  f.args.head_dim_v = 0;
  EXPECT_EQ(shape_of(f.args).head_dim_v, 64);
  EXPECT_NO_THROW(check_forward(f.args, true));
}

TEST(ForwardArgsTest, StridesOfDimensionsOfSizeOneAreIgnored) {
  const auto one_head = [](ForwardArgs& a, Plan&) {
    a.heads = a.heads_kv = 1;
    a.q.head_stride = 3;
    a.k.head_stride = a.v.head_stride = -1;
    a.out.head_stride = 0;
  };
  EXPECT_EQ(refusal(one_head), "accepted");
  const auto one_token = [](ForwardArgs& a, Plan& p) {
    p.total_q = p.total_k = 1;
    a.q.token_stride = 7;
    a.k.token_stride = a.v.token_stride = 1;
    a.out.token_stride = 0;
  };
  EXPECT_EQ(refusal(one_token), "accepted");
}

TEST(ForwardArgsTest, PointersOfEmptyTensorsMayBeNull) {
  EXPECT_EQ(refusal(CHANGE((p.total_q = 0, a.q.data = nullptr, a.out.data = nullptr))), "accepted");
  EXPECT_EQ(refusal(CHANGE((p.total_k = 0, a.k.data = nullptr, a.v.data = nullptr))), "accepted");
  EXPECT_THAT(refusal(CHANGE((p.total_q = 0, a.v.data = nullptr))), HasSubstr("v.data is null"));
}

TEST(ForwardArgsTest, KeysSharedByAllHeadsMayHaveStrideZero) {
  EXPECT_EQ(refusal(CHANGE((a.k.head_stride = 0, a.v.head_stride = 0))), "accepted");
}

TEST(PlanInputsTest, ThePointersThatALoweringNeedsMustBeThere) {
  PlanShape shape{};
  shape.total_q = 3;
  shape.total_k = 4;
  shape.batch = 1;
  const std::int32_t some = 0;
  const auto check = [&](Lowering lowering, const std::function<void(PlanInputs&)>& change) {
    PlanInputs in;
    in.lowering = lowering;
    in.cu_seqlens_q = in.cu_seqlens_k = in.tree_dfs_order_start_q = in.tree_dfs_order_end_k =
        in.first = in.len = &some;
    change(in);
    try {
      check_plan_inputs(shape, in);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const auto without = [&](Lowering lowering, const std::int32_t* PlanInputs::*pointer) {
    return check(lowering, [&](PlanInputs& in) { in.*pointer = nullptr; });
  };
  for (const Lowering any :
       {Lowering::kTree, Lowering::kCausal, Lowering::kFull, Lowering::kIntervals}) {
    EXPECT_THAT(without(any, &PlanInputs::cu_seqlens_q),
                HasSubstr("cu_seqlens_q is null, expected a pointer to batch + 1 int32"));
    EXPECT_THAT(without(any, &PlanInputs::cu_seqlens_k), HasSubstr("cu_seqlens_k is null"));
  }
  EXPECT_THAT(without(Lowering::kTree, &PlanInputs::tree_dfs_order_start_q),
              HasSubstr("tree_dfs_order_start_q is null, expected a pointer to total_q int32"));
  EXPECT_THAT(without(Lowering::kTree, &PlanInputs::tree_dfs_order_end_k),
              HasSubstr("tree_dfs_order_end_k is null"));
  EXPECT_THAT(without(Lowering::kIntervals, &PlanInputs::first), HasSubstr("first is null"));
  EXPECT_THAT(without(Lowering::kIntervals, &PlanInputs::len), HasSubstr("len is null"));
  EXPECT_EQ(without(Lowering::kCausal, &PlanInputs::tree_dfs_order_start_q), "accepted");
  EXPECT_EQ(without(Lowering::kFull, &PlanInputs::first), "accepted");
  EXPECT_EQ(without(Lowering::kIntervals, &PlanInputs::tree_dfs_order_end_k), "accepted");
  EXPECT_THAT(check(static_cast<Lowering>(4), [](PlanInputs&) {}),
              HasSubstr("lowering is 4, expected 0 (tree)"));
  shape.total_q = 0;
  EXPECT_EQ(without(Lowering::kTree, &PlanInputs::tree_dfs_order_start_q), "accepted");
  shape.batch = 0;
  EXPECT_EQ(without(Lowering::kFull, &PlanInputs::cu_seqlens_q), "accepted");
}

TEST(ForwardLaunchTest, ParametersAreTheArguments) {
  Fixture f;
  const ForwardLaunch launch = f.launch();
  const ForwardParams& p = launch.params;
  EXPECT_EQ(p.q, f.args.q.data);
  EXPECT_EQ(p.k, f.args.k.data);
  EXPECT_EQ(p.v, f.args.v.data);
  EXPECT_EQ(p.out, f.args.out.data);
  EXPECT_EQ(p.lse, f.args.lse);
  EXPECT_EQ(p.plan, f.args.plan_buffer);
  EXPECT_EQ(p.q_token_stride, 256);
  EXPECT_EQ(p.q_head_stride, 64);
  EXPECT_EQ(p.v_token_stride, 256);
  EXPECT_EQ(p.out_head_stride, 128);
  EXPECT_EQ(p.heads_per_kv, 2);
  EXPECT_EQ(p.head_packs, 4);
  EXPECT_EQ(p.heads_per_pack_log2, 0);
  EXPECT_EQ(p.tokens_in_8_rows, 8);
  EXPECT_EQ(p.total_q, 10);
  const PlanShape plan = to_plan_shape(f.plan);
  const PlanOffsets offsets = plan_offsets(plan);
  EXPECT_EQ(p.first, offsets.first);
  EXPECT_EQ(p.len, offsets.len);
  EXPECT_EQ(p.query_tiles, offsets.views[0].query_tiles);
  EXPECT_EQ(p.key_tiles, offsets.views[0].key_tiles);
  EXPECT_EQ(p.query_tile_count, kMetaQueryTiles);
  // One block for every (query tile, head) that the totals allow.
  EXPECT_EQ(p.max_query_tiles, tile_slots(10, 2, plan.views[0].block_m));
  EXPECT_EQ(launch.grid.x, static_cast<unsigned>(p.max_query_tiles) * 4);
  EXPECT_EQ(launch.grid.y * launch.grid.z, 1U);
}

TEST(ForwardLaunchTest, TheViewOfTheKernelsTileIsTaken) {
  Fixture f;
  f.plan.num_views = 3;
  f.plan.views[2] = f.plan.views[0];
  f.plan.views[0] = {16, 16};
  f.plan.views[1] = {f.plan.views[2].block_m, 16};
  const PlanOffsets offsets = plan_offsets(to_plan_shape(f.plan));
  const ForwardParams p = f.launch().params;
  EXPECT_EQ(p.query_tiles, offsets.views[2].query_tiles);
  EXPECT_EQ(p.query_tile_count, kMetaQueryTiles + 2);
}

TEST(ForwardLaunchTest, APackedViewIsWalkedInTokens) {
  Fixture f;  // two query heads to a kv head
  f.plan.total_q = 1000;
  f.args.out.token_stride = 4 * 128;
  const int block_m = f.plan.views[0].block_m;
  f.plan.views[0].block_m = block_m / 2;
  const ForwardLaunch launch = f.launch();
  const ForwardParams& p = launch.params;
  EXPECT_EQ(p.head_packs, 2);
  EXPECT_EQ(p.heads_per_kv, 2);
  EXPECT_EQ(p.heads_per_pack_log2, 1);
  EXPECT_EQ(p.tokens_in_8_rows, 4);
  EXPECT_EQ(p.max_query_tiles, tile_slots(1000, 2, block_m / 2));
  EXPECT_EQ(launch.grid.x, static_cast<unsigned>(p.max_query_tiles) * 2);
  EXPECT_EQ(p.query_tile_count, kMetaQueryTiles);
  f.args.heads_kv = 4;  // no head shares its keys: the view is another tile's
  EXPECT_THROW(f.launch(), Error);
}

PlanShape holding(std::initializer_list<PlanView> views) {
  PlanShape plan{};
  for (const PlanView& view : views) plan.views[plan.num_views++] = view;
  return plan;
}

TEST(ForwardViewTest, AsManyHeadsShareATileAsDivideAKvHeads) {
  for (const auto& [heads_per_kv, log2] : {std::pair(1, 0),
                                           {2, 1},
                                           {3, 0},
                                           {4, 2},
                                           {6, 1},
                                           {7, 0},
                                           {8, 3},
                                           {12, 2},
                                           {16, 3},
                                           {24, 3},
                                           {32, 3}}) {
    EXPECT_EQ(most_heads_per_pack_log2(heads_per_kv), log2) << heads_per_kv;
    const Shape shape{DType::kBF16, 5 * heads_per_kv, 5, 128};
    EXPECT_EQ(heads_per_pack_log2_for(shape), std::min(log2, 2)) << heads_per_kv;
  }
}

TEST(ForwardViewTest, TheViewOfTheMostHeadsThatThePlanHoldsIsTaken) {
  const TileConfig sm80{128, 64, 2, 4};
  const TileConfig sm90{192, 112, 2, 12, 64};
  const auto expect = [](const PlanShape& plan, const TileConfig& tile, int heads_per_kv, int view,
                         int log2) {
    const ForwardView found = forward_view(plan, tile, heads_per_kv);
    EXPECT_EQ(found.view, view) << heads_per_kv;
    EXPECT_EQ(found.heads_per_pack_log2, log2) << heads_per_kv;
  };
  const PlanShape all =
      holding({{128, 64}, {64, 64}, {32, 64}, {16, 64}, {192, 64}, {24, 64}, {16, 32}});
  for (const auto& [heads_per_kv, log2] :
       {std::pair(1, 0), {2, 1}, {4, 2}, {6, 1}, {7, 0}, {8, 3}, {16, 3}}) {
    expect(all, sm80, heads_per_kv, log2, log2);
    const bool eight = heads_per_kv % 8 == 0;
    expect(all, sm90, heads_per_kv, eight ? 5 : 4, eight ? 3 : 0);
    expect(holding({{16, 16}, {128, 64}}), sm80, heads_per_kv, 1, 0);
    expect(holding({{128, 32}, {64, 32}}), sm80, heads_per_kv, -1, 0);
    // A plan that was made for packs and nothing else.
    expect(holding({{16, 64}}), sm80, heads_per_kv, eight ? 0 : -1, eight ? 3 : 0);
  }
  // Fewer heads than could be packed.
  expect(holding({{128, 64}, {64, 64}}), sm80, 8, 1, 1);
}

TEST(ForwardLaunchTest, APlanWithoutTheKernelsTileIsRefusedNotRebuilt) {
  Fixture f;
  f.plan.views[0].block_n *= 2;
  try {
    f.launch();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_THAT(error.what(), HasSubstr("the plan holds no tile lists for"));
    EXPECT_THAT(error.what(), HasSubstr(to_string(Fixture::spec())));
    EXPECT_THAT(error.hint(), HasSubstr("plan_for()"));
  }
}

TEST(ForwardLaunchTest, ScalesAreThoseOfBase2) {
  Fixture f;
  const ForwardParams plain = f.launch().params;
  EXPECT_FLOAT_EQ(plain.scale_log2, static_cast<float>(0.125 * std::log2(std::exp(1.0))));
  f.args.softcap = 20;
  const ForwardParams capped = f.launch().params;
  // scale_log2 * tanh(softcap_in * qk) is the score in base 2.
  EXPECT_FLOAT_EQ(capped.scale_log2, static_cast<float>(20 * std::log2(std::exp(1.0))));
  EXPECT_FLOAT_EQ(capped.softcap_in, 0.125F / 20);
}

TEST(ForwardLaunchTest, NoQueryRowsMeansNoBlocks) {
  Fixture f;
  f.plan.total_q = 0;
  f.args.q.data = nullptr;
  f.args.out.data = nullptr;
  EXPECT_EQ(f.launch().grid.x, 0U);
}

TEST(ForwardLaunchTest, HeadsAreWalkedInWholeGroupsThatFitTheL2) {
  Fixture f;
  f.args.heads = 32;
  f.args.heads_kv = 8;
  f.args.out.token_stride = 32 * 128;
  f.plan.total_q = f.plan.total_k = 100'000;
  EXPECT_EQ(f.launch(132, kBigL2).params.head_packs_in_group, 32);
  EXPECT_EQ(f.launch(132, 1).params.head_packs_in_group, 4);
  for (const std::int64_t l2_bytes : {20'000'000, 60'000'000, 150'000'000, 400'000'000}) {
    const ForwardParams p = f.launch(132, l2_bytes).params;
    EXPECT_EQ(p.head_packs_in_group % 4, 0);
    EXPECT_GE(p.head_packs_in_group, 4);
    EXPECT_LE(p.head_packs_in_group, 32);
  }
}

TEST(ForwardLaunchTest, PackedHeadsAreWalkedInWholeGroupsToo) {
  Fixture f;
  f.args.heads = 64;
  f.args.heads_kv = 4;  // packs of 8, two to a kv head
  f.args.out.token_stride = 64 * 128;
  f.plan.total_q = f.plan.total_k = 100'000;
  f.plan.views[0].block_m /= 8;
  const ForwardLaunch launch = f.launch(132, kBigL2);
  EXPECT_EQ(launch.params.head_packs, 8);
  EXPECT_EQ(launch.params.head_packs_in_group, 8);
  EXPECT_EQ(launch.grid.x, static_cast<unsigned>(launch.params.max_query_tiles) * 8);
  for (const std::int64_t l2_bytes : {1, 60'000'000, 150'000'000, 400'000'000}) {
    const ForwardParams p = f.launch(132, l2_bytes).params;
    EXPECT_EQ(p.head_packs_in_group % 2, 0);
    EXPECT_GE(p.head_packs_in_group, 2);
    EXPECT_LE(p.head_packs_in_group, 8);
  }
}

TEST(ForwardLaunchTest, MoreBlocksThanAGridHoldsAreRefused) {
  Fixture f;
  f.args.heads = 4096;
  f.args.out.token_stride = 4096 * 128;
  f.plan.total_q = std::numeric_limits<std::int32_t>::max();
  try {
    f.launch();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_THAT(error.what(), HasSubstr("thread blocks, at most 2147483647"));
  }
}

TEST(StridesTest, TheFirstTensorThatNoMapHoldsIsNamed) {
  Fixture f;
  const PlanShape plan = check_forward(f.args, true);
  const auto maps = [&] {
    return forward_tensor_maps(f.args, plan, parse_kernel_spec("fwd/sm90@sm_90a/bf16/d64v128"));
  };
  EXPECT_TRUE(maps().fit());
  f.args.v.head_stride = -128;
  EXPECT_FALSE(maps().fit());
  EXPECT_THAT(describe_misfit(maps()), HasSubstr("v has token stride 256 and head stride -128"));
  f.args.q.token_stride = 0;
  EXPECT_THAT(describe_misfit(maps()), HasSubstr("q has token stride 0 and head stride 64"));
}

TEST(StridesTest, ABoxOfQHoldsAsManyHeadsAsTheViewPacks) {
  Fixture f;
  f.args.heads = 16;
  const KernelSpec spec = parse_kernel_spec("fwd/sm90@sm_90a/bf16/d64v128");
  f.plan.views[0] = {spec.tile.block_m / 8, spec.tile.view_block_n()};
  const PlanShape plan = to_plan_shape(f.plan);
  const auto maps = [&] { return forward_tensor_maps(f.args, plan, spec); };
  EXPECT_EQ(maps().q.rows, spec.tile.block_m / 8);
  EXPECT_EQ(maps().q.box_heads, 8);
  EXPECT_EQ(maps().k.box_heads, 1);
  EXPECT_EQ(maps().v_granule.box_heads, 1);
  EXPECT_TRUE(maps().fit());
  // One head in the map for all of the tensor's: no box holds eight of it.
  f.args.q.head_stride = 0;
  EXPECT_FALSE(maps().fit());
  EXPECT_THAT(describe_misfit(maps()), HasSubstr("head stride 0, which kernels"));
  EXPECT_THAT(describe_misfit(maps()), HasSubstr("and a positive head stride"));
  const auto other = strided_spec(spec.problem, plan, 8);
  ASSERT_TRUE(other);
  EXPECT_EQ(other->tile.block_m, 128);
  EXPECT_EQ(make_forward_launch(f.args, plan, *other, 132, kBigL2).params.heads_per_pack_log2, 3);
  f.plan.views[0].block_m = spec.tile.block_m;
  const ForwardTensorMaps unpacked = forward_tensor_maps(f.args, to_plan_shape(f.plan), spec);
  EXPECT_EQ(unpacked.q.rows, spec.tile.block_m);
  EXPECT_EQ(unpacked.q.box_heads, 1);
  EXPECT_TRUE(unpacked.fit());
}

TEST(StridesTest, TheOtherKernelIsForTheSameProblem) {
  const Fixture f;
  const PlanShape plan = to_plan_shape(f.plan);
  const KernelSpec sm90 = parse_kernel_spec("fwd/sm90@sm_90a/bf16/d64v128/softcap");
  const auto other = strided_spec(sm90.problem, plan, 2);
  ASSERT_TRUE(other);
  EXPECT_EQ(*other, Fixture::spec(true));
  const PlanShape nothing{};
  EXPECT_EQ(strided_spec(sm90.problem, nothing, 2), std::nullopt);
}

TEST(PlanLaunchTest, GridsFollowTheTotalsUpToWhatFillsTheDevice) {
  PlanShape shape{};
  shape.num_views = 2;
  shape.views[0] = {128, 64};
  shape.views[1] = {64, 32};
  PlanInputs inputs;
  inputs.lowering = Lowering::kCausal;
  std::int32_t buffer = 0;
  const PlanLaunch nothing = make_plan_launch(shape, inputs, &buffer, 100);
  for (const Grid& grid : {nothing.sequences, nothing.intervals, nothing.key_tiles}) {
    EXPECT_GE(grid.x, 1U) << "an empty plan must be written too";
  }
  EXPECT_EQ(nothing.params.plan, &buffer);
  EXPECT_EQ(nothing.params.lowering, kLowerCausal);
  EXPECT_EQ(nothing.key_tiles.y, 3U) << "granules and two views";
  shape.total_q = shape.total_k = 1000;
  shape.batch = 1;
  EXPECT_GT(make_plan_launch(shape, inputs, &buffer, 100).intervals.x, nothing.intervals.x);
  shape.total_q = shape.total_k = std::numeric_limits<std::int32_t>::max();
  const PlanLaunch most = make_plan_launch(shape, inputs, &buffer, 100);
  EXPECT_LE(most.intervals.x, 100'000U);
  EXPECT_LE(most.key_tiles.x, 100'000U);
}

// AddressSanitizer minds which operator new belongs to which delete; the counter replaces some.
#if !defined(__SANITIZE_ADDRESS__)
TEST(ForwardArgsTest, CheckingAndPlanningALaunchAllocateNothing) {
  const Fixture f;
  const KernelSpec spec = Fixture::spec();
  const long allocations = test::count_allocations([&] {
    const PlanShape plan = check_forward(f.args, true);
    make_forward_launch(f.args, plan, spec, 132, kBigL2);
  });
  EXPECT_EQ(allocations, 0);
}
#endif

}  // namespace
}  // namespace treeattn
