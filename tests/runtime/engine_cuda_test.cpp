// The CUDA engine over a driver and a compiler without a GPU: what it launches where, and what it
// never does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "generator/arch.h"
#include "generator/tile_space.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/forward.h"
#include "runtime/attention/plan_cpu.h"
#include "runtime/cuda/device.h"
#include "runtime/support/config.h"
#include "templates/shared/params.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/child_process.h"
#include "tests/support/fake_driver.h"
#include "tests/support/fake_nvrtc.h"
#include "tests/support/log_capture.h"
#include "tests/support/temp_dir.h"
#include "treeattn/treeattn.h"

namespace treeattn {
namespace {

using test::FakeDriver;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::SizeIs;

/// Engines keep their kernels in the user's cache folder; fake ones must never get there. The
/// configuration is read once, so this happens before main().
class PrivateCache : public ::testing::Environment {
 public:
  PrivateCache() {
    setenv("TREEATTN_CACHE_DIR", dir_.path().c_str(), 1);
    for (const char* name : {"TREEATTN_CACHE_PATH", "TREEATTN_JIT", "TREEATTN_CAPTURE_MISS",
                             "TREEATTN_DUMP", "TREEATTN_TEMPLATE_DIR", "TREEATTN_FAMILY"}) {
      unsetenv(name);
    }
  }
  std::string path() const { return dir_.path().string(); }

 private:
  test::TempDir dir_;
};
const auto* const private_cache = static_cast<const PrivateCache*>(
    ::testing::AddGlobalTestEnvironment(new PrivateCache));  // NOLINT(cert-err58-cpp)

/// FakeNvrtc reads a kernel's name right after `void`.
decltype(NvrtcTable::nvrtcCreateProgram) create_program = nullptr;
nvrtcResult create_without_bounds(nvrtcProgram* program, const char* source, const char* name,
                                  int headers, const char* const* texts, const char* const* names) {
  constexpr std::string_view kBounds = "__launch_bounds__(";
  std::string plain = source;
  for (std::size_t at = plain.find(kBounds); at != std::string::npos; at = plain.find(kBounds)) {
    plain.erase(at, plain.find(")\n", at) + 2 - at);
  }
  return create_program(program, plain.c_str(), name, headers, texts, names);
}

std::atomic<int> forbidden_calls{0};
/// A driver function like this one that counts its calls as forbidden.
template <class... Args>
auto forbid(CUresult(CUDAAPI*)(Args...)) {
  return +[](Args...) -> CUresult {
    ++forbidden_calls;
    return CUDA_ERROR_NOT_PERMITTED;
  };
}

constexpr int kTotal = 1000;

class CudaEngine : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(config().cache_dir, private_cache->path()) << "the cache folder is not private";
    for (const auto& file : test::files_below(config().cache_dir)) std::filesystem::remove(file);
    create_program = nvrtc_.table.nvrtcCreateProgram;
    nvrtc_.table.nvrtcCreateProgram = create_without_bounds;
  }

  static Shape shape(int dim) { return {DType::kBF16, 4, 2, dim}; }
  static KernelSpec spec(int dim, Target target = kSm90Target) {
    return default_spec(problem_for(Pass::kForward, shape(dim), target));
  }
  Plan plan_for(const Engine& engine, int dim) const {
    const Shape one = shape(dim);
    return engine.plan_for(kTotal, kTotal, 1, {&one, 1});
  }
  /// Good arguments; nothing behind the pointers is ever read.
  ForwardArgs args(const Plan& plan, int dim) {
    ForwardArgs a;
    a.heads = 4;
    a.heads_kv = 2;
    a.head_dim = dim;
    a.q = {memory_, 4 * dim, dim};
    a.k = a.v = {memory_, 2 * dim, dim};
    a.out = {memory_, 4 * dim, dim};
    a.softmax_scale = 1;
    a.plan = &plan;
    a.plan_buffer = reinterpret_cast<const std::int32_t*>(memory_);
    a.workspace = memory_;
    a.workspace_bytes = kForwardWorkspaceBytes;
    return a;
  }
  /// The same for backward.
  BackwardArgs backward_args(const Plan& plan, int dim, bool deterministic) {
    BackwardArgs a;
    a.heads = 4;
    a.heads_kv = 2;
    a.head_dim = dim;
    a.q = a.out = a.dout = {memory_, 4 * dim, dim};
    a.k = a.v = {memory_, 2 * dim, dim};
    a.lse = reinterpret_cast<const float*>(memory_);
    a.dq = {memory_, 4 * dim, dim};
    a.dk = a.dv = {memory_, 2 * dim, dim};
    a.softmax_scale = 1;
    a.deterministic = deterministic;
    a.plan = &plan;
    a.plan_buffer = reinterpret_cast<const std::int32_t*>(memory_);
    a.workspace = memory_;
    a.workspace_bytes = std::size_t{1} << 40;
    return a;
  }
  Plan backward_plan(const Engine& engine, int dim) const {
    Shape one = shape(dim);
    one.backward = true;
    return engine.plan_for(kTotal, kTotal, 1, {&one, 1});
  }
  CUstream stream() { return reinterpret_cast<CUstream>(memory_ + 1); }

