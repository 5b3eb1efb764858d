#include "generator/tile_space.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "generator/arch.h"
#include "generator/launch_bounds.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

/// head_dim / head_dim_v pairs of published models: DeepSeek-V2 and V3, MiniCPM3, and both ways of
/// halving.
constexpr std::array<std::pair<std::uint16_t, std::uint16_t>, 4> kMixedDims{
    {{192, 128}, {96, 64}, {128, 64}, {64, 128}}};

constexpr std::array<std::uint16_t, 4> kBlockM{32, 64, 128, 256};
static_assert(kBlockM[0] >> kMostHeadsPerPackLog2 == kViewRowsStep, "plans hold a view for it");
constexpr std::array<std::uint16_t, 4> kBlockN{16, 32, 64, 128};
constexpr std::array<std::uint16_t, 2> kSm90BlockM{128, 192};
constexpr std::array<std::uint16_t, 6> kSm90BlockN{64, 80, 96, 112, 128, 176};
constexpr std::array<std::uint16_t, 2> kSm90BoxN{32, 64};
constexpr std::array<std::uint8_t, 2> kStages{1, 2};
constexpr std::array<std::uint8_t, 3> kWarps{2, 4, 8};

/// With four warps a multiprocessor a scheduler has nothing to run while its only warp waits.
constexpr int kFillingWarps = 8;

/// Packed heads are no reason for more rows than default tiles have.
constexpr int kMostPackedRows = 128;

/// For `return refused(why, ...)`: true, and the reason for who wants to know it. Hot calls look
/// for their default tile and do not.
template <class... Args>
bool refused(std::string* why, fmt::format_string<Args...> reason, Args&&... args) {
  if (why != nullptr) *why = fmt::format(reason, std::forward<Args>(args)...);
  return true;
}

bool refuse_dim(const char* name, int dim, std::string* why) {
  if (dim >= kHeadDimMin && dim <= kHeadDimMax && dim % kHeadDimStep == 0) return false;
  return refused(why, "{} is {}, expected a multiple of {} from {} to {}", name, dim, kHeadDimStep,
                 kHeadDimMin, kHeadDimMax);
}

template <std::size_t kCount, class T>
bool refuse_value(const char* name, int value, const std::array<T, kCount>& allowed,
                  std::string* why) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return false;
  return refused(why, "{} is {}, expected one of {}", name, value, fmt::join(allowed, ", "));
}

template <class Config>
bool refuse_smem(const Problem& problem, const Config& config, std::string* why) {
  const int limit = arch_limits(problem.target).smem_per_block;
  if (config.smem_bytes() <= limit) return false;
  return refused(why, "needs {} bytes of shared memory, {} offers {} a block", config.smem_bytes(),
                 to_string(problem.target), limit);
}

/// What any pass of the sm80 family refuses alike.
template <class Config>
bool refuse_size(const Problem& problem, const Config& config, std::string* why) {
  const int accumulators = accumulator_registers(config);
  if (accumulators > kMaxAccumulators) {
    return refused(why, "accumulators take {} registers a thread, expected at most {}",
                   accumulators, kMaxAccumulators);
  }
  return refuse_smem(problem, config, why);
}

bool refuse_forward(const Problem& problem, const TileConfig& tile, std::string* why) {
  const int rows = tile.block_m / tile.warps;
  if (rows != 16 && rows != 32) {
    return refused(why, "a warp would own {} rows, expected 16 or 32", rows);
  }
  return refuse_size(problem, forward_config({problem, tile}), why);
}

/// Registers a consumer needs beside its accumulators: addresses, descriptors, softmax state. Found
/// with ptxas over all default specs.
constexpr int sm90_other_registers(bool softcap) {
  return softcap ? 40 : 32;
}

bool refuse_forward_sm90(const Problem& problem, const TileConfig& tile, std::string* why) {
  if (refuse_value("block_m", tile.block_m, kSm90BlockM, why)) return true;
  // A tile's granules have a flag each for every warpgroup.
  const int most = sm90_flag_bits(tile.block_m / 64) * kGranuleKeys;
  if (tile.block_n < 16 || tile.block_n > most || tile.block_n % 16 != 0) {
    return refused(why, "block_n is {}, expected a multiple of 16 from 16 to {}", tile.block_n,
                   most);
  }
  if (refuse_value("box_n", tile.box_n, kSm90BoxN, why)) return true;
  if (tile.stages != 2) return refused(why, "stages is {}, expected 2", tile.stages);
  if (tile.warps != tile.block_m / 16) {
    return refused(why, "warps is {}, expected {} for {} rows", tile.warps, tile.block_m / 16,
                   tile.block_m);
  }
  const ForwardSm90Config config = forward_sm90_config({problem, tile});
  if (const int loads = config.granules() * std::max(config.chunks(), config.chunks_v());
      loads > 32) {
    return refused(why, "a tile has {} pieces of 16 keys and 64 dims, expected at most 32", loads);
  }
  const int registers = accumulator_registers(config) + sm90_other_registers(problem.softcap);
  if (registers > config.consumer_registers()) {
    return refused(why, "a thread needs {} registers, {} warpgroups leave it {}", registers,
                   config.warpgroups(), config.consumer_registers());
  }
  return refuse_smem(problem, config, why);
}

