#include "runtime/attention/plan_cpu.h"

#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace treeattn {
namespace {

constexpr KeyTile kEmptyTile{INT_MAX, -1, INT_MAX, -1};

/// Bounds over the keys [key0, key0 + keys) of a tile that has room for `nominal` keys.
KeyTile tile_bounds(const int* first, const int* len, int key0, int keys, int nominal) {
  KeyTile tile = kEmptyTile;
  int max_first = -1;
  int min_last = INT_MAX;
  bool every_key_seen = keys == nominal;
  for (int j = key0; j < key0 + keys; ++j) {
    if (len[j] == 0) {
      every_key_seen = false;
      continue;
    }
    const int last = first[j] + len[j] - 1;
    tile.min_first = std::min(tile.min_first, first[j]);
    tile.max_last = std::max(tile.max_last, last);
    max_first = std::max(max_first, first[j]);
    min_last = std::min(min_last, last);
  }
  if (tile.max_last < 0) return kEmptyTile;
  tile.min_last = min_last;
  if (every_key_seen) tile.max_first = max_first;
  return tile;
}

int tiles_over(int tokens, int tile) {
  return tokens / tile + (tokens % tile != 0);
}

/// How many key tiles each query tile of one sequence visits, and the lowest and highest of them.
class TileVisits {
 public:
  /// `keys` are the sequence's key tiles; rows are numbered from `row0` on.
  void compute(std::span<const KeyTile> keys, int row0, int query_tiles, int block_m) {
    count_.assign(query_tiles + 1, 0);
    lo_.assign(query_tiles, 0);
    hi_.assign(query_tiles, 0);
    std::vector<std::int64_t> delta(query_tiles + 1, 0);
    reset_paint();
    for (std::size_t t = 0; t < keys.size(); ++t) {
      if (keys[t].max_last < 0) continue;
      const int begin = (keys[t].min_first - row0) / block_m;
      const int end = (keys[t].max_last - row0) / block_m;
      ++delta[begin];
      --delta[end + 1];
      paint(lo_, begin, end, static_cast<int>(t));
    }
    reset_paint();
    for (std::size_t t = keys.size(); t-- > 0;) {
      if (keys[t].max_last < 0) continue;
      paint(hi_, (keys[t].min_first - row0) / block_m, (keys[t].max_last - row0) / block_m,
            static_cast<int>(t) + 1);
    }
    std::int64_t running = 0;
    for (int m = 0; m < query_tiles; ++m) {
      running += delta[m];
      count_[m] = static_cast<int>(running);
    }
  }

  int count(int m) const { return count_[m]; }
  int lo(int m) const { return lo_[m]; }
  int hi(int m) const { return hi_[m]; }

 private:
  void reset_paint() {
    unpainted_.resize(lo_.size() + 1);
    std::iota(unpainted_.begin(), unpainted_.end(), 0);
  }
  /// Lowest unpainted query tile >= m.
  int find(int m) {
    while (unpainted_[m] != m) {
      unpainted_[m] = unpainted_[unpainted_[m]];
      m = unpainted_[m];
    }
    return m;
  }
  /// Sets the tiles of [begin, end] that no earlier call set.
  void paint(std::vector<int>& values, int begin, int end, int value) {
    for (int m = find(begin); m <= end; m = find(m)) {
      values[m] = value;
      unpainted_[m] = m + 1;
    }
  }

  std::vector<int> count_;
  std::vector<int> lo_;
  std::vector<int> hi_;
  std::vector<int> unpainted_;
};

class PlanBuilder {
 public:
  PlanBuilder(const PlanShape& shape, const PlanInputs& inputs, int* buffer)
      : shape_(shape), in_(inputs), at_(plan_offsets(shape)), plan_(buffer) {
    std::fill_n(plan_, at_.total_ints, 0);
    cu_q_ = plan_ + at_.cu_q;
    cu_k_ = plan_ + at_.cu_k;
    first_ = plan_ + at_.first;
    len_ = plan_ + at_.len;
    plan_[kMetaFirstBadToken] = INT_MAX;
  }

  void build() {
    clamp_cu_seqlens(in_.cu_seqlens_q, shape_.total_q, cu_q_, kFaultCuSeqlensQ);
    clamp_cu_seqlens(in_.cu_seqlens_k, shape_.total_k, cu_k_, kFaultCuSeqlensK);
    for (int b = 0; b < shape_.batch; ++b) {
      if (faults()[b] != kFaultNone) note_bad_token(cu_q_[b]);
    }
    for (int b = 0; b < shape_.batch; ++b) lower(b);
    for (int b = 0; b < shape_.batch; ++b) {
      plan_[kMetaBadSequences] += faults()[b] != kFaultNone;
      plan_[kMetaBadKind] |= faults()[b];
    }
    fill_key_tiles(at_.granules, kGranuleKeys);
    for (int v = 0; v < shape_.num_views; ++v) {
      fill_key_tiles(at_.views[v].key_tiles, shape_.views[v].block_n);
      order_query_tiles(v);
      order_key_tiles(v);
    }
    plan_[kMetaMagic] = kPlanMagic;
  }

