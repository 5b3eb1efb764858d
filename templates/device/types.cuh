// Integer aliases and constants; kernels include no toolkit header.
#pragma once

namespace treeattn {

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

inline constexpr int kIntMax = 0x7fffffff;
inline constexpr u32 kFullWarp = 0xffffffffu;

struct alignas(16) Int4 {
  int x, y, z, w;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

struct alignas(8) Int2 {
  int x, y;
};

__device__ __forceinline__ float neg_infinity() {
  return __int_as_float(static_cast<int>(0xff800000));
}
__device__ __forceinline__ float quiet_nan() {
  return __int_as_float(0x7fffffff);
}

}  // namespace treeattn
