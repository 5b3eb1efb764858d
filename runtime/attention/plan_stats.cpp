#include "runtime/attention/plan_stats.h"

#include <algorithm>
#include <cstddef>

namespace treeattn {
namespace {

/// Key tiles that plain causal attention visits for rows up to m1 (a position in the sequence).
std::int64_t causal_tiles(std::int64_t m1, std::int64_t len_q, std::int64_t len_k,
                          std::int64_t block_n) {
  const std::int64_t last_key = m1 + len_k - len_q;
  return last_key < 0 ? 0 : last_key / block_n + 1;
}

void count_pairs(const PlanReader& plan, int b, PlanStats& stats) {
  const int row0 = plan.cu_q()[b];
  const int rows = plan.cu_q()[b + 1] - row0;
  const int key0 = plan.cu_k()[b];
  const int key_end = plan.cu_k()[b + 1];
  const int offset = key_end - key0 - rows;
  // Keys that each row sees: the intervals as a difference array.
  std::vector<std::int64_t> context(static_cast<std::size_t>(rows) + 1, 0);
  for (int j = key0; j < key_end; ++j) {
    const int len = plan.len()[j];
    if (len == 0) continue;
    stats.visible_pairs += len;
    ++context[plan.first()[j] - row0];
    --context[plan.first()[j] - row0 + len];
  }
  for (int i = 1; i < rows; ++i) context[i] += context[i - 1];
  for (int i = std::max(0, -offset); i < rows; ++i) {
    const int own_key = key0 + i + offset;
    const bool ends_path = plan.len()[own_key] == 1 && plan.first()[own_key] == row0 + i;
    if (ends_path) stats.unshared_tokens += context[i];
  }
}

}  // namespace

PlanStats analyse_plan(const PlanShape& shape, const int* buffer, int view) {
  const PlanReader plan(shape, buffer);
  const auto [block_m, block_n] = shape.views[view];
  PlanStats stats;
  for (int b = 0; b < shape.batch; ++b) {
    if (plan.seq_fault()[b] != kFaultNone) {
      ++stats.bad_sequences;
      continue;
    }
    stats.rows += plan.cu_q()[b + 1] - plan.cu_q()[b];
    stats.keys += plan.cu_k()[b + 1] - plan.cu_k()[b];
    count_pairs(plan, b, stats);
  }
  stats.tokens_saved = std::max<std::int64_t>(0, stats.unshared_tokens - stats.keys);

  const int* cu_q = plan.cu_q();
  for (const QueryTile& tile : plan.query_tiles(view)) {
    if (tile.row0 >= cu_q[shape.batch] || tile.work < 0) continue;
    const int* after = std::upper_bound(cu_q, cu_q + shape.batch + 1, tile.row0);
    const int row0 = after[-1];
    const int len_q = after[0] - row0;
    const int m1 = tile.row0 + tile.rows - 1;
    const std::int64_t causal = causal_tiles(m1 - row0, len_q, tile.keys, block_n);
    std::int64_t visited_below = 0;
    for (int t = tile.lo; t < tile.hi; ++t) {
      const TileClass c = classify_tile(plan.key_tiles(view)[tile.slot0 + t], tile.row0, m1);
      if (c == TileClass::kSkipped) continue;
      ++(c == TileClass::kFull ? stats.tiles_full : stats.tiles_partial);
      visited_below += t < causal;
    }
    stats.tiles_skipped += causal - visited_below;
  }
  if (stats.tiles_visited() > 0) {
    stats.useful_share = static_cast<double>(stats.visible_pairs) /
                         (static_cast<double>(stats.tiles_visited()) * block_m * block_n);
  }
  return stats;
}

TileGrid tile_grid(const PlanShape& shape, const int* buffer, int view, int sequence) {
  const PlanReader plan(shape, buffer);
  const auto [block_m, block_n] = shape.views[view];
  const int row0 = plan.cu_q()[sequence];
  const int rows = plan.cu_q()[sequence + 1] - row0;
  const int key0 = plan.cu_k()[sequence];
  const int keys = plan.cu_k()[sequence + 1] - key0;
  TileGrid grid;
  grid.query_tiles = rows / block_m + (rows % block_m != 0);
  grid.key_tiles = keys / block_n + (keys % block_n != 0);
  grid.classes.reserve(static_cast<std::size_t>(grid.query_tiles) * grid.key_tiles);
  const std::span<const KeyTile> tiles = plan.key_tiles(view);
  const int slot0 = tile_slot0(key0, sequence, block_n);
  for (int m = 0; m < grid.query_tiles; ++m) {
    const int m0 = row0 + m * block_m;
    const int m1 = std::min(m0 + block_m, row0 + rows) - 1;
    for (int t = 0; t < grid.key_tiles; ++t) {
      grid.classes.push_back(classify_tile(tiles[slot0 + t], m0, m1));
    }
  }
  return grid;
}

}  // namespace treeattn
