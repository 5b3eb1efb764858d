// What a call costs on the host: no allocation on either side, no wait for the device, few
// microseconds. Also calls from several threads at once.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/allocation_counter.h"
#include "tests/support/device_case.h"
#include "tests/support/forward_bar.h"

namespace treeattn::testing {
namespace {

class HostCost : public GpuTest {};

/// A driver function that the library itself has no use for.
template <class Function>
Function driver_function(const char* name) {
  void* const library = dlopen(driver().path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) throw Error(ErrorCode::kNotFound, "the driver is not loaded");
  void* const address = dlsym(library, name);
  if (address == nullptr) throw Error(ErrorCode::kNotFound, name);
  return reinterpret_cast<Function>(address);
}

std::size_t free_device_bytes() {
  static const auto info =
      driver_function<CUresult(CUDAAPI*)(std::size_t*, std::size_t*)>("cuMemGetInfo_v2");
  std::size_t free = 0;
  std::size_t total = 0;
  check(info(&free, &total), "cuMemGetInfo");
  return free;
}

/// Keeps a stream busy until released; gives up after a while, so that a call which waits for the
/// stream fails its test instead of hanging it.
class BlockedStream {
 public:
  BlockedStream() {
    static const auto launch_host =
        driver_function<CUresult(CUDAAPI*)(CUstream, CUhostFn, void*)>("cuLaunchHostFunc");
    check(launch_host(stream_.get(), &BlockedStream::wait, this), "cuLaunchHostFunc");
  }
  ~BlockedStream() { release(); }
  BlockedStream(const BlockedStream&) = delete;
  BlockedStream& operator=(const BlockedStream&) = delete;

  CUstream get() const { return stream_.get(); }
  /// Lets the stream go on and waits for it. False: nobody released it in time.
  bool release() {
    gate_.release();
    stream_.synchronize();
    return in_time_;
  }

 private:
  static void CUDA_CB wait(void* self) {
    auto& blocked = *static_cast<BlockedStream*>(self);
    blocked.in_time_ = blocked.gate_.try_acquire_for(std::chrono::seconds(20));
  }

  StreamOwner stream_;
  std::counting_semaphore<16> gate_{0};
  bool in_time_ = false;
};

RandomCase tree_case() {
  const RandomCaseOptions options = plain_trees(DType::kBF16, 128);
  for (std::uint64_t seed = 0;; ++seed) {
    RandomCase c = random_case(seed, options);
    if (std::min(c.cu_q.back(), c.cu_k.back()) > 500) return c;
  }
}

/// A case on the device with its kernels loaded and its plan built.
struct Ready {
  RandomCase c = tree_case();
  DeviceCase on{c, true};
  GuardedBuffer cu_q{c.cu_q}, cu_k{c.cu_k}, start{c.start}, end{c.end};
  std::vector<float> lse;
  ForwardArgs args = on.forward_args(c);

