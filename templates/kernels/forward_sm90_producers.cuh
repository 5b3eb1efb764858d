// Forward, sm90 family: the warps that find out what is visible and load it. forward_sm90.cuh tells
// what they are to each other and to the consumers.
#pragma once

#include "forward_sm90_work.cuh"

namespace treeattn {
namespace forward {

/// A queued granule: its number in the sequence and, below, which warpgroups see all of it.
inline constexpr int kGranulesShift = 1;  ///< in a record, above whether it is the last
inline constexpr int kSeenBits = 3;
inline constexpr u32 kSeenByAll = (1u << kWarpgroups) - 1;

/// Warp 1: what is visible, as a list of tiles.
struct Scanner {
  const ForwardSm90Params& p;
  Smem smem;
  int lane;
  Ring<kRecords> ring;
  QueryTile tile;
  int granule_slot0 = 0;
  int queue_begin = 0, queue_end = 0;  ///< counts, not places
  int base = 0;                        ///< first box that is not yet tested
  KeyTile ahead[2];                    ///< bounds of the boxes from there on, one a lane

  __device__ __forceinline__ Scanner(const ForwardSm90Params& params, Smem shared)
      : p(params), smem(shared), lane(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ void read_tile(int index) {
    const int* record = p.f.plan + p.f.query_tiles + static_cast<i64>(index) * kQueryTileInts;
    const Int4 a = ld_plan_int4(record);
    const Int4 b = ld_plan_int4(record + 4);
    tile = QueryTile{a.x, a.y, a.z, a.w, b.x, uniform(b.y), uniform(b.z), uniform(b.w)};
    const int sequence = tile.slot0 - tile.key0 / kConfig.box_n;
    granule_slot0 = tile_slot0(tile.key0, sequence, kGranuleKeys);
    base = tile.work < 0 ? tile.hi : tile.lo;
    queue_begin = queue_end = 0;
    ahead[0] = box_bounds(base + lane);
    ahead[1] = box_bounds(base + 32 + lane);
  }

  __device__ __forceinline__ static KeyTile bounds_at(const int* at) {
    const Int4 b = ld_plan_int4(at);
    return KeyTile{b.x, b.y, b.z, b.w};
  }

  __device__ __forceinline__ KeyTile box_bounds(int box) const {
    if (box >= tile.hi) return KeyTile{0x7fffffff, -1, 0x7fffffff, -1};
    return bounds_at(p.f.plan + p.f.key_tiles +
                     (static_cast<i64>(tile.slot0) + box) * kKeyTileInts);
  }

  /// The warpgroups that see all of it; one without rows does, for it stores none.
  __device__ __forceinline__ u32 seen_by(const KeyTile& bounds) const {
    const int last = tile.row0 + tile.rows - 1;
    u32 seen = 0;
#pragma unroll
    for (int w = 0; w < kWarpgroups; ++w) {
      const int tokens = 8 * p.f.tokens_in_8_rows;  // of a warpgroup
      const int row0 = tile.row0 + w * tokens;
      if (tile_full(bounds, row0, min(last, row0 + tokens - 1))) seen |= 1u << w;
    }
    return seen;
  }

  /// Queues the visible granules of 32 boxes, one a lane, in their order.
  __device__ __forceinline__ void queue_granules(int box, const KeyTile& bounds) {
    const int last = tile.row0 + tile.rows - 1;
    const bool visible = !tile_skipped(bounds, tile.row0, last);
    if (__ballot_sync(kFullWarp, visible) == 0) return;
    u32 granules = 0;
    u32 seen = 0;  // kSeenBits a granule
    if (visible) {
      if (seen_by(bounds) == kSeenByAll) {
        granules = (1u << kInBox) - 1;
        seen = 0xffffffffu;
      } else {
        const int* at =
            p.f.plan + p.granules + (static_cast<i64>(granule_slot0) + box * kInBox) * kKeyTileInts;
        const int count = min(kInBox, (tile.keys + kGranuleKeys - 1) / kGranuleKeys - box * kInBox);
#pragma unroll
        for (int g = 0; g < kInBox; ++g) {
          if (g >= count) continue;
          const KeyTile granule = bounds_at(at + g * kKeyTileInts);
          if (tile_skipped(granule, tile.row0, last)) continue;
          granules |= 1u << g;
          seen |= seen_by(granule) << g * kSeenBits;
        }
      }
    }
    const int count = __popc(granules);
    int upto = count;  // over the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kFullWarp, upto, step);
      if (lane >= step) upto += before;
    }
    int place = queue_end + upto - count;
#pragma unroll
    for (int g = 0; g < kInBox; ++g) {
      if ((granules >> g & 1) == 0) continue;
      st_shared_u32(smem.queue(place), static_cast<u32>(box * kInBox + g) << kSeenBits |
                                           (seen >> g * kSeenBits & kSeenByAll));
      ++place;
    }
    queue_end += static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<u32>(count)));
  }

