// Time for limits on speed.
#pragma once

#include <ctime>

namespace treeattn::testing {

/// Processor time of this process in milliseconds: what else runs on a machine does not lengthen
/// it.
inline double cpu_ms() {
  return 1000.0 * static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

}  // namespace treeattn::testing
