// Forward, sm90 family: wgmma, TMA, mbarriers, warp specialisation.
//
// Work      a persistent grid, one block a multiprocessor. An item is a query tile of the plan and
//           a query head; the list is heavy first inside groups of heads whose K and V share the
//           L2, and blocks draw from it (Schedule).
// Roles     warp 1 scans, warp 0 loads Q and K, warp 2 loads V; 2 or 3 consumer warpgroups own 64
//           query rows each.
// Tiles     the scanner tests the bounds of boxes of box_n keys, 32 at a time, and of their 16-key
//           granules where a box is not full, and strings visible granules together:
//           block_n / 16 of them, wherever they lie, make one MMA tile. Granules that are full for
//           a warpgroup's rows run without mask code. One load brings a run of box_n keys that is
//           whole in a tile; other granules are loaded one by one.
//
//   scanner       up to 4 tiles ahead of the loads, into the next items
//   loaders       K0 Q | K1 | K2 | ...    V0 | V1 | V2 | ... the next item's follow at once
//   warpgroup     QK0 softmax0 | QK1 PV0 softmax1 | QK2 PV1 softmax2 | ... | PV(n-1) store
//                              issued together: softmax j runs beside PV(j-1)
//   warpgroups    take turns issuing: one's softmax runs beside the other's MMAs
//
// Barriers  mbarriers: record full / empty (scanner and loaders), Q full / empty, K and V full /
//           empty per stage. Q full: warp 0, with the work and Q's bytes. K full: lane 0 with
//           the bytes and flags, and 32 lanes with their intervals. V full: lane 0 with the bytes,
//           or, at a sequence's end, once what lies behind it is zero (tail). Empty: one arrival
//           per consumer warp. Named barriers 1..3: a warpgroup's turn to issue.
// Registers O: head_dim_v / 2 a thread; S: block_n / 2; P: block_n / 4. The producers' warpgroup
//           gives its registers to the consumers (setmaxnreg).
// Shared    1 or 2 x Q | stages x K | stages x V | (stages + 1) x {first, len, flags} | queue of
//           granules | records | work | mbarriers; ForwardSm90Config has the offsets. Q has two
//           stages where there is room.
#pragma once

#include "../device/ptx_sm90.cuh"
#include "../device/softmax.cuh"

namespace treeattn {
namespace forward {

inline constexpr int kM = kConfig.block_m;
inline constexpr int kN = kConfig.block_n;
inline constexpr int kGranules = kConfig.granules();  ///< of a tile
inline constexpr int kInBox = kConfig.granules_in_box();
inline constexpr int kFlagBits = kConfig.flag_bits();
inline constexpr int kRecords = ForwardSm90Config::kRecords;
inline constexpr int kStages = kConfig.stages;
inline constexpr int kWarpgroups = kConfig.warpgroups();
inline constexpr int kConsumerWarps = kConfig.warps;
inline constexpr int kChunksQk = kConfig.chunks();
inline constexpr int kChunksV = kConfig.chunks_v();
inline constexpr int kStepsQk = (kConfig.head_dim + 15) / 16;
inline constexpr int kStepsPv = kN / 16;
inline constexpr int kScores = kN / 2;                   ///< S accumulators of a thread
inline constexpr int kOutputs = kConfig.head_dim_v / 2;  ///< O accumulators of a thread
inline constexpr int kChunkDims = ForwardSm90Config::kChunkDims;
inline constexpr int kRowBytes = ForwardSm90Config::kRowBytes;
inline constexpr int kQStages = kConfig.q_stages();
inline constexpr int kMaskSlots = kConfig.mask_slots();

static_assert(kM == 64 * kWarpgroups && kConsumerWarps == 4 * kWarpgroups,
              "a warpgroup owns 64 rows");
static_assert(kWarpgroups == 2 || kWarpgroups == 3, "registers are traded for these");
static_assert(kN % kGranuleKeys == 0 && kConfig.box_n % kGranuleKeys == 0, "whole granules");
static_assert(ForwardSm90Config::kGranule == kGranuleKeys, "the plan's granules");
static_assert(kGranules <= kFlagBits, "a flag for each granule");
static_assert(kGranules + 32 * kInBox <= ForwardSm90Config::kQueueGranules,
              "the queue holds a tile and a batch of tests");
static_assert(kGranules * (kChunksQk > kChunksV ? kChunksQk : kChunksV) <= 32,
              "a lane loads one granule");

/// What a block is to do with an item.
enum WorkKind : int { kAttend = 0, kSeesNothing = 1, kInvalid = 2, kExit = 3 };

struct Item {
  int index;  ///< query tile, in the plan's order
  int head;
};

/// The or of all lanes' values: what one lane holds and the others lack, or what all hold alike.
/// The compiler knows the result to be the same in all lanes, so that branches on it are not
/// divergent and addresses made of it are scalar.
__device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(kFullWarp, static_cast<u32>(x)));
}