  /// Tests boxes until more than one tile's worth is queued or none is left.
  __device__ __forceinline__ void look_ahead() {
#pragma unroll 1
    while (queue_end - queue_begin <= kGranules && base < tile.hi) {
      const KeyTile bounds = ahead[0];
      ahead[0] = ahead[1];
      ahead[1] = box_bounds(base + 64 + lane);
      queue_granules(base + lane, bounds);
      base += 32;
    }
    __syncwarp();
  }

  /// Hands a tile, or an item without any, to the loader.
  __device__ __forceinline__ void emit(WorkKind kind, int head, int granules, bool last) {
    mbarrier_wait(smem.record_empty(ring.stage), ring.parity ^ 1);
    const u32 record = smem.record(ring.stage);
    if (lane < granules) {
      st_shared_u32(record + 32 + lane * 4, ld_shared_u32(smem.queue(queue_begin + lane)));
    }
    if (lane == 0) {
      st_shared_int4(record, Int4{tile.row0, tile.rows, head, kind});
      st_shared_int4(record + 16, Int4{tile.key0, tile.keys, head / p.f.heads_per_kv,
                                       granules << kGranulesShift | last});
    }
    // Of every lane that wrote: checkers of races do not follow a store through another lane.
    mbarrier_arrive(smem.record_full(ring.stage));
    ring.advance();
  }

  __device__ __forceinline__ void run() {
    Schedule schedule(p, lane);
#pragma unroll 1
    for (Item item; schedule.item(item); schedule.advance()) {
      read_tile(item.index);
#pragma unroll 1
      do {
        look_ahead();
        const int granules = min(kGranules, queue_end - queue_begin);
        const bool last = queue_end - queue_begin <= kGranules;
        // As late as its latency can still be hidden: the fewer items are spoken for, the more
        // evenly they are dealt out.
        if (last) schedule.draw();
        const WorkKind kind = tile.work < 0 ? kInvalid : granules == 0 ? kSeesNothing : kAttend;
        emit(kind, item.head, granules, last);
        queue_begin += granules;
      } while (queue_begin < queue_end);
    }
    emit(kExit, 0, 0, true);
  }
};

/// A tile for a loading warp: a lane loads granule lane % kGranules, chunk lane / kGranules of its
/// dims.
struct LoaderTile {
  Int4 work;     ///< {row0, rows, first head, kind}
  int kind;      ///< as work.w
  int granules;  ///< that it has
  bool last;     ///< of its item
  int key0;      ///< first packed key of the sequence
  int keys;      ///< of the sequence
  int kv_head;
  int key;     ///< first of this lane's granule, relative to key0
  u32 seen;    ///< the warpgroups that see all of this lane's granule
  bool boxed;  ///< this lane's granule is loaded with its box
  bool loads;  ///< by this lane
};

/// What the warps that load have in common.
struct Loader {
  const ForwardSm90Params& p;
  Smem smem;
  int lane;
  Ring<kRecords> ring;

  __device__ __forceinline__ Loader(const ForwardSm90Params& params, Smem shared)
      : p(params), smem(shared), lane(static_cast<int>(threadIdx.x % 32)) {}

