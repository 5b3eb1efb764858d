#include "runtime/cuda/device.h"

#include <fmt/format.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "generator/arch.h"
#include "treeattn/error.h"

namespace treeattn {

namespace {

DeviceInfo read_device(CUdevice device) {
  const DriverTable& d = driver();
  DeviceInfo info;
  info.ordinal = device;
  std::array<char, 256> name{};
  check(d.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device),
        "cuDeviceGetName");
  info.name = name.data();
  const auto attribute = [&](CUdevice_attribute which, const char* what) {
    int value = 0;
    check(d.cuDeviceGetAttribute(&value, which, device), what);
    return value;
  };
  info.major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, "compute capability");
  info.minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, "compute capability");
  info.sm_count = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, "multiprocessor count");
  info.smem_optin_bytes =
      attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, "shared memory per block");
  info.max_threads_per_block =
      attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, "threads per block");
  info.registers_per_block =
      attribute(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, "registers per block");
  info.l2_bytes = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, "L2 cache size");
  info.clock_khz = attribute(CU_DEVICE_ATTRIBUTE_CLOCK_RATE, "clock rate");
  std::size_t memory = 0;
  check(d.cuDeviceTotalMem(&memory, device), "cuDeviceTotalMem");
  info.memory_bytes = static_cast<std::int64_t>(memory);
  return info;
}

}  // namespace

const DeviceInfo& device_info(CUdevice device) {
  // By generation, so that a test's fake never answers for another one; leaked with its entries.
  using Key = std::pair<unsigned, CUdevice>;
  static auto* const mutex = new std::mutex;
  static auto* const known = new std::map<Key, DeviceInfo>;
  const std::lock_guard lock(*mutex);
  const Key key{driver_generation(), device};
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  return known->emplace(key, read_device(device)).first->second;
}

Target kernel_target(Target device, FamilyChoice choice) {
  const bool hopper = device.cc == kSm90Target.cc;
  return hopper && choice == FamilyChoice::kAuto ? kSm90Target : device;
}

Target kernel_target(const DeviceInfo& device, FamilyChoice choice) {
  return kernel_target(target_for_device(device.major, device.minor), choice);
}

CUdevice current_device() {
  CUdevice device = 0;
  const CUresult result = driver().cuCtxGetDevice(&device);
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    throw Error(ErrorCode::kCudaError, "no CUDA context is current on this thread",
                "make one current (cuCtxSetCurrent, or any CUDA runtime call such as cudaFree(0)) "
                "before the call");
  }
  check(result, "cuCtxGetDevice");
  return device;
}

ContextScope::ContextScope(CUcontext context) {
  if (context == nullptr) return;
  const DriverTable& d = driver();
  CUcontext current = nullptr;
  check(d.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current == context) return;
  check(d.cuCtxPushCurrent(context), "cuCtxPushCurrent");
  pushed_with_ = &d;
}

ContextScope::~ContextScope() {
  CUcontext popped = nullptr;
  if (pushed_with_ != nullptr) pushed_with_->cuCtxPopCurrent(&popped);
}

PrimaryContext::PrimaryContext(int ordinal) {
  const DriverTable& d = driver();
  int count = 0;
  check(d.cuDeviceGetCount(&count), "cuDeviceGetCount");
  if (ordinal < 0 || ordinal >= count) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("device is {}, but this machine has {}", ordinal,
                    count == 0 ? "no CUDA device" : fmt::format("devices 0 to {}", count - 1)));
  }
  check(d.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  check(d.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  if (const CUresult result = d.cuCtxPushCurrent(context_); result != CUDA_SUCCESS) {
    d.cuDevicePrimaryCtxRelease(device_);
    throw_cuda_error(result, "cuCtxPushCurrent");
  }
}

PrimaryContext::~PrimaryContext() {
  const DriverTable* const d = driver_if_in_use();
  if (d == nullptr) return;
  CUcontext popped = nullptr;
  d->cuCtxPopCurrent(&popped);
  d->cuDevicePrimaryCtxRelease(device_);
}

}  // namespace treeattn
