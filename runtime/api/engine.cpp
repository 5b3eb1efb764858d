// The engine: checks arguments, picks kernels, launches. Device work is asynchronous; a call
// allocates nothing once its kernels are loaded.
#include <fmt/format.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>

#include "generator/arch.h"
#include "generator/tile_space.h"
#include "runtime/attention/backward.h"
#include "runtime/attention/cpu_backward.h"
#include "runtime/attention/cpu_forward.h"
#include "runtime/attention/forward.h"
#include "runtime/attention/plan_cpu.h"
#include "runtime/cuda/device.h"
#include "runtime/cuda/driver.h"
#include "runtime/jit/kernel_cache.h"
#include "runtime/jit/launch.h"
#include "runtime/support/log.h"
#include "treeattn/treeattn.h"

namespace treeattn {
namespace {

/// Counts forks: CUDA state does not survive one.
std::atomic<unsigned>& fork_generation() {
  static std::atomic<unsigned> generation = [] {
    pthread_atfork(nullptr, nullptr, [] { fork_generation().fetch_add(1); });
    return 0U;
  }();
  return generation;
}

/// The view that the CPU executor walks; any head dim fits it.
constexpr PlanView kCpuView{128, 64};

std::string describe_views(const PlanShape& plan) {
  std::string text;
  for (int v = 0; v < plan.num_views; ++v) {
    text +=
        fmt::format("{}{}x{}", v == 0 ? "" : ", ", plan.views[v].block_m, plan.views[v].block_n);
  }
  return text.empty() ? "no tiles" : text + " tiles";
}

CUstream to_stream(Stream stream) {
  return static_cast<CUstream>(stream);
}

}  // namespace

struct Engine::Impl {
  EngineKind kind = EngineKind::kCuda;
  int threads = 0;
  // CUDA engines only
  CUcontext context = nullptr;
  bool owns_primary = false;
  DeviceInfo device;
  Target target;
  unsigned fork_generation_at_birth = 0;
  std::unique_ptr<KernelCache> kernels;
  TensorMapCache tensor_maps;
  std::atomic<std::uint64_t> launches{0};

  bool cuda() const { return kind == EngineKind::kCuda; }

  void attach() {
    const DriverTable& d = driver();
    check(d.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    if (context == nullptr) {
      CUdevice first{};
      check(d.cuDeviceGet(&first, 0), "cuDeviceGet(0)");
      check(d.cuDevicePrimaryCtxRetain(&context, first), "cuDevicePrimaryCtxRetain(0)");
      owns_primary = true;
    }
    const ContextScope scope(context);
    CUdevice ordinal{};
    check(d.cuCtxGetDevice(&ordinal), "cuCtxGetDevice");
    device = device_info(ordinal);
    target = kernel_target(device);
    fork_generation_at_birth = fork_generation();
    kernels = KernelCache::create_default();
  }

  void check_process() const {
    if (fork_generation_at_birth == fork_generation()) return;
    throw Error(
        ErrorCode::kInvalidArgument,
        "this engine was created before the process forked; CUDA does not survive a fork",
        "create the engine in the child process (with Python's multiprocessing: use spawn)");
  }

  KernelSpec plan_spec() const {
    Problem problem;
    problem.pass = Pass::kPlan;
    return {on_device(problem, target), {}};
  }

  KernelSpec kernel_spec(Pass pass, const Shape& shape) const {
    return default_spec(problem_for(pass, shape, target));
  }

  /// The spec that the caller names, or the default.
  KernelSpec kernel_spec(Pass pass, const Shape& shape, std::string_view text) const {
    if (text.empty()) return kernel_spec(pass, shape);
    const KernelSpec spec = parse_kernel_spec(text);
    Problem asked = problem_for(pass, shape, target);
    if (target.cc == kSm90Target.cc) {  // where both families run
      asked.family = spec.problem.family;
      asked.target = Target{target.cc, spec.problem.family == Family::kSm90};
    }
    if (spec.problem != asked) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("spec {} does not fit these arguments, which ask for {}", text,
                              to_string(asked)));
    }
    return spec;
  }