  alignas(16) std::byte memory_[64]{};
  test::FakeNvrtc nvrtc_;
  FakeDriver driver_{2};
};

template <class Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST_F(CudaEngine, SaysWhatItRunsOn) {
  const Engine engine;
  EXPECT_EQ(engine.kind(), EngineKind::kCuda);
  EXPECT_EQ(engine.description(),
            "Fake GPU (compute capability 9.0, 132 SMs), kernels for sm_90a (family sm90) and "
            "sm_90 (family sm80)");
  driver_.devices[1].major = 8;
  driver_.make_current(driver_.context(1));
  EXPECT_EQ(Engine().description(),
            "Fake GPU (compute capability 8.0, 132 SMs), kernels for sm_80");
}

TEST_F(CudaEngine, ForwardIsOneLaunchOnTheStream) {
  driver_.devices[0].major = 8;
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  driver_.launch_params_bytes = sizeof(ForwardParams);
  engine.forward(args(plan, 64), stream());
  const auto launches = driver_.launches();
  ASSERT_THAT(launches, SizeIs(1));
  const FakeDriver::Launch& seen = launches[0];
  const TileConfig tile = spec(64, Target{80, false}).tile;
  EXPECT_THAT(seen.entry, HasSubstr("fwd_sm80_bf16_d64v64"));
  EXPECT_EQ(seen.config.hStream, stream());
  EXPECT_EQ(seen.context, driver_.context(0));
  EXPECT_EQ(seen.config.blockDimX, tile.warps * 32U);
  const int packed = heads_per_pack_log2_for(shape(64));
  EXPECT_EQ(seen.config.gridDimX % (4U >> packed), 0U);
  EXPECT_GE(seen.config.gridDimX,
            static_cast<unsigned>(kTotal / (tile.block_m >> packed) * (4 >> packed)));
  EXPECT_LE(static_cast<int>(seen.config.sharedMemBytes), driver_.smem_limit(seen.entry, 0));
  ForwardParams params{};
  std::memcpy(&params, seen.params.data(), sizeof params);
  EXPECT_EQ(params.q, memory_);
  EXPECT_EQ(params.q_token_stride, 4 * 64);
  EXPECT_EQ(params.heads_per_kv, 2);
  EXPECT_EQ(engine.stats().launches, 1U);
}

// A launch costs the host some 3 us, more than everything else of a call.
TEST_F(CudaEngine, BackwardIsThreeLaunchesInOrder) {
  Engine engine;
  const Plan plan = backward_plan(engine, 64);
  driver_.launch_params_bytes = sizeof(BackwardParams);
  engine.backward(backward_args(plan, 64, false), stream());
  const auto launches = driver_.launches();
  ASSERT_THAT(launches, SizeIs(3));
  EXPECT_THAT(launches[0].entry, EndsWith("_prepare"));
  EXPECT_THAT(launches[1].entry, MatchesRegex(".*_m[0-9]+n[0-9]+s[0-9]w[0-9]"));
  EXPECT_THAT(launches[2].entry, EndsWith("_sum"));
  for (const FakeDriver::Launch& launch : launches) {
    EXPECT_EQ(launch.config.hStream, stream());
    EXPECT_EQ(launch.context, driver_.context(0));
    EXPECT_EQ(launch.params, launches[0].params);
  }
  EXPECT_EQ(launches[2].config.blockDimX, static_cast<unsigned>(kElementwiseThreads));
  EXPECT_EQ(engine.stats().launches, 3U);
}

TEST_F(CudaEngine, DeterministicBackwardEndsWithTheKernelOfDq) {
  Engine engine;
  const Plan plan = backward_plan(engine, 64);
  driver_.launch_params_bytes = sizeof(BackwardParams);
  engine.backward(backward_args(plan, 64, true), stream());
  const auto launches = driver_.launches();
  ASSERT_THAT(launches, SizeIs(3));
  EXPECT_THAT(launches[0].entry, EndsWith("_prepare"));
  EXPECT_THAT(launches[1].entry, HasSubstr("bwd_sm80"));
  EXPECT_THAT(launches[2].entry, HasSubstr("bwd_dq_sm80"));
  EXPECT_NE(launches[2].params, launches[1].params) << "it walks its own tiles";
}

