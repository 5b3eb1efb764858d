// From checked arguments to the parameters and grids of the backward kernels: pure, so that it is
// tested without a GPU. Throws as arguments.h says; nothing here allocates unless it throws.
#pragma once

#include "generator/kernel_spec.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/plan.h"
#include "templates/shared/params.h"
#include "treeattn/treeattn.h"

namespace treeattn {

Shape shape_of(const BackwardArgs& args);
/// Checks everything that needs no device, as check_forward() does.
PlanShape check_backward(const BackwardArgs& args, bool cuda);

std::size_t backward_workspace_bytes(const PlanShape& plan, const Shape& shape,
                                     const KernelSpec& spec, int sm_count, bool deterministic);

/// The backward launches as plain data, in launch order.
struct BackwardLaunch {
  BackwardParams params{};
  Grid prepare, main, sum;
};
BackwardLaunch make_backward_launch(const BackwardArgs& args, const PlanShape& plan,
                                    const KernelSpec& spec, int sm_count, std::int64_t l2_bytes);

/// The kernel of its own that makes dq in deterministic mode: its grid, and what it reads of the
/// plan, in `params`.
Grid add_dq_launch(BackwardParams& params, const PlanShape& plan, const KernelSpec& spec);

}  // namespace treeattn