  /// Inside a ContextScope of the engine's context.
  const LoadedKernel& kernel_for(const KernelSpec& spec, Stream stream) const {
    return kernels->get(spec, device.ordinal, to_stream(stream));
  }

  void launch(const LoadedKernel& kernel, std::size_t entry, const Grid& grid, const void* params,
              std::size_t params_bytes, Stream stream) {
    if (grid.x == 0) return;
    LaunchPlan plan;
    plan.kernel = kernel.entry(entry).function;
    plan.grid = {grid.x, grid.y, grid.z};
    plan.threads = static_cast<unsigned>(kernel.entry(entry).threads);
    plan.smem_bytes = static_cast<unsigned>(kernel.entry(entry).smem_bytes);
    plan.params = params;
    plan.params_bytes = params_bytes;
    plan.name = kernel.entry(entry).name;
    treeattn::launch(plan, to_stream(stream));
    launches.fetch_add(1, std::memory_order_relaxed);
  }

  void build_plan(const PlanShape& shape, const PlanInputs& inputs, std::int32_t* buffer,
                  Stream stream) {
    const ContextScope scope(context);
    const LoadedKernel& kernel = kernel_for(plan_spec(), stream);
    const PlanLaunch work = make_plan_launch(shape, inputs, buffer, device.sm_count);
    const std::array grids{work.sequences, work.intervals, work.key_tiles, work.query_tiles};
    for (std::size_t i = 0; i < grids.size(); ++i) {
      launch(kernel, i, grids[i], &work.params, sizeof(work.params), stream);
    }
  }

  void forward(const ForwardArgs& args, const PlanShape& plan, Stream stream) {
    KernelSpec spec = kernel_spec(Pass::kForward, shape_of(args), args.spec);
    if (spec.problem.family == Family::kSm90) {
      const ForwardTensorMaps maps = forward_tensor_maps(args, plan, spec);
      if (plan.total_q == 0 || maps.fit()) {
        forward_sm90(args, plan, spec, maps, stream);
        return;
      }
      spec = spec_for_strides(args.spec, plan, spec.problem, args.heads / args.heads_kv, maps);
    }
    const ForwardLaunch work =
        make_forward_launch(args, plan, spec, device.sm_count, device.l2_bytes);
    if (work.grid.x == 0) return;
    const ContextScope scope(context);
    launch(kernel_for(spec, stream), 0, work.grid, &work.params, sizeof(work.params), stream);
  }

  void forward_sm90(const ForwardArgs& args, const PlanShape& plan, const KernelSpec& spec,
                    const ForwardTensorMaps& maps, Stream stream) {
    const ForwardLaunch work =
        make_forward_launch(args, plan, spec, device.sm_count, device.l2_bytes);
    if (work.grid.x == 0) return;
    const ContextScope scope(context);
    const ForwardSm90Params params{tensor_maps.get(maps.q),
                                   tensor_maps.get(maps.k),
                                   tensor_maps.get(maps.k_granule),
                                   tensor_maps.get(maps.v),
                                   tensor_maps.get(maps.v_granule),
                                   work.params,
                                   plan_offsets(plan).granules,
                                   static_cast<unsigned long long*>(args.workspace),
                                   next_launch_number(),
                                   maps.q.head_step(),
                                   maps.k.head_step(),
                                   maps.v.head_step()};
    launch(kernel_for(spec, stream), 0, work.grid, &params, sizeof(params), stream);
  }

  /// Of this process; never 0, which finished launches leave in their workspace. Consecutive
  /// numbers are spread over all of 32 bits, because the bytes that a workspace happens to hold are
  /// small integers more often than not.
  static unsigned next_launch_number() {
    static std::atomic<unsigned> launches_so_far{0};
    unsigned number = 0;
    while (number == 0) number = launches_so_far.fetch_add(1, std::memory_order_relaxed) + 1;
    return number * 0x9e3779b1U;  // odd: as many different results
  }

