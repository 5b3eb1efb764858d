// What the backward kernels want to know before they start: of every row delta and lse in base 2,
// with an empty dq accumulator; and how the main kernel's work is dealt out.
//
// Work      a power of two of neighbouring lanes serves one row of one head; grid (1 + rows,
//           heads). The first block makes the schedule: tiles that cost a quarter more than what
//           every slot of the chip has to do on average are shared by several blocks.
// Pipeline  none: rows are read once, in 16-byte chunks.
// Shared    a few words for the schedule's sums.
#pragma once

#include "../device/softmax.cuh"
#include "../device/tile_copy.cuh"

namespace treeattn {
namespace backward {

/// Sum over the lanes that serve one row.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

/// The dot product of eight pairs of 16-bit numbers.
__device__ __forceinline__ float dot8(const Int4& a, const Int4& b) {
  const u32 x[4] = {static_cast<u32>(a.x), static_cast<u32>(a.y), static_cast<u32>(a.z),
                    static_cast<u32>(a.w)};
  const u32 y[4] = {static_cast<u32>(b.x), static_cast<u32>(b.y), static_cast<u32>(b.z),
                    static_cast<u32>(b.w)};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(unpack_low(x[i]), unpack_low(y[i]), sum);
    sum = fmaf(unpack_high(x[i]), unpack_high(y[i]), sum);
  }
  return sum;
}

/// Steps of the main kernel for the tile at `index` in the plan's order, for one query head.
__device__ __forceinline__ int tile_steps(const BackwardParams& p, int index) {
  const int slot = p.plan[p.key_order + 4LL * index];
  const Int4 bounds = ld_plan_int4(p.plan + p.key_tiles + static_cast<i64>(slot) * kKeyTileInts);
  return bounds.y < 0 ? 0 : (bounds.y - bounds.x + kConfig.block_m) / kConfig.block_m;
}

/// Sum over the block.
__device__ __forceinline__ i64 block_sum(i64 x) {
  constexpr int kWarps = kElementwiseThreads / 32;
  __shared__ i64 sums[kWarps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  i64 total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

/// Deals out the tiles in their order, heaviest first. One block.
__device__ __forceinline__ void make_schedule(const BackwardParams& p) {
  const int tiles = p.plan[p.key_tile_count];
  i64 mine = 0;
  for (int i = threadIdx.x; i < tiles; i += kElementwiseThreads) mine += tile_steps(p, i);
  const i64 total = block_sum(mine);  // of one query head
  if (threadIdx.x >= 32) return;
  // Half of what a slot has to do if all are equally busy.
  const i64 fair = total * p.heads / (2LL * p.slots) + 1;
  const i64 target = fair > kLeastSteps ? fair : kLeastSteps;
  const int lane = static_cast<int>(threadIdx.x);
  int* units = p.schedule + kScheduleHeaderInts;
  int* split_tiles = units + p.max_units * kScheduleUnitInts;
  int split = 0;
  int unit_count = 0;
  for (int base = 0; base < p.max_split; base += 32) {
    const int index = base + lane;
    int shares = 1;
    if (index < min(tiles, p.max_split)) {
      const i64 steps = static_cast<i64>(tile_steps(p, index)) * p.heads_per_kv;
      if (steps > 2 * fair + fair / 2) shares = static_cast<int>((steps + target - 1) / target);
    }
    int sum = shares;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += below;
    }
    // Tiles of a bin of the plan's order differ a little: the first that is whole ends the list.
    const bool fits = shares > 1 && unit_count + sum <= p.max_units;
    const u32 stops = ~__ballot_sync(kFullWarp, fits);
    const int taken = stops == 0 ? 32 : __ffs(static_cast<int>(stops)) - 1;
    if (lane < taken) {
      const int first = unit_count + sum - shares;
      split_tiles[index * kScheduleTileInts] = first;
      split_tiles[index * kScheduleTileInts + 1] = shares;
      for (int share = 0; share < shares; ++share) {
        int* unit = units + (first + share) * kScheduleUnitInts;
        unit[0] = index;
        unit[1] = share;
        unit[2] = shares;
        unit[3] = 0;
      }
    }
    if (taken > 0) unit_count += __shfl_sync(kFullWarp, sum, taken - 1);
    split += taken;
    if (taken < 32) break;
  }
  if (lane != 0) return;
  // As many kv heads together as it takes for the heaviest whole tile not to outlast the others.
  const i64 heaviest = split < tiles ? tile_steps(p, split) : 0;
  const i64 needed = total > 0 ? (heaviest * p.slots + total - 1) / total : 1;
  const i64 most = needed < p.heads_kv ? needed : p.heads_kv;
  const int together = most > p.fitting_kv_heads ? static_cast<int>(most) : p.fitting_kv_heads;
  const int groups = max(1, p.heads_kv / max(together, 1));
  p.schedule[0] = split;
  p.schedule[1] = unit_count;
  p.schedule[2] = (p.heads_kv + groups - 1) / groups;
  p.schedule[3] = 0;
}

__device__ __forceinline__ void prepare(const BackwardParams& p) {
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0) make_schedule(p);
    return;
  }
  constexpr int kChunks = kConfig.head_dim_v / 8;
  constexpr int kLanes = ceil_pow2(kChunks);  // 32 at most
  constexpr int kRows = kElementwiseThreads / kLanes;
  constexpr int kDqChunks = kConfig.padded_dim() / 4;
  const int row = static_cast<int>(blockIdx.x - 1) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool exists = row < p.total_q;
  float sum = 0.0f;
  if (exists && lane < kChunks) {
    const u16* out =
        static_cast<const u16*>(p.out) + row * p.out_token_stride + head * p.out_head_stride;
    const u16* dout =
        static_cast<const u16*>(p.dout) + row * p.dout_token_stride + head * p.dout_head_stride;
    sum = dot8(ld_global_int4(out + lane * 8), ld_global_int4(dout + lane * 8));
  }
  sum = lanes_sum<kLanes>(sum);
  if (!exists) return;
  const i64 at = static_cast<i64>(head) * p.total_q + row;
  if (lane == 0) {
    const float lse = p.lse[at];
    const bool sees = lse != neg_infinity();
    if (sees && p.dlse != nullptr) sum -= p.dlse[at];
    p.lse_log2[at] = sees ? lse * kLog2E : -neg_infinity();
    p.delta[at] = sees ? sum : 0.0f;
  }
  if (p.dq_accumulator == nullptr) return;
  float* dq = p.dq_accumulator + at * kConfig.padded_dim();
  for (int i = lane; i < kDqChunks; i += kLanes) {
    st_global_float4(dq + i * 4, Float4{0.0f, 0.0f, 0.0f, 0.0f});
  }
}

}  // namespace backward
}  // namespace treeattn
