// Tensor maps: how the copy engine of compute capability 9.0 is told about a tensor.
#pragma once

#include <cstdint>

#include "templates/shared/params.h"

namespace treeattn {

/// A [tokens, heads, dims] tensor of 2-byte numbers, read in boxes of `rows` tokens of one head and
/// 64 dims, which lie in shared memory with a 128-byte swizzle. What lies outside reads as zero.
struct TensorMapRequest {
  const void* data = nullptr;
  KernelDType dtype = KernelDType::kBF16;
  int dims = 0;
  int heads = 0;
  std::int64_t tokens = 0;
  std::int64_t token_stride = 0;  ///< elements
  std::int64_t head_stride = 0;   ///< elements
  int rows = 0;

  /// What a head's index is multiplied by: heads without a stride are one in the map.
  int head_step() const { return head_stride == 0 ? 0 : 1; }
};

/// Whether a tensor map can hold the strides: positive, where there is more than one of something;
/// heads may have none.
bool fits_tensor_map(const TensorMapRequest& request);
/// Encodes on the host, about a quarter of a microsecond; no device is touched. An empty tensor
/// gets an all-zero map, which must not be read. Throws Error(kCudaError).
TensorMap encode_tensor_map(const TensorMapRequest& request);

}  // namespace treeattn
