// Plan builder: lowers a batch to one interval of query rows per key, then summarises and sorts.
// The layout and every definition are plan.h's; the CPU builder makes the same buffer.
//
// Four launches, stream-ordered, no synchronisation, O(tokens + tiles log tiles):
//   sequences    1 block      clamps cu_seqlens, marks their faults, clears the meta section
//   intervals    grid stride  one thread a key (one binary search each); marks a start_q that
//                             decreases; clears the scratch
//   key_tiles    grid (x, 1 + views): one warp a granule / key tile: bounds; a tile's rows are one
//                             range, so its visits go to a difference array and its index to the
//                             two sparse tables (log2 levels) that yield each query tile's lowest
//                             and highest
//   query_tiles  1 block per view and side: prefix sum, table push-down, stable counting sort by
//                             work or octave of rows
#pragma once

#include "../device/ptx_sm80.cuh"

namespace treeattn {
namespace plan {

inline constexpr int kBlock = 1024;  ///< threads of the one-block kernels

/// The sequence of a token: the last b with cu[b] <= token; batch for tokens past the last
/// sequence.
__device__ __forceinline__ int find_sequence(const int* cu, int batch, int token) {
  int lo = 0;
  int hi = batch + 1;  // first index with cu > token
  while (lo < hi) {
    const int mid = (lo + hi) / 2;
    if (cu[mid] <= token) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo - 1;
}

/// The sequence whose tiles include `slot` (batch: the tokens past the last sequence), and which
/// tile.
__device__ __forceinline__ int find_slot(const int* cu, int batch, int tile_size, int slot,
                                         int& tile) {
  int lo = 0;
  int hi = batch + 1;
  while (lo < hi) {
    const int mid = (lo + hi) / 2;
    if (tile_slot0(cu[mid], mid, tile_size) <= slot) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  tile = slot - tile_slot0(cu[lo - 1], lo - 1, tile_size);
  return lo - 1;
}

__device__ __forceinline__ int sequence_end(const int* cu, int batch, int b, int total) {
  return b < batch ? cu[b + 1] : total;
}

__device__ __forceinline__ void mark_fault(const PlanParams& p, int b, int kind, int token) {
  if (atomicOr(p.plan + p.offsets.seq_fault + b, kind) == 0)
    atomicAdd(p.plan + kMetaBadSequences, 1);
  atomicOr(p.plan + kMetaBadKind, kind);
  atomicMin(p.plan + kMetaFirstBadToken, token);
}

/// Inclusive scan over the block; `carry` enters the first value and leaves as the total.
template <class T, class Op>
__device__ __forceinline__ T block_scan(T value, T& carry, T* shared, Op op) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(kFullWarp, value, d);
    if (lane >= d) value = op(other, value);
  }
  if (lane == 31) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    T sum = shared[lane];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const T other = __shfl_up_sync(kFullWarp, sum, d);
      if (lane >= d) sum = op(other, sum);
    }
    shared[lane] = sum;
  }
  __syncthreads();
  if (warp > 0) value = op(shared[warp - 1], value);
  value = op(carry, value);
  carry = op(carry, shared[31]);
  __syncthreads();
  return value;
}

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  __device__ __forceinline__ int operator()(int a, int b) const { return max(a, b); }
};

/// Writes cu_seqlens as the largest value so far, inside [0, total], and marks what that changed.
__device__ __forceinline__ void clamp_lengths(const PlanParams& p, const int* given, i64 offset,
                                              int total, int kind, int* shared) {
  int* cu = p.plan + offset;
  int carry = 0;
  for (int base = 0; base <= p.shape.batch; base += kBlock) {
    const int b = base + threadIdx.x;
    const int value = b > 0 && b <= p.shape.batch ? min(max(given[b], 0), total) : 0;
    const int clamped = block_scan(value, carry, shared, Max{});
    if (b <= p.shape.batch) cu[b] = clamped;
  }
  __syncthreads();
  for (int b = threadIdx.x; b < p.shape.batch; b += kBlock) {
    if (cu[b] != given[b] || cu[b + 1] != given[b + 1]) {
      mark_fault(p, b, kind, p.plan[p.offsets.cu_q + b]);
    }
  }
}

