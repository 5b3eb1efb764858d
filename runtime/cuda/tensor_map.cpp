#include "runtime/cuda/tensor_map.h"

#include <fmt/format.h>

#include <cstring>

#include "runtime/cuda/driver.h"

namespace treeattn {
namespace {

constexpr int kElementBytes = 2;
constexpr std::int64_t kMostStrideBytes = std::int64_t{1} << 40;

bool fits(std::int64_t stride, std::int64_t count) {
  return count <= 1 || (stride > 0 && stride * kElementBytes < kMostStrideBytes);
}

/// Heads that lie apart.
int mapped_heads(const TensorMapRequest& request) {
  return request.head_stride == 0 ? 1 : request.heads;
}

/// The driver checks strides of dimensions of size 1 too.
std::uint64_t stride_bytes(std::int64_t stride, std::int64_t count) {
  return count <= 1 ? 16 : static_cast<std::uint64_t>(stride) * kElementBytes;
}

}  // namespace

bool fits_tensor_map(const TensorMapRequest& request) {
  return fits(request.token_stride, request.tokens) &&
         fits(request.head_stride, mapped_heads(request)) &&
         request.box_heads <= mapped_heads(request);
}

std::string describe_misfit(std::string_view name, const TensorMapRequest& request) {
  return fmt::format(
      "{} has token stride {} and head stride {}, which kernels of the sm90 family cannot read: "
      "expected a positive token stride and {} head stride",
      name, request.token_stride, request.head_stride,
      request.box_heads > 1 ? "a positive" : "no negative");
}

TensorMap encode_tensor_map(const TensorMapRequest& request) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                alignof(TensorMap) >= alignof(CUtensorMap));
  TensorMap map{};
  if (request.tokens == 0) return map;
  const std::uint64_t sizes[] = {static_cast<std::uint64_t>(request.dims),
                                 static_cast<std::uint64_t>(mapped_heads(request)),
                                 static_cast<std::uint64_t>(request.tokens)};
  const std::uint64_t strides[] = {stride_bytes(request.head_stride, mapped_heads(request)),
                                   stride_bytes(request.token_stride, request.tokens)};
  const std::uint32_t box[] = {ForwardSm90Config::kChunkDims,
                               static_cast<std::uint32_t>(request.box_heads),
                               static_cast<std::uint32_t>(request.rows)};
  const std::uint32_t steps[] = {1, 1, 1};
  CUtensorMap encoded{};
  const CUresult result = driver().cuTensorMapEncodeTiled(
      &encoded,
      request.dtype == KernelDType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      3, const_cast<void*>(request.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw_cuda_error(result,
                     fmt::format("cuTensorMapEncodeTiled of {} tokens x {} heads x {} dims with "
                                 "strides {} and {}",
                                 request.tokens, request.heads, request.dims, request.token_stride,
                                 request.head_stride));
  }
  std::memcpy(&map, &encoded, sizeof(map));
  return map;
}

TensorMap TensorMapCache::get(const TensorMapRequest& request) {
  // Fibonacci hashing (Knuth, TAOCP 6.4): addresses differ by multiples of anything from 16 bytes
  // to 2 MiB, and all of them have to reach all places.
  const auto place = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(request.data)) +
                     static_cast<std::uint64_t>(request.rows);
  Entry& entry = entries_[place * 0x9e3779b97f4a7c15U >> (64 - kPlaceBits)];
  {
    const std::lock_guard lock(mutex_);
    if (entry.used && entry.request == request) return entry.map;
  }
  const TensorMap map = encode_tensor_map(request);
  const std::lock_guard lock(mutex_);
  entry = {request, map, true};
  return map;
}

}  // namespace treeattn