bool refuse_backward(const Problem& problem, const TileConfig& tile, std::string* why) {
  if (tile.warps < 4) return refused(why, "warps is {}, expected 4 or 8", tile.warps);
  if (tile.block_n % (8 * tile.warps) != 0) {
    return refused(why, "block_n is {}, expected a multiple of {} with {} warps", tile.block_n,
                   8 * tile.warps, tile.warps);
  }
  return refuse_size(problem, backward_config({problem, tile}), why);
}

/// The only tile so far.
constexpr TileConfig kBackwardSm90{64, 128, 2, 8};

bool refuse_backward_sm90_problem(const Problem& problem, std::string* why) {
  if (problem.head_dim <= 64 || problem.head_dim > 128 || problem.head_dim_v > 128) {
    return refused(why,
                   "head dims are {} and {}, expected 72 to 128 and up to 128 in the sm90 family's "
                   "backward; the sm80 family has the others",
                   problem.head_dim, problem.head_dim_v);
  }
  return problem.softcap &&
         refused(why, "the sm90 family's backward has no softcap; the sm80 family has");
}

bool refuse_backward_sm90(const Problem& problem, const TileConfig& tile, std::string* why) {
  if (tile != kBackwardSm90) {
    return refused(why, "expected {}, the only tile of this family's backward",
                   to_string(kBackwardSm90));
  }
  return refuse_smem(problem, backward_sm90_config({problem, tile}), why);
}

bool refuse_backward_dq(const Problem& problem, const TileConfig& tile, std::string* why) {
  if (tile.block_m != 16 * tile.warps) {
    return refused(why, "a warp would own {} rows, expected 16", tile.block_m / tile.warps);
  }
  return refuse_size(problem, backward_dq_config({problem, tile}), why);
}

/// Whether a tile is not legal for a problem that is; `why` may be null.
bool refuse_tile(const Problem& problem, const TileConfig& tile, std::string* why) {
  if (problem.pass == Pass::kPlan) {
    return tile != TileConfig{} && refused(why, "plan kernels have no tile");
  }
  if (problem.family == Family::kSm90) {
    return problem.pass == Pass::kBackward ? refuse_backward_sm90(problem, tile, why)
                                           : refuse_forward_sm90(problem, tile, why);
  }
  if (tile.box_n != 0) {
    return refused(why, "the sm80 family loads whole tiles: expected no box_n");
  }
  if (refuse_value("block_m", tile.block_m, kBlockM, why)) return true;
  if (refuse_value("block_n", tile.block_n, kBlockN, why)) return true;
  if (refuse_value("stages", tile.stages, kStages, why)) return true;
  if (refuse_value("warps", tile.warps, kWarps, why)) return true;
  switch (problem.pass) {
    case Pass::kBackward:
      return refuse_backward(problem, tile, why);
    case Pass::kBackwardDq:
      return refuse_backward_dq(problem, tile, why);
    default:
      return refuse_forward(problem, tile, why);
  }
}

/// Every tile the space enumerates for a problem.
template <class Visit>
void for_each_tile(const Problem& problem, Visit&& visit) {
  if (problem.pass == Pass::kPlan) return;
  if (problem.family == Family::kSm90 && problem.pass == Pass::kBackward) {
    visit(kBackwardSm90);
    return;
  }
  if (problem.family == Family::kSm90) {
    for (const std::uint16_t m : kSm90BlockM) {
      for (const std::uint16_t n : kSm90BlockN) {
        for (const std::uint16_t box : kSm90BoxN) {
          visit(TileConfig{m, n, 2, static_cast<std::uint8_t>(m / 16), box});
        }
      }
    }
    return;
  }
  for (const std::uint16_t m : kBlockM) {
    for (const std::uint16_t n : kBlockN) {
      for (const std::uint8_t stages : kStages) {
        for (const std::uint8_t warps : kWarps) visit(TileConfig{m, n, stages, warps});
      }
    }
  }
}