TEST_F(CudaEngine, BackwardOfTheSm90FamilyReadsThroughTensorMaps) {
  Engine engine;
  const Plan plan = backward_plan(engine, 128);
  driver_.launch_params_bytes = sizeof(BackwardParams);
  BackwardArgs a = backward_args(plan, 128, false);
  engine.backward(a, stream());
  const auto launches = driver_.launches();
  ASSERT_THAT(launches, SizeIs(3));
  EXPECT_THAT(launches[1].entry, HasSubstr("bwd_sm90_bf16_d128v128_m64n128s2w8"));
  EXPECT_EQ(launches[1].config.blockDimX, 384U);
  EXPECT_EQ(launches[0].params, launches[2].params);
  EXPECT_NE(launches[0].params, launches[1].params) << "maps come first";

  a.k.token_stride = 0;
  a.spec = "bwd/sm90@sm_90a/bf16/d128v128";
  EXPECT_THAT(refusal([&] { engine.backward(a); }), HasSubstr("k has token stride 0"));
  EXPECT_THAT(driver_.launches(), SizeIs(3)) << "refused before anything is launched";
  a.spec = {};
  engine.backward(a);
  EXPECT_THAT(driver_.launches().back().entry, HasSubstr("bwd_sm80"));
  Shape backward = shape(128);
  backward.backward = true;
  EXPECT_GE(engine.backward_workspace_bytes(plan, backward),
            engine.backward_workspace_bytes(plan, backward, false, "bwd/sm80@sm_90/bf16/d128v128"))
      << "strides are not known when a workspace is made";

  // Without queries the keys' gradients are zeros, whatever the strides.
  Shape one = shape(128);
  one.backward = true;
  const Plan empty = engine.plan_for(0, kTotal, 1, {&one, 1});
  BackwardArgs b = backward_args(empty, 128, false);
  b.k.token_stride = 0;
  engine.backward(b);
  EXPECT_THAT(driver_.launches().rbegin()[1].entry, HasSubstr("bwd_sm90"));
}

TEST_F(CudaEngine, NoQueriesMeansNoLaunch) {
  Engine engine;
  const Shape one = shape(64);
  const Plan plan = engine.plan_for(0, 10, 1, {&one, 1});
  engine.forward(args(plan, 64));
  EXPECT_THAT(driver_.launches(), IsEmpty());
}

TEST_F(CudaEngine, BuildPlanLaunchesItsKernelsInOrder) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  PlanInputs inputs;
  inputs.lowering = Lowering::kCausal;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = reinterpret_cast<const std::int32_t*>(memory_);
  engine.build_plan(plan, inputs, reinterpret_cast<std::int32_t*>(memory_), stream());
  std::vector<std::string> entries;
  for (const FakeDriver::Launch& launch : driver_.launches()) {
    entries.push_back(launch.entry);
    EXPECT_EQ(launch.config.hStream, stream());
  }
  EXPECT_THAT(entries, ElementsAre(HasSubstr("sequences"), HasSubstr("intervals"),
                                   HasSubstr("key_tiles"), HasSubstr("query_tiles")));
}

TEST_F(CudaEngine, PrepareNamesKernelsAndWhereTheyCameFrom) {
  Engine engine;
  Shape one = shape(88);
  const auto first = engine.prepare({&one, 1});
  ASSERT_THAT(first, SizeIs(2));
  EXPECT_EQ(first[0].spec, "plan/sm80@sm_90");
  EXPECT_EQ(first[1].spec, to_string(spec(88)));
  EXPECT_EQ(first[1].origin, "compiled");
  const Stats after = engine.stats();
  EXPECT_GE(after.compiles, 1U);
  const auto again = engine.prepare({&one, 1});
  EXPECT_EQ(again[0].origin, "memory");
  EXPECT_EQ(again[1].origin, "memory");
  EXPECT_EQ(engine.stats().compiles, after.compiles);
  EXPECT_EQ(engine.stats().memory_hits, after.memory_hits + 2);
  EXPECT_EQ(engine.stats().launches, 0U);
  one.backward = true;
  EXPECT_THAT(engine.prepare({&one, 1}), SizeIs(4));
}

TEST_F(CudaEngine, OnePlanServesEveryHeadDim) {
  const Engine engine;
  std::vector<Shape> shapes;
  for (int dim = 16; dim <= 256; dim += 8) {
    shapes.push_back(shape(dim));
    shapes.back().backward = true;
  }
  const Plan plan = engine.plan_for(kTotal, kTotal, 1, shapes);
  for (const Shape& each : shapes) {
    const TileConfig tile = spec(each.head_dim).tile;
    const ForwardView view = forward_view(to_plan_shape(plan), tile, each.heads / each.heads_kv);
    EXPECT_GE(view.view, 0) << each.head_dim;
    EXPECT_EQ(view.heads_per_pack_log2, heads_per_pack_log2_for(each)) << each.head_dim;
  }
}

TEST_F(CudaEngine, ShapesThatNoKernelServesAreRefused) {
  Engine engine;
  const auto text = [&](Shape bad) {
    const std::string planning = refusal([&] { engine.plan_for(1, 1, 1, {&bad, 1}); });
    EXPECT_EQ(refusal([&] { engine.prepare({&bad, 1}); }), planning);
    return planning;
  };
  EXPECT_THAT(text(shape(20)), HasSubstr("head_dim is 20, expected a multiple of 8"));
  EXPECT_THAT(text({DType::kF32, 4, 2, 64}), HasSubstr("dtype is f32"));
  EXPECT_THAT(text({DType::kF16, 4, 3, 64}), HasSubstr("heads is 4, expected a multiple"));
  EXPECT_THAT(driver_.launches(), IsEmpty());
}

