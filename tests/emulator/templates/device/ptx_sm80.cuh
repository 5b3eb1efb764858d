// templates/device/ptx_sm80.cuh for the emulator: the same functions, without PTX.
#pragma once

#include "types.cuh"

namespace treeattn {

__device__ __forceinline__ u32 smem_address(const void*) {
  return emulator::kSharedBase;
}

__device__ __forceinline__ u32 thread_index_here() {
  return threadIdx.x;
}

__device__ __forceinline__ void cp_async_16(u32 dst, const void* src, bool valid) {
  emulator::async_copy(dst, src, 16, valid);
}

__device__ __forceinline__ void cp_async_4(u32 dst, const void* src, bool valid) {
  emulator::async_copy(dst, src, 4, valid);
}

__device__ __forceinline__ void cp_async_4_if(bool wanted, u32 dst, const void* src, bool valid) {
  if (wanted) emulator::async_copy(dst, src, 4, valid);
}

__device__ __forceinline__ void cp_async_commit_group() {
  emulator::async_commit();
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  emulator::async_wait(kPending);
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 address) {
  emulator::ldmatrix(r, 4, false, address);
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], u32 address) {
  emulator::ldmatrix(r, 2, false, address);
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
  emulator::ldmatrix(r, 4, true, address);
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], u32 address) {
  emulator::ldmatrix(r, 2, true, address);
}

__device__ __forceinline__ Int2 ld_shared_int2(u32 address) {
  return emulator::load_shared<Int2>(address);
}

__device__ __forceinline__ Int4 ld_shared_int4(u32 address) {
  return emulator::load_shared<Int4>(address);
}

__device__ __forceinline__ u32 ld_shared_u32(u32 address) {
  return emulator::load_shared<u32>(address);
}

__device__ __forceinline__ void st_shared_u32(u32 address, u32 value) {
  emulator::store_shared(address, value);
}

__device__ __forceinline__ void st_shared_int4(u32 address, const Int4& v) {
  emulator::store_shared(address, v);
}

__device__ __forceinline__ void st_shared_pointer(u32 address, const void* pointer) {
  emulator::store_shared(address, pointer);
}

template <class T>
__device__ __forceinline__ const T* ld_shared_pointer(u32 address) {
  return emulator::load_shared<const T*>(address);
}

__device__ __forceinline__ Int4 ld_plan_int4(const int* pointer) {
  return *reinterpret_cast<const Int4*>(pointer);
}

__device__ __forceinline__ void st_global_int4(void* pointer, const Int4& v) {
  *static_cast<Int4*>(pointer) = v;
}

__device__ __forceinline__ Int4 ld_global_int4(const void* pointer) {
  return *static_cast<const Int4*>(pointer);
}

__device__ __forceinline__ Float4 ld_global_float4(const float* from) {
  return *reinterpret_cast<const Float4*>(from);
}

__device__ __forceinline__ void st_global_float4(float* to, const Float4& v) {
  *reinterpret_cast<Float4*>(to) = v;
}

__device__ __forceinline__ void st_shared_float4(u32 address, const Float4& v) {
  emulator::store_shared(address, v);
}

__device__ __forceinline__ void red_add_float4(float* to, const Float4& v) {
  Float4& at = *reinterpret_cast<Float4*>(to);
  at = Float4{at.x + v.x, at.y + v.y, at.z + v.z, at.w + v.w};
}

inline constexpr bool kHasStmatrix = __CUDA_ARCH__ >= 900;

__device__ __forceinline__ void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  const u32 r[4] = {r0, r1, r2, r3};
  emulator::stmatrix(address, r);
}

__device__ __forceinline__ void fence_proxy_async() {}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void bulk_red_add_f32(float* to, u32 from, u32 bytes) {
  emulator::bulk_add(to, from, bytes);
}

__device__ __forceinline__ void bulk_commit_group() {}

__device__ __forceinline__ void bulk_wait_read() {
  emulator::bulk_wait();
}

__device__ __forceinline__ void bulk_wait() {
  emulator::bulk_wait();
}
#endif

/// Subnormal numbers count as zero, as with .ftz.
__device__ __forceinline__ float flushed(float x) {
  return fabsf(x) < std::numeric_limits<float>::min() ? 0.0f : x;
}

__device__ __forceinline__ float exp2_approx(float x) {
  return flushed(exp2f(flushed(x)));
}

__device__ __forceinline__ float log2_approx(float x) {
  return flushed(log2f(flushed(x)));
}

__device__ __forceinline__ float rcp_approx(float x) {
  return flushed(1.0f / flushed(x));
}

}  // namespace treeattn