/// dq tiles in order of preference.
std::span<const TileConfig> backward_dq_preferences(const Problem& problem) {
  static constexpr std::array kTo128{TileConfig{64, 64, 2, 4}, TileConfig{64, 64, 1, 4},
                                     TileConfig{64, 32, 1, 4}};
  static constexpr std::array kTo256{TileConfig{64, 32, 2, 4}, TileConfig{64, 32, 1, 4},
                                     TileConfig{64, 16, 1, 4}, TileConfig{32, 16, 1, 2}};
  if (std::max(problem.head_dim, problem.head_dim_v) <= 128) return kTo128;
  return kTo256;
}

/// Backward tiles in order of preference: K, V, Q, dO, P and dS all lie in shared memory, from
/// sm_90 on dQ too, so that a block is alone on its multiprocessor more often than not.
std::span<const TileConfig> backward_preferences(const Problem& problem) {
  static constexpr std::array kTo64{TileConfig{128, 128, 1, 8}, TileConfig{128, 64, 1, 4},
                                    TileConfig{64, 64, 1, 4}};
  static constexpr std::array kTo128{TileConfig{64, 128, 2, 8}, TileConfig{64, 64, 2, 8},
                                     TileConfig{64, 64, 1, 8}, TileConfig{32, 64, 1, 8}};
  static constexpr std::array kTo256{TileConfig{64, 64, 2, 8}, TileConfig{64, 64, 1, 8},
                                     TileConfig{32, 64, 1, 8}, TileConfig{32, 32, 1, 4}};
  const int dim = std::max(problem.head_dim, problem.head_dim_v);
  if (dim <= 64) return kTo64;
  if (dim <= 128) return kTo128;
  return kTo256;
}

/// Tiles in order of preference. The larger the head, the fewer keys or rows the registers leave
/// room for.
std::span<const TileConfig> forward_preferences(const Problem& problem) {
  static constexpr std::array kTo24{TileConfig{128, 64, 2, 4}};
  static constexpr std::array kTo64{TileConfig{128, 128, 2, 4}, TileConfig{128, 64, 2, 4},
                                    TileConfig{128, 32, 2, 4}};
  static constexpr std::array kTo128{TileConfig{128, 64, 2, 4}, TileConfig{128, 32, 2, 4},
                                     TileConfig{128, 32, 1, 4}, TileConfig{64, 32, 2, 4}};
  static constexpr std::array kTo176{TileConfig{128, 32, 2, 4}, TileConfig{64, 32, 2, 4},
                                     TileConfig{64, 32, 1, 4}};
  static constexpr std::array kTo256{TileConfig{64, 64, 1, 4}, TileConfig{64, 32, 1, 4}};
  const int dim = std::max(problem.head_dim, problem.head_dim_v);
  if (dim <= 24) return kTo24;
  if (dim <= 64) return kTo64;
  if (dim <= 128) return kTo128;
  // A wide q and k cost shared memory, a wide v registers too.
  if (problem.head_dim_v <= 176 && problem.head_dim <= 192) return kTo176;
  return kTo256;
}

std::span<const TileConfig> forward_sm90_preferences(const Problem& problem) {
  static constexpr std::array kTo64{TileConfig{192, 112, 2, 12, 64},
                                    TileConfig{192, 96, 2, 12, 64}};
  static constexpr std::array kTo256{TileConfig{128, 128, 2, 8, 64}, TileConfig{128, 112, 2, 8, 64},
                                     TileConfig{128, 96, 2, 8, 64}, TileConfig{128, 80, 2, 8, 64},
                                     TileConfig{128, 64, 2, 8, 64}};
  if (std::max(problem.head_dim, problem.head_dim_v) <= 64) return kTo64;
  return kTo256;
}

std::span<const TileConfig> preferred_tiles(const Problem& problem) {
  if (problem.family == Family::kSm90) {
    return problem.pass == Pass::kBackward ? std::span<const TileConfig>(&kBackwardSm90, 1)
                                           : forward_sm90_preferences(problem);
  }
  switch (problem.pass) {
    case Pass::kBackward:
      return backward_preferences(problem);
    case Pass::kBackwardDq:
      return backward_dq_preferences(problem);
    default:
      return forward_preferences(problem);
  }
}

