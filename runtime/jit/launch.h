// One kernel launch as plain data. Asynchronous; allocates nothing and never synchronises.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

#include "runtime/cuda/driver.h"

namespace treeattn {

/// `params` is the kernel's one parameter, a struct by value that the driver copies before launch()
/// returns.
struct LaunchPlan {
  CUkernel kernel = nullptr;
  std::array<unsigned, 3> grid{1, 1, 1};
  unsigned threads = 0;
  unsigned smem_bytes = 0;  ///< dynamic
  const void* params = nullptr;
  std::size_t params_bytes = 0;
  std::string_view name = "kernel";  ///< for error messages
};

/// Launches into the current context, to which the stream belongs. Throws Error(kCudaError) naming
/// the kernel and its launch shape.
void launch(const LaunchPlan& plan, CUstream stream);

}  // namespace treeattn
