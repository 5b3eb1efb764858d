// How the engine lives in a process with a GPU: graphs, streams, threads, forks, errors, host cost.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "generator/arch.h"
#include "generator/kernel_spec.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/device_case.h"
#include "tests/support/log_capture.h"
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

std::vector<std::byte> bytes_of(const HostTensor& t) {
  const auto* data = static_cast<const std::byte*>(t.data());
  return {data, data + t.size_bytes()};
}

/// Captures what `body` launches and makes it launchable.
class Graph {
 public:
  template <class Body>
  explicit Graph(CUstream stream, Body&& body) {
    const DriverTable& d = driver();
    check(d.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL), "begin capture");
    body();
    CUgraph graph = nullptr;
    check(d.cuStreamEndCapture(stream, &graph), "end capture");
    check(d.cuGraphInstantiateWithFlags(&exec_, graph, 0), "instantiate");
    d.cuGraphDestroy(graph);
  }
  ~Graph() { driver().cuGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(CUstream stream) { check(driver().cuGraphLaunch(exec_, stream), "graph launch"); }

 private:
  CUgraphExec exec_ = nullptr;
};

struct DeviceTree {
  GuardedBuffer cu, start, end;
  PlanInputs inputs() const {
    PlanInputs in;
    in.cu_seqlens_q = in.cu_seqlens_k = cu.as<int>();
    in.tree_dfs_order_start_q = start.as<int>();
    in.tree_dfs_order_end_k = end.as<int>();
    return in;
  }
};

// A captured plan and forward, replayed with other trees and lengths under the same totals.
void capture_and_replay(int dim, const std::string& spec = {}) {
  RandomCase c = sizeable(dim);
  const int total = std::min(c.cu_q.back(), c.cu_k.back());
  c.heads = c.heads_kv = 2;
  c.total_q = c.total_k = total;
  c.q = c.k = c.v = c.out = HostTensor(c.dtype, total, 2, dim);
  SplitMix64 rng(1);
  for (HostTensor* t : {&c.q, &c.k, &c.v}) {
    for (int n = 0; n < total; ++n) {
      for (int h = 0; h < 2; ++h) {
        for (int d = 0; d < dim; ++d) t->set(n, h, d, 2 * rng.uniform() - 1);
      }
    }
  }
  const auto set_tree = [&](int tokens) {
    random_forest(rng, tokens, c.start, c.end);
    c.cu_q = c.cu_k = {0, tokens};
    c.start.resize(total, 0);
    c.end.resize(total, 0);
  };
  set_tree(total);
  DeviceTree tree{GuardedBuffer(c.cu_q), GuardedBuffer(c.start), GuardedBuffer(c.end)};
  const Shape shape = shape_of_case(c, false);
  Plan plan = gpu_engine().plan_for(total, total, 1, {&shape, 1});
  if (!spec.empty()) {
    const TileConfig tile = parse_kernel_spec(spec).tile;
    plan.views[plan.num_views++] = {tile.block_m, tile.block_n};
  }
  const GuardedBuffer buffer(plan_bytes(plan));
  const GuardedBuffer q(c.q), k(c.k), v(c.v), out(c.out);
  const GuardedBuffer lse(static_cast<std::size_t>(2) * total * 4);
  ForwardArgs args = c.forward_args();
  args.q.data = q.as();
  args.k.data = k.as();
  args.v.data = v.as();
  args.out.data = out.as();
  args.lse = lse.as<float>();
  args.plan = &plan;
  args.plan_buffer = buffer.as<int>();
  args.spec = spec;
  const StreamOwner stream;
  Graph graph(stream.get(), [&] {
    gpu_engine().build_plan(plan, tree.inputs(), buffer.as<int>(), stream.get());
    gpu_engine().forward(args, stream.get());
  });
  for (const int tokens : {total, total / 2, total - 3, 1}) {
    set_tree(tokens);
    tree.cu.upload(c.cu_q.data(), c.cu_q.size() * 4);
    tree.start.upload(c.start.data(), c.start.size() * 4);
    tree.end.upload(c.end.data(), c.end.size() * 4);
    graph.launch(stream.get());
    stream.synchronize();
    out.download(c.out.data(), c.out.size_bytes());
    std::vector<float> got_lse(static_cast<std::size_t>(2) * total);
    lse.download(got_lse.data(), got_lse.size() * 4);
    const OracleResult expected = oracle_forward(c.oracle(), Emulate::kBF16);
    const ForwardError error =
        compare_forward(expected.out, expected.lse, c.out.to_doubles(), got_lse, 2, dim);
    EXPECT_LT(error.rel_l2, 4e-3) << tokens << " tokens: " << error.describe();
    EXPECT_LT(error.lse, 1e-4) << tokens << " tokens: " << error.describe();
  }
}

