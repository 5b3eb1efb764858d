// The CUDA driver, opened lazily. A table of function pointers that tests replace by a fake; nothing
// links libcuda.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "generator/arch.h"

namespace treeattn {

/// Driver entry points, resolved with cuGetProcAddress at the lowest version that serves.
struct DriverTable {
  // filled by whoever implements this file: cuInit, cuDriverGetVersion, cuDeviceGet, cuDeviceGetCount,
  // cuDeviceGetName, cuDeviceGetAttribute, cuDeviceTotalMem, cuCtxGetCurrent, cuCtxGetDevice,
  // cuCtxPushCurrent, cuCtxPopCurrent, cuCtxSynchronize, cuDevicePrimaryCtxRetain/Release,
  // cuLibraryLoadData, cuLibraryUnload, cuLibraryGetKernel, cuKernelSetAttribute, cuKernelGetAttribute,
  // cuLaunchKernelEx, cuStreamIsCapturing, cuThreadExchangeStreamCaptureMode, cuStreamCreate,
  // cuStreamDestroy, cuStreamSynchronize, cuEventCreate, cuEventRecord, cuEventElapsedTime, cuEventSynchronize, cuEventDestroy,
  // cuMemAlloc, cuMemFree, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuMemcpyDtoDAsync, cuMemsetD32Async, cuMemsetD8Async,
  // cuStreamBeginCapture, cuStreamEndCapture, cuGraphInstantiate, cuGraphLaunch, cuGraphExecDestroy, cuGraphDestroy,
  // cuGetErrorName, cuGetErrorString, cuPointerGetAttribute, cuTensorMapEncodeTiled
  std::string path;  ///< the library that was opened
};

}  // namespace treeattn