TEST_F(CudaEngine, ASpecMustBeLegalFitTheArgumentsAndHaveAView) {
  Engine engine;
  Plan plan = plan_for(engine, 64);
  const auto text = [&](const char* name) {
    ForwardArgs a = args(plan, 64);
    a.spec = name;
    return refusal([&] { engine.forward(a); });
  };
  EXPECT_THAT(text("fwd/sm80"), HasSubstr("fwd/sm80"));
  EXPECT_THAT(text("fwd/sm80@sm_90/bf16/d64v64/m48n64s2w4"), HasSubstr("48"));
  for (const char* other :
       {"fwd/sm80@sm_80/bf16/d64v64/m64n32s2w4", "fwd/sm80@sm_90/f16/d64v64/m64n32s2w4",
        "fwd/sm80@sm_90/bf16/d64v128/m64n32s2w4", "fwd/sm80@sm_90/bf16/d64v64/softcap/m64n32s2w4",
        "bwd/sm80@sm_90/bf16/d64v64"}) {
    EXPECT_THAT(text(other), HasSubstr("does not fit these arguments")) << other;
  }
  constexpr const char* kOther = "fwd/sm80@sm_90/bf16/d64v64/m64n16s1w4";
  EXPECT_THAT(text(kOther), HasSubstr("holds no tile lists for 64x16 tiles"));
  EXPECT_THAT(driver_.launches(), IsEmpty());
  EXPECT_EQ(engine.stats().launches, 0U);
  plan.views[plan.num_views++] = {64, 16};
  EXPECT_EQ(text(kOther), "accepted");
  ASSERT_THAT(driver_.launches(), SizeIs(1));
  EXPECT_THAT(driver_.launches()[0].entry, HasSubstr("m64n16s1w4"));
}

TEST_F(CudaEngine, Sm90KernelsGetTensorMapsAndAPersistentGrid) {
  Engine engine;
  constexpr int kDim = 128;
  const Plan plan = plan_for(engine, kDim);
  ForwardArgs a = args(plan, kDim);
  a.spec = "fwd/sm90@sm_90a/bf16/d128v128/m128n128s2w8b64";
  a.v.data = memory_ + 32;  // not k's
  driver_.launch_params_bytes = sizeof(ForwardSm90Params);
  engine.forward(a, stream());
  ASSERT_THAT(driver_.launches(), SizeIs(1));
  const FakeDriver::Launch seen = driver_.launches()[0];
  EXPECT_THAT(seen.entry, HasSubstr("fwd_sm90_bf16_d128v128"));
  EXPECT_EQ(seen.config.blockDimX, 384U);
  // Fewer items than multiprocessors: one block each.
  const int packed = heads_per_pack_log2_for(shape(kDim));
  EXPECT_EQ(seen.config.gridDimX,
            (4U >> packed) * static_cast<unsigned>(tile_slots(kTotal, 1, 128 >> packed)));
  const auto maps = driver_.tensor_maps();
  ASSERT_THAT(maps, SizeIs(5));  // of k and v two: a box of keys, and a granule
  EXPECT_THAT(maps[0].sizes, ElementsAre(kDim, 4, kTotal));
  EXPECT_THAT(maps[0].box, ElementsAre(64, 1 << packed, 128 >> packed));
  EXPECT_THAT(maps[1].sizes, ElementsAre(kDim, 2, kTotal));
  EXPECT_THAT(maps[1].box, ElementsAre(64, 1, 64));
  EXPECT_THAT(maps[2].box, ElementsAre(64, 1, kGranuleKeys));
  EXPECT_THAT(maps[2].sizes, ElementsAre(kDim, 2, kTotal));
  EXPECT_THAT(maps[3].strides, ElementsAre(2 * kDim, 2 * 2 * kDim));
  EXPECT_THAT(maps[3].box, ElementsAre(64, 1, 64));
  EXPECT_THAT(maps[4].box, ElementsAre(64, 1, kGranuleKeys));
  ForwardSm90Params params{};
  std::memcpy(&params, seen.params.data(), sizeof params);
  EXPECT_EQ(params.q.opaque[0], 0x0101010101010101U);
  EXPECT_EQ(params.k_granule.opaque[0], 0x0303030303030303U);
  EXPECT_EQ(params.v.opaque[0], 0x0404040404040404U);
  EXPECT_EQ(params.v_granule.opaque[0], 0x0505050505050505U);
  EXPECT_EQ(params.granules, plan_offsets(to_plan_shape(plan)).granules);
  EXPECT_EQ(params.f.heads_per_kv, 2);

  EXPECT_EQ(params.k_head_step, 1);
  // Items are drawn from a counter that belongs to one launch at a time.
  EXPECT_EQ(static_cast<void*>(params.counter), a.workspace);
  const unsigned first_launch = params.launch;
  EXPECT_NE(first_launch, 0U);

  a.k.head_stride = 0;  // the same keys for every head
  engine.forward(a);
  const FakeDriver::Launch shared = driver_.launches()[1];
  std::memcpy(&params, shared.params.data(), sizeof params);
  EXPECT_EQ(params.k_head_step, 0);
  EXPECT_EQ(params.v_head_step, 1);
  // Far from its neighbours: what a workspace happens to hold is often a small integer.
  EXPECT_GT(std::min(params.launch - first_launch, first_launch - params.launch), 1'000'000U);
  EXPECT_NE(params.launch, 0U);

  ForwardArgs bare = a;
  bare.workspace = nullptr;
  EXPECT_THAT(refusal([&] { engine.forward(bare); }),
              HasSubstr("workspace is null, expected forward_workspace_bytes() = 16 bytes"));
  bare = a;
  bare.workspace_bytes = 8;
  EXPECT_THAT(refusal([&] { engine.forward(bare); }), HasSubstr("workspace_bytes is 8"));

  a.k.token_stride = 0;
  EXPECT_THAT(refusal([&] { engine.forward(a); }), HasSubstr("k has token stride 0 and head"));
  EXPECT_THAT(driver_.launches(), SizeIs(2));
}

