// Layout of the plan: one relocatable int32 device buffer, described by a small plain header. The
// CPU builder, the device builder and every kernel share this file.
#pragma once

#include "config.h"

namespace treeattn {

inline constexpr int kMaxPlanViews = 8;
inline constexpr int kPlanMetaInts = 64;
/// Ints of a QueryTile and of a KeyTile.
inline constexpr int kQueryTileInts = 8;
inline constexpr int kKeyTileInts = 4;

/// A view's block_m is a multiple of this: tiles have 32 rows or more, which up to eight heads
/// share.
inline constexpr int kViewRowsStep = 4;

/// One tile shape a plan holds tile lists for.
struct PlanView {
  int block_m;  ///< query tokens; where a tile's rows are shared by heads, fewer than its rows
  int block_n;
};

/// The header: all offsets into the buffer follow from it. Plain data; the same in C, C++ and
/// Python.
struct PlanShape {
  int total_q;
  int total_k;
  int batch;
  int num_views;
  PlanView views[kMaxPlanViews];
};

/// Indices into the meta section (the first kPlanMetaInts ints of the buffer).
enum PlanMeta : int {
  kMetaMagic = 0,          ///< kPlanMagic once built
  kMetaBadSequences = 1,   ///< number of sequences whose tree or intervals are invalid
  kMetaFirstBadToken = 2,  ///< lowest offending packed index, INT_MAX if none
  kMetaBadKind = 3,        ///< PlanFault bits, or-ed over all faults
  kMetaQueryTiles = 8,     ///< [kMaxPlanViews]: query tiles of each view
  kMetaKeyTiles = 16,      ///< [kMaxPlanViews]: key tiles of each view
  kMetaVisits = 24,        ///< [kMaxPlanViews]: sum of QueryTile::work over valid tiles
  kMetaKeyRows = 32,       ///< [kMaxPlanViews]: sum of rows_spanned() over key tiles, two ints each
};
inline constexpr int kPlanMagic = 0x74726565;  // "tree"

/// What was wrong with the inputs a plan was built from.
enum PlanFault : int {
  kFaultNone = 0,
  kFaultStartDecreases = 1,  ///< tree_dfs_order_start_q decreases inside a sequence
  kFaultCuSeqlensQ = 2,      ///< cu_seqlens_q[0] != 0, decreases, or exceeds total_q
  kFaultCuSeqlensK = 4,      ///< cu_seqlens_k[0] != 0, decreases, or exceeds total_k
  kFaultInterval = 8,        ///< an interval leaves the query rows of its key's sequence
};

/// A block of query rows of one sequence. Records are ordered heavy first; rows past the last
/// sequence form tiles with hi == lo, whose rows see nothing.
struct QueryTile {
  int row0;   ///< first packed query row
  int rows;   ///< 1..block_m
  int key0;   ///< first packed key of the sequence
  int keys;   ///< keys of the sequence
  int slot0;  ///< slot of the sequence's first key tile
  int lo;     ///< first key tile (relative to slot0) that may be visible
  int hi;     ///< one past the last
  int work;   ///< key tiles to visit (an upper bound); -1: the sequence is invalid, rows become NaN
};

/// Bounds over the non-empty keys of a key tile, in packed query rows. A tile without any has
/// min_first = INT_MAX and max_last = -1; a tile with an empty key, or shorter than block_n, has
/// max_first = INT_MAX, which no row range can call full.
struct KeyTile {
  int min_first;
  int max_last;
  int max_first;
  int min_last;
};

/// Rows from the first to the last that sees a key of the tile.
TREEATTN_HOST_DEVICE constexpr int rows_spanned(const KeyTile& t) {
  return t.max_last < 0 ? 0 : t.max_last - t.min_first + 1;
}
/// Rows [m0, m1] see nothing of the tile.
TREEATTN_HOST_DEVICE constexpr bool tile_skipped(const KeyTile& t, int m0, int m1) {
  return t.max_last < m0 || t.min_first > m1;
}
/// Rows [m0, m1] see every key of the tile.
TREEATTN_HOST_DEVICE constexpr bool tile_full(const KeyTile& t, int m0, int m1) {
  return t.max_first <= m0 && t.min_last >= m1;
}

TREEATTN_HOST_DEVICE constexpr long long plan_align(long long ints) {
  return (ints + 3) / 4 * 4;
}

/// Slots of `tile`-sized tiles over `total` tokens in `batch` sequences: sequence b's tiles start
/// at slot cu[b] / tile + b, which never overlaps the next sequence's and needs no prefix sum.
TREEATTN_HOST_DEVICE constexpr int tile_slots(int total, int batch, int tile) {
  return total / tile + batch + 1;
}
TREEATTN_HOST_DEVICE constexpr int tile_slot0(int cu_begin, int b, int tile) {
  return cu_begin / tile + b;
}

/// Offsets of the sections, in ints from the start of the buffer; every section is 16-byte aligned.
/// The tail of each view is scratch that only the builder uses.
struct PlanOffsets {
  long long cu_q;       ///< [batch + 1], clamped to be valid
  long long cu_k;       ///< [batch + 1], clamped to be valid
  long long seq_fault;  ///< [batch]: PlanFault bits of each sequence
  long long first;      ///< [total_k]: first packed row that sees the key
  long long len;        ///< [total_k]: rows that see it
  long long granules;   ///< [tile_slots(total_k, batch, 16)] KeyTile
  struct View {
    long long query_tiles;  ///< [tile_slots(total_q, batch, block_m)] QueryTile, heavy first
    long long key_tiles;    ///< [tile_slots(total_k, batch, block_n)] KeyTile, by slot
    long long key_order;    ///< [tile_slots(total_k, batch, block_n)] {slot, key0, keys, sequence},
                            ///< by octave() of the rows that a tile spans, most first
    long long key_rank;     ///< [tile_slots(total_k, batch, block_n)] a slot's place in key_order,
                            ///< INT_MAX if it is unused
    long long scratch;      ///< builder scratch
  } views[kMaxPlanViews];
  long long total_ints;
};

/// Levels of the sparse table that finds the lowest and highest key tile of each query tile.
TREEATTN_HOST_DEVICE constexpr int plan_levels(int slots) {
  int levels = 1;
  while ((1 << levels) <= slots) ++levels;
  return levels;
}

/// Bits of a number of rows. Key tiles are ordered by this alone, so that neighbours stay together:
/// blocks that run at the same time then read the same query rows and add to the same rows of dq,
/// which the L2 serves.
TREEATTN_HOST_DEVICE constexpr int octave(int rows) {
  int bits = 0;
  for (; rows > 0; rows /= 2) ++bits;
  return bits;
}

/// Query tiles are ordered by `weight >> shift`, with the least shift that leaves fewer bins than
/// this; ties keep their row order, so that the CPU and the device builder agree.
inline constexpr int kOrderBins = 2048;
TREEATTN_HOST_DEVICE constexpr int plan_order_shift(int max_weight) {
  int shift = 0;
  while ((max_weight >> shift) >= kOrderBins) ++shift;
  return shift;
}

/// Scratch: visits as a difference array [slots_m + 1], min and max tables [levels][slots_m], then
/// sort keys [slots_m].
TREEATTN_HOST_DEVICE constexpr long long plan_scratch_ints(int slots_m) {
  return plan_align(slots_m + 1) + (2LL * plan_levels(slots_m) + 1) * slots_m;
}

TREEATTN_HOST_DEVICE constexpr PlanOffsets plan_offsets(const PlanShape& s) {
  PlanOffsets o{};
  long long at = kPlanMetaInts;
  o.cu_q = at;
  at += plan_align(s.batch + 1);
  o.cu_k = at;
  at += plan_align(s.batch + 1);
  o.seq_fault = at;
  at += plan_align(s.batch + 1);
  o.first = at;
  at += plan_align(s.total_k);
  o.len = at;
  at += plan_align(s.total_k);
  o.granules = at;
  at += static_cast<long long>(kKeyTileInts) * tile_slots(s.total_k, s.batch, kGranuleKeys);
  for (int v = 0; v < s.num_views; ++v) {
    const int slots_m = tile_slots(s.total_q, s.batch, s.views[v].block_m);
    const int slots_n = tile_slots(s.total_k, s.batch, s.views[v].block_n);
    o.views[v].query_tiles = at;
    at += static_cast<long long>(kQueryTileInts) * slots_m;
    o.views[v].key_tiles = at;
    at += static_cast<long long>(kKeyTileInts) * slots_n;
    o.views[v].key_order = at;
    at += 4LL * slots_n;
    o.views[v].key_rank = at;
    at += plan_align(slots_n);
    o.views[v].scratch = at;
    at += plan_align(plan_scratch_ints(slots_m));
  }
  o.total_ints = at;
  return o;
}

}  // namespace treeattn
