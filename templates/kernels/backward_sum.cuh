// Turns f32 accumulators into gradients: scales and rounds dq, and adds up the shares of dk and dv.
//
// Work      a thread makes 16 dims of one row of one head; dq: grid (rows x dims, heads); dk and
//           dv: grid (shared tiles, kv heads, 2).
// Pipeline  none: everything is read and written once, in 16-byte chunks.
// Shared    none.
#pragma once

#include "../device/tile_copy.cuh"

namespace treeattn {
namespace backward {

/// Packed NaNs of the kernel's type.
inline constexpr int kNanPair = kConfig.dtype == KernelDType::kF16 ? 0x7e007e00 : 0x7fc07fc0;

/// Writes 16 dims (8 at the end of a head dim that is no multiple of 16) from `shares`
/// accumulators, which hold a pair of 8-dim MMA tiles as add_rows() leaves it: {tile 0 dims 2t, 2t
/// + 1, tile 1 dims 2t, 2t + 1} for t = 0..3.
__device__ __forceinline__ void sum_pair(const float* from, int shares, i64 share_stride,
                                         float scale, u16* to, bool whole) {
  Float4 v[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) v[t] = ld_global_float4(from + t * 4);
  for (int share = 1; share < shares; ++share) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const Float4 w = ld_global_float4(from + share * share_stride + t * 4);
      v[t].x += w.x;
      v[t].y += w.y;
      v[t].z += w.z;
      v[t].w += w.w;
    }
  }
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

__device__ __forceinline__ void write_dq(const BackwardParams& p) {
  constexpr int kPairs = kConfig.padded_dim() / 16;
  const i64 index = static_cast<i64>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
  const int head = static_cast<int>(blockIdx.y);
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
  const int place = kConfig.dq_place(row, pair);
  const float* from = p.dq_accumulator +
                      (static_cast<i64>(head) * p.total_q + row) * kConfig.padded_dim() +
                      place * 16;
  sum_pair(from, 1, 0, p.softmax_scale, to, whole);
}

template <int kDims>
__device__ __forceinline__ void sum_tile(const BackwardParams& p, const float* shares, float scale,
                                         void* out, i64 token_stride, i64 head_stride) {
  constexpr int kPadded = (kDims + 15) / 16 * 16;
  constexpr int kPairs = kPadded / 16;
  constexpr i64 kSlab = static_cast<i64>(kConfig.block_n) * kPadded;
  const int tile = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int i = static_cast<int>(blockIdx.z / 2 * kElementwiseThreads + threadIdx.x);
  const int* entry =
      p.schedule + kScheduleHeaderInts + p.max_units * kScheduleUnitInts + tile * kScheduleTileInts;
  const Int4 order = ld_plan_int4(p.plan + p.key_order + 4LL * tile);
  const float* from = shares + (static_cast<i64>(entry[0]) * p.heads_kv + head) * kSlab;
  u16* to = static_cast<u16*>(out) + order.y * token_stride + head * head_stride;
  const int key = i / kPairs;
  const int pair = i - key * kPairs;
  if (key >= order.z) return;
  sum_pair(from + key * kPadded + pair * 16, entry[1], p.heads_kv * kSlab, scale,
           to + key * token_stride + pair * 16, pair * 16 + 16 <= kDims);
}

/// Grid (max_split, heads_kv, 2 x parts of a tile): dk and dv of the tiles that several blocks
/// shared.
__device__ __forceinline__ void write_dk_dv(const BackwardParams& p) {
  if (static_cast<int>(blockIdx.x) >= p.schedule[0]) return;
  if (blockIdx.z % 2 == 0) {
    sum_tile<kConfig.head_dim>(p, p.dk_shares, p.softmax_scale, p.dk, p.dk_token_stride,
                               p.dk_head_stride);
  } else {
    sum_tile<kConfig.head_dim_v>(p, p.dv_shares, 1.0f, p.dv, p.dv_token_stride, p.dv_head_stride);
  }
}

}  // namespace backward
}  // namespace treeattn