TEST_F(CudaEngine, PlansOfPackedHeadsAreWalkedPacked) {
  Engine engine;
  constexpr int kDim = 128;
  Plan plan = plan_for(engine, kDim);  // two query heads to a kv head
  plan.views[0].block_m = spec(kDim).tile.block_m / 2;
  driver_.launch_params_bytes = sizeof(ForwardSm90Params);
  engine.forward(args(plan, kDim), stream());
  const FakeDriver::Launch seen = driver_.launches().back();
  EXPECT_THAT(seen.entry, HasSubstr("fwd_sm90_bf16_d128v128"));
  EXPECT_EQ(seen.config.gridDimX, 2U * static_cast<unsigned>(tile_slots(kTotal, 1, 64)));
  EXPECT_THAT(driver_.tensor_maps()[0].sizes, ElementsAre(kDim, 4, kTotal));
  EXPECT_THAT(driver_.tensor_maps()[0].box, ElementsAre(64, 2, 64));
  EXPECT_THAT(driver_.tensor_maps()[1].box, ElementsAre(64, 1, 64));
  ForwardSm90Params params{};
  std::memcpy(&params, seen.params.data(), sizeof params);
  EXPECT_EQ(params.f.head_packs, 2);
  EXPECT_EQ(params.f.heads_per_pack_log2, 1);

  // A box of two heads that are one in the map: the other family, as packed.
  driver_.launch_params_bytes = sizeof(ForwardParams);
  ForwardArgs shared = args(plan, kDim);
  shared.q.head_stride = 0;
  engine.forward(shared, stream());
  const FakeDriver::Launch instead = driver_.launches().back();
  EXPECT_THAT(instead.entry, HasSubstr("fwd_sm80_bf16_d128v128_m128n64"));
  ForwardParams p{};
  std::memcpy(&p, instead.params.data(), sizeof p);
  EXPECT_EQ(p.heads_per_pack_log2, 1);
  EXPECT_EQ(p.q_head_stride, 0);
  shared.spec = "fwd/sm90@sm_90a/bf16/d128v128/m128n128s2w8b64";
  EXPECT_THAT(refusal([&] { engine.forward(shared); }), HasSubstr("a positive head stride"));

  // A named kernel walks a packed view, too.
  plan.views[0] = {64 / 2, 16};
  ForwardArgs named = args(plan, kDim);
  named.spec = "fwd/sm80@sm_90/bf16/d128v128/m64n16s1w4";
  engine.forward(named);
  std::memcpy(&p, driver_.launches().back().params.data(), sizeof p);
  EXPECT_EQ(p.heads_per_pack_log2, 1);
}

// Backward's tile lists may have the shape of packed ones.
TEST_F(CudaEngine, PlansThatHoldTheUnpackedViewAreWalkedByItUntilPackingIsOn) {
  Engine engine;
  constexpr int kDim = 128;
  const Plan plan = backward_plan(engine, kDim);
  EXPECT_GE(find_view(to_plan_shape(plan), 64, 64), 0) << "of dq";
  driver_.launch_params_bytes = sizeof(ForwardSm90Params);
  engine.forward(args(plan, kDim));
  ForwardSm90Params params{};
  std::memcpy(&params, driver_.launches().back().params.data(), sizeof params);
  EXPECT_EQ(params.f.heads_per_pack_log2, heads_per_pack_log2_for(shape(kDim)));
}