  /// The kernel that runs where strides rule out the sm90 family's, which no caller named.
  template <class Maps>
  static KernelSpec spec_for_strides(std::string_view named, const PlanShape& plan,
                                     const Problem& problem, int heads_per_kv, const Maps& maps) {
    if (!named.empty()) {
      throw Error(ErrorCode::kUnsupported, describe_misfit(maps),
                  "copy the tensor, or name no kernel: one of the sm80 family is used then");
    }
    const auto spec = strided_spec(problem, plan, heads_per_kv);
    if (!spec) {
      throw Error(
          ErrorCode::kUnsupported,
          fmt::format("{}; and the plan, which holds tile lists for {}, serves no kernel of "
                      "the sm80 family with head dims {} and {}",
                      describe_misfit(maps), describe_views(plan), problem.head_dim,
                      problem.head_dim_v),
          "copy the tensor, or plan and run with TREEATTN_FAMILY=sm80");
    }
    if (log_level() >= LogLevel::kInfo) {
      log_once(LogLevel::kInfo, "strides:" + to_string(*spec),
               fmt::format("{}; {} is used", describe_misfit(maps), to_string(*spec)));
    }
    return *spec;
  }

  /// The spec of a call, with `maps` if it is of the sm90 family. No query: nothing is read through
  /// them.
  KernelSpec backward_spec(const BackwardArgs& args, const PlanShape& plan,
                           std::optional<BackwardTensorMaps>& maps) const {
    const KernelSpec spec = kernel_spec(Pass::kBackward, shape_of(args), args.spec);
    if (spec.problem.family != Family::kSm90) return spec;
    maps = backward_tensor_maps(args, plan, spec);
    if (plan.total_q == 0 || maps->fit()) return spec;
    const KernelSpec strided = spec_for_strides(args.spec, plan, spec.problem, 1, *maps);
    maps.reset();
    return strided;
  }

  BackwardSm90Params backward_sm90_params(const PlanShape& plan, const BackwardTensorMaps& maps,
                                          const BackwardLaunch& work) {
    BackwardSm90Params params{};
    params.f = work.params;
    if (plan.total_q == 0) return params;
    params.q = tensor_maps.get(maps.q);
    params.k = tensor_maps.get(maps.k);
    params.v = tensor_maps.get(maps.v);
    params.dout = tensor_maps.get(maps.dout);
    params.q_head_step = maps.q.head_step();
    params.k_head_step = maps.k.head_step();
    params.v_head_step = maps.v.head_step();
    params.dout_head_step = maps.dout.head_step();
    return params;
  }

  void backward(const BackwardArgs& args, const PlanShape& plan, Stream stream) {
    const Shape shape = shape_of(args);
    std::optional<BackwardTensorMaps> maps;
    const KernelSpec spec = backward_spec(args, plan, maps);
    const BackwardLaunch work = make_backward_launch(args, plan, spec, device.sm_count);
    const ContextScope scope(context);
    // Kernels are found before anything is launched: a miss must not leave half of the gradients.
    const LoadedKernel& kernel = kernel_for(spec, stream);
    std::optional<BackwardSm90Params> sm90;
    if (maps) sm90 = backward_sm90_params(plan, *maps, work);
    const auto launch_all = [&] {
      launch(kernel, 0, work.prepare, &work.params, sizeof(work.params), stream);
      if (sm90) {
        launch(kernel, 1, work.main, &*sm90, sizeof(*sm90), stream);
      } else {
        launch(kernel, 1, work.main, &work.params, sizeof(work.params), stream);
      }
      launch(kernel, 2, work.sum, &work.params, sizeof(work.params), stream);
    };
    if (!args.deterministic) {
      launch_all();
      return;
    }
    const KernelSpec dq_spec = kernel_spec(Pass::kBackwardDq, shape);
    BackwardParams dq_params = work.params;
    const Grid dq_grid = add_dq_launch(dq_params, plan, dq_spec);
    const LoadedKernel& dq_kernel = kernel_for(dq_spec, stream);
    launch_all();
    launch(dq_kernel, 0, dq_grid, &dq_params, sizeof(dq_params), stream);
  }
};

