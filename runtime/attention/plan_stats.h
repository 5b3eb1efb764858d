// What a plan saves: tile classes, visited area, tokens. For people (tree show, bench), not for
// kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/attention/plan.h"

namespace treeattn {

enum class TileClass : std::uint8_t { kSkipped, kPartial, kFull };

/// Class of a key tile for rows [m0, m1].
constexpr TileClass classify_tile(const KeyTile& tile, int m0, int m1) {
  if (tile_skipped(tile, m0, m1)) return TileClass::kSkipped;
  return tile_full(tile, m0, m1) ? TileClass::kFull : TileClass::kPartial;
}

/// Counts over the (query tile x key tile) grid of one view: of each sequence, the pairs that plain
/// causal attention would visit and those that the plan visits.
struct PlanStats {
  std::int64_t rows = 0;             ///< query rows inside sequences
  std::int64_t keys = 0;             ///< keys inside sequences
  std::int64_t visible_pairs = 0;    ///< (row, key) pairs that the mask allows
  std::int64_t unshared_tokens = 0;  ///< context lengths summed over rows that end a path; the
                                     ///< tokens written out without sharing when len_q == len_k
  std::int64_t tokens_saved = 0;     ///< unshared_tokens - keys, at least 0
  std::int64_t tiles_skipped = 0;
  std::int64_t tiles_partial = 0;
  std::int64_t tiles_full = 0;
  std::int64_t bad_sequences = 0;  ///< left out of every other count
  double useful_share = 0;         ///< visible pairs / (visited tiles * block_m * block_n)

  std::int64_t tiles_visited() const { return tiles_partial + tiles_full; }
  std::int64_t tiles() const { return tiles_skipped + tiles_visited(); }
};
PlanStats analyse_plan(const PlanShape& shape, const int* buffer, int view);

/// Tile classes of one sequence, row-major over its query tiles and key tiles.
struct TileGrid {
  int query_tiles = 0;
  int key_tiles = 0;
  std::vector<TileClass> classes;

  TileClass at(int query_tile, int key_tile) const {
    return classes[static_cast<std::size_t>(query_tile) * key_tiles + key_tile];
  }
};
TileGrid tile_grid(const PlanShape& shape, const int* buffer, int view, int sequence);

}  // namespace treeattn