/// The items of a block: the one of its own number, then what it draws from the counter that all
/// blocks share. For one warp.
///
/// The counter needs no zeroing. Its upper half says which launch it belongs to; whoever finds
/// another's there starts it anew, and who draws the last ticket leaves zeros, which are no
/// launch's: a replayed graph launches under the same name again.
struct Schedule {
  const ForwardSm90Params& p;
  int lane;
  int tiles;  ///< query tiles that there are
  int items;
  int at;
  bool open = false;
  u64 drawn = 0;  ///< of lane 0, 0 in others

  __device__ __forceinline__ Schedule(const ForwardSm90Params& params, int lane_in_warp)
      : p(params),
        lane(lane_in_warp),
        tiles(params.f.plan[params.f.query_tile_count]),
        items(tiles * params.f.heads),
        at(static_cast<int>(blockIdx.x)) {}

  /// The present item; false when there is none left.
  __device__ __forceinline__ bool item(Item& item) const {
    if (at >= items) return false;
    // A group that is smaller comes first: what is left at the end is dealt out evenly.
    const int smaller = p.f.heads % p.f.heads_in_group;
    const int before = tiles * smaller;
    int heads = p.f.heads_in_group;
    int first_head = 0;
    int rest = at;
    if (at < before) {
      heads = smaller;
    } else {
      const int per_group = tiles * heads;
      const int group = (at - before) / per_group;
      rest = at - before - group * per_group;
      first_head = smaller + group * heads;
    }
    item.index = rest / heads;
    item.head = first_head + rest - item.index * heads;
    return true;
  }

  /// Draws the next item; the number is first needed by advance().
  __device__ __forceinline__ void draw() {
    if (lane != 0) return;
    if (!open) {
      const u64 name = static_cast<u64>(p.launch) << 32;
      u64 seen = atomicAdd(p.counter, 0ull);
      while (seen >> 32 != p.launch) {
        const u64 found = atomicCAS(p.counter, seen, name);
        if (found == seen) break;
        seen = found;
      }
      open = true;
    }
    drawn = atomicAdd(p.counter, 1ull);
  }

  __device__ __forceinline__ void advance() {
    // Every block that had an item draws until there is none: as many tickets as items.
    const int ticket = uniform(static_cast<int>(drawn));
    if (lane == 0 && ticket == items - 1) *p.counter = 0;
    at = static_cast<int>(gridDim.x) + ticket;
  }
};

/// Shared memory by name.
struct Smem {
  u32 base;

