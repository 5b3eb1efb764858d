#include "tests/support/device_case.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>

#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn::testing {
namespace {

constexpr std::uint8_t kGuard = 0xa5;
constexpr std::uint8_t kNanByte = 0xff;

}  // namespace

const std::string& no_gpu() {
  static const std::string reason = [] {
    std::string why;
    if (try_driver(&why) == nullptr) return "no GPU: " + why;
    try {
      const PrimaryContext context(0);
      return std::string();
    } catch (const Error& error) {
      return std::string("no GPU: ") + error.what();
    }
  }();
  return reason;
}

Engine& gpu_engine() {
  static PrimaryContext* const context = new PrimaryContext(0);
  static Engine* const engine = new Engine;
  thread_local const ContextScope current(context->get());
  return *engine;
}

GuardedBuffer::GuardedBuffer(std::size_t bytes) : buffer_(bytes + 2 * kGuardBytes), bytes_(bytes) {
  buffer_.fill(kGuard);
}

GuardedBuffer::GuardedBuffer(const void* data, std::size_t bytes) : GuardedBuffer(bytes) {
  upload(data, bytes);
}

void GuardedBuffer::upload(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  const auto* from = static_cast<const std::byte*>(data);
  buffer_.upload(std::span<const std::byte>(from, bytes), kGuardBytes);
}

void GuardedBuffer::download(void* to, std::size_t bytes) const {
  if (bytes == 0) return;
  const auto values = buffer_.download<std::byte>(bytes, kGuardBytes);
  std::memcpy(to, values.data(), bytes);
}

bool GuardedBuffer::intact() const {
  if (buffer_.bytes() == 0) return true;
  const auto all_guard = [&](std::size_t at) {
    const auto bytes = buffer_.download<std::uint8_t>(kGuardBytes, at);
    return std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t b) { return b == kGuard; });
  };
  return all_guard(0) && all_guard(kGuardBytes + bytes_);
}

Shape shape_of_case(const RandomCase& p, bool backward) {
  return {p.dtype, p.heads, p.heads_kv, p.head_dim, p.head_dim_v, p.softcap > 0, backward};
}

GuardedBuffer forward_workspace() {
  return GuardedBuffer(std::vector<std::uint8_t>(kForwardWorkspaceBytes, kNanByte));
}

int most_packed(const RandomCase& p) {
  return most_heads_per_pack_log2(p.heads / p.heads_kv);
}

DeviceCase::DeviceCase(const RandomCase& p, bool backward, Stream stream,
                       std::optional<int> heads_per_pack_log2)
    : q(p.q), k(p.k), v(p.v), out(p.out), lse(static_cast<std::size_t>(p.heads) * p.total_q * 4) {
  const Shape shape = shape_of_case(p, backward);
  plan_ = gpu_engine().plan_for(p.total_q, p.total_k, p.batch(), {&shape, 1});
  if (heads_per_pack_log2) {
    const Problem problem = problem_for(Pass::kForward, shape, kernel_target(device_info(0)));
    const TileConfig tile = default_tile(problem);
    plan_.views[0] = {tile.block_m >> *heads_per_pack_log2, tile.view_block_n()};  // forward's
  }
  plan_buffer_ = GuardedBuffer(plan_bytes(plan_));
  workspace = forward_workspace();
  build_plan(p, stream);
}

void DeviceCase::build_plan(const RandomCase& p, Stream stream) {
  cu_q_ = GuardedBuffer(p.cu_q);
  cu_k_ = GuardedBuffer(p.cu_k);
  start_ = GuardedBuffer(p.start);
  end_ = GuardedBuffer(p.end);
  first_ = GuardedBuffer(p.first);
  len_ = GuardedBuffer(p.len);
  PlanInputs inputs;
  inputs.lowering = p.lowering;
  inputs.cu_seqlens_q = cu_q_.as<int>();
  inputs.cu_seqlens_k = cu_k_.as<int>();
  inputs.tree_dfs_order_start_q = start_.as<int>();
  inputs.tree_dfs_order_end_k = end_.as<int>();
  inputs.first = first_.as<int>();
  inputs.len = len_.as<int>();
  gpu_engine().build_plan(plan_, inputs, plan_buffer(), stream);
}

