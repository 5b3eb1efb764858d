// Online softmax in base 2 over accumulator fragments, with a lazily moved reference maximum.
#pragma once

#include "ptx_sm80.cuh"

namespace treeattn {

inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kLog2E = 1.442695040888963407f;

/// The reference maximum of a row moves only when the row's maximum outgrows it by this many powers
/// of two: the result is the same (numerator and denominator share the reference), sums stay below
/// 2^kLazyMax per key, and the accumulators are rarely rescaled (the trick is FlashAttention-4's,
/// arXiv 2603.05451). The decision is the row's own, so a row's bits do not depend on its
/// neighbours.
inline constexpr float kLazyMax = 8.0f;

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
  return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kFullWarp, v, 1);
  return v + __shfl_xor_sync(kFullWarp, v, 2);
}

/// tanh by exp2 (tanh.approx is too coarse for lse at 1e-4). Near zero 1 - 2 / (e + 1) cancels, so
/// the odd Taylor polynomial takes over; at 0.3 its next term is below 1e-7 of the value.
__device__ __forceinline__ float tanh_exp2(float x) {
  constexpr float kTwoLog2E = 2.885390081777926815f;
  const float e = exp2_approx(fminf(x * kTwoLog2E, 126.0f));
  const float far = 1.0f - 2.0f * rcp_approx(e + 1.0f);
  const float y = x * x;
  float p = fmaf(y, -1382.0f / 155925.0f, 62.0f / 2835.0f);
  p = fmaf(y, p, -17.0f / 315.0f);
  p = fmaf(y, p, 2.0f / 15.0f);
  p = fmaf(y, p, -1.0f / 3.0f);
  const float near = fmaf(x * y, p, x);
  return fabsf(x) < 0.3f ? near : far;
}

/// State of kTiles 16-row tiles of one warp; a thread holds rows lane / 4 and lane / 4 + 8 of each.
template <int kTiles>
struct SoftmaxState {
  float reference[kTiles][2];  ///< log2 domain; -inf until the row has seen a key
  float sum[kTiles][2];        ///< this thread's columns only

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      reference[t][0] = reference[t][1] = neg_infinity();
      sum[t][0] = sum[t][1] = 0.0f;
    }
  }
};

}  // namespace treeattn
