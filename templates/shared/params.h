// Kernel parameters, exactly as passed. Both compilers see this file; sizes are asserted on both
// sides.
#pragma once

#include "plan.h"

namespace treeattn {

/// Values of PlanParams::lowering; the public treeattn::Lowering has the same.
enum LoweringCode : int {
  kLowerTree = 0,       ///< tree_dfs_order_start_q / tree_dfs_order_end_k
  kLowerCausal = 1,     ///< row i sees key j iff j <= i + offset
  kLowerFull = 2,       ///< every row of a sequence sees every key of it
  kLowerIntervals = 3,  ///< first[] and len[] given by the caller
};

/// Parameters of the plan kernels.
struct PlanParams {
  PlanShape shape;
  PlanOffsets offsets;
  int* plan;
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* start_q;  ///< kTree: [total_q]
  const int* end_k;    ///< kTree: [total_k]
  const int* first;    ///< kIntervals: [total_k]
  const int* len;      ///< kIntervals: [total_k]
  int lowering;        ///< LoweringCode
};

/// Parameters of the forward kernels. Strides are in elements. Query heads are walked in packs that
/// share a kv head and the rows of a tile: row r is token row0 + (r >> heads_per_pack_log2) and
/// head r & ((1 << heads_per_pack_log2) - 1) of the pack. The plan counts in tokens.
struct ForwardParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;       ///< [heads, total_q], may be null
  const int* plan;  ///< plan buffer
  long long q_token_stride, q_head_stride;
  long long k_token_stride, k_head_stride;
  long long v_token_stride, v_head_stride;
  long long out_token_stride, out_head_stride;
  long long query_tiles;  ///< offset of the view's QueryTile list, in ints
  long long key_tiles;    ///< offset of the view's KeyTile array
  long long first;        ///< offsets of the intervals
  long long len;
  int query_tile_count;  ///< offset of the number of query tiles (in the meta section)
  int max_query_tiles;   ///< grid extent of the tile dimension: tile_slots() of the view's block_m
  int total_q;
  int head_packs;           ///< heads >> heads_per_pack_log2
  int heads_per_kv;         ///< heads / heads_kv
  int head_packs_in_group;  ///< walked together per query tile, so that their K/V stay in L2
  int heads_per_pack_log2;  ///< 0 to kMostHeadsPerPackLog2; a pack never spans two kv heads
  int tokens_in_8_rows;     ///< 8 >> heads_per_pack_log2, for main loops that have no time to shift
  float scale_log2;         ///< softmax_scale * log2(e); with softcap: softcap * log2(e)
  float softcap_in;         ///< with softcap: softmax_scale / softcap
};

/// A CUtensorMap, which the driver encodes and only the copy engine reads.
struct alignas(128) TensorMap {
  unsigned long long opaque[16];
};

/// Parameters of the sm90 family's forward kernels. The maps' dims are {head dim, head, token}.
struct ForwardSm90Params {
  TensorMap q;
  TensorMap k, k_granule;  ///< a box, a granule
  TensorMap v, v_granule;
  ForwardParams f;
  long long granules;           ///< offset of the granules' KeyTiles in the plan
  unsigned long long* counter;  ///< the launch (upper half) and how many items it has drawn
  unsigned launch;              ///< this one: another number than that of any launch before, not 0
  int q_head_step, k_head_step, v_head_step;  ///< 0: all heads are the map's one
};

