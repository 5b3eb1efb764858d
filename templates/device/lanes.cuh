// Exchanges between the lanes of a warp.
#pragma once

#include "types.cuh"

namespace treeattn {

/// The or of all lanes' values: what one lane holds and the others lack, or what all hold alike.
/// The compiler knows the result to be the same in all lanes, so that branches on it are not
/// divergent and addresses made of it are scalar.
__device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_or_sync(kFullWarp, static_cast<u32>(x)));
}

/// w[i] of lane j becomes w[j] of lane i, inside groups of four lanes.
__device__ __forceinline__ void transpose_quad(u32 (&w)[4], u32 quad) {
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

}  // namespace treeattn
