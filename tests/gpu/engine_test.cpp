// How the engine lives in a process with a GPU: streams, threads, forks, empty totals, errors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "generator/arch.h"
#include "generator/kernel_spec.h"
#include "generator/tile_space.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/plan.h"
#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"
#include "treeattn/error.h"

namespace treeattn::testing {
namespace {

using ::testing::HasSubstr;

class EngineOnGpu : public GpuTest {};

RandomCaseOptions options_for(int dim, DType dtype = DType::kBF16) {
  RandomCaseOptions options;
  options.dtype = dtype;
  options.head_dim = dim;
  options.head_dim_v = dim;
  options.softcap = false;
  options.lowering = Lowering::kTree;
  options.long_share = 0;
  return options;
}

/// A case with at least this many tokens.
RandomCase sizeable(int dim, DType dtype = DType::kBF16, std::uint64_t seed = 0) {
  for (;; ++seed) {
    RandomCase c = random_case(seed, options_for(dim, dtype));
    if (c.cu_q.back() > 200 && c.cu_k.back() > 200) return c;
  }
}

TEST_F(EngineOnGpu, TwoStreamsShareAPlan) {
  RandomCase c = sizeable(64);
  DeviceCase on(c, false);
  std::vector<float> lse;
  on.forward(c, lse);
  const auto expected = bytes_of(c.out);
  const StreamOwner a;
  const StreamOwner b;
  c.out.fill(std::nan(""));
  const GuardedBuffer out_a(c.out);
  const GuardedBuffer out_b(c.out);
  ForwardArgs args = on.forward_args(c);
  args.lse = nullptr;
  const GuardedBuffer workspace_b = forward_workspace();
  for (int n = 0; n < 200; ++n) {
    args.out.data = out_a.as();
    args.workspace = on.workspace.as();
    gpu_engine().forward(args, a.get());
    args.out.data = out_b.as();
    args.workspace = workspace_b.as();
    gpu_engine().forward(args, b.get());
  }
  a.synchronize();
  b.synchronize();
  for (const GuardedBuffer* out : {&out_a, &out_b}) {
    std::vector<std::byte> got(expected.size());
    out->download(got.data(), got.size());
    EXPECT_EQ(got, expected);
  }
}

TEST_F(EngineOnGpu, AThreadWithoutAContextUsesTheEngines) {
  RandomCase c = sizeable(64);
  DeviceCase on(c, false);
  std::vector<float> lse;
  on.forward(c, lse);
  const auto expected = bytes_of(c.out);
  c.out.fill(std::nan(""));
  on.out.upload(c.out.data(), c.out.size_bytes());
  const ForwardArgs args = on.forward_args(c);
  Engine& engine = gpu_engine();
  CUcontext left = nullptr;
  std::thread([&] {
    engine.forward(args);
    driver().cuCtxGetCurrent(&left);
  }).join();
  EXPECT_EQ(left, nullptr) << "the call left a context behind on the thread";
  on.out.download(c.out.data(), c.out.size_bytes());
  EXPECT_EQ(bytes_of(c.out), expected);
}

TEST_F(EngineOnGpu, AForkedChildIsToldWhatToDoAndTheParentGoesOn) {
  RandomCase c = sizeable(64);
  DeviceCase on(c, false);
  const ForwardArgs args = on.forward_args(c);
  gpu_engine().forward(args);
  Engine& engine = gpu_engine();
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto told = [](auto&& call) {
      try {
        call();
      } catch (const Error& error) {
        return std::strstr(error.what(), "fork") != nullptr &&
               std::strstr(error.what(), "spawn") != nullptr;
      }
      return false;
    };
    int code = 0;
    if (!told([&] { engine.forward(args); })) code |= 1;
    if (!told([&] { engine.validate(on.plan(), on.plan_buffer()); })) code |= 2;
    if (!told([] { const Engine fresh; })) code |= 4;
    _exit(code);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  std::vector<float> lse;
  on.forward(c, lse);
  EXPECT_FALSE(std::isnan(c.out.get(0, 0, 0)));
}

// As the C API's or a plain program's does: no framework has made a context current.
TEST_F(EngineOnGpu, AnEngineMadeWithoutAContextTakesThePrimaryOne) {
  RandomCase c = sizeable(64);
  DeviceCase on(c, false);
  std::vector<float> lse;
  on.forward(c, lse);
  const auto expected = bytes_of(c.out);
  c.out.fill(std::nan(""));
  on.out.upload(c.out.data(), c.out.size_bytes());
  const ForwardArgs args = on.forward_args(c);
  std::thread([&] {
    Engine engine;
    engine.forward(args);
    const Engine moved = std::move(engine);
    EXPECT_EQ(moved.stats().launches, 1U);
  }).join();
  on.out.download(c.out.data(), c.out.size_bytes());
  EXPECT_EQ(bytes_of(c.out), expected);
}

// Empty totals, with null pointers for what is empty.
TEST_F(EngineOnGpu, NothingToDoIsFine) {
  const Shape shape{DType::kBF16, 2, 1, 64, 64, false, true};
  for (const auto& [total_q, total_k] : {std::pair(0, 0), std::pair(0, 5), std::pair(5, 0)}) {
    const Plan plan = gpu_engine().plan_for(total_q, total_k, 0, {&shape, 1});
    const GuardedBuffer buffer(plan_bytes(plan));
    PlanInputs inputs;
    inputs.lowering = Lowering::kCausal;
    gpu_engine().build_plan(plan, inputs, buffer.as<int>());
    EXPECT_TRUE(gpu_engine().validate(plan, buffer.as<int>()).valid);
    const std::vector<std::uint16_t> ones(5 * 2 * 64, 0x3f80);
    const GuardedBuffer q(ones.data(), static_cast<std::size_t>(total_q) * 2 * 64 * 2);
    const GuardedBuffer k(ones.data(), static_cast<std::size_t>(total_k) * 64 * 2);
    const GuardedBuffer out(ones.data(), static_cast<std::size_t>(total_q) * 2 * 64 * 2);
    const GuardedBuffer dk(ones.data(), static_cast<std::size_t>(total_k) * 64 * 2);
    const GuardedBuffer dv(ones.data(), static_cast<std::size_t>(total_k) * 64 * 2);
    const GuardedBuffer lse(std::vector<float>(static_cast<std::size_t>(total_q) * 2));
    ForwardArgs args;
    args.heads = 2;
    args.heads_kv = 1;
    args.head_dim = 64;
    args.q = {q.as(), 128, 64};
    args.k = args.v = {k.as(), 64, 64};
    args.out = {out.as(), 128, 64};
    args.lse = lse.as<float>();
    args.softmax_scale = 1;
    args.plan = &plan;
    args.plan_buffer = buffer.as<int>();
    const GuardedBuffer counter = forward_workspace();
    args.workspace = counter.as();
    args.workspace_bytes = kForwardWorkspaceBytes;
    gpu_engine().forward(args);
    for (const bool deterministic : {false, true}) {
      const GuardedBuffer workspace(
          gpu_engine().backward_workspace_bytes(plan, shape, deterministic));
      BackwardArgs back;
      back.heads = 2;
      back.heads_kv = 1;
      back.head_dim = 64;
      back.q = args.q;
      back.k = args.k;
      back.v = args.v;
      back.out = back.dout = {out.as(), 128, 64};
      back.lse = lse.as<float>();
      back.dq = {q.as(), 128, 64};
      back.dk = {dk.as(), 64, 64};
      back.dv = {dv.as(), 64, 64};
      back.softmax_scale = 1;
      back.deterministic = deterministic;
      back.plan = &plan;
      back.plan_buffer = buffer.as<int>();
      back.workspace = workspace.as();
      back.workspace_bytes = gpu_engine().backward_workspace_bytes(plan, shape, deterministic);
      gpu_engine().backward(back);
    }
    for (int n = 0; n < total_q * 2 * 64; ++n) {
      std::vector<std::uint16_t> got(static_cast<std::size_t>(total_q) * 2 * 64);
      out.download(got.data(), got.size() * 2);
      ASSERT_EQ(got[n], 0) << "rows that see nothing are zero";
    }
    for (const GuardedBuffer* t : {&dk, &dv}) {
      std::vector<std::uint16_t> got(static_cast<std::size_t>(total_k) * 64);
      t->download(got.data(), got.size() * 2);
      EXPECT_TRUE(std::ranges::all_of(got, [](std::uint16_t x) { return x == 0; }));
    }
  }
}

template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST_F(EngineOnGpu, BadArgumentsAreNamedBeforeAnythingIsLaunched) {
  RandomCase c = sizeable(128);
  const DeviceCase on(c, false);
  const auto launches = gpu_engine().stats().launches;
  const auto refusal = [&](auto&& change) {
    ForwardArgs args = on.forward_args(c);
    change(args);
    return message_of([&] { gpu_engine().forward(args); });
  };
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.dtype = DType::kF32; }), HasSubstr("dtype is f32"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.head_dim = 68; }), HasSubstr("head_dim is 68"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.softmax_scale = -1; }), HasSubstr("softmax_scale"));
  EXPECT_THAT(
      refusal([](ForwardArgs& a) { a.q.data = static_cast<const std::byte*>(a.q.data) + 2; }),
      HasSubstr("q.data"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.k.token_stride += 1; }), HasSubstr("k.token_stride"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.spec = "fwd/sm80@sm_80/f16/d128v128"; }),
              HasSubstr("does not fit"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.spec = "fwd/sm80"; }), HasSubstr("fwd/sm80"));
  const DeviceInfo& device = device_info(0);
  const std::string other_tile = "fwd/sm80@" +
                                 to_string(target_for_device(device.major, device.minor)) +
                                 "/bf16/d128v128/m64n16s1w4";
  EXPECT_THAT(refusal([&](ForwardArgs& a) { a.spec = other_tile; }),
              HasSubstr("holds no tile lists for 64x16 tiles"));
  // A smaller head, whose strides are good, with other tiles.
  const auto held = [&](int dim) {
    Shape shape = shape_of_case(c, false);
    shape.head_dim = shape.head_dim_v = dim;
    const TileConfig tile = default_tile(problem_for(Pass::kForward, shape, kernel_target(device)));
    return find_view(to_plan_shape(on.plan()), tile.block_m, tile.view_block_n()) >= 0;
  };
  int other_dim = 16;
  while (held(other_dim)) other_dim += 8;
  ASSERT_LT(other_dim, c.head_dim);
  EXPECT_THAT(refusal([&](ForwardArgs& a) { a.head_dim = a.head_dim_v = other_dim; }),
              HasSubstr("the plan holds no tile lists"));
  EXPECT_EQ(gpu_engine().stats().launches, launches);
}

}  // namespace
}  // namespace treeattn::testing
