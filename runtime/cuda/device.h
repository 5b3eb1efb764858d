// Devices and contexts: what a device offers, and making a context current for one call. Functions
// throw Error(kCudaError); everything is thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "generator/kernel_spec.h"
#include "runtime/cuda/driver.h"
#include "runtime/support/config.h"

namespace treeattn {

struct DeviceInfo {
  CUdevice ordinal = 0;
  std::string name;
  int major = 0;  ///< compute capability
  int minor = 0;
  int sm_count = 0;
  int smem_optin_bytes = 0;  ///< shared memory that a block can ask for
  int max_threads_per_block = 0;
  int registers_per_block = 0;
  std::int64_t l2_bytes = 0;
  int clock_khz = 0;
  std::int64_t memory_bytes = 0;
};

/// Read once per device; the reference stays valid.
const DeviceInfo& device_info(CUdevice device);

/// What on_device() is asked about for a device, or for devices of a target: sm_90a in place
/// of sm_90 where the sm90 family is chosen.
Target kernel_target(Target device, FamilyChoice choice = config().family);
/// Throws Error(kUnsupported) below compute capability 8.0.
Target kernel_target(const DeviceInfo& device, FamilyChoice choice = config().family);

/// The device of the current context. Throws with what to do if there is no current context.
CUdevice current_device();

/// Makes `context` current for this thread unless it is already; restores the former one. A null
/// context changes nothing.
class ContextScope {
 public:
  explicit ContextScope(CUcontext context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const DriverTable* pushed_with_ = nullptr;
};

/// Holds a device's primary context, current for the thread that made it, until destroyed by that
/// thread.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  CUcontext get() const { return context_; }
  CUdevice device() const { return device_; }

 private:
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

}  // namespace treeattn
