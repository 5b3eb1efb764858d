// Forward, sm90 family: wgmma, TMA, mbarriers, warp specialisation.
//
// Work      a persistent grid, one block a multiprocessor. An item is a query tile of the plan and
//           a query head; the list is heavy first inside groups of heads whose K and V share the
//           L2, and blocks draw from it (Schedule).
// Roles     warp 0 loads; 2 or 3 consumer warpgroups own 64 query rows each.
// Boxes     what a plan's view calls a key tile is here a box of box_n keys. The producer tests the
//           bounds of 32 boxes at a time and strings the visible ones together: block_n / box_n
//           boxes, wherever they lie, make one MMA tile. Boxes that are full for a warpgroup's rows
//           run without mask code.
//
//   producer      K0 Q | K1 V0 | K2 V1 | ... | V(n-1)        the next item's K0 follows at once
//   warpgroup     QK0 softmax0 | QK1 PV0 softmax1 | QK2 PV1 softmax2 | ... | PV(n-1) store
//                              issued together: softmax j runs beside PV(j-1)
//   warpgroups    take turns issuing (where head_dim_v <= 128): one's softmax runs beside the
//                 other's MMAs
//
// Barriers  mbarriers: Q full / empty, K and V full / empty per stage. Q full: the producer, with
//           the work and Q's bytes. K full: lane 0 with the bytes and flags, and 32 lanes with
//           their intervals. V full: lane 0 with the bytes, or, at a sequence's end, once what lies
//           behind it is zero (tail). Empty: one arrival per consumer warp. Named barriers 1..3: a
//           warpgroup's turn to issue.
// Registers O: head_dim_v / 2 a thread; S: block_n / 2; P: block_n / 4. The producer's warpgroup
//           gives its registers to the consumers (setmaxnreg).
// Shared    1 or 2 x Q | stages x K | stages x V | (stages + 2) x {first, len, flags} | queue |
//           work | mbarriers; ForwardSm90Config has the offsets. Q has two stages where there is
//           room. Intervals have two slots more than V, with which they are released: K runs a tile
//           ahead of V.
#pragma once

#include "../device/ptx_sm90.cuh"
#include "../device/softmax.cuh"

namespace treeattn {
namespace forward {

inline constexpr int kM = kConfig.block_m;
inline constexpr int kN = kConfig.block_n;
inline constexpr int kBox = kConfig.box_n;
inline constexpr int kBoxes = kConfig.boxes();
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
inline constexpr bool kTurns = kConfig.head_dim_v <= 128;

static_assert(kM == 64 * kWarpgroups && kConsumerWarps == 4 * kWarpgroups,
              "a warpgroup owns 64 rows");
static_assert(kWarpgroups == 2 || kWarpgroups == 3, "registers are traded for these");
static_assert(kN % kBox == 0 && kBox % kGranuleKeys == 0, "a tile is made of whole boxes");
static_assert(2 * kBoxes + 32 <= ForwardSm90Config::kQueueBoxes,
              "the queue holds the tile before, this one and a batch of tests");
static_assert(kBoxes * (kChunksQk > kChunksV ? kChunksQk : kChunksV) <= 32, "a lane loads one box");

/// What a block is to do with an item.
enum WorkKind : int { kAttend = 0, kSeesNothing = 1, kInvalid = 2, kExit = 3 };

struct Item {
  int index;  ///< query tile, in the plan's order
  int head;
};

/// The items of a block: the one of its own number, then what it draws from the counter that all
/// blocks share. For warp 0.
///
/// The counter needs no zeroing. Its upper half says which launch it belongs to; whoever finds
/// another's there starts it anew, and who draws the last ticket leaves zeros, which are no
/// launch's: a replayed graph launches under the same name again.
struct Schedule {
  const ForwardSm90Params& p;
  int tiles;  ///< query tiles that there are
  int items;
  int at;
  bool open = false;
  u64 drawn = 0;  ///< of lane 0

  __device__ __forceinline__ explicit Schedule(const ForwardSm90Params& params)
      : p(params),
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
    if (threadIdx.x != 0) return;
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
    const int ticket = __shfl_sync(kFullWarp, static_cast<int>(drawn), 0);
    if (threadIdx.x == 0 && ticket == items - 1) *p.counter = 0;
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
    return base + kConfig.queue_offset() + place % ForwardSm90Config::kQueueBoxes * 8;
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

/// Flags of a tile: bit 8 w + b is set when its box b is full for warpgroup w.
inline constexpr u32 kLastTile = 1u << 31;
inline constexpr u32 kTileFull = (1u << kBoxes) - 1;  ///< of one warpgroup
inline constexpr u32 kAllFull = kTileFull * (kWarpgroups == 2 ? 0x101u : 0x10101u);

/// Warp 0.
struct Producer {
  const ForwardSm90Params& p;
  Smem smem;
  int lane;
  Ring<kQStages> q_ring;
  Ring<kStages> k_ring, v_ring;
  u32 tail_parity = 0, slot = 0;
  QueryTile tile;
  int kv_head = 0;
  int head_of_queue = 0, end_of_queue = 0;  ///< counts, not places
  int base = 0;                             ///< first box that is not yet tested