__device__ __forceinline__ void sequences(const PlanParams& p) {
  __shared__ int shared[32];
  for (int i = threadIdx.x; i < kPlanMetaInts; i += kBlock) {
    p.plan[i] = i == kMetaFirstBadToken ? kIntMax : 0;
  }
  for (int b = threadIdx.x; b < p.shape.batch; b += kBlock) p.plan[p.offsets.seq_fault + b] = 0;
  __syncthreads();
  clamp_lengths(p, p.cu_seqlens_q, p.offsets.cu_q, p.shape.total_q, kFaultCuSeqlensQ, shared);
  clamp_lengths(p, p.cu_seqlens_k, p.offsets.cu_k, p.shape.total_k, kFaultCuSeqlensK, shared);
}

/// Rows of [begin, end) with start_q <= bound.
__device__ __forceinline__ int count_starts(const int* start_q, int begin, int end, int bound) {
  int lo = begin;
  int hi = end;
  while (lo < hi) {
    const int mid = lo + (hi - lo) / 2;
    if (start_q[mid] <= bound) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo - begin;
}

__device__ __forceinline__ void lower_key(const PlanParams& p, int key) {
  const int* cu_q = p.plan + p.offsets.cu_q;
  const int* cu_k = p.plan + p.offsets.cu_k;
  int* first = p.plan + p.offsets.first;
  int* len = p.plan + p.offsets.len;
  const int b = find_sequence(cu_k, p.shape.batch, key);
  if (b == p.shape.batch) {  // belongs to nothing
    first[key] = 0;
    len[key] = 0;
    return;
  }
  const int row0 = cu_q[b];
  const int rows = cu_q[b + 1] - row0;
  if (p.lowering == kLowerIntervals) {
    const i64 begin = p.first[key];
    const i64 count = p.len[key];
    const i64 clamped = max(begin, static_cast<i64>(row0));
    const i64 end = min(begin + count, static_cast<i64>(row0 + rows));
    if (count != 0 && (count < 0 || clamped != begin || end != begin + count)) {
      mark_fault(p, b, kFaultInterval, key);
    }
    const bool empty = count <= 0 || end <= clamped;
    first[key] = empty ? row0 : static_cast<int>(clamped);
    len[key] = empty ? 0 : static_cast<int>(end - clamped);
    return;
  }
  const int keys = cu_k[b + 1] - cu_k[b];
  const int from = p.lowering == kLowerFull ? 0 : max(0, key - cu_k[b] - (keys - rows));
  const int seen =
      p.lowering == kLowerTree ? count_starts(p.start_q, row0, row0 + rows, p.end_k[key]) : rows;
  first[key] = row0 + from;
  len[key] = max(0, seen - from);
}

__device__ __forceinline__ void intervals(const PlanParams& p) {
  const int* cu_q = p.plan + p.offsets.cu_q;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  const i64 thread = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (i64 key = thread; key < p.shape.total_k; key += step) lower_key(p, static_cast<int>(key));
  if (p.lowering == kLowerTree) {
    for (i64 row = thread + 1; row < p.shape.total_q; row += step) {
      if (p.start_q[row] >= p.start_q[row - 1]) continue;
      const int b = find_sequence(cu_q, p.shape.batch, static_cast<int>(row));
      if (b < p.shape.batch && row > cu_q[b]) {
        mark_fault(p, b, kFaultStartDecreases, static_cast<int>(row));
      }
    }
  }
  for (int v = 0; v < p.shape.num_views; ++v) {
    const int slots = tile_slots(p.shape.total_q, p.shape.batch, p.shape.views[v].block_m);
    const i64 visits = plan_align(slots + 1);
    const i64 table = static_cast<i64>(plan_levels(slots)) * slots;
    int* scratch = p.plan + p.offsets.views[v].scratch;
    for (i64 i = thread; i < visits + 2 * table; i += step) {
      scratch[i] = i < visits ? 0 : i < visits + table ? kIntMax : -1;
    }
  }
}

__device__ __forceinline__ int warp_min(int v) {
  return __reduce_min_sync(kFullWarp, v);
}
__device__ __forceinline__ int warp_max(int v) {
  return __reduce_max_sync(kFullWarp, v);
}

/// Bounds over `size` keys from `key0`, of which `keys` exist.
__device__ __forceinline__ KeyTile summarise(const PlanParams& p, int key0, int keys, int size) {
  KeyTile t{kIntMax, -1, keys < size ? kIntMax : -1, kIntMax};
  for (int j = threadIdx.x % 32; j < min(keys, size); j += 32) {
    const int first = p.plan[p.offsets.first + key0 + j];
    const int len = p.plan[p.offsets.len + key0 + j];
    if (len == 0) {
      t.max_first = kIntMax;
      continue;
    }
    t.min_first = min(t.min_first, first);
    t.max_last = max(t.max_last, first + len - 1);
    t.max_first = max(t.max_first, first);
    t.min_last = min(t.min_last, first + len - 1);
  }
  t = KeyTile{warp_min(t.min_first), warp_max(t.max_last), warp_max(t.max_first),
              warp_min(t.min_last)};
  if (t.max_last < 0) t.min_last = -1;  // no key at all
  return t;
}

__device__ __forceinline__ void store_bounds(int* at, const KeyTile& t) {
  st_global_int4(at, Int4{t.min_first, t.max_last, t.max_first, t.min_last});
}

/// Adds the visits of key tile `tile` of sequence b to the query tiles its rows touch.
__device__ __forceinline__ void count_visits(const PlanParams& p, int v, int b, int tile,
                                             const KeyTile& t) {
  if (t.max_last < 0) return;
  const int block_m = p.shape.views[v].block_m;
  const int slots = tile_slots(p.shape.total_q, p.shape.batch, block_m);
  const int row0 = p.plan[p.offsets.cu_q + b];
  const int slot0 = tile_slot0(row0, b, block_m);
  const int from = slot0 + (t.min_first - row0) / block_m;
  const int to = slot0 + (t.max_last - row0) / block_m;
  int* visits = p.plan + p.offsets.views[v].scratch;
  atomicAdd(visits + from, 1);
  atomicAdd(visits + to + 1, -1);
  const int level = 31 - __clz(to - from + 1);
  int* lowest = visits + plan_align(slots + 1) + static_cast<i64>(level) * slots;
  int* highest = lowest + static_cast<i64>(plan_levels(slots)) * slots;
  const int second = to - (1 << level) + 1;
  atomicMin(lowest + from, tile);
  atomicMin(lowest + second, tile);
  atomicMax(highest + from, tile);
  atomicMax(highest + second, tile);
}

__device__ __forceinline__ void key_tiles(const PlanParams& p) {
  const int* cu_k = p.plan + p.offsets.cu_k;
  const int v = static_cast<int>(blockIdx.y) - 1;  // -1: granules
  const int size = v < 0 ? kGranuleKeys : p.shape.views[v].block_n;
  const int slots = tile_slots(p.shape.total_k, p.shape.batch, size);
  const int warps = gridDim.x * (blockDim.x / 32);
  int* out = p.plan + (v < 0 ? p.offsets.granules : p.offsets.views[v].key_tiles);
  for (int slot = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; slot < slots; slot += warps) {
    int tile;
    const int b = find_slot(cu_k, p.shape.batch, size, slot, tile);
    const int keys = b < p.shape.batch ? cu_k[b + 1] - cu_k[b] - tile * size : 0;
    const KeyTile t = keys > 0 ? summarise(p, cu_k[b] + tile * size, keys, size)
                               : KeyTile{kIntMax, -1, kIntMax, -1};
    if (threadIdx.x % 32 == 0) {
      store_bounds(out + static_cast<i64>(slot) * kKeyTileInts, t);
      if (v >= 0) count_visits(p, v, b, tile, t);
    }
  }
}

/// Replaces sort keys (>= -1, kIntMax: no item) by positions in descending order of key >> shift,
/// ties by index, and -1 last. Returns the number of items.
__device__ __forceinline__ int sort_positions(int* keys, int count, int* bins, int* shared) {
  // bins[kOrderBins] holds the -1 items
  int top = 0;
  for (int i = threadIdx.x; i < count; i += kBlock) {
    if (keys[i] != kIntMax) top = max(top, keys[i]);
  }
  int carry = 0;
  block_scan(top, carry, shared, Max{});
  const int shift = plan_order_shift(carry);
  for (int i = threadIdx.x; i <= kOrderBins; i += kBlock) bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kBlock) {
    if (keys[i] == kIntMax) continue;
    keys[i] = keys[i] < 0 ? kOrderBins : kOrderBins - 1 - (keys[i] >> shift);
    atomicAdd(bins + keys[i], 1);
  }
  __syncthreads();
  int total = 0;
  for (int base = 0; base <= kOrderBins; base += kBlock) {
    const int i = base + threadIdx.x;
    const int value = i <= kOrderBins ? bins[i] : 0;
    const int scanned = block_scan(value, total, shared, Add{});
    if (i <= kOrderBins) bins[i] = scanned - value;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // one warp keeps the sort stable
    for (int base = 0; base < count; base += 32) {
      const int i = base + threadIdx.x;
      const int bin = i < count ? keys[i] : kIntMax;
      const u32 same = __match_any_sync(kFullWarp, bin);
      const int rank = __popc(same & ((1u << threadIdx.x) - 1));
      const bool leader = rank == 0;
      int at = 0;
      if (leader && bin != kIntMax) {
        at = bins[bin];
        bins[bin] = at + __popc(same);
      }
      at = __shfl_sync(kFullWarp, at, __ffs(static_cast<int>(same)) - 1);
      if (bin != kIntMax) keys[i] = at + rank;
      __syncwarp();
    }
  }
  __syncthreads();
  return total;
}

