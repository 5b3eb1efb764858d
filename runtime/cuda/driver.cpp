#include "runtime/cuda/driver.h"

#include <fmt/format.h>
#include <pthread.h>

#include <atomic>
#include <mutex>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/support/config.h"
#include "runtime/support/dynamic_library.h"
#include "treeattn/error.h"

namespace treeattn {

namespace {

constexpr const char* kForked =
    "this process was forked from one that had started CUDA, and CUDA does not survive a fork";
constexpr const char* kForkHint =
    "start CUDA only in the child, or start the child afresh (Python's multiprocessing: 'spawn')";
constexpr const char* kInstallHint =
    "install the NVIDIA driver (525 or newer), run the container with GPU access (docker run "
    "--gpus all), or name libcuda.so.1 in TREEATTN_LIBCUDA. Compiling and the CPU executor need "
    "no driver";

struct DriverState {
  std::mutex mutex;
  bool tried = false;
  const DriverTable* real = nullptr;  // leaked: launches may come from static destructors
  const DriverTable* fake = nullptr;
  DriverProblem problem;
};

DriverState& state() {
  static auto* const leaked = new DriverState;
  return *leaked;
}

// What driver() answers with; null until it is known.
std::atomic<const DriverTable*> in_use{nullptr};
std::atomic<unsigned> generation{0};
// Set in a child of a process that had called cuInit. No lock: another thread may have held it.
std::atomic<bool> forked_after_init{false};
std::atomic<const DriverTable*> initialised{nullptr};

void note_fork() {
  const DriverTable* dead = initialised.load();
  if (dead == nullptr) return;
  forked_after_init.store(true);
  in_use.compare_exchange_strong(dead, nullptr);
}

std::vector<std::string> driver_candidates() {
  const std::string& named = config().driver_path;
  if (!named.empty()) return {named};
  return {
    "libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1",
#if defined(__aarch64__)
        "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
#else
        "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
#endif
        "/usr/lib64/libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"
  };
}

/// Fills the table; the name of the first entry point that is problem, or null.
const char* resolve(DriverTable& table, PFN_cuGetProcAddress_v12000 get) {
  const auto find = [get](const char* name, int version) {
    void* address = nullptr;
    CUdriverProcAddressQueryResult found{};
    const CUresult result = get(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, &found);
    return result == CUDA_SUCCESS ? address : nullptr;
  };
#define TREEATTN_RESOLVE(name, version)                                         \
  table.name = reinterpret_cast<PFN_##name##_v##version>(find(#name, version)); \
  if (table.name == nullptr) return #name;
  TREEATTN_DRIVER_FUNCTIONS(TREEATTN_RESOLVE)
#undef TREEATTN_RESOLVE
  table.cuFuncLoad = reinterpret_cast<decltype(table.cuFuncLoad)>(find("cuFuncLoad", 12040));
  return nullptr;
}

std::string result_name(const DriverTable& table, CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (table.cuGetErrorName == nullptr || table.cuGetErrorName(result, &name) != CUDA_SUCCESS) {
    name = nullptr;
  }
  if (table.cuGetErrorString == nullptr || table.cuGetErrorString(result, &text) != CUDA_SUCCESS) {
    text = nullptr;
  }
  std::string described =
      fmt::format("{} ({})", name != nullptr ? name : "CUDA error", static_cast<int>(result));
  if (text != nullptr) described.append(": ").append(text);
  return described;
}

/// The driver, or the reason there is none.
const DriverTable* acquire(DriverProblem& problem) {
  if (const DriverTable* table = in_use.load(std::memory_order_acquire)) return table;
  if (forked_after_init.load()) {
    problem = {ErrorCode::kCudaError, kForked, kForkHint};
    return nullptr;
  }
  DriverState& s = state();
  const std::lock_guard lock(s.mutex);
  if (s.fake != nullptr) return s.fake;
  if (!s.tried) {
    s.tried = true;
    static const int registered = pthread_atfork(nullptr, nullptr, note_fork);
    static_cast<void>(registered);
    s.real = open_driver(driver_candidates(), s.problem);
    initialised.store(s.real);
    in_use.store(s.real, std::memory_order_release);
  }
  if (s.real == nullptr) problem = s.problem;
  return s.real;
}

}  // namespace

const DriverTable* open_driver(std::span<const std::string> candidates, DriverProblem& problem) {
  const DynamicLibrary library = DynamicLibrary::open(candidates);
  if (!library) {
    problem = {ErrorCode::kNotFound,
               "the CUDA driver (libcuda.so.1) was not found; tried\n" + library.failure_text(),
               kInstallHint};
    return nullptr;
  }
  PFN_cuGetProcAddress_v12000 get = nullptr;
  const char* lacking = "cuGetProcAddress_v2";
  DriverTable table;
  table.path = library.path();
  if (library.load<std::remove_pointer_t<PFN_cuGetProcAddress_v12000>>(get, lacking)) {
    lacking = resolve(table, get);
  }
  if (lacking != nullptr) {
    problem = {ErrorCode::kNotFound,
               fmt::format("the CUDA driver {} is too old: it has no {}", library.path(), lacking),
               "install driver 525 or newer (CUDA 12.0)"};
    return nullptr;
  }
  if (const CUresult result = table.cuInit(0); result != CUDA_SUCCESS) {
    problem = {ErrorCode::kCudaError,
               fmt::format("the CUDA driver {} does not start: {}", library.path(),
                           result_name(table, result)),
               "nvidia-smi shows whether this machine has a usable GPU; in a container, check that "
               "it was given one"};
    return nullptr;
  }
  return new DriverTable(std::move(table));
}

const DriverTable& driver() {
  if (const DriverTable* table = in_use.load(std::memory_order_acquire)) return *table;
  DriverProblem problem;
  const DriverTable* const table = acquire(problem);
  if (table == nullptr) throw Error(problem.code, problem.message, problem.hint);
  return *table;
}

const DriverTable* try_driver(std::string* why) {
  DriverProblem problem;
  const DriverTable* const table = acquire(problem);
  if (table == nullptr && why != nullptr) {
    *why = Error(problem.code, problem.message, problem.hint).what();
  }
  return table;
}

const DriverTable* driver_if_in_use() noexcept {
  return in_use.load(std::memory_order_acquire);
}

void set_driver_for_testing(const DriverTable* table) {
  DriverState& s = state();
  const std::lock_guard lock(s.mutex);
  s.fake = table;
  const bool real_is_dead = forked_after_init.load();
  in_use.store(table != nullptr ? table : (real_is_dead ? nullptr : s.real));
  generation.fetch_add(1);
}

unsigned driver_generation() noexcept {
  return generation.load(std::memory_order_acquire);
}

int driver_cuda_major(const DriverTable& table) noexcept {
  int version = 0;
  return table.cuDriverGetVersion(&version) == CUDA_SUCCESS ? version / 1000 : 0;
}

std::string describe(CUresult result) {
  const DriverTable* const table = driver_if_in_use();
  return result_name(table != nullptr ? *table : DriverTable{}, result);
}

void throw_cuda_error(CUresult result, std::string_view what) {
  throw Error(ErrorCode::kCudaError, fmt::format("{}: {}", what, describe(result)));
}

}  // namespace treeattn