  __device__ __forceinline__ u32 q(int stage) const {
    return base + stage * kConfig.q_stage_bytes();
  }
  __device__ __forceinline__ u32 k(int stage) const {
    return base + kConfig.k_offset() + stage * kConfig.k_stage_bytes();
  }
  __device__ __forceinline__ u32 v(int stage) const {
    return base + kConfig.v_offset() + stage * kConfig.v_stage_bytes();
  }
  __device__ __forceinline__ u32 mask(u32 slot) const {
    return base + kConfig.mask_offset() + slot * kConfig.mask_slot_bytes();
  }
  __device__ __forceinline__ u32 flags(u32 slot) const { return mask(slot) + 2 * kN * 4; }
  __device__ __forceinline__ u32 queue(int place) const {
    return base + kConfig.queue_offset() + place % ForwardSm90Config::kQueueGranules * 4;
  }
  __device__ __forceinline__ u32 record(int stage) const {
    return base + kConfig.record_offset() + stage * kConfig.record_bytes();
  }
  __device__ __forceinline__ u32 work(int stage) const {
    return base + kConfig.work_offset() + stage * 16;
  }
  __device__ __forceinline__ u32 barrier(int index) const {
    return base + kConfig.barrier_offset() + index * 8;
  }
  __device__ __forceinline__ u32 tail() const { return barrier(0); }
  __device__ __forceinline__ u32 q_full(int stage) const { return barrier(1 + stage); }
  __device__ __forceinline__ u32 q_empty(int stage) const { return barrier(3 + stage); }
  __device__ __forceinline__ u32 k_full(int stage) const { return barrier(5 + stage); }
  __device__ __forceinline__ u32 k_empty(int stage) const { return barrier(5 + kStages + stage); }
  __device__ __forceinline__ u32 v_full(int stage) const {
    return barrier(5 + 2 * kStages + stage);
  }
  __device__ __forceinline__ u32 v_empty(int stage) const {
    return barrier(5 + 3 * kStages + stage);
  }
  __device__ __forceinline__ u32 record_full(int stage) const {
    return barrier(5 + 4 * kStages + stage);
  }
  __device__ __forceinline__ u32 record_empty(int stage) const {
    return barrier(5 + 4 * kStages + kRecords + stage);
  }
};

/// Stage and parity of the next tile, or item, in a ring of stages.
template <int kSize>
struct Ring {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kSize) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Flags of a tile: bit kFlagBits w + g is set when its granule g is full for warpgroup w.
inline constexpr u32 kLastTile = 1u << 31;
inline constexpr u32 kTileFull = (1u << kGranules) - 1;  ///< of one warpgroup
inline constexpr u32 kAllFull =
    kTileFull * (1u | 1u << kFlagBits | (kWarpgroups == 3 ? 1u << 2 * kFlagBits : 0u));

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
      const int row0 = tile.row0 + w * 64;
      if (tile_full(bounds, row0, min(last, row0 + 63))) seen |= 1u << w;
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
  Int4 work;     ///< {row0, rows, head, kind}
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

/// A consumer warpgroup's softmax state of its 64 rows: a thread holds rows lane / 4 and
/// lane / 4 + 8 of its warp's 16.
using State = SoftmaxState<1>;

/// A consumer warpgroup.
struct Consumer {
  const ForwardParams& p;
  Smem smem;
  int warpgroup;
  int lane;
  Ring<kQStages> q_ring;
  Ring<kStages> k_ring, v_ring;
  u32 slot = 0;
  int row;        ///< this thread's first packed row
  int rows_left;  ///< rows of the tile from that one on
  int head;

