// The CUDA driver, opened lazily: a table of entry points that tests replace by a fake. Nothing
// links libcuda. Looking up the table is thread-safe and one atomic load once it is there; a driver
// that is missing is remembered, and so is a fork, which CUDA does not survive.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <span>
#include <string>
#include <string_view>

#include "treeattn/error.h"

namespace treeattn {

/// Every entry point with the version of it that is asked for: the lowest that serves, so that
/// older drivers have it and its parameters are those of the type named by that version. (cuda.h
/// renames some of these by macro; a field carries the new name, and so does every use of it.)
#define TREEATTN_DRIVER_FUNCTIONS(X)          \
  X(cuInit, 2000)                             \
  X(cuDriverGetVersion, 2020)                 \
  X(cuGetErrorName, 6000)                     \
  X(cuGetErrorString, 6000)                   \
  X(cuDeviceGet, 2000)                        \
  X(cuDeviceGetCount, 2000)                   \
  X(cuDeviceGetName, 2000)                    \
  X(cuDeviceGetAttribute, 2000)               \
  X(cuDeviceTotalMem, 3020)                   \
  X(cuDevicePrimaryCtxRetain, 7000)           \
  X(cuDevicePrimaryCtxRelease, 11000)         \
  X(cuCtxGetCurrent, 4000)                    \
  X(cuCtxGetDevice, 2000)                     \
  X(cuCtxPushCurrent, 4000)                   \
  X(cuCtxPopCurrent, 4000)                    \
  X(cuCtxSynchronize, 2000)                   \
  X(cuLibraryLoadData, 12000)                 \
  X(cuLibraryUnload, 12000)                   \
  X(cuLibraryGetKernel, 12000)                \
  X(cuKernelGetFunction, 12000)               \
  X(cuKernelSetAttribute, 12000)              \
  X(cuKernelGetAttribute, 12000)              \
  X(cuLaunchKernelEx, 11060)                  \
  X(cuStreamIsCapturing, 10000)               \
  X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuStreamCreate, 2000)                     \
  X(cuStreamDestroy, 4000)                    \
  X(cuStreamSynchronize, 2000)                \
  X(cuStreamBeginCapture, 10010)              \
  X(cuStreamEndCapture, 10000)                \
  X(cuGraphInstantiateWithFlags, 11040)       \
  X(cuGraphLaunch, 10000)                     \
  X(cuGraphExecDestroy, 10000)                \
  X(cuGraphDestroy, 10000)                    \
  X(cuEventCreate, 2000)                      \
  X(cuEventRecord, 2000)                      \
  X(cuEventElapsedTime, 2000)                 \
  X(cuEventSynchronize, 2000)                 \
  X(cuEventDestroy, 4000)                     \
  X(cuMemAlloc, 3020)                         \
  X(cuMemFree, 3020)                          \
  X(cuMemcpyHtoDAsync, 3020)                  \
  X(cuMemcpyDtoHAsync, 3020)                  \
  X(cuMemcpyDtoDAsync, 3020)                  \
  X(cuMemsetD32Async, 3020)                   \
  X(cuMemsetD8Async, 3020)                    \
  X(cuPointerGetAttribute, 4000)              \
  X(cuTensorMapEncodeTiled, 12000)

struct DriverTable {
#define TREEATTN_FIELD(name, version) PFN_##name##_v##version name = nullptr;
  TREEATTN_DRIVER_FUNCTIONS(TREEATTN_FIELD)
#undef TREEATTN_FIELD
  /// From 12.4 on; null on older drivers.
  CUresult(CUDAAPI* cuFuncLoad)(CUfunction) = nullptr;

  std::string path;  ///< the library that was opened
};

/// The driver, opened and initialised at first use. Throws Error(kNotFound) that lists what was
/// tried and what to install, or Error(kCudaError) if the driver refuses to start.
const DriverTable& driver();
/// The same as a value: null, with the reason in `why` unless that is null.
const DriverTable* try_driver(std::string* why = nullptr);
/// The driver if it is in use in this process already; opens nothing.
const DriverTable* driver_if_in_use() noexcept;

/// Why there is no driver; becomes an Error where a caller insists.
struct DriverProblem {
  ErrorCode code = ErrorCode::kOk;
  std::string message;
  std::string hint;
};
/// Opens and initialises the first of these libraries, for driver(); null with the problem. The
/// table is never freed.
const DriverTable* open_driver(std::span<const std::string> candidates, DriverProblem& problem);

/// Replaces the driver by a fake; null restores the real one.
void set_driver_for_testing(const DriverTable* table);
/// Grows with every such replacement, so that what was cached or loaded of one driver is not used
/// with another.
unsigned driver_generation() noexcept;

/// CUDA version of the driver's API, such as 13.0 -> 13; 0 if it cannot be told.
int driver_cuda_major(const DriverTable& table) noexcept;

/// "CUDA_ERROR_INVALID_VALUE (1): invalid argument".
std::string describe(CUresult result);
[[noreturn]] void throw_cuda_error(CUresult result, std::string_view what);
/// Throws Error(kCudaError) that says what was attempted and the driver's name and text.
inline void check(CUresult result, std::string_view what) {
  if (result != CUDA_SUCCESS) [[unlikely]] {
    throw_cuda_error(result, what);
  }
}

}  // namespace treeattn
