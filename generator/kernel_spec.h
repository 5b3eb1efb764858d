// What is asked (Problem) and how it is tiled (TileConfig): together a KernelSpec, whose canonical
// text names a kernel everywhere (command line, cache, logs, profilers).
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "templates/shared/config.h"

namespace treeattn {

enum class Pass : std::uint8_t { kPlan, kForward, kBackward, kBackwardDq };

/// Kernel families: what instructions a kernel is written with, not what it is compiled for.
enum class Family : std::uint8_t { kSm80, kSm90 };

/// A compilation target such as sm_90 or sm_90a.
struct Target {
  std::uint16_t cc = 80;       ///< compute capability times ten: 80, 86, 90, 100, 120
  bool arch_specific = false;  ///< the suffix 'a'

  friend auto operator<=>(const Target&, const Target&) = default;
};

/// What is asked. Plan problems leave everything after `target` at its default.
struct Problem {
  Pass pass = Pass::kForward;
  Family family = Family::kSm80;
  Target target;
  KernelDType dtype = KernelDType::kBF16;
  std::uint16_t head_dim = 0;
  std::uint16_t head_dim_v = 0;
  bool softcap = false;

  friend auto operator<=>(const Problem&, const Problem&) = default;
};

/// How it is tiled.
struct TileConfig {
  std::uint16_t block_m = 0;
  std::uint16_t block_n = 0;
  std::uint8_t stages = 0;
  std::uint8_t warps = 0;   ///< that compute
  std::uint16_t box_n = 0;  ///< keys a load brings, where that is not block_n: 0

  /// Keys of what a plan's view calls a key tile.
  int view_block_n() const { return box_n != 0 ? box_n : block_n; }

  friend auto operator<=>(const TileConfig&, const TileConfig&) = default;
};

struct KernelSpec {
  Problem problem;
  TileConfig tile;

  friend auto operator<=>(const KernelSpec&, const KernelSpec&) = default;
};

struct KernelSpecHash {
  std::size_t operator()(const KernelSpec& spec) const noexcept;
};

/// Canonical text: `fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4`, with `/softcap` before the tile
/// where softcap is on; `plan/sm80@sm_90` for the plan kernels; the sm90 family's tiles end with
/// their boxes, as in m128n128s2w8b64. parse(to_string(s)) == s.
std::string to_string(const KernelSpec& spec);
std::string to_string(const Problem& problem);  ///< the same without the tile
std::string to_string(const TileConfig& tile);  ///< m128n64s2w4
std::string to_string(const Target& target);    ///< sm_90
std::string_view to_string(KernelDType dtype);  ///< f16, bf16
std::string_view to_string(Family family);      ///< sm80, sm90

/// Inverse of to_string. A forward text without a tile gets the default tile of its problem.
/// Throws Error(kInvalidArgument) naming the part that is wrong and what was expected there.
KernelSpec parse_kernel_spec(std::string_view text);
Target parse_target(std::string_view text);  ///< accepts sm_90, sm90, 90, 9.0

}  // namespace treeattn