  __device__ __forceinline__ Consumer(const ForwardParams& params, Smem shared)
      : p(params),
        smem(shared),
        warpgroup(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 128) - 1, 0)),
        lane(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ u32 turn(int w) const { return 1 + w; }

  __device__ __forceinline__ void wait_turn() const { named_barrier_sync(turn(warpgroup), 256); }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(turn(warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 256);
  }

  /// After all lanes' reads.
  __device__ __forceinline__ void release(u32 barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  /// s = q k^T, issued.
  __device__ __forceinline__ void issue_qk(float (&s)[kScores]) const {
    // Rows of 128 bytes, eight to a group; a step of 16 dims is 32 bytes further in the row.
    constexpr u64 kLayout = matrix_layout(16, 8 * kRowBytes);
    const u64 q = matrix_descriptor(smem.q(q_ring.stage) + warpgroup * 64 * kRowBytes, kLayout);
    const u64 k = matrix_descriptor(smem.k(k_ring.stage), kLayout);
#pragma unroll
    for (int step = 0; step < kStepsQk; ++step) {
      const int chunk = step / 4;
      const int within = step % 4 * 32;
      wgmma_qk(s, q + ((chunk * kM * kRowBytes + within) >> 4),
               k + ((chunk * kN * kRowBytes + within) >> 4), step != 0);
    }
    wgmma_commit_group();
  }

  /// o += p v, issued.
  __device__ __forceinline__ void issue_pv(float (&o)[kOutputs],
                                           const u32 (&numerators)[kStepsPv][4]) const {
    // V is read along its dims: groups of 8 keys are 1,024 bytes apart, chunks of 64 dims kN rows.
    constexpr u64 kLayout = matrix_layout(kN * kRowBytes, 8 * kRowBytes);
    const u64 v = matrix_descriptor(smem.v(v_ring.stage), kLayout);
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
      wgmma_pv(o, numerators[step], v + ((step * 16 * kRowBytes) >> 4));
    }
    wgmma_commit_group();
  }

  /// Scores outside their key's interval of rows become -inf, in granules that are not full.
  __device__ __forceinline__ void mask_scores(float (&s)[kScores], u32 full) const {
    const u32 at = smem.mask(slot) + lane % 4 * 8;
#pragma unroll
    for (int g = 0; g < kGranules; ++g) {
      if ((full >> g & 1) != 0) continue;
#pragma unroll
      for (int n = g * (kGranuleKeys / 8); n < (g + 1) * (kGranuleKeys / 8); ++n) {
        const Int2 first = ld_shared_int2(at + n * 8 * 4);
        const Int2 len = ld_shared_int2(at + (kN + n * 8) * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = row + r * 8;
          if (static_cast<u32>(i - first.x) >= static_cast<u32>(len.x))
            s[n * 4 + r * 2] = neg_infinity();
          if (static_cast<u32>(i - first.y) >= static_cast<u32>(len.y))
            s[n * 4 + r * 2 + 1] = neg_infinity();
        }
      }
    }
  }

  /// Scores become numerators; `alpha` is what was accumulated before is to be multiplied by. True
  /// if it is not 1 for some row of the warp.
  __device__ __forceinline__ bool softmax(float (&s)[kScores], State& state, float (&alpha)[2],
                                          u32 flags) const {
    if constexpr (kConfig.softcap) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = tanh_exp2(s[i] * p.softcap_in);
    }
    const u32 full = flags >> warpgroup * kFlagBits & kTileFull;
    if (full != kTileFull) mask_scores(s, full);
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[r * 2], s[r * 2 + 1]);
#pragma unroll
      for (int n = 1; n < kN / 8; ++n) {
        top = fmaxf(top, fmaxf(s[n * 4 + r * 2], s[n * 4 + r * 2 + 1]));
      }
      top = quad_max(top) * p.scale_log2;
      const float old = state.reference[0][r];
      const bool move = top > old + kLazyMax;
      alpha[r] = move ? exp2_approx(old - top) : 1.0f;
      state.reference[0][r] = move ? top : old;
      moved |= move;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = state.reference[0][r];
      // A row without any key so far.
      const float base = reference == neg_infinity() ? 0.0f : reference;
      float sum = state.sum[0][r] * alpha[r];
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        float& s0 = s[n * 4 + r * 2];
        float& s1 = s[n * 4 + r * 2 + 1];
        s0 = exp2_approx(fmaf(s0, p.scale_log2, -base));
        s1 = exp2_approx(fmaf(s1, p.scale_log2, -base));
        sum += s0 + s1;
      }
      state.sum[0][r] = sum;
    }
    return __any_sync(kFullWarp, moved);
  }

  /// The accumulator layout of scores 16j..16j+15 is the A operand's of step j.
  __device__ __forceinline__ void pack(const float (&s)[kScores],
                                       u32 (&numerators)[kStepsPv][4]) const {
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        numerators[step][i] = pack2(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
      }
    }
  }

  /// Has these computed here: compilers sink them below a wait, where they no longer run beside the
  /// MMAs that are waited for.
  template <int kSize>
  static __device__ __forceinline__ void pin(float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(values[i])::"memory");
  }

  /// Waits for all MMAs; their A operands are in use until then.
  __device__ __forceinline__ void wait_pv(float (&o)[kOutputs],
                                          u32 (&numerators)[kStepsPv][4]) const {
    wgmma_wait_group<0>(o);
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(numerators[step][i])::"memory");
    }
  }

  __device__ __forceinline__ void attend(float (&o)[kOutputs], State& state) {
    float s[kScores];
    u32 numerators[kStepsPv][4];
    float alpha[2];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;

    mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
    wait_turn();
    wgmma_fence();
    issue_qk(s);
    pass_turn();
    u32 flags = ld_shared_u32(smem.flags(slot));
    wgmma_wait_group<0>(s);
    release(smem.k_empty(k_ring.stage));
    k_ring.advance();
    softmax(s, state, alpha, flags);
    pack(s, numerators);
    slot = (slot + 1) % kMaskSlots;
    if ((flags & kLastTile) == 0) {
#pragma unroll 1
      while (true) {
        mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
        wait_turn();
        wgmma_fence();
        issue_qk(s);
        mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
        wgmma_fence();
        issue_pv(o, numerators);
        pass_turn();
        flags = ld_shared_u32(smem.flags(slot));
        wgmma_wait_group<1>(s);
        release(smem.k_empty(k_ring.stage));
        k_ring.advance();
        const bool moved = softmax(s, state, alpha, flags);
        pin(s);
        // Twice the same: ptxas, too, would sink the exponentials below the wait, but for a branch.
        if ((flags & kLastTile) != 0) {
          finish_pv(o, numerators, s, moved, alpha);
          break;
        }
        finish_pv(o, numerators, s, moved, alpha);
      }
    }
    release(smem.q_empty(q_ring.stage));
    q_ring.advance();
    mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
    wgmma_fence();
    issue_pv(o, numerators);
    wait_pv(o, numerators);
    release(smem.v_empty(v_ring.stage));
    v_ring.advance();
  }

  /// Waits for PV, makes the next A operands of s, and scales o where a reference moved.
  __device__ __forceinline__ void finish_pv(float (&o)[kOutputs], u32 (&numerators)[kStepsPv][4],
                                            const float (&s)[kScores], bool moved,
                                            const float (&alpha)[2]) {
    wait_pv(o, numerators);
    release(smem.v_empty(v_ring.stage));
    v_ring.advance();
    slot = (slot + 1) % kMaskSlots;
    pack(s, numerators);
    if (moved) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= alpha[i / 2 % 2];
    }
  }

  /// Normalises and stores. Four lanes hold the four pairs of a chunk of eight dims; four chunks
  /// are transposed among them, so that each stores 16 bytes.
  __device__ __forceinline__ void store(const float (&o)[kOutputs], const State& state) const {
    constexpr int kChunks8 = kConfig.head_dim_v / 8;
    u16* const out = static_cast<u16*>(p.out) + head * p.out_head_stride;
    const u32 quad = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[0][r]);
      const bool seen = state.reference[0][r] != neg_infinity();
      const float inverse = seen ? 1.0f / sum : 0.0f;
      const bool inside = r * 8 < rows_left;
      const i64 at = row + r * 8;
      if (p.lse != nullptr && quad == 0 && inside) {
        p.lse[static_cast<i64>(head) * p.total_q + at] =
            seen ? kLn2 * (state.reference[0][r] + log2_approx(sum)) : neg_infinity();
      }