/// How the main backward kernel's work is dealt out; made on the device, before it starts. Blocks
/// first take the units of tiles that several blocks share, then whole tiles that would make others
/// wait if they came last, then the rest as it lies in memory.
struct ScheduleHeader {
  int split;  ///< tiles that are shared: the first of the plan's order
  int units;  ///< their shares
  int heavy;  ///< tiles of the plan's order that are shared or must not come last
  int unused;
};
/// One block's share of a tile: steps [share * S / shares, (share + 1) * S / shares) of its S, over
/// row tiles and then query heads.
struct ScheduleUnit {
  int tile;  ///< index in the plan's order
  int share;
  int shares;
  int unused;
};
inline constexpr int kScheduleHeaderInts = 4;
inline constexpr int kScheduleUnitInts = 4;
/// A share has at least this many steps where a tile is shared for balance: each loads K and V and
/// adds to gradients in memory.
inline constexpr int kLeastSteps = 8;
/// From this octave() of rows on, the query heads of a kv head are walked by blocks of their own.
/// Blocks start at different times and tiles have different numbers of rows: with one head after
/// the other, blocks lag by up to four times as many rows, more than the L2 holds of dq.
inline constexpr int kHeadsApartOctave = 12;
/// Query heads whose rows blocks walk at the same time, for the same reason.
inline constexpr int kHeadsTogether = 8;

/// Parameters of the backward kernels. Strides are in elements.
struct BackwardParams {
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* dout;
  const float* lse;   ///< [heads, total_q], as forward wrote it
  const float* dlse;  ///< [heads, total_q], may be null
  void* dq;
  void* dk;
  void* dv;
  const int* plan;
  // Workspace. Dims are padded to multiples of 16 and lie in the order that backward_sum.cuh reads.
  float* lse_log2;        ///< [heads, total_q]: lse * log2(e), +inf where a row sees nothing
  float* delta;           ///< [heads, total_q]
  float* dq_accumulator;  ///< [heads, total_q, padded_dim]; null: another kernel makes dq
  int* schedule;          ///< ScheduleHeader, ScheduleUnit[max_units]
  float* dk_accumulator;  ///< [max_split, heads_kv, block_n, padded_dim]: of shared tiles
  float* dv_accumulator;  ///< [max_split, heads_kv, block_n, padded_dim_v]
  long long q_token_stride, q_head_stride;
  long long k_token_stride, k_head_stride;
  long long v_token_stride, v_head_stride;
  long long out_token_stride, out_head_stride;
  long long dout_token_stride, dout_head_stride;
  long long dq_token_stride, dq_head_stride;
  long long dk_token_stride, dk_head_stride;
  long long dv_token_stride, dv_head_stride;
  long long key_tiles;  ///< offset of the view's KeyTile array
  long long key_order;  ///< offset of the view's key tiles, by octave() of their rows
  long long key_rank;   ///< offset of the places in that order, by slot
  long long first;      ///< offsets of the intervals
  long long len;
  long long cu_q;         ///< offset of cu_seqlens_q
  long long seq_fault;    ///< offset of the fault bits
  int key_tile_count;     ///< offset of the number of key tiles (in the meta section)
  int key_rows;           ///< offset of the rows that they span (in the meta section)
  int max_key_tiles;      ///< tile_slots(total_k, batch, block_n)
  long long query_tiles;  ///< offset of the view's QueryTile list
  int query_tile_count;   ///< offset of the number of query tiles
  int batch;
  int total_q;
  int total_k;
  int heads;
  int heads_kv;
  int heads_per_kv;
  int slots;               ///< blocks of the main kernel that run at once
  int max_units;           ///< capacity of the schedule, per kv head; 0: tiles are never shared
  int max_split;           ///< tiles that may be shared at most
  int max_heavy;           ///< whole tiles that may be taken before the rest
  int heads_apart_octave;  ///< kHeadsApartOctave, but in tests
  float softmax_scale;     ///< with softcap: of the score gradient too
  float scale_log2;        ///< softmax_scale * log2(e); with softcap: softcap * log2(e)
  float softcap_in;        ///< with softcap: softmax_scale / softcap
};

/// Parameters of the sm90 family's main backward kernel. The maps' dims are {head dim, head,
/// token}.
struct BackwardSm90Params {
  TensorMap q, k, v, dout;
  BackwardParams f;
  int q_head_step, k_head_step, v_head_step, dout_head_step;  ///< 0: all heads are the map's one
};

}  // namespace treeattn
