#include "runtime/jit/launch.h"

#include <fmt/format.h>

namespace treeattn {

namespace {

[[noreturn]] void throw_launch_error(CUresult result, const LaunchPlan& plan) {
  throw_cuda_error(
      result, fmt::format("launching {} with {} x {} x {} blocks of {} threads and {} bytes of "
                          "shared memory",
                          plan.name, plan.grid[0], plan.grid[1], plan.grid[2], plan.threads,
                          plan.smem_bytes));
}

}  // namespace

void launch(const LaunchPlan& plan, CUstream stream) {
  CUlaunchConfig config{};
  config.gridDimX = plan.grid[0];
  config.gridDimY = plan.grid[1];
  config.gridDimZ = plan.grid[2];
  config.blockDimX = plan.threads;
  config.blockDimY = 1;
  config.blockDimZ = 1;
  config.sharedMemBytes = plan.smem_bytes;
  config.hStream = stream;
  // The driver's interface is not const-correct; it only reads the parameters.
  void* params[] = {const_cast<void*>(plan.params)};
  // A CUkernel may stand where a CUfunction is asked for: the driver resolves it for the context.
  const CUresult result = driver().cuLaunchKernelEx(
      &config, reinterpret_cast<CUfunction>(plan.kernel), params, nullptr);
  if (result != CUDA_SUCCESS) [[unlikely]] {
    throw_launch_error(result, plan);
  }
}

}  // namespace treeattn