#pragma unroll
      for (int c = 0; c < kChunks8; c += 4) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = c + i;
          w[i] =
              n < kChunks8 ? pack2(o[n * 4 + r * 2] * inverse, o[n * 4 + r * 2 + 1] * inverse) : 0;
        }
        transpose_quad(w, quad);
        const int chunk = c + static_cast<int>(quad);
        if (inside && (kChunks8 % 4 == 0 || chunk < kChunks8)) {
          st_global_int4(out + at * p.out_token_stride + chunk * 8,
                         Int4{static_cast<int>(w[0]), static_cast<int>(w[1]),
                              static_cast<int>(w[2]), static_cast<int>(w[3])});
        }
      }
    }
  }

  /// w[i] of lane j becomes w[j] of lane i, inside groups of four lanes.
  static __device__ __forceinline__ void transpose_quad(u32 (&w)[4], u32 quad) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 got = __shfl_xor_sync(kFullWarp, quad & 2 ? w[i] : w[i + 2], 2);
      w[i] = quad & 2 ? got : w[i];
      w[i + 2] = quad & 2 ? w[i + 2] : got;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const u32 got = __shfl_xor_sync(kFullWarp, quad & 1 ? w[i] : w[i + 1], 1);
      w[i] = quad & 1 ? got : w[i];
      w[i + 1] = quad & 1 ? w[i + 1] : got;
    }
  }

  /// Rows without any key, and rows of invalid sequences.
  __device__ __forceinline__ void fill(u32 out_pair, float lse) const {
    constexpr int kChunks8 = kConfig.head_dim_v / 8;
    u16* const out = static_cast<u16*>(p.out) + head * p.out_head_stride;
    const int pair = static_cast<int>(out_pair);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r * 8 >= rows_left) continue;
      const i64 at = row + r * 8;
