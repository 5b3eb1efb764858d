// What each compilation target offers a kernel.
#pragma once

#include <span>
#include <string>

#include "generator/kernel_spec.h"

namespace treeattn {

/// Hardware limits of a target (CUDA C++ Programming Guide, table of compute capabilities).
struct ArchLimits {
  Target target;
  int smem_per_block;  ///< bytes a block can opt in to
  int smem_per_sm;     ///< bytes per multiprocessor
  int registers_per_sm;
  int max_threads_per_sm;
};

/// What the sm90 family is compiled for: wgmma and setmaxnreg are no part of plain sm_90.
inline constexpr Target kSm90Target{90, true};

/// What a device's kernels are compiled for, for people: sm_80, or sm_90a (family sm90) and sm_90
/// (family sm80).
std::string describe_targets(Target device);

/// Known targets in ascending order: sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_120 and so on.
std::span<const ArchLimits> known_targets();
/// Limits of a target; of the nearest older known one where it is newer than the table.
ArchLimits arch_limits(Target target);
/// The target to compile for on a device of this compute capability. Throws Error(kUnsupported)
/// below 8.0.
Target target_for_device(int major, int minor);

}  // namespace treeattn