  __device__ __forceinline__ Producer(const ForwardSm90Params& params, Smem shared)
      : p(params), smem(shared), lane(static_cast<int>(threadIdx.x % 32)) {}

  __device__ __forceinline__ void read_tile(int index) {
    const int* record = p.f.plan + p.f.query_tiles + static_cast<i64>(index) * kQueryTileInts;
    const Int4 a = ld_plan_int4(record);
    const Int4 b = ld_plan_int4(record + 4);
    tile = QueryTile{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    base = tile.lo;
  }

  /// Tests boxes until more than one tile's worth is queued or none is left.
  __device__ __forceinline__ void look_ahead() {
    while (end_of_queue - head_of_queue <= kBoxes && base < tile.hi) {
      const int box = base + lane;
      bool visible = false;
      u32 flags = 0;
      if (box < tile.hi) {
        const Int4 b = ld_plan_int4(p.f.plan + p.f.key_tiles +
                                    static_cast<i64>(tile.slot0 + box) * kKeyTileInts);
        const KeyTile bounds{b.x, b.y, b.z, b.w};
        const int last = tile.row0 + tile.rows - 1;
        visible = !tile_skipped(bounds, tile.row0, last);
#pragma unroll
        for (int w = 0; w < kWarpgroups;
             ++w) {  // a warpgroup without rows: full, for it stores none
          if (tile_full(bounds, tile.row0 + w * 64, min(last, tile.row0 + w * 64 + 63)))
            flags |= 1u << w * 8;
        }
      }
      const u32 ballot = __ballot_sync(kFullWarp, visible);
      if (visible) {
        const int place = end_of_queue + __popc(ballot & ((1u << lane) - 1));
        st_shared_u32(smem.queue(place), static_cast<u32>(box));
        st_shared_u32(smem.queue(place) + 4, flags);
      }
      end_of_queue += __popc(ballot);
      base += 32;
    }
    __syncwarp();
  }

  /// First key of a queued box, relative to its sequence's; -1 past the last.
  __device__ __forceinline__ int box_key(int first, int boxes, int b) const {
    return b < boxes ? static_cast<int>(ld_shared_u32(smem.queue(first + b))) * kBox : -1;
  }

  template <int kChunks>
  __device__ __forceinline__ void load_boxes(u32 to, const TensorMap& map, int head, u32 barrier,
                                             int first, int boxes) const {
    if (lane >= kBoxes * kChunks) return;
    const int b = lane % kBoxes;
    const int chunk = lane / kBoxes;
    const int key = box_key(first, boxes, b);
    tensor_load(to + (chunk * kN + b * kBox) * kRowBytes, map, barrier, chunk * kChunkDims, head,
                key >= 0 ? tile.key0 + key : -kBox);
  }

  /// K and the intervals of the tile whose first box is queued at `first`.
  __device__ __forceinline__ void load_k(int first, int boxes, bool last) {
    mbarrier_wait(smem.k_empty(k_ring.stage), k_ring.parity ^ 1);
    const u32 full = smem.k_full(k_ring.stage);
    u32 flags = 0;
    if (lane < boxes) flags = ld_shared_u32(smem.queue(first + lane) + 4) << lane;
    flags = __reduce_or_sync(kFullWarp, flags);
    if (lane == 0) {
      st_shared_u32(smem.flags(slot), flags | (last ? kLastTile : 0));
      mbarrier_arrive_expect_tx(full, kConfig.k_stage_bytes());
    }
    __syncwarp();
    load_boxes<kChunksQk>(smem.k(k_ring.stage), p.k, kv_head * p.k_head_step, full, first, boxes);
    if (flags != kAllFull) {
#pragma unroll 1
      for (int i = lane; i < kN; i += 32) {
        const int key = box_key(first, boxes, i / kBox);
        const int j = key + i % kBox;
        const bool valid = key >= 0 && j < tile.keys;
        const int* plan = p.f.plan + tile.key0 + j;
        cp_async_4(smem.mask(slot) + i * 4, plan + p.f.first, valid);
        cp_async_4(smem.mask(slot) + (kN + i) * 4, plan + p.f.len, valid);
      }
    }
    cp_async_mbarrier_arrive(full);
    slot = (slot + 1) % kMaskSlots;
    k_ring.advance();
  }

  __device__ __forceinline__ void load_v(int first, int boxes) {
    mbarrier_wait(smem.v_empty(v_ring.stage), v_ring.parity ^ 1);
    const u32 full = smem.v_full(v_ring.stage);
    // What follows a sequence is another's: times a zero it may still be NaN.
    const int last_key = box_key(first, boxes, boxes - 1);
    const int valid = tile.keys - last_key;
    const bool tail = valid < kBox;
    const u32 arrives_at = tail ? smem.tail() : full;
    if (lane == 0) mbarrier_arrive_expect_tx(arrives_at, kConfig.v_stage_bytes());
    __syncwarp();
    load_boxes<kChunksV>(smem.v(v_ring.stage), p.v, kv_head * p.v_head_step, arrives_at, first,
                         boxes);
    if (tail) {
      mbarrier_wait(smem.tail(), tail_parity);
      tail_parity ^= 1;
      const int rows = kBox - valid;
#pragma unroll 1
      for (int i = lane; i < rows * kChunksV * 8; i += 32) {
        const int row = i / 8 % rows + valid + (boxes - 1) * kBox;
        st_shared_int4(smem.v(v_ring.stage) + (i / 8 / rows * kN + row) * kRowBytes + i % 8 * 16,
                       Int4{0, 0, 0, 0});
      }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(full);
    }
    v_ring.advance();
  }

  /// Hands the item to the consumers, with Q where they need it.
  __device__ __forceinline__ void publish(int head, WorkKind kind) {
    mbarrier_wait(smem.q_empty(q_ring.stage), q_ring.parity ^ 1);
    const u32 full = smem.q_full(q_ring.stage);
    if (lane == 0) {
      st_shared_int4(smem.work(q_ring.stage), Int4{tile.row0, tile.rows, head, kind});
      if (kind == kAttend) {
        mbarrier_arrive_expect_tx(full, kConfig.q_stage_bytes());
      } else {
        mbarrier_arrive(full);
      }
    }
    __syncwarp();
    if (kind == kAttend && lane < kChunksQk) {
      tensor_load(smem.q(q_ring.stage) + lane * kM * kRowBytes, p.q, full, lane * kChunkDims,
                  head * p.q_head_step, tile.row0);
    }
    q_ring.advance();
  }

  __device__ __forceinline__ void run() {
    if (lane == 0) {
      prefetch_tensormap(p.q);
      prefetch_tensormap(p.k);
      prefetch_tensormap(p.v);
    }
    Schedule schedule(p);
    for (Item item; schedule.item(item); schedule.advance()) {
      read_tile(item.index);
      kv_head = item.head / p.f.heads_per_kv;
      head_of_queue = end_of_queue = 0;
      if (tile.work < 0) {
        publish(item.head, kInvalid);
        schedule.draw();
        continue;
      }
      look_ahead();
      if (end_of_queue == 0) {
        publish(item.head, kSeesNothing);
        schedule.draw();
        continue;
      }
      int before = -1;
      int boxes_before = 0;
      while (head_of_queue < end_of_queue) {
        const int first = head_of_queue;
        const int boxes = min(kBoxes, end_of_queue - first);
        load_k(first, boxes, end_of_queue - first <= kBoxes);
        if (before < 0) {
          publish(item.head, kAttend);
        } else {
          load_v(before, boxes_before);
        }
        before = first;
        boxes_before = boxes;
        head_of_queue += boxes;
        look_ahead();
      }
      // As late as its latency can still be hidden: the fewer items are spoken for, the more evenly
      // they are dealt out.
      schedule.draw();
      load_v(before, boxes_before);
    }
    publish(0, kExit);
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

  __device__ __forceinline__ void wait_turn() const {
    if constexpr (kTurns) named_barrier_sync(turn(warpgroup), 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kTurns) {
      named_barrier_arrive(turn(warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 256);
    }
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

  /// Scores outside their key's interval of rows become -inf, in boxes that are not full.
  __device__ __forceinline__ void mask_scores(float (&s)[kScores], u32 full) const {
    const u32 at = smem.mask(slot) + lane % 4 * 8;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      if ((full >> box & 1) != 0) continue;
#pragma unroll
      for (int n = box * (kBox / 8); n < (box + 1) * (kBox / 8); ++n) {
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
    const u32 full = flags >> warpgroup * 8 & kTileFull;
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
      const Int4 work = ld_shared_int4(smem.work(q_ring.stage));
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
  fence_mbarrier_init();
}

}  // namespace forward

__device__ __forceinline__ void forward_sm90(const ForwardSm90Params& p) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const forward::Smem smem{smem_address(shared_memory)};
  if (threadIdx.x == 0) forward::init_barriers(smem);
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kConfig.producer_registers()>();
    if (threadIdx.x < 32) forward::Producer(p, smem).run();
  } else {
    setmaxnreg_inc<kConfig.consumer_registers()>();
    forward::Consumer(p.f, smem).run();
  }
}

}  // namespace treeattn
