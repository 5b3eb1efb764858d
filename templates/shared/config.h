// What one generated kernel is specialised on. The host compiles this file to size shared memory
// and launches; NVRTC compiles the same text inside every generated source, so the two cannot
// disagree.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define TREEATTN_HOST_DEVICE __host__ __device__
#else
#define TREEATTN_HOST_DEVICE
#endif

namespace treeattn {

/// Element type of q, k, v and out inside a kernel.
enum class KernelDType : int { kF16 = 0, kBF16 = 1 };

/// Head dimensions every kernel accepts: multiples of kHeadDimStep in [kHeadDimMin, kHeadDimMax].
inline constexpr int kHeadDimStep = 8;
inline constexpr int kHeadDimMin = 16;
inline constexpr int kHeadDimMax = 256;

/// Keys per summary granule of the plan; divides every key tile. Granules start where a sequence
/// starts.
inline constexpr int kGranuleKeys = 16;

/// A forward tile's rows are tokens times query heads of one kv head: up to 1 << this heads of each
/// token. With 128 rows more would make tiles finer than granules; and no more than eight, so that
/// rows that are eight apart, as a thread's accumulators are, differ in their token alone.
inline constexpr int kMostHeadsPerPackLog2 = 3;

/// Everything a forward kernel is specialised on.
struct ForwardConfig {
  KernelDType dtype;
  int head_dim;    ///< of q and k
  int head_dim_v;  ///< of v and out
  int block_m;     ///< query rows per thread block
  int block_n;     ///< keys per tile
  int stages;      ///< K/V tiles in shared memory (1 or 2)
  int warps;       ///< each owns block_m / warps rows (16 or 32)
  bool softcap;

  /// Key tiles classified per pass over the plan's tile bounds; one visit bit each in shared
  /// memory.
  static constexpr int kScanTiles = 2048;

  TREEATTN_HOST_DEVICE constexpr int threads() const { return warps * 32; }
  TREEATTN_HOST_DEVICE constexpr int rows_per_warp() const { return block_m / warps; }