#pragma unroll 1
      for (int chunk = lane % 4; chunk < kChunks8; chunk += 4) {
        st_global_int4(out + at * p.out_token_stride + chunk * 8, Int4{pair, pair, pair, pair});
      }
      if (p.lse != nullptr && lane % 4 == 0) {
        p.lse[static_cast<i64>(head) * p.total_q + at] = lse;
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (warpgroup == kWarpgroups - 1) pass_turn();
    while (true) {
      mbarrier_wait(smem.q_full(q_ring.stage), q_ring.parity);
      // By the lane that releases it, for checkers of races.
      Int4 work{};
      if (lane == 0) work = ld_shared_int4(smem.work(q_ring.stage));
      work = Int4{__shfl_sync(kFullWarp, work.x, 0), __shfl_sync(kFullWarp, work.y, 0),
                  __shfl_sync(kFullWarp, work.z, 0), __shfl_sync(kFullWarp, work.w, 0)};
      if (work.w == kExit) return;
      const int local = static_cast<int>(threadIdx.x / 32 - 4) * 16 + lane / 4;
      row = work.x + local;
      rows_left = work.y - local;
      head = work.z;
      if (work.w != kAttend) {
        release(smem.q_empty(q_ring.stage));
        q_ring.advance();
        constexpr u32 kNanPair = kConfig.dtype == KernelDType::kF16 ? 0x7e007e00u : 0x7fc07fc0u;
        if (work.w == kInvalid) {
          fill(kNanPair, quiet_nan());
        } else {
          fill(0, neg_infinity());
        }
        continue;
      }
      float o[kOutputs];
      State state;
      state.init();
      attend(o, state);
      store(o, state);
    }
  }
};

__device__ __forceinline__ void init_barriers(Smem smem) {
  mbarrier_init(smem.tail(), 1);
  for (int stage = 0; stage < kQStages; ++stage) {
    mbarrier_init(smem.q_full(stage), 1);
    mbarrier_init(smem.q_empty(stage), kConsumerWarps);
  }
  for (int stage = 0; stage < kStages; ++stage) {
    mbarrier_init(smem.k_full(stage), 1 + 32);
    mbarrier_init(smem.k_empty(stage), kConsumerWarps);
    mbarrier_init(smem.v_full(stage), 1);
    mbarrier_init(smem.v_empty(stage), kConsumerWarps);
  }
  for (int stage = 0; stage < kRecords; ++stage) {
    mbarrier_init(smem.record_full(stage), 32);
    mbarrier_init(smem.record_empty(stage), 2 * 32);
  }
  fence_mbarrier_init();
}

}  // namespace forward

__device__ __forceinline__ void forward_sm90(const ForwardSm90Params& p) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const forward::Smem smem{smem_address(shared_memory)};
  if (threadIdx.x == 0) forward::init_barriers(smem);
  __syncthreads();
  const int warp = forward::uniform(static_cast<int>(threadIdx.x / 32));
  if (warp < 4) {
    setmaxnreg_dec<kConfig.producer_registers()>();
    if (warp == 0) forward::KeyLoader(p, smem).run();
    if (warp == 1) forward::Scanner(p, smem).run();
    if (warp == 2) forward::ValueLoader(p, smem).run();
  } else {
    setmaxnreg_inc<kConfig.consumer_registers()>();
    forward::Consumer(p.f, smem).run();
  }
}

}  // namespace treeattn
