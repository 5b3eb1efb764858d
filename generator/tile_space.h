// Which tiles a problem can be built with, which one is the default, and why the others are
// refused.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "templates/shared/plan.h"

namespace treeattn {

/// Empty if the head dims are supported; else the reason, naming the value and what was expected.
std::optional<std::string> refuse_problem(const Problem& problem);
/// Empty if the tile is legal for the problem; else the reason.
std::optional<std::string> refuse_tile(const Problem& problem, const TileConfig& tile);

struct TileCandidate {
  TileConfig tile;
  std::string refused;  ///< empty: legal
};
/// Every tile the space enumerates for the problem, legal or refused with its reason.
std::vector<TileCandidate> tile_candidates(const Problem& problem);

/// The tile used unless a caller asks for another. Throws Error for an unsupported problem.
TileConfig default_tile(const Problem& problem);
/// The best tile of the sm80 family that walks one of these views, for a problem of that family,
/// with rows for up to 1 << heads_per_pack_log2 query heads of a view's token: the default one
/// where a view of it is there, none if no view suits the problem.
std::optional<TileConfig> sm80_tile_for_views(const Problem& problem,
                                              std::span<const PlanView> views,
                                              int heads_per_pack_log2 = 0);
/// The problem with the family and target of the kernel that a device runs for it by default.
/// sm_90a stands for a device of compute capability 9.0 that runs the sm90 family wherever that has
/// a kernel, and the sm80 family compiled for sm_90 elsewhere.
Problem on_device(Problem problem, Target device);
/// The problem with its default tile.
KernelSpec default_spec(const Problem& problem);
/// All default specs of a pass on one device's target (see on_device): every head dim, both
/// dtypes, plus the supported pairs of different head_dim and head_dim_v that models use (192/128
/// and so on).
std::vector<KernelSpec> default_specs(Pass pass, Target target);

}  // namespace treeattn
