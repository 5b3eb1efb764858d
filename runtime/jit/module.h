// Kernels loaded into the driver: a CUlibrary with the CUkernel of every entry.
// Context-independent, with per-device state set once per device. Immutable but for that state,
// which is thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "generator/generate.h"
#include "runtime/cache/artifact.h"
#include "runtime/cuda/device.h"

namespace treeattn {

struct LoadedEntry {
  std::string name;
  CUkernel function = nullptr;
  int threads = 0;     ///< per block
  int smem_bytes = 0;  ///< dynamic, per block
};

class LoadedKernel {
 public:
  /// Loads the cubin and finds every entry of the source it was compiled from. A cubin that the
  /// driver refuses is a value: null, with the reason. Throws Error(kCudaError) where the trouble
  /// is not the cubin's (no memory, a context that already failed).
  static std::unique_ptr<LoadedKernel> load(const GeneratedSource& source, const Artifact& artifact,
                                            std::string& refused);
  /// Unloads, unless the driver is gone or the process was forked since.
  ~LoadedKernel();
  LoadedKernel(const LoadedKernel&) = delete;
  LoadedKernel& operator=(const LoadedKernel&) = delete;

  const LoadedEntry& entry(std::size_t index) const { return entries_.at(index); }
  const std::vector<LoadedEntry>& entries() const { return entries_; }
  /// What the compiler reported, by entry.
  const std::vector<EntryFacts>& facts() const { return facts_; }

  bool ready_on(CUdevice device) const noexcept {
    const auto index = static_cast<unsigned>(device);
    return index < kDevices &&
           (ready_[index / kWordBits].load(std::memory_order_acquire) >> (index % kWordBits) & 1) !=
               0;
  }
  /// Makes every entry launchable on a device, in the current context: checks its limits, allows
  /// the dynamic shared memory, loads the code. Text if the driver refuses the code for this
  /// device. Throws Error(kUnsupported) naming the limit that is exceeded.
  std::optional<std::string> make_ready(const DeviceInfo& device) const;

 private:
  static constexpr unsigned kWordBits = 64;
  static constexpr unsigned kDevices = 256;

  LoadedKernel() = default;
  void check_limits(const DeviceInfo& device) const;

  CUlibrary library_ = nullptr;
  unsigned driver_generation_ = 0;
  std::vector<LoadedEntry> entries_;
  std::vector<EntryFacts> facts_;
  mutable std::array<std::atomic<std::uint64_t>, kDevices / kWordBits> ready_{};
};

/// Whether a result means that this code will never load here, as opposed to trouble that may pass
/// or that is not the code's.
bool refuses_code(CUresult result) noexcept;

}  // namespace treeattn