ForwardArgs DeviceCase::forward_args(const RandomCase& p) const {
  ForwardArgs args;
  args.dtype = p.dtype;
  args.heads = p.heads;
  args.heads_kv = p.heads_kv;
  args.head_dim = p.head_dim;
  args.head_dim_v = p.head_dim_v;
  args.q = {q.as(), p.q.token_stride(), p.q.head_stride()};
  args.k = {k.as(), p.k.token_stride(), p.k.head_stride()};
  args.v = {v.as(), p.v.token_stride(), p.v.head_stride()};
  args.out = {out.as(), p.out.token_stride(), p.out.head_stride()};
  args.lse = lse.as<float>();
  args.softmax_scale = p.softmax_scale;
  args.softcap = p.softcap;
  args.plan = &plan_;
  args.plan_buffer = plan_buffer();
  args.workspace = workspace.as();
  args.workspace_bytes = kForwardWorkspaceBytes;
  return args;
}

void DeviceCase::forward(RandomCase& p, std::vector<float>& lse_out, Stream stream,
                         std::string_view spec) {
  p.out.fill(std::nan(""));
  out.upload(p.out.data(), p.out.size_bytes());
  lse_out.assign(static_cast<std::size_t>(p.heads) * p.total_q, std::nanf(""));
  lse.upload(lse_out.data(), lse_out.size() * sizeof(float));
  ForwardArgs args = forward_args(p);
  args.spec = spec;
  gpu_engine().forward(args, stream);
  out.download(p.out.data(), p.out.size_bytes());
  lse.download(lse_out.data(), lse_out.size() * sizeof(float));
}

std::vector<int> DeviceCase::download_plan() const {
  std::vector<int> values(plan_bytes(plan_) / sizeof(int));
  plan_buffer_.download(values.data(), values.size() * sizeof(int));
  return values;
}

bool DeviceCase::intact() const {
  return q.intact() && k.intact() && v.intact() && out.intact() && lse.intact() &&
         plan_buffer_.intact();
}

Gradients device_backward(BackwardCase& c, bool deterministic, std::string_view spec) {
  RandomCase& p = c.forward;
  DeviceCase on(p, true);
  for (HostTensor* t : {&c.dq, &c.dk, &c.dv}) t->fill(std::nan(""));
  const GuardedBuffer dout(c.dout);
  const GuardedBuffer lse(c.lse);
  const GuardedBuffer dlse(c.dlse);
  GuardedBuffer dq(c.dq);
  GuardedBuffer dk(c.dk);
  GuardedBuffer dv(c.dv);
  const Shape shape = shape_of_case(p, true);
  const std::size_t bytes =
      gpu_engine().backward_workspace_bytes(on.plan(), shape, deterministic, spec);
  const std::vector<std::uint8_t> poison(bytes, kNanByte);
  GuardedBuffer workspace(poison);
  BackwardArgs args = c.backward_args();
  args.q.data = on.q.as();
  args.k.data = on.k.as();
  args.v.data = on.v.as();
  args.out.data = on.out.as();
  args.dout.data = dout.as();
  args.lse = lse.as<float>();
  args.dlse = c.dlse.empty() ? nullptr : dlse.as<float>();
  args.dq.data = dq.as();
  args.dk.data = dk.as();
  args.dv.data = dv.as();
  args.deterministic = deterministic;
  args.plan = &on.plan();
  args.plan_buffer = on.plan_buffer();
  args.workspace = workspace.as();
  args.workspace_bytes = bytes;
  args.spec = spec;
  gpu_engine().backward(args);
  dq.download(c.dq.data(), c.dq.size_bytes());
  dk.download(c.dk.data(), c.dk.size_bytes());
  dv.download(c.dv.data(), c.dv.size_bytes());
  EXPECT_TRUE(on.intact() && dq.intact() && dk.intact() && dv.intact() && workspace.intact())
      << "bytes beside a tensor were written: " << p.describe();
  return {c.dq.to_doubles(), c.dk.to_doubles(), c.dv.to_doubles()};
}

void parallel_for(int count, const std::function<void(int)>& body) {
  std::atomic<int> next{0};
  std::exception_ptr failure;
  std::mutex failing;
  const auto work = [&] {
    try {
      for (int n = next++; n < count; n = next++) body(n);
    } catch (...) {
      const std::lock_guard lock(failing);
      failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> pool;
    for (unsigned n = 1; n < std::thread::hardware_concurrency(); ++n) pool.emplace_back(work);
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace treeattn::testing
