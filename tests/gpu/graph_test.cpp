// Plan and forward in a captured CUDA graph, warm and cold, replayed with other trees.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "generator/arch.h"
#include "generator/kernel_spec.h"
#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"
#include "tests/support/log_capture.h"

namespace treeattn::testing {
namespace {

constexpr int kTotal = 700;
constexpr int kBatch = 3;
constexpr int kHeads = 2;
constexpr int kDim = 64;

class GraphOnGpu : public GpuTest {};

/// Captures what `body` launches and makes it launchable.
class Graph {
 public:
  template <class Body>
  Graph(CUstream stream, Body&& body) {
    const DriverTable& d = driver();
    check(d.cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_GLOBAL), "begin capture");
    body();
    CUgraph graph = nullptr;
    check(d.cuStreamEndCapture(stream, &graph), "end capture");
    const CUresult result = d.cuGraphInstantiateWithFlags(&exec_, graph, 0);
    d.cuGraphDestroy(graph);
    check(result, "instantiate");
  }
  ~Graph() { driver().cuGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(CUstream stream) { check(driver().cuGraphLaunch(exec_, stream), "graph launch"); }

 private:
  CUgraphExec exec_ = nullptr;
};

RandomCase packed_case() {
  RandomCase c;
  c.dtype = DType::kBF16;
  c.heads = c.heads_kv = kHeads;
  c.head_dim = c.head_dim_v = kDim;
  c.softmax_scale = 1 / std::sqrt(double{kDim});
  c.total_q = c.total_k = kTotal;
  c.q = c.k = c.v = c.out = HostTensor(c.dtype, kTotal, kHeads, kDim);
  SplitMix64 rng(1);
  for (HostTensor* t : {&c.q, &c.k, &c.v}) {
    for (int n = 0; n < kTotal; ++n) {
      for (int h = 0; h < kHeads; ++h) {
        for (int d = 0; d < kDim; ++d) t->set(n, h, d, 3.4 * rng.uniform() - 1.7);
      }
    }
  }
  return c;
}

/// Other trees of these lengths; what the totals leave over is capacity.
void set_trees(RandomCase& c, SplitMix64& rng, const std::vector<int>& lengths) {
  c.cu_q = {0};
  c.start.clear();
  c.end.clear();
  for (const int tokens : lengths) {
    std::vector<int> start, end;
    random_forest(rng, tokens, start, end);
    c.start.insert(c.start.end(), start.begin(), start.end());
    c.end.insert(c.end.end(), end.begin(), end.end());
    c.cu_q.push_back(c.cu_q.back() + tokens);
  }
  c.cu_k = c.cu_q;
  c.start.resize(kTotal, -3);
  c.end.resize(kTotal, 1 << 30);
}

/// Captures build_plan and forward, and holds every replay to the oracle. `spec`: as in
/// ForwardArgs.
void capture_and_replay(const std::string& spec) {
  RandomCase c = packed_case();
  SplitMix64 rng(2);
  set_trees(c, rng, {kTotal, 0, 0});
  GuardedBuffer cu(c.cu_q), start(c.start), end(c.end);
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu.as<int>();
  inputs.tree_dfs_order_start_q = start.as<int>();
  inputs.tree_dfs_order_end_k = end.as<int>();
  const Shape shape = shape_of_case(c, false);
  Plan plan = gpu_engine().plan_for(kTotal, kTotal, kBatch, {&shape, 1});
  if (!spec.empty()) {
    const TileConfig tile = parse_kernel_spec(spec).tile;
    plan.views[plan.num_views++] = {tile.block_m, tile.view_block_n()};
  }
  const GuardedBuffer buffer(plan_bytes(plan));
  const GuardedBuffer q(c.q), k(c.k), v(c.v);
  GuardedBuffer out(c.out);
  std::vector<float> got_lse(std::size_t{kHeads} * kTotal);
  GuardedBuffer lse(got_lse);
  ForwardArgs args = c.forward_args();
  args.q.data = q.as();
  args.k.data = k.as();
  args.v.data = v.as();
  args.out.data = out.as();
  args.lse = lse.as<float>();
  args.plan = &plan;
  args.plan_buffer = buffer.as<int>();
  args.spec = spec;
  const GuardedBuffer workspace = forward_workspace();
  args.workspace = workspace.as();
  args.workspace_bytes = kForwardWorkspaceBytes;
  const StreamOwner stream;
  Graph graph(stream.get(), [&] {
    gpu_engine().build_plan(plan, inputs, buffer.as<int>(), stream.get());
    gpu_engine().forward(args, stream.get());
  });
  const std::vector<std::vector<int>> replays{{kTotal, 0, 0}, {1, 0, 333},   {100, 100, 100},
                                              {0, 0, 0},      {0, 129, 571}, {17, kTotal - 17, 0}};
  for (const std::vector<int>& lengths : replays) {
    set_trees(c, rng, lengths);
    cu.upload(c.cu_q.data(), c.cu_q.size() * sizeof(int));
    start.upload(c.start.data(), c.start.size() * sizeof(int));
    end.upload(c.end.data(), c.end.size() * sizeof(int));
    c.out.fill(std::nan(""));
    out.upload(c.out.data(), c.out.size_bytes());
    std::ranges::fill(got_lse, std::nanf(""));
    lse.upload(got_lse.data(), got_lse.size() * sizeof(float));
    graph.launch(stream.get());
    stream.synchronize();
    out.download(c.out.data(), c.out.size_bytes());
    lse.download(got_lse.data(), got_lse.size() * sizeof(float));
    const OracleResult expected = oracle_forward(c.oracle(), Emulate::kBF16);
    EXPECT_EQ(judge_forward(c, expected, c.out.to_doubles(), got_lse), "");
  }
  EXPECT_TRUE(buffer.intact() && out.intact() && lse.intact() && workspace.intact());
}

TEST_F(GraphOnGpu, ACapturedGraphReplaysWithOtherTrees) {
  const Shape shape{DType::kBF16, kHeads, kHeads, kDim};
  gpu_engine().prepare({&shape, 1});
  const test::LogCapture log;
  capture_and_replay("");
  EXPECT_EQ(log.count("captur"), 0U) << log.text();
}

// No other test names this tile: the kernel is not loaded when the capture begins.
TEST_F(GraphOnGpu, AKernelThatIsNotLoadedDoesNotSpoilACapture) {
  const test::LogCapture log;
  const DeviceInfo& device = device_info(0);
  const Target target = target_for_device(device.major, device.minor);
  capture_and_replay("fwd/sm80@" + to_string(target) + "/bf16/d64v64/m64n32s2w4");
  EXPECT_GE(log.count("captur"), 1U) << "a load during capture is worth a warning";
}

}  // namespace
}  // namespace treeattn::testing
