// Where a command computes: a GPU with its primary context, or the CPU executor. Belongs to the
// thread that made it.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "cli/common.h"
#include "runtime/cuda/device.h"
#include "treeattn/treeattn.h"

namespace treeattn::cli {

struct DeviceChoice {
  enum class Kind { kAuto, kCpu, kGpu };
  Kind kind = Kind::kAuto;
  int ordinal = 0;  ///< of the GPU
};
/// "auto", "cpu", "gpu" or "gpu:1". Throws UsageError.
DeviceChoice parse_device(std::string_view option, std::string_view text);
inline constexpr const char* kDeviceHelp =
    "gpu, gpu:N, cpu, or auto: the first GPU if there is one";

/// Why a GPU cannot be used; empty if it can be. Opens the driver, makes no context.
std::string refuse_gpu(int ordinal);

class Session {
 public:
  /// Throws Error(kNotFound) with the reason if a GPU was asked for that cannot be used.
  explicit Session(const DeviceChoice& choice, int threads = 0);

  bool gpu() const { return context_.has_value(); }
  Engine& engine() { return *engine_; }
  std::string description() const { return engine_->description(); }
  /// Of a GPU session.
  const DeviceInfo& device() const { return device_info(context_->device()); }
  /// Facts that belong beside every number measured here.
  Json json() const;

 private:
  std::optional<PrimaryContext> context_;
  std::optional<Engine> engine_;
};

}  // namespace treeattn::cli