  // Shared memory, in bytes, in this order. q is reused for out when the block ends.
  TREEATTN_HOST_DEVICE constexpr int q_bytes() const {
    return block_m * (head_dim > head_dim_v ? head_dim : head_dim_v) * 2;
  }
  TREEATTN_HOST_DEVICE constexpr int k_stage_bytes() const { return block_n * head_dim * 2; }
  TREEATTN_HOST_DEVICE constexpr int v_stage_bytes() const { return block_n * head_dim_v * 2; }
  /// Per stage: first[block_n], len[block_n], then the tile's KeyTile bounds, all int32.
  TREEATTN_HOST_DEVICE constexpr int mask_stage_bytes() const { return (2 * block_n + 4) * 4; }
  TREEATTN_HOST_DEVICE constexpr int k_offset() const { return q_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int v_offset() const {
    return k_offset() + stages * k_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int mask_offset() const {
    return v_offset() + stages * v_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int visit_offset() const {
    return mask_offset() + stages * mask_stage_bytes();
  }
  /// What the block works on, kept here because the main loop has no registers for it.
  TREEATTN_HOST_DEVICE constexpr int work_offset() const { return visit_offset() + kScanTiles / 8; }
  TREEATTN_HOST_DEVICE constexpr int smem_bytes() const { return work_offset() + 64; }
};

/// Bits that each consumer warpgroup has in the 31 that say which granules of a tile are full.
TREEATTN_HOST_DEVICE constexpr int sm90_flag_bits(int warpgroups) {
  return 30 / warpgroups;
}

/// Everything a forward kernel of the sm90 family is specialised on. Tiles lie in shared memory as
/// the copy engine writes them with a 128-byte swizzle: chunks of 64 dims, each with rows of 128
/// bytes; dims past the head are zeros.
struct ForwardSm90Config {
  KernelDType dtype;
  int head_dim;
  int head_dim_v;
  int block_m;  ///< query rows per thread block; a consumer warpgroup owns 64
  int block_n;  ///< keys per MMA tile: 16-key granules, wherever the visible ones lie
  int box_n;    ///< keys whose bounds are tested together, and that one load brings if all are seen
  int stages;   ///< K and V tiles in shared memory
  int warps;    ///< of the consumer warpgroups
  bool softcap;

  static constexpr int kChunkDims = 64;
  static constexpr int kRowBytes = 128;
  /// What a block may have on compute capability 9.0.
  static constexpr int kSmemLimit = 227 * 1024;
  /// Visible granules that the scanner keeps in mind, a power of two.
  static constexpr int kQueueGranules = 512;
  /// MMA tiles that the scanner may be ahead of the loads.
  static constexpr int kRecords = 4;

  TREEATTN_HOST_DEVICE constexpr int warpgroups() const { return warps / 4; }
  /// One more warpgroup loads.
  TREEATTN_HOST_DEVICE constexpr int threads() const { return warps * 32 + 128; }
  TREEATTN_HOST_DEVICE constexpr int granules() const { return block_n / kGranuleKeys; }
  TREEATTN_HOST_DEVICE constexpr int granules_in_box() const { return box_n / kGranuleKeys; }
  TREEATTN_HOST_DEVICE constexpr int flag_bits() const { return sm90_flag_bits(warpgroups()); }
  TREEATTN_HOST_DEVICE constexpr int chunks() const { return (head_dim + 63) / 64; }
  TREEATTN_HOST_DEVICE constexpr int chunks_v() const { return (head_dim_v + 63) / 64; }

  // Shared memory, in bytes, in this order.
  TREEATTN_HOST_DEVICE constexpr int q_stage_bytes() const {
    return block_m * chunks() * kRowBytes;
  }
  TREEATTN_HOST_DEVICE constexpr int k_stage_bytes() const {
    return block_n * chunks() * kRowBytes;
  }
  TREEATTN_HOST_DEVICE constexpr int v_stage_bytes() const {
    return block_n * chunks_v() * kRowBytes;
  }
  /// Two where there is room: the next item's Q comes while this one is worked on.
  TREEATTN_HOST_DEVICE constexpr int q_stages() const {
    return 2 * q_stage_bytes() + bytes_beside_q() <= kSmemLimit ? 2 : 1;
  }
  TREEATTN_HOST_DEVICE constexpr int k_offset() const { return q_stages() * q_stage_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int v_offset() const {
    return k_offset() + stages * k_stage_bytes();
  }
  /// Tiles whose intervals and flags are in shared memory. They come with K: tile t + stages + 1 is
  /// loaded once every warp has released K of tile t + 1, and has thus left the softmax of tile t.
  TREEATTN_HOST_DEVICE constexpr int mask_slots() const { return stages + 1; }
  /// Per slot: first[block_n], len[block_n], then the tile's flags, all int32.
  TREEATTN_HOST_DEVICE constexpr int mask_slot_bytes() const { return (2 * block_n + 4) * 4; }
  TREEATTN_HOST_DEVICE constexpr int mask_offset() const {
    return v_offset() + stages * v_stage_bytes();
  }
  /// Visible granules, a ring.
  TREEATTN_HOST_DEVICE constexpr int queue_offset() const {
    return mask_offset() + mask_slots() * mask_slot_bytes();
  }
  /// Tiles for the loader: {row0, rows, head, kind}, {key0, keys, kv head, granules and whether it
  /// is the last}, granules. Rows are tokens, the head is the first of its pack.
  TREEATTN_HOST_DEVICE constexpr int record_bytes() const { return 32 + (granules() + 3) / 4 * 16; }
  TREEATTN_HOST_DEVICE constexpr int record_offset() const {
    return queue_offset() + kQueueGranules * 4;
  }
  /// What the block works on, per Q stage: {row0, rows, head, kind}.
  TREEATTN_HOST_DEVICE constexpr int work_offset() const {
    return record_offset() + kRecords * record_bytes();
  }
  /// mbarriers, for two Q stages: tail, Q full, Q empty, then K full, K empty, V full and V empty
  /// per stage, then record full and empty.
  TREEATTN_HOST_DEVICE constexpr int barrier_offset() const { return work_offset() + 2 * 16; }
  TREEATTN_HOST_DEVICE constexpr int barriers() const {
    return 1 + 2 * 2 + 4 * stages + 2 * kRecords;
  }
  TREEATTN_HOST_DEVICE constexpr int bytes_beside_q() const {
    return stages * (k_stage_bytes() + v_stage_bytes()) + mask_slots() * mask_slot_bytes() +
           kQueueGranules * 4 + kRecords * record_bytes() + 2 * 16 + barriers() * 8;
  }
  TREEATTN_HOST_DEVICE constexpr int smem_bytes() const {
    return barrier_offset() + barriers() * 8;
  }

  // Registers of a thread after the warpgroups have traded. They trade what the block was started
  // with: threads() times the most that divides 65,536 among them in steps of 8. Who asks for more
  // waits forever.
  TREEATTN_HOST_DEVICE constexpr int registers() const { return 65536 / threads() / 8 * 8; }
  TREEATTN_HOST_DEVICE constexpr int producer_registers() const { return 56; }
  TREEATTN_HOST_DEVICE constexpr int consumer_registers() const {
    return (registers() * (warpgroups() + 1) - producer_registers()) / warpgroups() / 8 * 8;
  }
};

/// Threads per block of the kernels that only read and write rows once.
inline constexpr int kElementwiseThreads = 256;

/// Everything a backward kernel is specialised on. Rows in shared memory are padded to whole 16-dim
/// MMA steps with zeros.
struct BackwardConfig {
  KernelDType dtype;
  int head_dim;
  int head_dim_v;
  int block_m;  ///< query rows per step
  int block_n;  ///< keys per thread block
  int stages;   ///< Q and dO tiles in shared memory (1 or 2)
  int warps;    ///< 4 or 8: two by warps / 2 over every product
  bool softcap;
  bool bulk_dq;  ///< dq goes to its accumulator through shared memory and the bulk copy engine

  TREEATTN_HOST_DEVICE constexpr int threads() const { return warps * 32; }
  /// Groups of keys, a pair of warps each.
  TREEATTN_HOST_DEVICE constexpr int groups() const { return warps / 2; }
  TREEATTN_HOST_DEVICE constexpr int padded_dim() const { return (head_dim + 15) / 16 * 16; }
  TREEATTN_HOST_DEVICE constexpr int padded_dim_v() const { return (head_dim_v + 15) / 16 * 16; }

  // Shared memory, in bytes, in this order. K and V are reused for dK and dV when the block ends.
  TREEATTN_HOST_DEVICE constexpr int k_bytes() const { return block_n * padded_dim() * 2; }
  TREEATTN_HOST_DEVICE constexpr int v_bytes() const { return block_n * padded_dim_v() * 2; }
  TREEATTN_HOST_DEVICE constexpr int q_stage_bytes() const { return block_m * padded_dim() * 2; }
  TREEATTN_HOST_DEVICE constexpr int do_stage_bytes() const { return block_m * padded_dim_v() * 2; }
  TREEATTN_HOST_DEVICE constexpr int p_bytes() const { return block_m * block_n * 2; }
  TREEATTN_HOST_DEVICE constexpr int v_offset() const { return k_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int q_offset() const { return v_offset() + v_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int do_offset() const {
    return q_offset() + stages * q_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int p_offset() const {
    return do_offset() + stages * do_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int ds_offset() const { return p_offset() + p_bytes(); }
  /// Per stage: lse[block_m] in the log2 domain, then delta[block_m], f32.
  TREEATTN_HOST_DEVICE constexpr int stats_stage_bytes() const { return 2 * block_m * 4; }
  TREEATTN_HOST_DEVICE constexpr int stats_offset() const { return ds_offset() + p_bytes(); }
  /// first[block_n], len[block_n].
  TREEATTN_HOST_DEVICE constexpr int mask_offset() const {
    return stats_offset() + stages * stats_stage_bytes();
  }
  /// A KeyTile for the keys of each pair of warps.
  TREEATTN_HOST_DEVICE constexpr int groups_offset() const {
    return mask_offset() + 2 * block_n * 4;
  }
  /// What the block works on, kept here because the main loop has no registers for it.
  TREEATTN_HOST_DEVICE constexpr int work_offset() const {
    return groups_offset() + warps / 2 * 16;
  }
  /// dQ of one step in f32, on its way to the accumulator; then where it goes.
  TREEATTN_HOST_DEVICE constexpr int dq_offset() const { return work_offset() + 32; }
  TREEATTN_HOST_DEVICE constexpr int dq_bytes() const {
    return bulk_dq ? block_m * padded_dim() * 4 : 0;
  }
  TREEATTN_HOST_DEVICE constexpr int smem_bytes() const {
    return dq_offset() + dq_bytes() + (bulk_dq ? 16 : 0);
  }

  /// Accumulators of dq hold 16 dims in a place; odd rows swap neighbouring places, so that two
  /// rows of a step that are written together lie in different banks of shared memory.
  /// (Static, as nvcc has no kConfig to call it on with what is known at run time only.)
  TREEATTN_HOST_DEVICE static constexpr int dq_place(int padded_dim, int row, int pair) {
    return padded_dim / 16 % 2 == 0 ? pair ^ (row & 1) : pair;
  }

  // Blocks of the last kernel, whose threads make 16 dims each.
  /// For dk and dv of one tile and kv head: parts of dk and of dv in turns.
  TREEATTN_HOST_DEVICE constexpr int tile_sum_blocks() const {
    const int dims = padded_dim() > padded_dim_v() ? padded_dim() : padded_dim_v();
    return 2 * ((block_n * (dims / 16) + kElementwiseThreads - 1) / kElementwiseThreads);
  }
  /// For dq of one head.
  TREEATTN_HOST_DEVICE static constexpr long long dq_sum_blocks(int padded_dim, int total_q) {
    const long long threads = static_cast<long long>(total_q) * (padded_dim / 16);
    return (threads + kElementwiseThreads - 1) / kElementwiseThreads;
  }
};

/// Everything a backward kernel of the sm90 family is specialised on. Tiles lie in shared memory as
/// in ForwardSm90Config. The accumulators of dq, dk and dv are those of
/// BackwardConfig, whose kernels before and after the main one serve here too.
struct BackwardSm90Config : BackwardConfig {
  static constexpr int kChunkDims = 64;
  static constexpr int kRowBytes = 128;

  TREEATTN_HOST_DEVICE constexpr int warpgroups() const { return warps / 4; }
  /// One more warpgroup loads, and sends dQ.
  TREEATTN_HOST_DEVICE constexpr int threads() const { return warps * 32 + 128; }
  /// A warpgroup owns 64 keys.
  TREEATTN_HOST_DEVICE constexpr int groups() const { return warpgroups(); }
  TREEATTN_HOST_DEVICE constexpr int chunks() const { return (head_dim + 63) / 64; }
  TREEATTN_HOST_DEVICE constexpr int chunks_v() const { return (head_dim_v + 63) / 64; }

  // Shared memory, in bytes, in this order.
  TREEATTN_HOST_DEVICE constexpr int k_bytes() const { return block_n * chunks() * kRowBytes; }
  TREEATTN_HOST_DEVICE constexpr int v_bytes() const { return block_n * chunks_v() * kRowBytes; }
  TREEATTN_HOST_DEVICE constexpr int q_stage_bytes() const {
    return block_m * chunks() * kRowBytes;
  }
  TREEATTN_HOST_DEVICE constexpr int do_stage_bytes() const {
    return block_m * chunks_v() * kRowBytes;
  }
  /// dS of a step; of two steps, so that one barrier a step is enough.
  TREEATTN_HOST_DEVICE constexpr int ds_stage_bytes() const { return block_m * block_n * 2; }
  TREEATTN_HOST_DEVICE constexpr int v_offset() const { return k_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int q_offset() const { return v_offset() + v_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int do_offset() const {
    return q_offset() + stages * q_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int ds_offset() const {
    return do_offset() + stages * do_stage_bytes();
  }
  /// dQ of one step in f32, on its way to the accumulator.
  TREEATTN_HOST_DEVICE constexpr int dq_offset() const {
    return ds_offset() + 2 * ds_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int dq_bytes() const { return block_m * padded_dim() * 4; }
  /// Per stage: lse[block_m] in the log2 domain, then delta[block_m], f32.
  TREEATTN_HOST_DEVICE constexpr int stats_offset() const { return dq_offset() + dq_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int groups_offset() const {
    return stats_offset() + stages * stats_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int work_offset() const { return groups_offset() + groups() * 16; }
  /// mbarriers: two tails, K full, V full, dQ full, dQ empty, then Q full, Q empty, dO full and dO
  /// empty per stage.
  TREEATTN_HOST_DEVICE constexpr int barrier_offset() const { return work_offset() + 32; }
  TREEATTN_HOST_DEVICE constexpr int barriers() const { return 6 + 4 * stages; }
  TREEATTN_HOST_DEVICE constexpr int smem_bytes() const {
    return barrier_offset() + barriers() * 8;
  }

  // Registers of a thread before and after the warpgroups have traded, as in ForwardSm90Config.
  TREEATTN_HOST_DEVICE constexpr int registers() const { return 65536 / threads() / 8 * 8; }
  TREEATTN_HOST_DEVICE constexpr int producer_registers() const { return 24; }
  TREEATTN_HOST_DEVICE constexpr int consumer_registers() const { return 240; }
};

/// Everything a kernel that owns rows of dq is specialised on. Rows are padded as in
/// BackwardConfig.
struct BackwardDqConfig {
  KernelDType dtype;
  int head_dim;
  int head_dim_v;
  int block_m;  ///< query rows per thread block
  int block_n;  ///< keys per tile
  int stages;   ///< K/V tiles in shared memory (1 or 2)
  int warps;    ///< each owns block_m / warps = 16 rows
  bool softcap;

  TREEATTN_HOST_DEVICE constexpr int threads() const { return warps * 32; }
  TREEATTN_HOST_DEVICE constexpr int padded_dim() const { return (head_dim + 15) / 16 * 16; }
  TREEATTN_HOST_DEVICE constexpr int padded_dim_v() const { return (head_dim_v + 15) / 16 * 16; }

  // Shared memory, in bytes, in this order. Q is reused for dQ when the block ends.
  TREEATTN_HOST_DEVICE constexpr int q_bytes() const { return block_m * padded_dim() * 2; }
  TREEATTN_HOST_DEVICE constexpr int do_bytes() const { return block_m * padded_dim_v() * 2; }
  TREEATTN_HOST_DEVICE constexpr int k_stage_bytes() const { return block_n * padded_dim() * 2; }
  TREEATTN_HOST_DEVICE constexpr int v_stage_bytes() const { return block_n * padded_dim_v() * 2; }
  /// Per stage: first[block_n], len[block_n], then the tile's KeyTile bounds, all int32.
  TREEATTN_HOST_DEVICE constexpr int mask_stage_bytes() const { return (2 * block_n + 4) * 4; }
  TREEATTN_HOST_DEVICE constexpr int do_offset() const { return q_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int k_offset() const { return do_offset() + do_bytes(); }
  TREEATTN_HOST_DEVICE constexpr int v_offset() const {
    return k_offset() + stages * k_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int mask_offset() const {
    return v_offset() + stages * v_stage_bytes();
  }
  TREEATTN_HOST_DEVICE constexpr int smem_bytes() const {
    return mask_offset() + stages * mask_stage_bytes();
  }
};

}  // namespace treeattn
