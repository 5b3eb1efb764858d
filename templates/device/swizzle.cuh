// Rows of 16-bit elements in shared memory, in 16-byte chunks without padding: chunk c of row r
// lies at chunk c ^ x(r), chosen so that the eight rows of an ldmatrix always touch all 32 banks.
#pragma once

#include "types.cuh"

namespace treeattn {

/// A row has kChunks = p * odd chunks with p a power of two (8 at most matter). Rows 8/p apart
/// start in the same banks; giving them different x in [0, p) separates them, and x < p keeps the
/// chunk inside its row. Odd kChunks need no swizzle.
template <int kChunks>
struct SwizzledRows {
  static constexpr int kPeriod = kChunks % 8 == 0   ? 8
                                 : kChunks % 4 == 0 ? 4
                                 : kChunks % 2 == 0 ? 2
                                                    : 1;
  static constexpr u32 kRowBytes = kChunks * 16;

  __device__ __forceinline__ static u32 x(u32 row) { return (row / (8 / kPeriod)) % kPeriod; }

  __device__ __forceinline__ static u32 offset(u32 row, u32 chunk) {
    return row * kRowBytes + (chunk ^ x(row)) * 16;
  }

  /// Address of `chunk` (even, a compile-time constant after unrolling) past a lane address made by
  /// lane_address(): the low bits are exchanged, the others added.
  __device__ __forceinline__ static u32 at(u32 lane_address, u32 chunk) {
    return (lane_address ^ (chunk % kPeriod * 16)) + chunk / kPeriod * kPeriod * 16;
  }

  /// base + row's address with the lane's own chunk `half` (0 or 1) folded in. The sum needs base
  /// aligned to kPeriod * 16 bytes. With one chunk period the half is added, not exchanged.
  __device__ __forceinline__ static u32 lane_address(u32 base, u32 row, u32 half) {
    return base + row * kRowBytes + (half ^ x(row)) * 16;
  }
};

}  // namespace treeattn