TEST_F(CudaEngine, StridesThatNoTensorMapHoldsRunTheSm80Family) {
  Engine engine;
  constexpr int kDim = 128;
  const Plan plan = plan_for(engine, kDim);
  driver_.launch_params_bytes = sizeof(ForwardParams);
  using Change = void (*)(ForwardArgs&);
  for (const Change change : {Change([](ForwardArgs& a) { a.k.token_stride = 0; }),
                              Change([](ForwardArgs& a) { a.q.token_stride = 0; }),
                              Change([](ForwardArgs& a) { a.v.token_stride *= -1; }),
                              Change([](ForwardArgs& a) { a.v.head_stride *= -1; })}) {
    ForwardArgs a = args(plan, kDim);
    change(a);
    a.workspace = nullptr;  // only the sm90 family has a use for it
    engine.forward(a, stream());
    const FakeDriver::Launch seen = driver_.launches().back();
    EXPECT_THAT(seen.entry, HasSubstr("fwd_sm80_bf16_d128v128_m128n64"));
    EXPECT_EQ(seen.config.hStream, stream());
    ForwardParams params{};
    std::memcpy(&params, seen.params.data(), sizeof params);
    EXPECT_EQ(params.q_token_stride, a.q.token_stride);
    EXPECT_EQ(params.k_token_stride, a.k.token_stride);
    EXPECT_EQ(params.v_token_stride, a.v.token_stride);
    EXPECT_EQ(params.v_head_stride, a.v.head_stride);
  }
  EXPECT_THAT(driver_.launches(), SizeIs(4));
  EXPECT_THAT(driver_.tensor_maps(), IsEmpty());

  driver_.launch_params_bytes = 0;
  engine.forward(args(plan, kDim));
  EXPECT_THAT(driver_.launches().back().entry, HasSubstr("fwd_sm90_bf16_d128v128"));
  // One token has no stride to speak of.
  const Shape one = shape(kDim);
  const Plan short_plan = engine.plan_for(kTotal, 1, 1, {&one, 1});
  ForwardArgs a = args(short_plan, kDim);
  a.k.token_stride = 0;
  engine.forward(a);
  EXPECT_THAT(driver_.launches().back().entry, HasSubstr("fwd_sm90_bf16_d128v128"));
}

TEST_F(CudaEngine, TheSm80FamilyWalksTheViewThatThePlanHolds) {
  Engine engine;
  const auto entry_for = [&](int dim, bool backward) {
    Shape one = shape(dim);
    one.backward = backward;
    const Plan plan = engine.plan_for(kTotal, kTotal, 1, {&one, 1});
    ForwardArgs a = args(plan, dim);
    a.k.token_stride = a.v.token_stride = 0;
    engine.forward(a);
    return driver_.launches().back().entry;
  };
  // Not the sm80 family's default there: that has 64 rows, as packed views have tokens.
  EXPECT_THAT(entry_for(256, false), HasSubstr("fwd_sm80_bf16_d256v256_m64n64"));
  // Backward's tile lists do as well.
  EXPECT_THAT(entry_for(64, true), HasSubstr("fwd_sm80_bf16_d64v64_m128n128"));
}

TEST_F(CudaEngine, StridesThatNoKernelCanReadWithThisPlanAreNamed) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  ForwardArgs a = args(plan, 64);
  a.v.token_stride = -128;
  try {
    engine.forward(a);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_THAT(error.what(), HasSubstr("v has token stride -128 and head stride 64"));
    EXPECT_THAT(error.what(), HasSubstr("expected a positive token stride"));
    const int tokens = 192 >> heads_per_pack_log2_for(shape(64));
    EXPECT_THAT(error.what(), HasSubstr("tile lists for " + std::to_string(tokens) + "x64 tiles"));
    EXPECT_THAT(error.hint(), HasSubstr("copy the tensor"));
    EXPECT_THAT(error.hint(), HasSubstr("TREEATTN_FAMILY=sm80"));
  }
  EXPECT_THAT(driver_.launches(), IsEmpty());
  // Without rows there is nothing to read.
  const Shape one = shape(64);
  const Plan empty = engine.plan_for(0, kTotal, 1, {&one, 1});
  a.plan = &empty;
  EXPECT_EQ(refusal([&] { engine.forward(a); }), "accepted");
  EXPECT_THAT(driver_.launches(), IsEmpty());
}

TEST_F(CudaEngine, TheFamilyIsTheDevicesOrTheOneChosen) {
  DeviceInfo device;
  device.major = 9;
  EXPECT_EQ(kernel_target(device, FamilyChoice::kAuto), kSm90Target);
  EXPECT_EQ(kernel_target(device, FamilyChoice::kSm80), (Target{90, false}));
  device.major = 10;
  EXPECT_EQ(kernel_target(device, FamilyChoice::kAuto), (Target{100, false}));
  const Shape one = shape(128);
  EXPECT_EQ(to_string(problem_for(Pass::kForward, one, kSm90Target)),
            "fwd/sm90@sm_90a/bf16/d128v128");
  EXPECT_EQ(to_string(problem_for(Pass::kBackward, one, kSm90Target)),
            "bwd/sm90@sm_90a/bf16/d128v128");
  EXPECT_EQ(to_string(problem_for(Pass::kBackward, shape(64), kSm90Target)),
            "bwd/sm80@sm_90/bf16/d64v64")
      << "the sm90 family has no backward for it";
  EXPECT_EQ(to_string(problem_for(Pass::kBackwardDq, one, kSm90Target)),
            "bwd_dq/sm80@sm_90/bf16/d128v128");
  EXPECT_EQ(to_string(problem_for(Pass::kBackward, one, Target{90, false})),
            "bwd/sm80@sm_90/bf16/d128v128");
}