 private:
  int* faults() { return plan_ + at_.seq_fault; }
  void note_bad_token(int token) {
    plan_[kMetaFirstBadToken] = std::min(plan_[kMetaFirstBadToken], token);
  }
  void flag(int sequence, int fault, int token) {
    faults()[sequence] |= fault;
    note_bad_token(token);
  }

  void clamp_cu_seqlens(const int* given, int total, int* clamped, int fault) {
    clamped[0] = 0;
    if (shape_.batch == 0) return;
    for (int b = 0; b < shape_.batch; ++b) {
      clamped[b + 1] = std::clamp(given[b + 1], clamped[b], total);
      // A moved boundary makes the sequences on both of its sides wrong.
      if (clamped[b] != given[b] || clamped[b + 1] != given[b + 1]) faults()[b] |= fault;
    }
  }

  void lower(int b) {
    const int row0 = cu_q_[b];
    const int row_end = cu_q_[b + 1];
    const int key0 = cu_k_[b];
    const int offset = (cu_k_[b + 1] - key0) - (row_end - row0);
    if (in_.lowering == Lowering::kTree) check_start(b);
    for (int j = key0; j < cu_k_[b + 1]; ++j) {
      switch (in_.lowering) {
        case Lowering::kTree:
          first_[j] = row0 + std::max(0, j - key0 - offset);
          len_[j] = std::max(0, rows_up_to(in_.tree_dfs_order_end_k[j], row0, row_end) - first_[j]);
          break;
        case Lowering::kCausal:
          first_[j] = row0 + std::max(0, j - key0 - offset);
          len_[j] = row_end - first_[j];
          break;
        case Lowering::kFull:
          first_[j] = row0;
          len_[j] = row_end - row0;
          break;
        case Lowering::kIntervals:
          take_interval(b, j);
          break;
      }
    }
  }

  void check_start(int b) {
    const int* start = in_.tree_dfs_order_start_q;
    for (int i = cu_q_[b] + 1; i < cu_q_[b + 1]; ++i) {
      if (start[i] >= start[i - 1]) continue;
      flag(b, kFaultStartDecreases, i);
      return;
    }
  }