  /// The next tile, or item without any.
  __device__ __forceinline__ LoaderTile next() {
    mbarrier_wait(smem.record_full(ring.stage), ring.parity);
    const u32 record = smem.record(ring.stage);
    const Int4 about = ld_shared_int4(record + 16);
    const int g = lane % kGranules;
    LoaderTile tile;
    tile.work = ld_shared_int4(record);
    tile.kind = uniform(tile.work.w);
    tile.key0 = about.x;
    tile.keys = uniform(about.y);
    tile.kv_head = about.z;
    const int granules_last = uniform(about.w);
    tile.last = (granules_last & 1) != 0;
    tile.granules = granules_last >> kGranulesShift;
    const u32 entry = g < tile.granules ? ld_shared_u32(record + 32 + g * 4) : 0;
    mbarrier_arrive(smem.record_empty(ring.stage));
    ring.advance();
    // Numbers increase along a tile: places of a box that lie a box apart hold all of one run.
    const int granule = static_cast<int>(entry >> kSeenBits);
    const int place = g - g % kInBox;
    const int low = __shfl_sync(kFullWarp, granule, lane - g + place);
    const int high = __shfl_sync(kFullWarp, granule, lane - g + place + kInBox - 1);
    tile.key = granule * kGranuleKeys;
    tile.seen = entry & kSeenByAll;
    tile.boxed = place + kInBox <= tile.granules && high - low == kInBox - 1;
    tile.loads = !tile.boxed || g == place;
    return tile;
  }

  template <int kChunks>
  __device__ __forceinline__ void load(u32 to, const TensorMap& box, const TensorMap& granule,
                                       int head, u32 barrier, const LoaderTile& tile) const {
    if (lane >= kGranules * kChunks || !tile.loads) return;
    const int g = lane % kGranules;
    const int chunk = lane / kGranules;
    // Granules that a last tile lacks come from outside of the tensor: zeros that move no bytes.
    const int token = g < tile.granules ? tile.key0 + tile.key : -kGranuleKeys;
    tensor_load(to + (chunk * kN + g * kGranuleKeys) * kRowBytes, tile.boxed ? box : granule,
                barrier, chunk * kChunkDims, head, token);
  }
};

/// Warp 0: Q, K and the intervals.
struct KeyLoader {
  Loader loader;
  Ring<kQStages> q_ring;
  Ring<kStages> ring;
  u32 slot = 0;

  __device__ __forceinline__ KeyLoader(const ForwardSm90Params& params, Smem smem)
      : loader(params, smem) {}