TEST_F(CudaEngine, Sm90KernelsAreRefusedOnOtherDevices) {
  driver_.devices[0].major = 10;
  Engine engine;
  const Plan plan = plan_for(engine, 128);
  ForwardArgs a = args(plan, 128);
  a.spec = "fwd/sm90@sm_90a/bf16/d128v128/m128n128s2w8b64";
  EXPECT_THAT(refusal([&] { engine.forward(a); }), HasSubstr("does not fit these arguments"));
  EXPECT_THAT(driver_.launches(), IsEmpty());
}

TEST_F(CudaEngine, APlanForOtherHeadDimsIsRefused) {
  Engine engine;
  const Plan plan = plan_for(engine, 256);
  EXPECT_THAT(refusal([&] { engine.forward(args(plan, 64)); }),
              HasSubstr("the plan holds no tile lists"));
  EXPECT_THAT(driver_.launches(), IsEmpty());
}

TEST_F(CudaEngine, WorksInItsOwnContextAndLeavesTheCallersAlone) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  driver_.make_current(driver_.context(1));
  engine.forward(args(plan, 64));
  EXPECT_EQ(driver_.current(), driver_.context(1));
  EXPECT_EQ(driver_.context_depth(), 1U);
  std::thread([&] {
    engine.forward(args(plan, 64));
    EXPECT_EQ(driver_.current(), nullptr);
  }).join();
  ForwardArgs bad = args(plan, 64);
  bad.spec = "fwd/sm80@sm_90/bf16/d64v64/m64n16s1w4";
  refusal([&] { engine.forward(bad); });
  EXPECT_EQ(driver_.context_depth(), 1U);
  ASSERT_THAT(driver_.launches(), SizeIs(2));
  for (const auto& launch : driver_.launches()) EXPECT_EQ(launch.context, driver_.context(0));
}

std::atomic<int> retained{0};

TEST_F(CudaEngine, WithoutACurrentContextItHoldsThePrimaryOne) {
  retained = 0;
  static const auto retain = driver_.table.cuDevicePrimaryCtxRetain;
  driver_.table.cuDevicePrimaryCtxRetain = [](CUcontext* context, CUdevice device) {
    ++retained;
    return retain(context, device);
  };
  driver_.table.cuDevicePrimaryCtxRelease = [](CUdevice) {
    --retained;
    return CUDA_SUCCESS;
  };
  { const Engine current; }
  EXPECT_EQ(retained, 0);
  driver_.make_current(nullptr);
  {
    Engine engine;
    EXPECT_EQ(retained, 1);
    const Plan plan = plan_for(engine, 64);
    Engine moved = std::move(engine);
    moved.forward(args(plan, 64));
    EXPECT_EQ(retained, 1);
  }
  EXPECT_EQ(retained, 0);
  EXPECT_EQ(driver_.current(), nullptr);
  EXPECT_EQ(driver_.launches().at(0).context, driver_.context(0));
}

TEST_F(CudaEngine, ACaptureSurvivesAColdKernelAndWarnsOnce) {
  // The warning comes once a process: each run takes a head dim that no test has named before.
  static int dim = 96;
  dim += 8;
  Engine engine;
  const Plan plan = plan_for(engine, dim);
  const test::LogCapture log;
  driver_.set_capturing(stream(), true);
  engine.forward(args(plan, dim), stream());
  EXPECT_FALSE(driver_.capture_broken());
  EXPECT_EQ(log.count("was not loaded before a stream was captured"), 1U) << log.text();
  engine.forward(args(plan, dim), stream());
  driver_.set_capturing(stream(), false);
  EXPECT_EQ(log.count("captured"), 1U) << log.text();
  EXPECT_THAT(driver_.launches(), SizeIs(2));
}

TEST_F(CudaEngine, APreparedKernelIsCapturedWithoutAWord) {
  Engine engine;
  const Shape one = shape(64);
  engine.prepare({&one, 1});
  const Plan plan = plan_for(engine, 64);
  const test::LogCapture log;
  driver_.set_capturing(stream(), true);
  engine.forward(args(plan, 64), stream());
  driver_.set_capturing(stream(), false);
  EXPECT_FALSE(driver_.capture_broken());
  EXPECT_THAT(log.messages(), IsEmpty()) << log.text();
}

