#include "runtime/jit/module.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "treeattn/error.h"

namespace treeattn {

namespace {

constexpr const char* kLimitHint =
    "use a kernel for this device's compute capability, or a smaller tile";

[[noreturn]] void refuse_device(const EntryFacts& facts, const DeviceInfo& device,
                                std::string_view what, std::int64_t needed, std::int64_t limit) {
  throw Error(ErrorCode::kUnsupported,
              fmt::format("{} needs {} {} per block, but device {} ({}, compute capability {}.{}) "
                          "offers {}",
                          facts.name, needed, what, device.ordinal, device.name, device.major,
                          device.minor, limit),
              kLimitHint);
}

/// Whether the facts that travel with the code are about this source's entries.
bool describes(const Artifact& artifact, const GeneratedSource& source) {
  return std::equal(artifact.entries.begin(), artifact.entries.end(), source.entries.begin(),
                    source.entries.end(), [](const EntryFacts& facts, const KernelEntry& entry) {
                      return facts.name == entry.name && facts.threads == entry.threads &&
                             facts.smem_bytes == entry.smem_bytes;
                    });
}

}  // namespace

bool refuses_code(CUresult result) noexcept {
  switch (result) {
    case CUDA_ERROR_INVALID_VALUE:  // what some drivers say of a damaged image
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    case CUDA_ERROR_JIT_COMPILATION_DISABLED:
    case CUDA_ERROR_INVALID_SOURCE:
    case CUDA_ERROR_FILE_NOT_FOUND:
    case CUDA_ERROR_SHARED_OBJECT_INIT_FAILED:
    case CUDA_ERROR_NOT_FOUND:
    case CUDA_ERROR_NOT_SUPPORTED:
      return true;
    default:
      return false;
  }
}

std::unique_ptr<LoadedKernel> LoadedKernel::load(const GeneratedSource& source,
                                                 const Artifact& artifact, std::string& refused) {
  if (!describes(artifact, source)) {
    refused = "it lists other entries than its source";
    return nullptr;
  }
  const DriverTable& d = driver();
  std::unique_ptr<LoadedKernel> loaded(new LoadedKernel);
  loaded->driver_generation_ = driver_generation();
  const auto refuse = [&](CUresult result, std::string_view what) {
    if (!refuses_code(result)) throw_cuda_error(result, what);
    refused = fmt::format("the driver refused it: {}: {}", what, describe(result));
    return nullptr;
  };
  if (const CUresult result = d.cuLibraryLoadData(&loaded->library_, artifact.cubin.data(), nullptr,
                                                  nullptr, 0, nullptr, nullptr, 0);
      result != CUDA_SUCCESS) {
    loaded->library_ = nullptr;
    return refuse(result, "cuLibraryLoadData");
  }
  for (const KernelEntry& entry : source.entries) {
    LoadedEntry own{entry.name, nullptr, entry.threads, entry.smem_bytes};
    if (const CUresult result =
            d.cuLibraryGetKernel(&own.function, loaded->library_, entry.name.c_str());
        result != CUDA_SUCCESS) {
      return refuse(result, "cuLibraryGetKernel(" + entry.name + ")");
    }
    loaded->entries_.push_back(std::move(own));
  }
  loaded->facts_ = artifact.entries;
  return loaded;
}

LoadedKernel::~LoadedKernel() {
  // Results do not matter: at exit the driver may have shut down before us.
  const DriverTable* const d = driver_if_in_use();
  if (library_ == nullptr || d == nullptr || driver_generation_ != driver_generation()) return;
  // Relaxed, so that it spoils nobody's capture.
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  d->cuThreadExchangeStreamCaptureMode(&mode);
  d->cuLibraryUnload(library_);
  d->cuThreadExchangeStreamCaptureMode(&mode);
}

void LoadedKernel::check_limits(const DeviceInfo& device) const {
  for (const EntryFacts& entry : facts_) {
    if (entry.threads > device.max_threads_per_block) {
      refuse_device(entry, device, "threads", entry.threads, device.max_threads_per_block);
    }
    const std::int64_t smem = std::int64_t{entry.smem_bytes} + entry.static_smem_bytes;
    if (smem > device.smem_optin_bytes) {
      refuse_device(entry, device, "bytes of shared memory", smem, device.smem_optin_bytes);
    }
    const std::int64_t registers = std::int64_t{entry.registers} * entry.threads;
    if (registers > device.registers_per_block) {
      refuse_device(entry, device, "registers", registers, device.registers_per_block);
    }
  }
}

std::optional<std::string> LoadedKernel::make_ready(const DeviceInfo& device) const {
  check_limits(device);
  const DriverTable& d = driver();
  for (const LoadedEntry& entry : entries_) {
    const auto failed = [&](CUresult result, std::string_view what) -> std::optional<std::string> {
      if (result == CUDA_SUCCESS) return std::nullopt;
      const std::string step =
          fmt::format("{} of {} on device {}", what, entry.name, device.ordinal);
      if (!refuses_code(result)) throw_cuda_error(result, step);
      return fmt::format("the driver refused it: {}: {}", step, describe(result));
    };
    // Without these two the driver would load lazily in the first launch, which may be captured.
    CUfunction function = nullptr;
    if (auto refused = failed(d.cuKernelGetFunction(&function, entry.function), "loading")) {
      return refused;
    }
    if (d.cuFuncLoad != nullptr) {
      if (auto refused = failed(d.cuFuncLoad(function), "loading")) return refused;
    }
    if (entry.smem_bytes == 0) continue;
    if (auto refused =
            failed(d.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          entry.smem_bytes, entry.function, device.ordinal),
                   "setting the shared memory limit")) {
      return refused;
    }
  }
  const auto index = static_cast<unsigned>(device.ordinal);
  if (index < kDevices) {
    ready_[index / kWordBits].fetch_or(std::uint64_t{1} << (index % kWordBits),
                                       std::memory_order_release);
  }
  return std::nullopt;
}

}  // namespace treeattn
