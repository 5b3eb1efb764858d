// What the kernels of the sm90 family have in common beside their instructions.
#pragma once

#include "lanes.cuh"
#include "ptx_sm90.cuh"

namespace treeattn {

/// Stage and parity of what comes next in a ring of stages.
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

/// Bits of a matrix descriptor beside its address (PTX ISA, matrix descriptor format): byte offsets
/// between groups of 8 rows, and along the leading dimension, with the 128-byte swizzle.
__host__ __device__ constexpr u64 matrix_layout(u32 leading_bytes, u32 stride_bytes) {
  return static_cast<u64>(leading_bytes >> 4) << 16 | static_cast<u64>(stride_bytes >> 4) << 32 |
         static_cast<u64>(1) << 62;
}

__device__ __forceinline__ u64 matrix_descriptor(u32 address, u64 layout) {
  return layout | static_cast<u64>((address & 0x3ffff) >> 4);
}

/// Stores a row of a thread's accumulators, times `scale`: row r (0 or 1, eight rows further) of
/// kDims dims. Four lanes hold the four pairs of a chunk of eight dims; four chunks are transposed
/// among them, so that each stores 16 bytes.
template <int kDims>
__device__ __forceinline__ void store_row(const float (&c)[kDims / 2], int r, float scale, u16* to,
                                          bool exists) {
  constexpr int kChunks = kDims / 8;
  const u32 quad = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < kChunks; first += 4) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (first + i) * 4 + r * 2;
      w[i] = first + i < kChunks ? pack2(c[at] * scale, c[at + 1] * scale) : 0;
    }
    transpose_quad(w, quad);
    const int chunk = first + static_cast<int>(quad);
    if (exists && (kChunks % 4 == 0 || chunk < kChunks)) {
      st_global_int4(to + chunk * 8, Int4{static_cast<int>(w[0]), static_cast<int>(w[1]),
                                          static_cast<int>(w[2]), static_cast<int>(w[3])});
    }
  }
}

}  // namespace treeattn
