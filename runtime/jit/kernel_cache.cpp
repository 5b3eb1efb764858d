#include "runtime/jit/kernel_cache.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "runtime/cuda/device.h"
#include "runtime/support/log.h"
#include "treeattn/error.h"

namespace treeattn {

namespace {

using Clock = std::chrono::steady_clock;

std::uint64_t ns_since(Clock::time_point start) {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
}

double to_ms(std::uint64_t ns) {
  return static_cast<double>(ns) / 1e6;
}

/// Lets this thread load code although a stream is captured, by this thread or another one: in the
/// default mode the driver would refuse, and invalidate the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    check(driver_.cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const DriverTable& driver_ = driver();
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace

/// One spec. Everything but `kernel` is written before `done` and read after it.
struct KernelCache::Slot {
  std::atomic<const LoadedKernel*> kernel{nullptr};
  std::atomic<bool> done{false};
  std::unique_ptr<const LoadedKernel> owner;
  std::optional<Error> failure;
  bool compiled = false;
  std::mutex device_mutex;  // makes further devices ready one at a time
};

struct KernelCache::Shared {
  ArtifactSource source;
  CaptureMiss capture_miss;
  std::shared_mutex mutex;
  std::unordered_map<KernelSpec, std::shared_ptr<Slot>, KernelSpecHash> slots;

  Shared(CubinStore store, std::unique_ptr<Compiler> compiler, KernelCacheOptions options)
      : source(std::move(store), std::move(compiler), std::move(options.source)),
        capture_miss(options.capture_miss) {}

