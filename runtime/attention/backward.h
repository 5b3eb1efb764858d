// From checked arguments to the parameters and grids of the backward kernels: pure, so that it is
// tested without a GPU. Throws as arguments.h says; nothing here allocates unless it throws.
#pragma once

#include <string>

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
                                     const KernelSpec& spec, int sm_count, bool deterministic,
                                     int heads_apart_octave = kHeadsApartOctave);

/// The backward launches as plain data, in launch order.
struct BackwardLaunch {
  BackwardParams params{};
  Grid prepare, main, sum;
};
BackwardLaunch make_backward_launch(const BackwardArgs& args, const PlanShape& plan,
                                    const KernelSpec& spec, int sm_count,
                                    int heads_apart_octave = kHeadsApartOctave);

/// What the main kernel of the sm90 family reads, as it reads it.
struct BackwardTensorMaps {
  TensorMapRequest q, k, v, dout;

  bool fit() const {
    return fits_tensor_map(q) && fits_tensor_map(k) && fits_tensor_map(v) && fits_tensor_map(dout);
  }
};
BackwardTensorMaps backward_tensor_maps(const BackwardArgs& args, const PlanShape& plan,
                                        const KernelSpec& spec);
/// What is wrong with the strides, for an error; `maps` do not fit.
std::string describe_misfit(const BackwardTensorMaps& maps);

/// The kernel of its own that makes dq in deterministic mode: its grid, and what it reads of the
/// plan, in `params`.
Grid add_dq_launch(BackwardParams& params, const PlanShape& plan, const KernelSpec& spec);

}  // namespace treeattn
