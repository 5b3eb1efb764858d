// From checked arguments to the parameters of a forward kernel: pure, so that it is tested without
// a GPU. Throws Error(kInvalidArgument / kUnsupported) naming the argument, its value and what was
// expected; nothing here allocates unless it throws.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "generator/kernel_spec.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/plan.h"
#include "templates/shared/params.h"
#include "treeattn/treeattn.h"

namespace treeattn {

Shape shape_of(const ForwardArgs& args);
/// Checks everything that needs no device: sizes, ratios, scale, pointers, strides, the plan
/// header; with `cuda`, what the kernels ask for too.
PlanShape check_forward(const ForwardArgs& args, bool cuda);

/// Log2 of the most query heads of one kv head that the rows of a forward tile can be shared by.
int most_heads_per_pack_log2(int heads_per_kv);
/// Log2 of the query heads that share a forward tile's rows in plans that plan_for() makes: up to
/// four, since eight brought no more and make a plan's tile lists twice as long.
int heads_per_pack_log2_for(const Shape& shape);

/// Which of a plan's views a forward kernel walks.
struct ForwardView {
  int view;                 ///< -1: the plan holds none for the tile
  int heads_per_pack_log2;  ///< query heads that share the tile's rows
};
/// The view with the most heads a tile that the plan holds, whatever it was made for.
ForwardView forward_view(const PlanShape& plan, const TileConfig& tile, int heads_per_kv);

/// What kernels of the sm90 family need: the counter of items. Contents do not matter.
inline constexpr std::size_t kForwardWorkspaceBytes = 16;

/// A forward launch as plain data.
struct ForwardLaunch {
  ForwardParams params{};
  Grid grid;  ///< empty: nothing to do
};
/// q, k and v as the sm90 family reads them.
struct ForwardTensorMaps {
  TensorMapRequest q, k, k_granule, v, v_granule;

  bool fit() const { return fits_tensor_map(q) && fits_tensor_map(k) && fits_tensor_map(v); }
};
ForwardTensorMaps forward_tensor_maps(const ForwardArgs& args, const PlanShape& plan,
                                      const KernelSpec& spec);
/// For a call whose strides no tensor map holds: the sm80 family's kernel for a problem of the sm90
/// family, with a tile that the plan holds a view for (see forward_view()). None: it holds none.
std::optional<KernelSpec> strided_spec(const Problem& problem, const PlanShape& plan,
                                       int heads_per_kv);
/// What is wrong with the strides, for an error; `maps` do not fit.
std::string describe_misfit(const ForwardTensorMaps& maps);
/// `l2_bytes` sizes the groups of heads that are walked together. Throws if the plan holds no view
/// for the spec's tile.
ForwardLaunch make_forward_launch(const ForwardArgs& args, const PlanShape& plan,
                                  const KernelSpec& spec, int sm_count, std::int64_t l2_bytes);

/// Grids of the plan kernels, in launch order.
struct PlanLaunch {
  PlanParams params{};
  Grid sequences{1}, intervals{1}, key_tiles{1}, query_tiles{1};
};
PlanLaunch make_plan_launch(const PlanShape& shape, const PlanInputs& inputs, std::int32_t* buffer,
                            int sm_count);

}  // namespace treeattn
