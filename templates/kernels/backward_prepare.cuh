// What the backward kernels want to know of every row, made once: delta and lse in base 2, and an
// empty dq accumulator.
//
// Work      a power of two of neighbouring lanes serves one row of one head; grid (rows, heads).
// Pipeline  none: two rows are read once, in 16-byte chunks.
// Shared    none.
#pragma once

#include "../device/softmax.cuh"
#include "../device/tile_copy.cuh"

namespace treeattn {
namespace backward {

/// Sum over the lanes that serve one row.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

/// The dot product of eight pairs of 16-bit numbers.
__device__ __forceinline__ float dot8(const Int4& a, const Int4& b) {
  const u32 x[4] = {static_cast<u32>(a.x), static_cast<u32>(a.y), static_cast<u32>(a.z),
                    static_cast<u32>(a.w)};
  const u32 y[4] = {static_cast<u32>(b.x), static_cast<u32>(b.y), static_cast<u32>(b.z),
                    static_cast<u32>(b.w)};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(unpack_low(x[i]), unpack_low(y[i]), sum);
    sum = fmaf(unpack_high(x[i]), unpack_high(y[i]), sum);
  }
  return sum;
}

__device__ __forceinline__ void prepare(const BackwardParams& p) {
  constexpr int kChunks = kConfig.head_dim_v / 8;
  constexpr int kLanes = ceil_pow2(kChunks);  // 32 at most
  constexpr int kRows = kElementwiseThreads / kLanes;
  constexpr int kDqChunks = kConfig.padded_dim() / 4;
  const int row = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool exists = row < p.total_q;
  float sum = 0.0f;
  if (exists && lane < kChunks) {
    const u16* out =
        static_cast<const u16*>(p.out) + row * p.out_token_stride + head * p.out_head_stride;
    const u16* dout =
        static_cast<const u16*>(p.dout) + row * p.dout_token_stride + head * p.dout_head_stride;
    sum = dot8(ld_global_int4(out + lane * 8), ld_global_int4(dout + lane * 8));
  }
  sum = lanes_sum<kLanes>(sum);
  if (!exists) return;
  const i64 at = static_cast<i64>(head) * p.total_q + row;
  if (lane == 0) {
    const float lse = p.lse[at];
    const bool sees = lse != neg_infinity();
    if (sees && p.dlse != nullptr) sum -= p.dlse[at];
    p.lse_log2[at] = sees ? lse * kLog2E : -neg_infinity();
    p.delta[at] = sees ? sum : 0.0f;
  }
  if (p.dq_accumulator == nullptr) return;
  float* dq = p.dq_accumulator + at * kConfig.padded_dim();
  for (int i = lane; i < kDqChunks; i += kLanes) {
    st_global_float4(dq + i * 4, Float4{0.0f, 0.0f, 0.0f, 0.0f});
  }
}

}  // namespace backward
}  // namespace treeattn
