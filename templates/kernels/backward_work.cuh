// Backward: which keys a block owns, which rows it walks, and which of them see which keys.
#pragma once

#include "../device/ptx_sm80.cuh"

namespace treeattn {
namespace backward {

inline constexpr int kM = kConfig.block_m;
inline constexpr int kN = kConfig.block_n;
inline constexpr int kGroups = kConfig.groups();  ///< of keys; a group that no row sees is skipped
inline constexpr int kGroupKeys = kN / kGroups;

/// What a block works on. It lies in shared memory and is read again where it is needed.
struct Work {
  int key0, keys;
  int kv_head;
  int shared_tile;     ///< whose accumulators the block adds to; -1 if the tile is its alone
  int row0, row_last;  ///< rows that may see the keys: none if row_last is -1
  int begin, end;      ///< steps of this block, over row tiles and then query heads

  __device__ __forceinline__ void store(u32 smem) const {
    st_shared_int4(smem + kConfig.work_offset(), Int4{key0, keys, kv_head, shared_tile});
    st_shared_int4(smem + kConfig.work_offset() + 16, Int4{row0, row_last, begin, end});
  }
  __device__ __forceinline__ static Work load(u32 smem) {
    const Int4 a = ld_shared_int4(smem + kConfig.work_offset());
    const Int4 b = ld_shared_int4(smem + kConfig.work_offset() + 16);
    return Work{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  }
};

/// Of `count` items for every kv head, in groups of `together` kv heads, the one at `index`.
__device__ __forceinline__ int find_item(int index, int count, int together, int heads_kv,
                                         int& kv_head) {
  const int per_group = count * together;
  const int group = index / per_group;
  const int kv_heads = min(together, heads_kv - group * together);
  const int in_group = index - group * per_group;
  const int item = in_group / kv_heads;
  kv_head = group * together + (in_group - item * kv_heads);
  return item;
}

/// The tile, share and kv head of this block; false if there is none.
__device__ __forceinline__ bool find_unit(const BackwardParams& p, ScheduleUnit& unit,
                                          int& kv_head) {
  const Int4 header = ld_plan_int4(p.schedule);
  const int split = header.x;
  const int units = header.y;
  const int heavy = header.z;
  int block = static_cast<int>(blockIdx.x);
  if (block < units * p.heads_kv) {
    // Units are mostly query heads of a tile, and walked at the same time.
    const int together = max(1, kHeadsTogether / p.heads_per_kv);
    const int i = find_item(block, units, together, p.heads_kv, kv_head);
    const Int4 u = ld_plan_int4(p.schedule + kScheduleHeaderInts + i * kScheduleUnitInts);
    unit = ScheduleUnit{u.x, u.y, u.z, 0};
    return true;
  }
  block -= units * p.heads_kv;
  unit = ScheduleUnit{0, 0, 1, 0};
  if (block < (heavy - split) * p.heads_kv) {
    unit.tile = split + find_item(block, heavy - split, p.heads_kv, p.heads_kv, kv_head);
    return true;
  }
  block -= (heavy - split) * p.heads_kv;
  if (block >= p.max_key_tiles * p.heads_kv) return false;
  const int slot = find_item(block, p.max_key_tiles, kHeadsTogether, p.heads_kv, kv_head);
  unit.tile = p.plan[p.key_rank + slot];
  return unit.tile >= heavy && unit.tile != kIntMax;
}

/// False if there is nothing for this block; `invalid` if the keys' sequence is.
__device__ __forceinline__ bool assign(const BackwardParams& p, Work& work, bool& invalid) {
  ScheduleUnit unit;
  if (!find_unit(p, unit, work.kv_head)) return false;
  work.shared_tile = unit.tile < p.schedule[0] ? unit.tile : -1;
  const Int4 order = ld_plan_int4(p.plan + p.key_order + 4LL * unit.tile);
  const Int4 bounds = ld_plan_int4(p.plan + p.key_tiles + static_cast<i64>(order.x) * kKeyTileInts);
  invalid = order.w < p.batch && p.plan[p.seq_fault + order.w] != 0;
  work.key0 = order.y;
  work.keys = order.z;
  work.row0 = bounds.x;
  work.row_last = invalid ? -1 : bounds.y;
  const i64 steps =
      bounds.y < 0 ? 0 : static_cast<i64>((bounds.y - bounds.x + kM) / kM) * p.heads_per_kv;
  work.begin = static_cast<int>(unit.share * steps / unit.shares);
  work.end = static_cast<int>((unit.share + 1) * steps / unit.shares);
  return true;
}

/// Bounds of a group's keys, made by one warp; a barrier must follow. They lie in one sequence, so
/// keys past its end count as empty.
__device__ __forceinline__ void find_group_bounds(const BackwardParams& p, const Work& work,
                                                  u32 smem, u32 group, u32 lane) {
  KeyTile bounds{kIntMax, -1, -1, kIntMax};
  for (int i = static_cast<int>(lane); i < kGroupKeys; i += 32) {
    const int key = static_cast<int>(group) * kGroupKeys + i;
    const int len = key < work.keys ? p.plan[p.len + work.key0 + key] : 0;
    if (len <= 0) {
      bounds.max_first = kIntMax;
      continue;
    }
    const int first = p.plan[p.first + work.key0 + key];
    bounds.min_first = min(bounds.min_first, first);
    bounds.max_first = max(bounds.max_first, first);
    bounds.min_last = min(bounds.min_last, first + len - 1);
    bounds.max_last = max(bounds.max_last, first + len - 1);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    bounds.min_first = min(bounds.min_first, __shfl_xor_sync(kFullWarp, bounds.min_first, step));
    bounds.max_first = max(bounds.max_first, __shfl_xor_sync(kFullWarp, bounds.max_first, step));
    bounds.min_last = min(bounds.min_last, __shfl_xor_sync(kFullWarp, bounds.min_last, step));
    bounds.max_last = max(bounds.max_last, __shfl_xor_sync(kFullWarp, bounds.max_last, step));
  }
  if (lane == 0) {
    st_shared_int4(smem + kConfig.groups_offset() + group * 16,
                   Int4{bounds.min_first, bounds.max_last, bounds.max_first, bounds.min_last});
  }
}

__device__ __forceinline__ KeyTile group_bounds(u32 smem, u32 group) {
  const Int4 b = ld_shared_int4(smem + kConfig.groups_offset() + group * 16);
  return KeyTile{b.x, b.y, b.z, b.w};
}

/// One bit for every group of keys that any of the rows sees.
__device__ __forceinline__ u32 seen_groups(u32 smem, int first, int last) {
  u32 seen = 0;
#pragma unroll
  for (u32 g = 0; g < kGroups; ++g) {
    if (!tile_skipped(group_bounds(smem, g), first, last)) seen |= 1u << g;
  }
  return seen;
}

/// What a step covers.
struct Span {
  int rows;
  u32 seen;  ///< groups of keys that its rows see, a bit each

