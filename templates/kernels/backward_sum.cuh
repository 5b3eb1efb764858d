// Turns f32 accumulators into gradients: scales and rounds dq, and dk and dv of shared tiles. One
// launch for all: each costs the host as much as the rest of a call.
//
// Work      a thread makes 16 dims of one row of one head. First the blocks of dk and dv, tile by
//           tile, kv head by kv head; those of tiles that nobody shares have nothing to do. Then
//           those of dq, head by head.
// Pipeline  none: everything is read and written once, in 16-byte chunks.
// Barriers  none.
// Registers what 16 dims take.
// Shared    none.
#pragma once

#include "../device/tile_copy.cuh"

namespace treeattn {
namespace backward {

/// Packed NaNs of the kernel's type.
inline constexpr int kNanPair = kConfig.dtype == KernelDType::kF16 ? 0x7e007e00 : 0x7fc07fc0;

/// Writes 16 dims (8 at the end of a head dim that is no multiple of 16) from an accumulator, which
/// holds a pair of 8-dim MMA tiles as put_rows() leaves it: {tile 0 dims 2t, 2t + 1, tile 1 dims
/// 2t, 2t + 1} for t = 0..3.
__device__ __forceinline__ void write_pair(const float* from, float scale, u16* to, bool whole) {
  Float4 v[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) v[t] = ld_global_float4(from + t * 4);
  u32 low[4], high[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    low[t] = pack2(v[t].x * scale, v[t].y * scale);
    high[t] = pack2(v[t].z * scale, v[t].w * scale);
  }
  st_global_int4(to, Int4{static_cast<int>(low[0]), static_cast<int>(low[1]),
                          static_cast<int>(low[2]), static_cast<int>(low[3])});
  if (whole) {
    st_global_int4(to + 8, Int4{static_cast<int>(high[0]), static_cast<int>(high[1]),
                                static_cast<int>(high[2]), static_cast<int>(high[3])});
  }
}

/// Whether packed query row `row` belongs to an invalid sequence.
__device__ __forceinline__ bool row_is_invalid(const BackwardParams& p, int row) {
  if (p.plan[kMetaBadSequences] == 0) return false;
  const int* cu = p.plan + p.cu_q;
  int low = 0;  // the last sequence that starts at or before the row
  int high = p.batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  // Empty sequences share their start with the one that follows: the last of them holds the row.
  return p.batch > 0 && row < cu[p.batch] && p.plan[p.seq_fault + low] != 0;
}

/// `block` counts the blocks of dq.
__device__ __forceinline__ void write_dq(const BackwardParams& p, int block) {
  constexpr int kPairs = kConfig.padded_dim() / 16;
  const int blocks = static_cast<int>(kConfig.dq_sum_blocks(kConfig.padded_dim(), p.total_q));
  const int head = block / blocks;
  const i64 index = static_cast<i64>(block - head * blocks) * kElementwiseThreads + threadIdx.x;
  const int row = static_cast<int>(index / kPairs);
  const int pair = static_cast<int>(index % kPairs);
  if (row >= p.total_q) return;
  u16* to = static_cast<u16*>(p.dq) + row * p.dq_token_stride + head * p.dq_head_stride + pair * 16;
  const bool whole = pair * 16 + 16 <= kConfig.head_dim;
  if (row_is_invalid(p, row)) {
    const Int4 nan{kNanPair, kNanPair, kNanPair, kNanPair};
    st_global_int4(to, nan);
    if (whole) st_global_int4(to + 8, nan);
    return;
  }
  const int place = kConfig.dq_place(kConfig.padded_dim(), row, pair);
  const float* from = p.dq_accumulator +
                      (static_cast<i64>(head) * p.total_q + row) * kConfig.padded_dim() +
                      place * 16;
  write_pair(from, p.softmax_scale, to, whole);
}

/// Part `part` of the gradient `out` of a tile's keys.
template <int kDims>
__device__ __forceinline__ void write_tile(const BackwardParams& p, int tile, int head, int part,
                                           const float* accumulator, float scale, void* out,
                                           i64 token_stride, i64 head_stride) {
  constexpr int kPadded = (kDims + 15) / 16 * 16;
  constexpr int kPairs = kPadded / 16;
  constexpr i64 kSlab = static_cast<i64>(kConfig.block_n) * kPadded;
  const int i = part * kElementwiseThreads + static_cast<int>(threadIdx.x);
  const Int4 order = ld_plan_int4(p.plan + p.key_order + 4LL * tile);
  const float* from = accumulator + (static_cast<i64>(tile) * p.heads_kv + head) * kSlab;
  u16* to = static_cast<u16*>(out) + order.y * token_stride + head * head_stride;
  const int key = i / kPairs;
  const int pair = i - key * kPairs;
  if (key >= order.z) return;
  write_pair(from + key * kPadded + pair * 16, scale, to + key * token_stride + pair * 16,
             pair * 16 + 16 <= kDims);
}

/// `block` counts the blocks of dk and dv: those of the tiles that several blocks shared have work.
__device__ __forceinline__ void write_dk_dv(const BackwardParams& p, int block) {
  constexpr int kBlocks = kConfig.tile_sum_blocks();
  const int head_of_tile = block / kBlocks;
  const int part = block - head_of_tile * kBlocks;
  const int tile = head_of_tile / p.heads_kv;
  const int head = head_of_tile - tile * p.heads_kv;
  if (tile >= p.schedule[0]) return;
  if (part % 2 == 0) {
    write_tile<kConfig.head_dim>(p, tile, head, part / 2, p.dk_accumulator, p.softmax_scale, p.dk,
                                 p.dk_token_stride, p.dk_head_stride);
  } else {
    write_tile<kConfig.head_dim_v>(p, tile, head, part / 2, p.dv_accumulator, 1.0f, p.dv,
                                   p.dv_token_stride, p.dv_head_stride);
  }
}

__device__ __forceinline__ void sum(const BackwardParams& p) {
  const int block = static_cast<int>(blockIdx.x);
  const int tiles = p.max_split * p.heads_kv * kConfig.tile_sum_blocks();
  if (block < tiles) {
    write_dk_dv(p, block);
  } else {
    write_dq(p, block - tiles);
  }
}

}  // namespace backward
}  // namespace treeattn
