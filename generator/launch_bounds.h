// What a spec's kernel takes of a multiprocessor, worked out before it is compiled.
#pragma once

#include "generator/kernel_spec.h"

namespace treeattn {

ForwardConfig forward_config(const KernelSpec& spec);
ForwardSm90Config forward_sm90_config(const KernelSpec& spec);
/// Of either family.
BackwardConfig backward_config(const KernelSpec& spec);
BackwardSm90Config backward_sm90_config(const KernelSpec& spec);
BackwardDqConfig backward_dq_config(const KernelSpec& spec);

/// f32 accumulator registers of a thread: O and S.
int accumulator_registers(const ForwardConfig& config);
/// O, S and P.
int accumulator_registers(const ForwardSm90Config& config);
/// dK, dV and the larger of S with dP, and dQ.
int accumulator_registers(const BackwardConfig& config);
/// dQ, S and dP, and the fragments of Q and dO that ptxas keeps.
int accumulator_registers(const BackwardDqConfig& config);
/// What the 255 registers of a thread leave after addresses, fragments and softmax state.
inline constexpr int kMaxAccumulators = 208;

/// Blocks that are to run together on a multiprocessor: as many as shared memory, threads and the
/// registers that the kernel needs allow. Becomes the second argument of __launch_bounds__.
int blocks_per_sm(const KernelSpec& spec);

}  // namespace treeattn
