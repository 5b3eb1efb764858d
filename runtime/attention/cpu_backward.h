// The CPU executor's backward pass, with the arguments of Engine::backward on host memory.
// Re-entrant and deterministic: the result does not depend on the number of threads.
#pragma once

#include "treeattn/treeattn.h"

namespace treeattn {

/// As cpu_forward(): f16, bf16 and f32 compute in float, f64 in double; any head_dim >= 1; `args`
/// must have been validated; workspace, spec and deterministic are not used. threads = 0: one per
/// core.
void cpu_backward(const BackwardArgs& args, int threads);

}  // namespace treeattn