TEST_F(CudaEngine, HotCallsNeitherAllocateNorWaitNorLoad) {
  Engine engine;
  // The larger head dim's default tile comes after others that do not fit it.
  std::vector<Shape> shapes{shape(64), shape(128), shape(256)};
  for (Shape& each : shapes) each.backward = true;
  const Plan plan = engine.plan_for(kTotal, kTotal, 1, shapes);
  const ForwardArgs a = args(plan, 64);
  const ForwardArgs large = args(plan, 256);
  ForwardArgs strided = large;
  strided.k.token_stride = 0;
  const BackwardArgs b = backward_args(plan, 64, false);
  const BackwardArgs deterministic = backward_args(plan, 64, true);
  const BackwardArgs mapped = backward_args(plan, 128, false);
  BackwardArgs unmapped = mapped;
  unmapped.k.token_stride = 0;
  PlanInputs inputs;
  inputs.lowering = Lowering::kFull;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = reinterpret_cast<const std::int32_t*>(memory_);
  auto* buffer = reinterpret_cast<std::int32_t*>(memory_);
  engine.build_plan(plan, inputs, buffer);
  for (const ForwardArgs& each : {a, large, strided}) engine.forward(each);
  for (const BackwardArgs& each : {deterministic, mapped, unmapped}) engine.backward(each);
  DriverTable& d = driver_.table;
  forbidden_calls = 0;
  d.cuMemAlloc = forbid(d.cuMemAlloc);
  d.cuMemFree = forbid(d.cuMemFree);
  d.cuMemcpyHtoDAsync = forbid(d.cuMemcpyHtoDAsync);
  d.cuMemcpyDtoHAsync = forbid(d.cuMemcpyDtoHAsync);
  d.cuMemsetD32Async = forbid(d.cuMemsetD32Async);
  d.cuMemsetD8Async = forbid(d.cuMemsetD8Async);
  d.cuCtxSynchronize = forbid(d.cuCtxSynchronize);
  d.cuStreamSynchronize = forbid(d.cuStreamSynchronize);
  d.cuEventSynchronize = forbid(d.cuEventSynchronize);
  d.cuEventCreate = forbid(d.cuEventCreate);
  d.cuLibraryLoadData = forbid(d.cuLibraryLoadData);
  d.cuKernelSetAttribute = forbid(d.cuKernelSetAttribute);
  d.cuDeviceGetAttribute = forbid(d.cuDeviceGetAttribute);
  d.cuTensorMapEncodeTiled = [](CUtensorMap*, auto...) { return CUDA_SUCCESS; };
  d.cuCtxGetDevice = forbid(d.cuCtxGetDevice);
  d.cuStreamIsCapturing = forbid(d.cuStreamIsCapturing);
  static std::atomic<int> launches{0};
  launches = 0;
  d.cuLaunchKernelEx = [](const CUlaunchConfig*, CUfunction, void**, void**) {
    ++launches;
    return CUDA_SUCCESS;
  };
  const auto calls = [&] {
    engine.build_plan(plan, inputs, buffer, stream());
    engine.forward(a, stream());
    engine.forward(large, stream());
    engine.forward(strided, stream());
    engine.backward(b, stream());
    engine.backward(deterministic, stream());
    engine.backward(mapped, stream());
    engine.backward(unmapped, stream());
  };
// AddressSanitizer minds which operator new belongs to which delete; the counter replaces some.
#if defined(__SANITIZE_ADDRESS__)
  calls();
#else
  EXPECT_EQ(test::count_allocations(calls), 0);
#endif
  EXPECT_EQ(launches, 4 + 3 + 3 + 3 + 3 + 3);
  EXPECT_EQ(forbidden_calls, 0);
}

TEST_F(CudaEngine, AFailedLaunchNamesTheKernel) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  driver_.launch_result = CUDA_ERROR_OUT_OF_MEMORY;
  try {
    engine.forward(args(plan, 64));
    FAIL() << "launched";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCudaError);
    EXPECT_THAT(error.what(), HasSubstr("launching treeattn_fwd"));
    EXPECT_THAT(error.what(), HasSubstr("CUDA_ERROR_OUT_OF_MEMORY"));
  }
  driver_.launch_result = CUDA_SUCCESS;
  EXPECT_EQ(refusal([&] { engine.forward(args(plan, 64)); }), "accepted");
}

TEST_F(CudaEngine, ValidateReadsTheReportFromTheDevice) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  std::vector<std::int32_t> buffer(plan_bytes(plan) / sizeof(std::int32_t));
  const std::vector<int> cu{0, kTotal};
  std::vector<int> start(kTotal, 0);
  const std::vector<int> end(kTotal, 0);
  start[41] = 3;
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu.data();
  inputs.tree_dfs_order_start_q = start.data();
  inputs.tree_dfs_order_end_k = end.data();
  build_plan_cpu(to_plan_shape(plan), inputs, buffer.data());
  const PlanReport report = engine.validate(plan, buffer.data(), stream());
  EXPECT_FALSE(report.valid);
  EXPECT_EQ(report.first_bad_token, 42);
}

TEST_F(CudaEngine, AForkedChildIsToldWhatToDo) {
  Engine engine;
  const Plan plan = plan_for(engine, 64);
  const ForwardArgs a = args(plan, 64);
  engine.forward(a);
  const Shape one = shape(64);
  test::ChildProcess child([&] {
    const auto told = [](const std::string& text) {
      return text.find("fork") != std::string::npos && text.find("spawn") != std::string::npos;
    };
    int missing = 0;
    if (!told(refusal([&] { engine.forward(a); }))) missing |= 1;
    if (!told(refusal([&] { engine.validate(plan, a.plan_buffer); }))) missing |= 2;
    if (!told(refusal([&] { engine.prepare({&one, 1}); }))) missing |= 4;
    if (driver_.launches().size() != 1) missing |= 8;
    return missing;
  });
  EXPECT_EQ(child.wait(), 0);
  engine.forward(a);
  EXPECT_THAT(driver_.launches(), SizeIs(2)) << "the parent goes on";
}

}  // namespace
}  // namespace treeattn