__device__ __forceinline__ void order_query_tiles(const PlanParams& p, int v, int* bins,
                                                  int* shared) {
  const int block_m = p.shape.views[v].block_m;
  const int batch = p.shape.batch;
  const int slots = tile_slots(p.shape.total_q, batch, block_m);
  const int levels = plan_levels(slots);
  const int* cu_q = p.plan + p.offsets.cu_q;
  int* visits = p.plan + p.offsets.views[v].scratch;
  int* lowest = visits + plan_align(slots + 1);
  int* highest = lowest + static_cast<i64>(levels) * slots;
  int* keys = highest + static_cast<i64>(levels) * slots;
  int carry = 0;
  for (int base = 0; base < slots; base += kBlock) {
    const int i = base + threadIdx.x;
    const int sum = block_scan(i < slots ? visits[i] : 0, carry, shared, Add{});
    if (i < slots) visits[i] = sum;
  }
  for (int level = levels - 1; level > 0;
       --level) {  // an entry covers 2^level slots: push down by half
    const int half = 1 << (level - 1);
    for (int i = threadIdx.x; i < slots; i += kBlock) {
      const i64 above = static_cast<i64>(level) * slots + i;
      int low = lowest[above];
      int high = highest[above];
      if (i >= half) {
        low = min(low, lowest[above - half]);
        high = max(high, highest[above - half]);
      }
      lowest[above - slots] = min(lowest[above - slots], low);
      highest[above - slots] = max(highest[above - slots], high);
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < slots; i += kBlock) {
    int tile;
    const int b = find_slot(cu_q, batch, block_m, i, tile);
    const int rows = sequence_end(cu_q, batch, b, p.shape.total_q) - cu_q[b] - tile * block_m;
    const bool bad = b < batch && p.plan[p.offsets.seq_fault + b] != 0;
    keys[i] = rows <= 0 ? kIntMax : bad ? -1 : visits[i];
  }
  __syncthreads();
  const int count = sort_positions(keys, slots, bins, shared);
  int* records = p.plan + p.offsets.views[v].query_tiles;
  int sum = 0;
  for (int i = threadIdx.x; i < slots; i += kBlock) {
    if (keys[i] == kIntMax) continue;
    int tile;
    const int b = find_slot(cu_q, batch, block_m, i, tile);
    const int row0 = cu_q[b] + tile * block_m;
    const int rows = min(block_m, sequence_end(cu_q, batch, b, p.shape.total_q) - row0);
    const bool bad = b < batch && p.plan[p.offsets.seq_fault + b] != 0;
    const bool some = !bad && visits[i] > 0;
    const int key0 = b < batch ? p.plan[p.offsets.cu_k + b] : 0;
    const int keys_of_b = b < batch ? p.plan[p.offsets.cu_k + b + 1] - key0 : 0;
    const int slot0 = b < batch ? tile_slot0(key0, b, p.shape.views[v].block_n) : 0;
    int* record = records + static_cast<i64>(keys[i]) * kQueryTileInts;
    st_global_int4(record, Int4{row0, rows, key0, keys_of_b});
    st_global_int4(record + 4, Int4{slot0, some ? lowest[i] : 0, some ? highest[i] + 1 : 0,
                                    bad ? -1 : visits[i]});
    if (some) sum += visits[i];
  }
  int visit_sum = 0;
  block_scan(sum, visit_sum, shared, Add{});
  if (threadIdx.x == 0) {
    p.plan[kMetaQueryTiles + v] = count;
    p.plan[kMetaVisits + v] = visit_sum;
  }
}

__device__ __forceinline__ void order_key_tiles(const PlanParams& p, int v, int* bins,
                                                int* shared) {
  __shared__ i64 wide_shared[32];
  const int block_n = p.shape.views[v].block_n;
  const int batch = p.shape.batch;
  const int slots = tile_slots(p.shape.total_k, batch, block_n);
  const int* cu_k = p.plan + p.offsets.cu_k;
  const int* bounds = p.plan + p.offsets.views[v].key_tiles;
  int* keys = p.plan + p.offsets.views[v].key_rank;
  i64 spanned = 0;
  i64 spanned_sum = 0;
  for (int i = threadIdx.x; i < slots; i += kBlock) {
    int tile;
    const int b = find_slot(cu_k, batch, block_n, i, tile);
    const int present = sequence_end(cu_k, batch, b, p.shape.total_k) - cu_k[b] - tile * block_n;
    const Int4 t = ld_plan_int4(bounds + static_cast<i64>(i) * kKeyTileInts);
    const int rows = rows_spanned(KeyTile{t.x, t.y, t.z, t.w});
    keys[i] = present <= 0 ? kIntMax : octave(rows);
    if (present > 0) spanned += rows;
  }
  __syncthreads();
  block_scan(spanned, spanned_sum, wide_shared, Add{});
  const int count = sort_positions(keys, slots, bins, shared);
  int* order = p.plan + p.offsets.views[v].key_order;
  for (int i = threadIdx.x; i < slots; i += kBlock) {
    if (keys[i] == kIntMax) continue;
    int tile;
    const int b = find_slot(cu_k, batch, block_n, i, tile);
    const int key0 = cu_k[b] + tile * block_n;
    const int present = min(block_n, sequence_end(cu_k, batch, b, p.shape.total_k) - key0);
    st_global_int4(order + 4LL * keys[i], Int4{i, key0, present, b});
  }
  if (threadIdx.x == 0) {
    p.plan[kMetaKeyTiles + v] = count;
    *reinterpret_cast<i64*>(p.plan + kMetaKeyRows + 2 * v) = spanned_sum;
  }
}

__device__ __forceinline__ void query_tiles(const PlanParams& p) {
  __shared__ int bins[kOrderBins + 1];
  __shared__ int shared[32];
  const int v = static_cast<int>(blockIdx.x) / 2;
  if (v < p.shape.num_views) {  // a plan without views still has a block to sign it
    if (blockIdx.x % 2 == 0) {
      order_query_tiles(p, v, bins, shared);
    } else {
      order_key_tiles(p, v, bins, shared);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.plan[kMetaMagic] = kPlanMagic;
}

}  // namespace plan

__device__ __forceinline__ void plan_sequences(const PlanParams& p) {
  plan::sequences(p);
}
__device__ __forceinline__ void plan_intervals(const PlanParams& p) {
  plan::intervals(p);
}
__device__ __forceinline__ void plan_key_tiles(const PlanParams& p) {
  plan::key_tiles(p);
}
__device__ __forceinline__ void plan_query_tiles(const PlanParams& p) {
  plan::query_tiles(p);
}

}  // namespace treeattn