TEST_F(EngineOnGpu, ACapturedGraphReplaysWithOtherTrees) {
  const Shape shape{DType::kBF16, 2, 2, 64};
  gpu_engine().prepare({&shape, 1});
  capture_and_replay(64);
}

// No other test names this tile: the kernel is not loaded when the capture begins.
TEST_F(EngineOnGpu, AKernelThatIsNotLoadedDoesNotSpoilACapture) {
  const test::LogCapture log;
  const DeviceInfo& device = device_info(0);
  const Target target = target_for_device(device.major, device.minor);
  capture_and_replay(64, "fwd/sm80@" + to_string(target) + "/bf16/d64v64/m64n32s2w4");
  bool warned = false;
  for (const auto& [level, text] : log.messages()) {
    warned |= text.find("captur") != std::string::npos;
  }
  EXPECT_TRUE(warned) << "a load during capture is worth a warning";
}

TEST_F(EngineOnGpu, TwoStreamsShareAPlan) {
  RandomCase c = sizeable(64);
  DeviceCase on(c, false);
  std::vector<float> lse;
  on.forward(c, lse);
  const auto expected = bytes_of(c.out);
  const StreamOwner a;
  const StreamOwner b;
  const GuardedBuffer out_a(c.out);
  const GuardedBuffer out_b(c.out);
  ForwardArgs args = on.forward_args(c);
  args.lse = nullptr;
  for (int n = 0; n < 200; ++n) {
    args.out.data = out_a.as();
    gpu_engine().forward(args, a.get());
    args.out.data = out_b.as();
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
    int code = 1;
    try {
      engine.forward(args);
    } catch (const Error& error) {
      const bool told = std::strstr(error.what(), "fork") != nullptr &&
                        std::strstr(error.what(), "spawn") != nullptr;
      code = told ? 0 : 2;
    }
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
  RandomCase c = sizeable(64);
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
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.spec = "fwd/sm80@sm_80/bf16/d64v64"; }),
              HasSubstr("does not fit"));
  EXPECT_THAT(refusal([](ForwardArgs& a) { a.head_dim = a.head_dim_v = 128; }), HasSubstr("plan"));
  EXPECT_EQ(gpu_engine().stats().launches, launches);
}

TEST_F(EngineOnGpu, AHotForwardCallAllocatesNothingAndIsCheap) {
  RandomCase c = sizeable(64);
  const DeviceCase on(c, false);
  const ForwardArgs args = on.forward_args(c);
  const StreamOwner stream;
  for (int n = 0; n < 10; ++n) gpu_engine().forward(args, stream.get());
  stream.synchronize();
  std::vector<double> us;
  long allocations = 0;
  for (int n = 0; n < 500; ++n) {
    const auto begin = std::chrono::steady_clock::now();
    allocations += test::count_allocations([&] { gpu_engine().forward(args, stream.get()); });
    us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
                     .count());
    if (n % 50 == 49) stream.synchronize();
  }
  std::ranges::sort(us);
  std::printf("hot forward call: median %.2f us of host time\n", us[us.size() / 2]);
  EXPECT_EQ(allocations, 0);
  EXPECT_LT(us[us.size() / 2], 50);
}

}  // namespace
}  // namespace treeattn::testing