  Ready() { on.forward(c, lse); }
  PlanInputs inputs() const {
    PlanInputs in;
    in.cu_seqlens_q = cu_q.as<int>();
    in.cu_seqlens_k = cu_k.as<int>();
    in.tree_dfs_order_start_q = start.as<int>();
    in.tree_dfs_order_end_k = end.as<int>();
    return in;
  }
};

/// Median host time of a hot call, which must allocate on neither side.
double hot_call_us(const std::string& name, const std::function<void(CUstream)>& call) {
  const StreamOwner stream;
  for (int n = 0; n < 10; ++n) call(stream.get());
  stream.synchronize();
  const std::size_t free_bytes = free_device_bytes();
  std::vector<double> us;
  long allocations = 0;
  for (int n = 0; n < 500; ++n) {
    const auto begin = std::chrono::steady_clock::now();
    allocations += test::count_allocations([&] { call(stream.get()); });
    us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
                     .count());
    if (n % 50 == 49) stream.synchronize();
  }
  EXPECT_EQ(allocations, 0) << name;
  EXPECT_EQ(free_device_bytes(), free_bytes) << name;
  std::ranges::sort(us);
  const double median = us[us.size() / 2];
  std::printf("hot %s call: median %.2f us of host time\n", name.c_str(), median);
  GpuTest::RecordProperty("hot_" + name + "_call_us", std::to_string(median));
  return median;
}

TEST_F(HostCost, AHotForwardCallAllocatesNothingAndIsCheap) {
  const Ready r;
  EXPECT_LT(hot_call_us("forward", [&](CUstream s) { gpu_engine().forward(r.args, s); }), 50);
}

TEST_F(HostCost, AHotBackwardCallAllocatesNothingAndIsCheap) {
  const Ready r;
  const std::int64_t q_step = std::int64_t{r.c.heads} * 128;
  const std::int64_t k_step = std::int64_t{r.c.heads_kv} * 128;
  const GuardedBuffer dq(static_cast<std::size_t>(r.c.total_q * q_step * 2));
  const GuardedBuffer dk(static_cast<std::size_t>(r.c.total_k * k_step * 2));
  const GuardedBuffer dv(static_cast<std::size_t>(r.c.total_k * k_step * 2));
  BackwardArgs args;
  args.dtype = r.args.dtype;
  args.heads = r.args.heads;
  args.heads_kv = r.args.heads_kv;
  args.head_dim = r.args.head_dim;
  args.q = r.args.q;
  args.k = r.args.k;
  args.v = r.args.v;
  args.out = args.dout = {r.args.out.data, r.args.out.token_stride, r.args.out.head_stride};
  args.lse = r.args.lse;
  args.dq = {dq.as(), q_step, 128};
  args.dk = {dk.as(), k_step, 128};
  args.dv = {dv.as(), k_step, 128};
  args.softmax_scale = r.args.softmax_scale;
  args.plan = r.args.plan;
  args.plan_buffer = r.args.plan_buffer;
  for (const bool deterministic : {false, true}) {
    args.deterministic = deterministic;
    const GuardedBuffer workspace(gpu_engine().backward_workspace_bytes(
        r.on.plan(), shape_of_case(r.c, true), deterministic));
    args.workspace = workspace.as();
    args.workspace_bytes = workspace.bytes();
    const char* const name = deterministic ? "deterministic_backward" : "backward";
    EXPECT_LT(hot_call_us(name, [&](CUstream s) { gpu_engine().backward(args, s); }), 50);
    EXPECT_TRUE(workspace.intact());
  }
}

TEST_F(HostCost, BuildingAPlanAllocatesNothing) {
  const Ready r;
  const StreamOwner stream;
  const std::size_t free_bytes = free_device_bytes();
  const PlanInputs inputs = r.inputs();
  const long allocations = test::count_allocations(
      [&] { gpu_engine().build_plan(r.on.plan(), inputs, r.on.plan_buffer(), stream.get()); });
  stream.synchronize();
  EXPECT_EQ(allocations, 0);
  EXPECT_EQ(free_device_bytes(), free_bytes);
}

TEST_F(HostCost, CallsReturnWhileTheDeviceIsStillBusy) {
  static const auto query = driver_function<CUresult(CUDAAPI*)(CUstream)>("cuStreamQuery");
  const Ready r;
  BlockedStream stream;
  for (int n = 0; n < 20; ++n) {
    gpu_engine().build_plan(r.on.plan(), r.inputs(), r.on.plan_buffer(), stream.get());
    gpu_engine().forward(r.args, stream.get());
  }
  EXPECT_EQ(query(stream.get()), CUDA_ERROR_NOT_READY);
  EXPECT_TRUE(stream.release()) << "a call waited for the device";
}

// Each thread has its own stream, plan and output; all share the engine and the inputs.
TEST_F(HostCost, ThreadsPlanAndRunAtOnce) {
  constexpr int kThreads = 8;
  const Ready r;
  const std::vector<std::byte> expected = bytes_of(r.c.out);
  std::vector<std::vector<std::byte>> got(kThreads, std::vector<std::byte>(expected.size()));
  std::vector<std::jthread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Engine& engine = gpu_engine();
      const StreamOwner stream;
      const GuardedBuffer plan_buffer(plan_bytes(r.on.plan()));
      HostTensor poison = r.c.out;
      poison.fill(std::nan(""));
      const GuardedBuffer out(poison);
      ForwardArgs args = r.args;
      args.plan_buffer = plan_buffer.as<int>();
      const GuardedBuffer workspace = forward_workspace();
      args.workspace = workspace.as();
      args.out.data = out.as();
      args.lse = nullptr;
      for (int n = 0; n < 20; ++n) {
        engine.build_plan(r.on.plan(), r.inputs(), plan_buffer.as<int>(), stream.get());
        engine.forward(args, stream.get());
      }
      stream.synchronize();
      out.download(got[t].data(), got[t].size());
    });
  }
  threads.clear();
  for (const auto& bytes : got) EXPECT_EQ(bytes, expected);
}

}  // namespace
}  // namespace treeattn::testing
