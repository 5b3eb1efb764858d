// From checked arguments to the parameters of a forward kernel: pure, so that it is tested without
// a GPU. Throws Error(kInvalidArgument / kUnsupported) naming the argument, its value and what was
// expected; nothing here allocates unless it throws.
#pragma once

#include "generator/kernel_spec.h"
#include "runtime/attention/plan.h"
#include "templates/shared/params.h"
#include "treeattn/treeattn.h"

namespace treeattn {

/// head_dim_v with its default applied.
inline int value_head_dim(int head_dim, int head_dim_v) {
  return head_dim_v == 0 ? head_dim : head_dim_v;
}

/// Checks everything that needs no device: sizes, ratios, scale, pointers, strides, the plan
/// header. `cuda` adds what the kernels ask for: f16 or bf16, head dims they exist for, 16-byte
/// alignment.
PlanShape check_forward(const ForwardArgs& args, bool cuda);
/// Checks that every pointer the lowering needs is there.
void check_plan_inputs(const PlanShape& shape, const PlanInputs& inputs);
void check_shape(const Shape& shape, bool cuda);

/// The problem these arguments pose to the kernels of a target.
Problem forward_problem(const Shape& shape, Target target);
Shape shape_of(const ForwardArgs& args);

/// A forward launch as plain data.
struct ForwardLaunch {
  ForwardParams params{};
  unsigned blocks = 0;  ///< 0: nothing to do
};
/// `l2_bytes` sizes the groups of heads that are walked together. Throws if the plan holds no view
/// for the spec's tile.
ForwardLaunch make_forward_launch(const ForwardArgs& args, const PlanShape& plan,
                                  const KernelSpec& spec, std::int64_t l2_bytes);

/// Grids of the plan kernels, in launch order.
struct PlanLaunch {
  PlanParams params{};
  struct Grid {
    unsigned x = 1, y = 1;
  };
  Grid sequences, intervals, key_tiles, query_tiles;
};
PlanLaunch make_plan_launch(const PlanShape& shape, const PlanInputs& inputs, std::int32_t* buffer,
                            int sm_count);

}  // namespace treeattn
