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

/// What kernels of a pass are written with and compiled for.
struct FamilyTarget {
  Family family;
  Target target;
};
/// The default for a device's target. sm_90a stands for a device of compute capability 9.0 whose
/// forward kernels are the sm90 family's; everything else there is the sm80 family for sm_90.
FamilyTarget default_family(Pass pass, Target device);

/// What a device's kernels are compiled for, for people: sm_80, or sm_90a (forward) and sm_90
/// (backward, plan).
std::string describe_targets(Target device);

/// Known targets in ascending order: sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_120 and so on.
std::span<const ArchLimits> known_targets();
/// Limits of a target; of the nearest older known one where it is newer than the table.
ArchLimits arch_limits(Target target);
/// The target to compile for on a device of this compute capability. Throws Error(kUnsupported)
/// below 8.0.
Target target_for_device(int major, int minor);

}  // namespace treeattn