  /// One past the last row of [row0, row_end) with start <= end_k. Written out because on a start
  /// that decreases the device's search must land on the same row.
  int rows_up_to(int end_k, int row0, int row_end) const {
    int low = row0;
    int high = row_end;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (in_.tree_dfs_order_start_q[middle] <= end_k) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  void take_interval(int b, int j) {
    const std::int64_t row0 = cu_q_[b];
    const std::int64_t row_end = cu_q_[b + 1];
    const std::int64_t begin = in_.first[j];
    const std::int64_t end = begin + in_.len[j];
    first_[j] = cu_q_[b];
    if (in_.len[j] == 0) return;
    if (begin < row0 || end > row_end || end < begin) flag(b, kFaultInterval, j);
    const std::int64_t low = std::clamp(begin, row0, row_end);
    const std::int64_t high = std::clamp(end, low, row_end);
    if (high == low) return;
    first_[j] = static_cast<int>(low);
    len_[j] = static_cast<int>(high - low);
  }

  /// Bounds of every `tile`-sized key tile, by slot.
  void fill_key_tiles(long long offset, int tile) {
    auto* tiles = reinterpret_cast<KeyTile*>(plan_ + offset);
    std::fill_n(tiles, tile_slots(shape_.total_k, shape_.batch, tile), kEmptyTile);
    for (int b = 0; b < shape_.batch; ++b) {
      KeyTile* slot = tiles + tile_slot0(cu_k_[b], b, tile);
      for (int left = cu_k_[b + 1] - cu_k_[b]; left > 0; left -= tile) {
        *slot++ = tile_bounds(first_, len_, cu_k_[b + 1] - left, std::min(left, tile), tile);
      }
    }
  }

  void order_query_tiles(int v) {
    const int block_m = shape_.views[v].block_m;
    std::vector<QueryTile> tiles;
    tiles.reserve(tile_slots(shape_.total_q, shape_.batch, block_m));
    for (int b = 0; b < shape_.batch; ++b) add_query_tiles(v, b, tiles);
    for (int row = cu_q_[shape_.batch]; row < shape_.total_q;) {
      const int rows = std::min(block_m, shape_.total_q - row);
      tiles.push_back({row, rows, 0, 0, 0, 0, 0, 0});
      row += rows;
    }
    std::int64_t visits = 0;
    int most = 0;
    for (const QueryTile& tile : tiles) {
      visits += std::max(tile.work, 0);
      most = std::max(most, tile.work);
    }
    plan_[kMetaQueryTiles + v] = static_cast<int>(tiles.size());
    plan_[kMetaVisits + v] = static_cast<int>(std::min<std::int64_t>(visits, INT_MAX));

    // Heaviest first, invalid (-1) last, stable; -1 >> shift stays -1.
    const int shift = plan_order_shift(most);
    std::stable_sort(tiles.begin(), tiles.end(), [shift](const QueryTile& x, const QueryTile& y) {
      return x.work >> shift > y.work >> shift;
    });
    std::copy(tiles.begin(), tiles.end(),
              reinterpret_cast<QueryTile*>(plan_ + at_.views[v].query_tiles));
  }

  void add_query_tiles(int v, int b, std::vector<QueryTile>& tiles) {
    const auto [block_m, block_n] = shape_.views[v];
    const int row0 = cu_q_[b];
    const int rows = cu_q_[b + 1] - row0;
    const int keys = cu_k_[b + 1] - cu_k_[b];
    const int slot0 = tile_slot0(cu_k_[b], b, block_n);
    const bool bad = faults()[b] != kFaultNone;
    const auto* key_tiles = reinterpret_cast<const KeyTile*>(plan_ + at_.views[v].key_tiles);
    const int query_tiles = tiles_over(rows, block_m);
    if (!bad) {
      visits_.compute({key_tiles + slot0, static_cast<std::size_t>(tiles_over(keys, block_n))},
                      row0, query_tiles, block_m);
    }
    for (int m = 0; m < query_tiles; ++m) {
      QueryTile tile{row0 + m * block_m,
                     std::min(block_m, rows - m * block_m),
                     cu_k_[b],
                     keys,
                     slot0,
                     0,
                     0,
                     -1};
      if (!bad) {
        tile.lo = visits_.lo(m);
        tile.hi = visits_.hi(m);
        tile.work = visits_.count(m);
      }
      tiles.push_back(tile);
    }
  }

  void order_key_tiles(int v) {
    const int block_n = shape_.views[v].block_n;
    const auto* key_tiles = reinterpret_cast<const KeyTile*>(plan_ + at_.views[v].key_tiles);
    std::vector<KeyOrder> order;
    order.reserve(tile_slots(shape_.total_k, shape_.batch, block_n));
    for (int b = 0; b <= shape_.batch; ++b) {
      const int key_end = b < shape_.batch ? cu_k_[b + 1] : shape_.total_k;
      int slot = tile_slot0(cu_k_[b], b, block_n);
      for (int key = cu_k_[b]; key < key_end; ++slot) {
        const int keys = std::min(block_n, key_end - key);
        order.push_back({slot, key, keys, b});
        key += keys;
      }
    }
    const auto rows = [&](const KeyOrder& entry) { return rows_spanned(key_tiles[entry.slot]); };
    std::stable_sort(order.begin(), order.end(), [&](const KeyOrder& x, const KeyOrder& y) {
      return octave(rows(x)) > octave(rows(y));
    });
    plan_[kMetaKeyTiles + v] = static_cast<int>(order.size());
    std::int64_t spanned = 0;
    for (const KeyOrder& entry : order) spanned += rows(entry);
    std::memcpy(&plan_[kMetaKeyRows + 2 * v], &spanned, sizeof(spanned));
    std::copy(order.begin(), order.end(),
              reinterpret_cast<KeyOrder*>(plan_ + at_.views[v].key_order));
    int* const rank = plan_ + at_.views[v].key_rank;
    std::fill_n(rank, tile_slots(shape_.total_k, shape_.batch, block_n), INT_MAX);
    for (std::size_t i = 0; i < order.size(); ++i) rank[order[i].slot] = static_cast<int>(i);
  }

  const PlanShape shape_;
  const PlanInputs& in_;
  const PlanOffsets at_;
  int* plan_;
  int* cu_q_ = nullptr;
  int* cu_k_ = nullptr;
  int* first_ = nullptr;
  int* len_ = nullptr;
  TileVisits visits_;
};

}  // namespace

void build_plan_cpu(const PlanShape& shape, const PlanInputs& inputs, int* buffer) {
  PlanBuilder(shape, inputs, buffer).build();
}

}  // namespace treeattn
