// templates/device/ptx_sm90.cuh for the emulator: the same functions, without PTX.
#pragma once

#include "ptx_sm80.cuh"

namespace treeattn {

__device__ __forceinline__ void stmatrix_x4_trans(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  const u32 r[4] = {r0, r1, r2, r3};
  emulator::stmatrix(address, r, true);
}

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

}  // namespace treeattn
