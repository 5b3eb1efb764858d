// Tensor maps: how the copy engine of compute capability 9.0 is told about a tensor.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

#include "templates/shared/params.h"

namespace treeattn {

/// A [tokens, heads, dims] tensor of 2-byte numbers, read in boxes of `rows` tokens, `box_heads`
/// heads and 64 dims, which lie in shared memory with a 128-byte swizzle, a token's heads side by
/// side. What lies outside reads as zero.
struct TensorMapRequest {
  const void* data = nullptr;
  KernelDType dtype = KernelDType::kBF16;
  int dims = 0;
  int heads = 0;
  std::int64_t tokens = 0;
  std::int64_t token_stride = 0;  ///< elements
  std::int64_t head_stride = 0;   ///< elements
  int rows = 0;
  int box_heads = 1;

  /// What a head's index is multiplied by: heads without a stride are one in the map.
  int head_step() const { return head_stride == 0 ? 0 : 1; }

  friend bool operator==(const TensorMapRequest&, const TensorMapRequest&) = default;
};

/// Whether a tensor map can hold the strides: positive, where there is more than one of something;
/// heads may have none unless a box has several.
bool fits_tensor_map(const TensorMapRequest& request);
/// What is wrong with the strides of one that does not fit, for an error.
std::string describe_misfit(std::string_view name, const TensorMapRequest& request);
/// Encodes on the host, about a quarter of a microsecond; no device is touched. An empty tensor
/// gets an all-zero map, which must not be read. Throws Error(kCudaError).
TensorMap encode_tensor_map(const TensorMapRequest& request);

/// The maps that were asked for last: a layer's tensors come back at the same addresses step after
/// step, and a forward call needs five maps. A map follows from its request alone, so none is ever
/// stale. Thread-safe; allocates nothing.
class TensorMapCache {
 public:
  TensorMap get(const TensorMapRequest& request);

 private:
  static constexpr int kPlaceBits = 7;
  struct Entry {
    TensorMapRequest request;
    TensorMap map;
    bool used = false;
  };
  std::mutex mutex_;
  std::array<Entry, std::size_t{1} << kPlaceBits> entries_;
};

}  // namespace treeattn