  __device__ __forceinline__ Span(u32 smem, int row0) {
    const int last = static_cast<int>(ld_shared_u32(smem + kConfig.work_offset() + 20));
    rows = min(kM, last + 1 - row0);
    seen = seen_groups(smem, row0, row0 + rows - 1);
  }
};

/// The walk over the row tiles of one query head after the other.
struct Walk {
  int head, row0;
  int left;  ///< steps to go, this one included

  __device__ __forceinline__ Walk(const Work& work, int heads_per_kv) {
    const int tiles = (work.row_last - work.row0 + kM) / kM;
    const int head_in_group = work.begin / tiles;
    head = work.kv_head * heads_per_kv + head_in_group;
    row0 = work.row0 + (work.begin - head_in_group * tiles) * kM;
    left = work.end - work.begin;
  }
  __device__ __forceinline__ bool next(u32 smem) {
    const Int2 rows = ld_shared_int2(smem + kConfig.work_offset() + 16);
    row0 += kM;
    if (row0 > rows.y) {
      row0 = rows.x;
      ++head;
    }
    return --left > 0;
  }
  __device__ __forceinline__ int rows(u32 smem) const {
    return min(kM, static_cast<int>(ld_shared_u32(smem + kConfig.work_offset() + 20)) + 1 - row0);
  }
};

}  // namespace backward
}  // namespace treeattn
