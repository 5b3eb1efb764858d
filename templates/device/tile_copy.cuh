// Copies between global rows and swizzled shared rows.
#pragma once

#include "ptx_sm80.cuh"
#include "swizzle.cuh"

namespace treeattn {

/// Least power of two that is not below n.
__host__ __device__ constexpr int ceil_pow2(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

/// Copies `valid` rows of kChunks 16-byte chunks into swizzled rows of kRowChunks; the rest of
/// kRows, and the chunks beyond kChunks, become zero. A power of two of threads serves each row, so
/// that a thread keeps its chunk and only steps rows.
template <int kThreads, int kRows, int kChunks, int kRowChunks = kChunks>
__device__ __forceinline__ void load_rows(u32 dst, const u16* src, i64 row_stride, int valid) {
  constexpr int kRowThreads = ceil_pow2(kRowChunks);
  constexpr int kRowsPerPass = kThreads / kRowThreads;
  constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  const u32 thread = thread_index_here();
  const u32 chunk = thread % kRowThreads;
  const int row0 = static_cast<int>(thread / kRowThreads);
  if (kRowChunks != kRowThreads && chunk >= kRowChunks) return;
  if (kChunks != kRowChunks && chunk >= kChunks) valid = 0;
  const u16* from = src + row0 * row_stride + chunk * 8;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = row0 + pass * kRowsPerPass;
    if (kRows % kRowsPerPass == 0 || row < kRows) {
      cp_async_16(dst + SwizzledRows<kRowChunks>::offset(row, chunk), from, row < valid);
    }
    from += kRowsPerPass * row_stride;
  }
}

}  // namespace treeattn