  const LoadedKernel* find(const KernelSpec& spec) {
    const std::shared_lock lock(mutex);
    const auto found = slots.find(spec);
    return found != slots.end() ? found->second->kernel.load(std::memory_order_acquire) : nullptr;
  }
  void forget(const KernelSpec& spec, const Slot& slot) {
    const std::unique_lock lock(mutex);
    const auto found = slots.find(spec);
    if (found != slots.end() && found->second.get() == &slot) slots.erase(found);
  }
};

struct KernelCache::Counters {
  std::atomic<std::uint64_t> memory_hits{0}, disk_hits{0}, compiles{0}, rejected{0}, compile_ns{0},
      load_ns{0};
};

struct KernelCache::Ensured {
  const LoadedKernel* kernel;
  const char* origin;
};

KernelCache::KernelCache(std::shared_ptr<Shared> shared)
    : shared_(std::move(shared)), counters_(std::make_unique<Counters>()) {}

KernelCache::KernelCache(CubinStore store, std::unique_ptr<Compiler> compiler,
                         KernelCacheOptions options)
    : KernelCache(
          std::make_shared<Shared>(std::move(store), std::move(compiler), std::move(options))) {}

KernelCache::~KernelCache() = default;

std::unique_ptr<KernelCache> KernelCache::create_default() {
  // Never freed, kernels included: no driver call at exit, and none in a forked child, which starts
  // afresh. What was replaced stays linked, so that leak checkers see it as held.
  struct Default {
    pid_t pid = 0;
    unsigned generation = 0;
    std::shared_ptr<Shared> shared;
    Default* replaced = nullptr;
  };
  static auto* const mutex = new std::mutex;
  static auto* current = new Default;
  const std::lock_guard lock(*mutex);
  if (current->shared == nullptr || current->pid != getpid() ||
      current->generation != driver_generation()) {
    KernelCacheOptions options;
    options.source.jit = config().jit;
    options.source.generate = [folder = config().template_dir](const KernelSpec& spec) {
      return generate(spec, folder);
    };
    options.capture_miss = config().capture_miss;
    current =
        new Default{getpid(), driver_generation(),
                    std::make_shared<Shared>(CubinStore::from_config(config()),
                                             std::make_unique<NvrtcCompiler>(config().dump_dir),
                                             std::move(options)),
                    current};
  }
  return std::unique_ptr<KernelCache>(new KernelCache(current->shared));
}

const LoadedKernel& KernelCache::get(const KernelSpec& spec, CUstream stream) {
  return get(spec, current_device(), stream);
}

const LoadedKernel& KernelCache::get(const KernelSpec& spec, CUdevice device, CUstream stream) {
  if (const LoadedKernel* kernel = shared_->find(spec);
      kernel != nullptr && kernel->ready_on(device)) [[likely]] {
    counters_->memory_hits.fetch_add(1, std::memory_order_relaxed);
    return *kernel;
  }
  check_capture(spec, stream);
  return *ensure(spec, device).kernel;
}

PreparedKernel KernelCache::prepare(const KernelSpec& spec) {
  const auto start = Clock::now();
  const CUdevice device = current_device();
  const Ensured ensured = ensure(spec, device);
  {
    // Ready on the device may mean loaded in another of its contexts.
    const RelaxedCapture relaxed;
    if (auto refused = ensured.kernel->make_ready(device_info(device))) {
      throw Error(ErrorCode::kUnsupported, to_string(spec) + ": " + *refused);
    }
  }
  return {to_string(spec), ensured.origin, to_ms(ns_since(start))};
}

void KernelCache::check_capture(const KernelSpec& spec, CUstream stream) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = driver().cuStreamIsCapturing(stream, &status);
  // The default stream answers so while any other stream of the context is captured.
  const bool implicit = result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  if (!implicit) check(result, "cuStreamIsCapturing");
  if (!implicit && status == CU_STREAM_CAPTURE_STATUS_NONE) return;
  const std::string what =
      "kernel " + to_string(spec) + " was not loaded before a stream was captured";
  if (shared_->capture_miss == CaptureMiss::kError) {
    throw Error(ErrorCode::kNotFound,
                what + ", and TREEATTN_CAPTURE_MISS=error forbids doing so now",
                "call prepare() with this shape before the capture");
  }
  log_once(LogLevel::kWarning, "capture-miss:" + to_string(spec),
           what + "; loading it now. Call prepare() ahead of captures");
}

KernelCache::Ensured KernelCache::ensure(const KernelSpec& spec, CUdevice device) {
  const RelaxedCapture relaxed;
  bool is_builder = false;
  const std::shared_ptr<Slot> slot = claim(spec, is_builder);
  if (is_builder) fill(*slot, spec, device);
  slot->done.wait(false, std::memory_order_acquire);
  // A copy each: threads share no exception object.
  if (slot->failure) throw Error(*slot->failure);

  const LoadedKernel* const kernel = slot->kernel.load(std::memory_order_acquire);
  if (is_builder) return {kernel, slot->compiled ? "compiled" : "disk"};
  counters_->memory_hits.fetch_add(1, std::memory_order_relaxed);
  const std::lock_guard lock(slot->device_mutex);
  if (!kernel->ready_on(device)) {
    const auto start = Clock::now();
    if (auto refused = kernel->make_ready(device_info(device))) {
      throw Error(ErrorCode::kUnsupported, to_string(spec) + ": " + *refused);
    }
    counters_->load_ns += ns_since(start);
  }
  return {kernel, "memory"};
}

std::shared_ptr<KernelCache::Slot> KernelCache::claim(const KernelSpec& spec, bool& is_builder) {
  const std::unique_lock lock(shared_->mutex);
  std::shared_ptr<Slot>& slot = shared_->slots[spec];
  is_builder = slot == nullptr;
  if (is_builder) slot = std::make_shared<Slot>();
  return slot;
}

void KernelCache::fill(Slot& slot, const KernelSpec& spec, CUdevice device) {
  bool remember = true;
  try {
    build(slot, spec, device);
  } catch (const Error& error) {
    slot.failure = error;
    // What the driver says of memory or of a broken context is not about this kernel.
    remember = error.code() != ErrorCode::kCudaError;
  } catch (const std::exception& error) {
    slot.failure = Error(ErrorCode::kInternal, to_string(spec) + ": " + error.what());
    remember = false;
  }
  if (!remember) shared_->forget(spec, slot);
  slot.done.store(true, std::memory_order_release);
  slot.done.notify_all();
}

void KernelCache::build(Slot& slot, const KernelSpec& spec, CUdevice device) {
  const GeneratedSource source = shared_->source.generate(spec);
  const DeviceInfo& info = device_info(device);
  std::unique_ptr<LoadedKernel> loaded;
  std::uint64_t load_ns = 0;
  const auto load = [&](const Artifact& artifact) -> std::optional<std::string> {
    const auto start = Clock::now();
    std::string refused;
    std::unique_ptr<LoadedKernel> kernel = LoadedKernel::load(source, artifact, refused);
    if (kernel == nullptr) return refused;
    if (auto why = kernel->make_ready(info)) return why;
    loaded = std::move(kernel);
    load_ns = ns_since(start);
    return std::nullopt;
  };
  const ObtainedArtifact obtained =
      shared_->source.obtain(source, driver_cuda_major(driver()), load);
  slot.compiled = obtained.compiled;
  slot.owner = std::move(loaded);
  slot.kernel.store(slot.owner.get(), std::memory_order_release);

  counters_->rejected += static_cast<std::uint64_t>(obtained.rejected);
  counters_->load_ns += load_ns;
  if (obtained.compiled) {
    ++counters_->compiles;
    counters_->compile_ns += static_cast<std::uint64_t>(obtained.compile_ms * 1e6);
  } else {
    ++counters_->disk_hits;
  }
}

void KernelCache::reset() {
  const std::unique_lock lock(shared_->mutex);
  std::erase_if(shared_->slots, [](const auto& entry) {
    const Slot& slot = *entry.second;
    return slot.done.load(std::memory_order_acquire) && slot.failure.has_value();
  });
}

KernelExplanation KernelCache::explain(const KernelSpec& spec) const {
  return shared_->source.explain(spec);
}

BuildReport KernelCache::build_artifact(const KernelSpec& spec, bool force) {
  return shared_->source.build(spec, force);
}

CubinStore& KernelCache::store() {
  return shared_->source.store();
}

Stats KernelCache::stats() const {
  Stats stats;
  stats.memory_hits = counters_->memory_hits;
  stats.disk_hits = counters_->disk_hits;
  stats.compiles = counters_->compiles;
  stats.rejected = counters_->rejected;
  stats.compile_ms = to_ms(counters_->compile_ns);
  stats.load_ms = to_ms(counters_->load_ns);
  return stats;
}

}  // namespace treeattn
