// Builds the plan in host memory, by the definition the device kernels follow too: the reference
// for them and what the CPU executor runs on. Never reads or writes out of bounds whatever the
// inputs hold.
#pragma once

#include "runtime/attention/plan.h"

namespace treeattn {

/// Fills `buffer` (plan_offsets(shape).total_ints ints). Bad inputs are clamped and flagged in the
/// meta section, never thrown. O(tokens + tiles log tiles).
void build_plan_cpu(const PlanShape& shape, const PlanInputs& inputs, int* buffer);

}  // namespace treeattn