/// `why` may be null.
bool refuse_problem(const Problem& problem, std::string* why) {
  const bool sm90 = problem.family == Family::kSm90;
  if (sm90 && problem.target != kSm90Target) {
    return refused(why, "the sm90 family is compiled for {}, expected it instead of {}",
                   to_string(kSm90Target), to_string(problem.target));
  }
  if (sm90 && problem.pass != Pass::kForward && problem.pass != Pass::kBackward) {
    return refused(why, "the sm90 family has forward and backward kernels only");
  }
  if (problem.pass == Pass::kPlan) return false;
  if (refuse_dim("head_dim", problem.head_dim, why)) return true;
  if (refuse_dim("head_dim_v", problem.head_dim_v, why)) return true;
  return sm90 && problem.pass == Pass::kBackward && refuse_backward_sm90_problem(problem, why);
}

}  // namespace

std::optional<std::string> refuse_problem(const Problem& problem) {
  std::string why;
  if (refuse_problem(problem, &why)) return why;
  return std::nullopt;
}

std::optional<std::string> refuse_tile(const Problem& problem, const TileConfig& tile) {
  std::string why;
  if (refuse_tile(problem, tile, &why)) return why;
  return std::nullopt;
}

std::vector<TileCandidate> tile_candidates(const Problem& problem) {
  std::vector<TileCandidate> candidates;
  for_each_tile(problem, [&](const TileConfig& tile) {
    candidates.push_back({tile, refuse_tile(problem, tile).value_or("")});
  });
  return candidates;
}

TileConfig default_tile(const Problem& problem) {
  if (const auto reason = refuse_problem(problem)) {
    throw Error(ErrorCode::kInvalidArgument, *reason);
  }
  if (problem.pass == Pass::kPlan) return {};
  const auto preferences = preferred_tiles(problem);
  for (const int warps : {kFillingWarps, 1}) {
    for (const TileConfig& tile : preferences) {
      if (refuse_tile(problem, tile, nullptr)) continue;
      if (blocks_per_sm({problem, tile}) * tile.warps >= warps) return tile;
    }
  }
  throw Error(ErrorCode::kInternal, fmt::format("no default tile fits {}", to_string(problem)));
}

std::optional<TileConfig> sm80_tile_for_views(const Problem& problem,
                                              std::span<const PlanView> views,
                                              int heads_per_pack_log2) {
  const auto held = [&](const TileConfig& tile) {
    return std::any_of(views.begin(), views.end(), [&](const PlanView& view) {
      if (view.block_n != tile.block_n) return false;
      if (view.block_m == tile.block_m) return true;
      if (tile.block_m > kMostPackedRows) return false;
      for (int log2 = 1; log2 <= heads_per_pack_log2; ++log2) {
        if (view.block_m == tile.block_m >> log2) return true;
      }
      return false;
    });
  };
  const TileConfig usual = default_tile(problem);
  if (held(usual)) return usual;
  // What fills a multiprocessor first, then the larger tile, then what leaves a thread the fewest
  // accumulators (nobody has measured these tiles: none may spill), then what loads further ahead.
  using Merit = std::tuple<bool, int, int, int>;
  const auto merit = [&](const TileConfig& tile) {
    const bool fills = blocks_per_sm({problem, tile}) * tile.warps >= kFillingWarps;
    return Merit{fills, tile.block_m * tile.block_n, tile.warps, tile.stages};
  };
  std::optional<TileConfig> best;
  for_each_tile(problem, [&](const TileConfig& tile) {
    if (!held(tile) || refuse_tile(problem, tile, nullptr)) return;
    if (!best || merit(tile) > merit(*best)) best = tile;
  });
  return best;
}

Problem on_device(Problem problem, Target device) {
  problem.family = Family::kSm90;
  problem.target = device;
  if (device == kSm90Target && !refuse_problem(problem, nullptr)) return problem;
  problem.family = Family::kSm80;
  problem.target.arch_specific = false;
  return problem;
}

KernelSpec default_spec(const Problem& problem) {
  return {problem, default_tile(problem)};
}

std::vector<KernelSpec> default_specs(Pass pass, Target target) {
  std::vector<KernelSpec> specs;
  for (const KernelDType dtype : {KernelDType::kF16, KernelDType::kBF16}) {
    const auto add = [&](std::uint16_t head_dim, std::uint16_t head_dim_v) {
      Problem problem;
      problem.pass = pass;
      problem.dtype = dtype;
      problem.head_dim = head_dim;
      problem.head_dim_v = head_dim_v;
      specs.push_back(default_spec(on_device(problem, target)));
    };
    for (std::uint16_t dim = kHeadDimMin; dim <= kHeadDimMax; dim += kHeadDimStep) add(dim, dim);
    for (const auto& [head_dim, head_dim_v] : kMixedDims) add(head_dim, head_dim_v);
  }
  return specs;
}

}  // namespace treeattn
