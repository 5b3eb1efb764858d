// templates/device/ptx_sm90.cuh for the emulator: the same functions, without PTX.
#pragma once

#include "ptx_sm80.cuh"

namespace treeattn {

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}

__device__ __forceinline__ void fence_mbarrier_init() {}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  emulator::mbarrier_arrive(barrier, 0);
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}

__device__ __forceinline__ void cp_async_mbarrier_arrive(u32 barrier) {
  emulator::mbarrier_arrive_after_copies(barrier);
}

__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  emulator::mbarrier_wait(barrier, parity);
}

__device__ __forceinline__ void named_barrier_sync(u32 id, u32 threads) {
  emulator::named_barrier(id, threads, true);
}

__device__ __forceinline__ void named_barrier_arrive(u32 id, u32 threads) {
  emulator::named_barrier(id, threads, false);
}

__device__ __forceinline__ void prefetch_tensormap(const TensorMap&) {}

__device__ __forceinline__ void tensor_load(u32 to, const TensorMap& map, u32 barrier, int dim,
                                            int head, int token) {
  emulator::tensor_load(to, &map, barrier, dim, head, token);
}

__device__ __forceinline__ void wgmma_fence() {}

__device__ __forceinline__ void wgmma_commit_group() {
  emulator::wgmma_commit();
}

template <int kSize>
__device__ __forceinline__ void pin(float (&)[kSize]) {}

template <int kPending, int kSize>
__device__ __forceinline__ void wgmma_wait_group(float (&)[kSize]) {
  emulator::wgmma_wait(kPending);
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {}

__host__ __device__ constexpr u64 matrix_layout(u32 leading_bytes, u32 stride_bytes) {
  return static_cast<u64>(leading_bytes >> 4) << 16 | static_cast<u64>(stride_bytes >> 4) << 32 |
         static_cast<u64>(1) << 62;
}

__device__ __forceinline__ u64 matrix_descriptor(u32 address, u64 layout) {
  return layout | static_cast<u64>((address & 0x3ffff) >> 4);
}

}  // namespace treeattn