  __device__ __forceinline__ void load_k(const LoaderTile& tile) {
    const ForwardSm90Params& p = loader.p;
    const Smem& smem = loader.smem;
    const int lane = loader.lane;
    u32 flags = 0;
    if (lane < tile.granules) {
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        flags |= (tile.seen >> w & 1) << (w * kFlagBits + lane);
      }
    }
    flags = __reduce_or_sync(kFullWarp, flags);
    mbarrier_wait(smem.k_empty(ring.stage), ring.parity ^ 1);
    const u32 full = smem.k_full(ring.stage);
    if (lane == 0) {
      st_shared_u32(smem.flags(slot), flags | (tile.last ? kLastTile : 0));
      mbarrier_arrive_expect_tx(full, kConfig.k_stage_bytes());
    }
    __syncwarp();
    loader.load<kChunksQk>(smem.k(ring.stage), p.k, p.k_granule, tile.kv_head * p.k_head_step, full,
                           tile);
    if (flags != kAllFull) {
#pragma unroll 1
      for (int i = lane; i < (kN + 31) / 32 * 32; i += 32) {
        const int g = i / kGranuleKeys;
        const int key = __shfl_sync(kFullWarp, tile.key, g) + i % kGranuleKeys;
        if (i >= kN) continue;
        const bool valid = g < tile.granules && key < tile.keys;
        const int* plan = p.f.plan + tile.key0 + (valid ? key : 0);
        cp_async_4(smem.mask(slot) + i * 4, plan + p.f.first, valid);
        cp_async_4(smem.mask(slot) + (kN + i) * 4, plan + p.f.len, valid);
      }
    }
    cp_async_mbarrier_arrive(full);
    slot = (slot + 1) % kMaskSlots;
    ring.advance();
  }

  /// Hands the item to the consumers, with Q where they need it.
  __device__ __forceinline__ void publish(const LoaderTile& tile) {
    const ForwardSm90Params& p = loader.p;
    const Smem& smem = loader.smem;
    mbarrier_wait(smem.q_empty(q_ring.stage), q_ring.parity ^ 1);
    const u32 full = smem.q_full(q_ring.stage);
    if (loader.lane == 0) {
      st_shared_int4(smem.work(q_ring.stage), tile.work);
      if (tile.kind == kAttend) {
        mbarrier_arrive_expect_tx(full, kConfig.q_stage_bytes());
      } else {
        mbarrier_arrive(full);
      }
    }
    __syncwarp();
    if (tile.kind == kAttend && loader.lane < kChunksQk) {
      tensor_load(smem.q(q_ring.stage) + loader.lane * kM * kRowBytes, p.q, full,
                  loader.lane * kChunkDims, tile.work.z * p.q_head_step, tile.work.x);
    }
    q_ring.advance();
  }

  __device__ __forceinline__ void run() {
    if (loader.lane == 0) {
      prefetch_tensormap(loader.p.q);
      prefetch_tensormap(loader.p.k);
      prefetch_tensormap(loader.p.k_granule);
    }
    bool first = true;
    while (true) {
      const LoaderTile tile = loader.next();
      if (tile.kind == kAttend) load_k(tile);
      if (first) publish(tile);
      if (tile.kind == kExit) return;
      first = tile.last;
    }
  }
};

/// Warp 2.
struct ValueLoader {
  Loader loader;
  Ring<kStages> ring;
  u32 tail_parity = 0;

  __device__ __forceinline__ ValueLoader(const ForwardSm90Params& params, Smem smem)
      : loader(params, smem) {}

  __device__ __forceinline__ void load_v(const LoaderTile& tile) {
    const ForwardSm90Params& p = loader.p;
    const Smem& smem = loader.smem;
    const int lane = loader.lane;
    // What follows a sequence is another's: times a zero it may still be NaN.
    const int valid = tile.keys - uniform(lane == tile.granules - 1 ? tile.key : 0);
    const bool tail = valid < kGranuleKeys;
    mbarrier_wait(smem.v_empty(ring.stage), ring.parity ^ 1);
    const u32 full = smem.v_full(ring.stage);
    const u32 arrives_at = tail ? smem.tail() : full;
    if (lane == 0) mbarrier_arrive_expect_tx(arrives_at, kConfig.v_stage_bytes());
    __syncwarp();
    loader.load<kChunksV>(smem.v(ring.stage), p.v, p.v_granule, tile.kv_head * p.v_head_step,
                          arrives_at, tile);
    if (tail) {
      mbarrier_wait(smem.tail(), tail_parity);
      tail_parity ^= 1;
      const int rows = kGranuleKeys - valid;
#pragma unroll 1
      for (int i = lane; i < rows * kChunksV * 8; i += 32) {
        const int row = i / 8 % rows + valid + (tile.granules - 1) * kGranuleKeys;
        st_shared_int4(smem.v(ring.stage) + (i / 8 / rows * kN + row) * kRowBytes + i % 8 * 16,
                       Int4{0, 0, 0, 0});
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(full);
    }
    ring.advance();
  }

  __device__ __forceinline__ void run() {
    if (loader.lane == 0) {
      prefetch_tensormap(loader.p.v);
      prefetch_tensormap(loader.p.v_granule);
    }
    while (true) {
      const LoaderTile tile = loader.next();
      if (tile.kind == kExit) return;
      if (tile.kind == kAttend) load_v(tile);
    }
  }
};

}  // namespace forward
}  // namespace treeattn