Engine::Engine(const EngineOptions& options) : impl_(std::make_unique<Impl>()) {
  impl_->kind = options.kind;
  if (options.threads < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("threads is {}, expected 0 (one per core) or more", options.threads));
  }
  impl_->threads = options.threads;
  if (impl_->cuda()) impl_->attach();
}

Engine::~Engine() {
  if (impl_ == nullptr || !impl_->owns_primary) return;
  if (impl_->fork_generation_at_birth != fork_generation()) return;
  const DriverTable* d = try_driver(nullptr);
  if (d != nullptr) d->cuDevicePrimaryCtxRelease(impl_->device.ordinal);
}

Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

EngineKind Engine::kind() const {
  return impl_->kind;
}

std::string Engine::description() const {
  if (!impl_->cuda()) {
    const unsigned threads = impl_->threads > 0 ? static_cast<unsigned>(impl_->threads)
                                                : std::max(1U, std::thread::hardware_concurrency());
    return fmt::format("CPU executor, {} thread{}", threads, threads == 1 ? "" : "s");
  }
  return fmt::format("{} (compute capability {}.{}, {} SMs), kernels for {}", impl_->device.name,
                     impl_->device.major, impl_->device.minor, impl_->device.sm_count,
                     describe_targets(impl_->target));
}

Plan Engine::plan_for(std::int64_t total_q, std::int64_t total_k, int batch,
                      std::span<const Shape> shapes) const {
  const auto check_total = [](const char* name, std::int64_t value) {
    if (value >= 0 && value <= INT32_MAX) return;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} is {}, expected 0 to {}", name, value, INT32_MAX),
                "split the batch");
  };
  check_total("total_q", total_q);
  check_total("total_k", total_k);
  PlanShape plan{};
  plan.total_q = static_cast<int>(total_q);
  plan.total_k = static_cast<int>(total_k);
  plan.batch = batch;
  const auto add_view = [&plan](PlanView view) {
    if (find_view(plan, view.block_m, view.block_n) >= 0) return;
    if (plan.num_views == kMaxPlanViews) {
      throw Error(ErrorCode::kUnsupported,
                  fmt::format("the shapes need more than {} different tile shapes", kMaxPlanViews),
                  "make one plan for some of the shapes and another for the rest");
    }
    plan.views[plan.num_views++] = view;
  };
  if (!impl_->cuda()) add_view(kCpuView);
  for (const Shape& shape : shapes) {
    check_shape(shape, impl_->cuda());
    if (!impl_->cuda()) continue;
    const auto add = [&](Pass pass, int heads_per_pack_log2 = 0) {
      const TileConfig tile = impl_->kernel_spec(pass, shape).tile;
      add_view({tile.block_m >> heads_per_pack_log2, tile.view_block_n()});
    };
    add(Pass::kForward, heads_per_pack_log2_for(shape));
    if (!shape.backward) continue;
    add(Pass::kBackward);
    add(Pass::kBackwardDq);
  }
  const Plan header = to_plan(plan);
  to_plan_shape(header);  // checks batch
  return header;
}

void Engine::build_plan(const Plan& plan, const PlanInputs& inputs, std::int32_t* buffer,
                        Stream stream) {
  const PlanShape shape = to_plan_shape(plan);
  check_plan_inputs(shape, inputs);
  if (buffer == nullptr) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("buffer is null, expected plan_bytes(plan) = {} bytes", plan_bytes(plan)));
  }
  if (reinterpret_cast<std::uintptr_t>(buffer) % 16 != 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("buffer is {}, expected a pointer aligned to 16 bytes",
                            static_cast<const void*>(buffer)));
  }
  if (!impl_->cuda()) {
    build_plan_cpu(shape, inputs, buffer);
    return;
  }
  impl_->check_process();
  impl_->build_plan(shape, inputs, buffer, stream);
}

