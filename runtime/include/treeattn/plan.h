/// The plan: which query rows see which keys, made once per batch and used by every layer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace treeattn {

/// Lowerings that build_plan turns into one interval of query rows per key.
enum class Lowering : int {
  kTree = 0,       ///< tree_dfs_order_start_q / tree_dfs_order_end_k
  kCausal = 1,     ///< row i sees key j iff j <= i + len_k - len_q
  kFull = 2,       ///< every row of a sequence sees every key of it
  kIntervals = 3,  ///< first[] and len[] given by the caller
};

/// Plain data that describes a plan's buffer; copy it freely. The buffer holds int32 and no
/// pointers.
struct Plan {
  std::uint32_t struct_size = sizeof(Plan);
  std::uint32_t version = 1;
  std::int32_t total_q = 0;
  std::int32_t total_k = 0;
  std::int32_t batch = 0;
  std::int32_t num_views = 0;
  struct View {
    std::int32_t block_m;
    std::int32_t block_n;
  } views[8] = {};
};

/// Bytes of the buffer that build_plan fills.
std::size_t plan_bytes(const Plan& plan);

}  // namespace treeattn
