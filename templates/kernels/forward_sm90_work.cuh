// Forward, sm90 family: what its roles share: sizes, the work of a block, shared memory by name.
// forward_sm90.cuh tells how they work together.
#pragma once

#include "../device/sm90.cuh"

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
static_assert(kGranules <= kFlagBits, "a flag for each granule");
static_assert(kGranules + 32 * kInBox <= ForwardSm90Config::kQueueGranules,
              "the queue holds a tile and a batch of tests");
static_assert(kGranules * (kChunksQk > kChunksV ? kChunksQk : kChunksV) <= 32,
              "a lane loads one granule");

/// What a block is to do with an item.
enum WorkKind : int { kAttend = 0, kSeesNothing = 1, kInvalid = 2, kExit = 3 };

struct Item {
  int index;  ///< query tile, in the plan's order
  int head;   ///< first of the pack
};

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
        items(tiles * params.f.head_packs),
        at(static_cast<int>(blockIdx.x)) {}

  /// The present item; false when there is none left.
  __device__ __forceinline__ bool item(Item& item) const {
    if (at >= items) return false;
    // A group that is smaller comes first: what is left at the end is dealt out evenly.
    const int smaller = p.f.head_packs % p.f.head_packs_in_group;
    const int before = tiles * smaller;
    int packs = p.f.head_packs_in_group;
    int first_pack = 0;
    int rest = at;
    if (at < before) {
      packs = smaller;
    } else {
      const int per_group = tiles * packs;
      const int group = (at - before) / per_group;
      rest = at - before - group * per_group;
      first_pack = smaller + group * packs;
    }
    item.index = rest / packs;
    item.head = (first_pack + rest - item.index * packs) << p.f.heads_per_pack_log2;
    return true;
  }

  /// Draws the next item; the number is first needed by advance().
  __device__ __forceinline__ void draw() {
    if (lane != 0) return;
    if (!open) {
      const u64 name = static_cast<u64>(p.launch) << 32;
      u64 seen = atomicAdd(p.counter, 0ull);
      // A launch in progress has not counted to its last item while this block still has to draw.
      while (seen >> 32 != p.launch || static_cast<u32>(seen) >= static_cast<u32>(items)) {
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

/// Flags of a tile: bit kFlagBits w + g is set when its granule g is full for warpgroup w.
inline constexpr u32 kLastTile = 1u << 31;
inline constexpr u32 kTileFull = (1u << kGranules) - 1;  ///< of one warpgroup
inline constexpr u32 kAllFull =
    kTileFull * (1u | 1u << kFlagBits | (kWarpgroups == 3 ? 1u << 2 * kFlagBits : 0u));

}  // namespace forward
}  // namespace treeattn