PlanReport Engine::validate(const Plan& plan, const std::int32_t* buffer, Stream stream) const {
  const PlanShape shape = to_plan_shape(plan);
  if (buffer == nullptr)
    throw Error(ErrorCode::kInvalidArgument, "buffer is null, expected a built plan");
  if (!impl_->cuda()) return report_faults(shape, buffer);
  impl_->check_process();
  const ContextScope scope(impl_->context);
  std::vector<int> head(static_cast<std::size_t>(plan_report_ints(shape)));
  const DriverTable& d = driver();
  check(d.cuMemcpyDtoHAsync(head.data(), reinterpret_cast<CUdeviceptr>(buffer),
                            head.size() * sizeof(int), to_stream(stream)),
        "reading the plan's report");
  check(d.cuStreamSynchronize(to_stream(stream)), "waiting for the plan");
  return report_faults(shape, head.data());
}

std::size_t Engine::forward_workspace_bytes(const Plan& plan, const Shape& shape) const {
  to_plan_shape(plan);
  check_shape(shape, impl_->cuda());
  // A spec may ask for the sm90 family; neither the sm80 family nor the CPU executor needs any.
  return impl_->cuda() && impl_->target.cc == kSm90Target.cc ? kForwardWorkspaceBytes : 0;
}

void Engine::forward(const ForwardArgs& args, Stream stream) {
  const PlanShape plan = check_forward(args, impl_->cuda());
  if (!impl_->cuda()) {
    cpu_forward(args, impl_->threads);
    return;
  }
  impl_->check_process();
  impl_->forward(args, plan, stream);
}

std::size_t Engine::backward_workspace_bytes(const Plan& plan, const Shape& shape,
                                             bool deterministic, std::string_view spec) const {
  const PlanShape header = to_plan_shape(plan);
  check_shape(shape, impl_->cuda());
  if (!impl_->cuda()) return 0;
  const auto bytes = [&](const KernelSpec& kernel) {
    return treeattn::backward_workspace_bytes(header, shape, kernel, impl_->device.sm_count,
                                              deterministic);
  };
  const KernelSpec kernel = impl_->kernel_spec(Pass::kBackward, shape, spec);
  if (kernel.problem.family != Family::kSm90 || !spec.empty()) return bytes(kernel);
  // Strides, which may rule that kernel out, are not known yet.
  const auto strided = strided_spec(kernel.problem, header, 1);
  return std::max(bytes(kernel), strided ? bytes(*strided) : 0);
}

void Engine::backward(const BackwardArgs& args, Stream stream) {
  const PlanShape plan = check_backward(args, impl_->cuda());
  if (!impl_->cuda()) {
    cpu_backward(args, impl_->threads);
    return;
  }
  impl_->check_process();
  impl_->backward(args, plan, stream);
}

std::vector<PreparedKernel> Engine::prepare(std::span<const Shape> shapes) {
  std::vector<PreparedKernel> prepared;
  for (const Shape& shape : shapes) check_shape(shape, impl_->cuda());
  if (!impl_->cuda()) return prepared;
  impl_->check_process();
  const ContextScope scope(impl_->context);
  const auto add = [&](const KernelSpec& spec) {
    prepared.push_back(impl_->kernels->prepare(spec));
  };
  add(impl_->plan_spec());
  for (const Shape& shape : shapes) {
    add(impl_->kernel_spec(Pass::kForward, shape));
    if (!shape.backward) continue;
    add(impl_->kernel_spec(Pass::kBackward, shape));
    add(impl_->kernel_spec(Pass::kBackwardDq, shape));
  }
  return prepared;
}

Stats Engine::stats() const {
  if (!impl_->cuda()) return {};
  Stats stats = impl_->kernels->stats();
  stats.launches = impl_->launches.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace treeattn
