// The CPU executor: forward attention on host memory with the arguments of Engine::forward and a
// plan in host memory. Re-entrant; the result does not depend on the number of threads.
#pragma once

#include "treeattn/treeattn.h"

namespace treeattn {

/// f16, bf16 and f32 compute in float, f64 in double; any head_dim >= 1. `args` must have been
/// validated as Engine::forward does; workspace and spec are not used. threads = 0: one per core.
/// Throws Error(kInvalidArgument) when the plan was never built or holds no view.
void cpu_forward(const ForwardArgs& args, int threads);

}  // namespace treeattn
