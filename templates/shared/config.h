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

}  // namespace treeattn
