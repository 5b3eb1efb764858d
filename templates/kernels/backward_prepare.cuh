// What the backward kernels want to know before they start: of every row delta and lse in base 2,
// with empty accumulators; and how the main kernel's work is dealt out.
//
// Work      a power of two of neighbouring lanes serves one row of one head; grid (1 + blocks of
//           rows + shared tiles, heads). The first block makes the schedule. Tiles are shared by
//           several blocks if they cost nearly what every slot of the chip has to do on average, or
//           if so many rows see them that query heads are better walked apart.
// Pipeline  none: rows are read once, in 16-byte chunks.
// Shared    none.
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

/// How the key tiles of one head are shared.
struct Sharing {
  int tiles;
  i64 rows;  ///< all that the tiles span
  i64 fair;  ///< half of the steps that every slot has if all are equally busy

  __device__ __forceinline__ explicit Sharing(const BackwardParams& p)
      : tiles(p.plan[p.key_tile_count]),
        rows(*reinterpret_cast<const i64*>(p.plan + p.key_rows)),
        fair(rows * p.heads / (2LL * p.slots * kConfig.block_m) + 1) {}

  /// Rows that tile `index` of the plan's order spans.
  __device__ __forceinline__ int rows_of(const BackwardParams& p, int index) const {
    const int slot = p.plan[p.key_order + 4LL * index];
    const Int4 b = ld_plan_int4(p.plan + p.key_tiles + static_cast<i64>(slot) * kKeyTileInts);
    return rows_spanned(KeyTile{b.x, b.y, b.z, b.w});
  }
  __device__ __forceinline__ static int steps(int rows) {
    return (rows + kConfig.block_m - 1) / kConfig.block_m;
  }
  __device__ __forceinline__ bool heads_apart(const BackwardParams& p, int rows) const {
    return p.heads_per_kv > 1 && octave(rows) >= p.heads_apart_octave;
  }
  __device__ __forceinline__ bool heavy(i64 steps) const {
    return steps > fair + fair / 4 * 3 && steps > kLeastSteps;
  }
  // Of all tiles of an octave or none, so that they are the first of the plan's order.
  __device__ __forceinline__ static i64 least_steps(const BackwardParams& p, int rows) {
    return rows == 0 ? 0 : static_cast<i64>(steps(1 << (octave(rows) - 1))) * p.heads_per_kv;
  }
  __device__ __forceinline__ bool shared(const BackwardParams& p, int index, int rows) const {
    if (index >= min(tiles, p.max_split)) return false;
    return heads_apart(p, rows) || heavy(least_steps(p, rows));
  }
  /// A quarter of what a slot has to do: whoever takes one last may be waited for.
  __device__ __forceinline__ bool must_not_be_last(const BackwardParams& p, int rows) const {
    return least_steps(p, rows) > fair / 2;
  }
  /// Shares of one that is.
  __device__ __forceinline__ int shares(const BackwardParams& p, int rows) const {
    const i64 all = static_cast<i64>(steps(rows)) * p.heads_per_kv;
    const i64 target = fair > kLeastSteps ? fair : kLeastSteps;
    const int wanted = heavy(all) ? static_cast<int>((all + target - 1) / target) : 1;
    if (!heads_apart(p, rows)) return wanted;
    return (wanted + p.heads_per_kv - 1) / p.heads_per_kv * p.heads_per_kv;
  }
};

/// Deals out the tiles that do not come in the order of memory: the first of the plan's. One warp.
__device__ __forceinline__ void make_schedule(const BackwardParams& p) {
  const Sharing sharing(p);
  const int lane = static_cast<int>(threadIdx.x);
  int* units = p.schedule + kScheduleHeaderInts;
  int split = 0;
  int unit_count = 0;
  for (int base = 0; base < p.max_split; base += 32) {
    const int index = base + lane;
    const int rows = index < sharing.tiles ? sharing.rows_of(p, index) : 0;
    const bool shared = sharing.shared(p, index, rows);
    const int shares = shared ? sharing.shares(p, rows) : 0;
    int sum = shares;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += below;
    }
    const u32 stops = ~__ballot_sync(kFullWarp, shared && unit_count + sum <= p.max_units);
    const int taken = stops == 0 ? 32 : __ffs(static_cast<int>(stops)) - 1;
    if (lane < taken) {
      const int first = unit_count + sum - shares;
      for (int share = 0; share < shares; ++share) {
        st_global_int4(units + (first + share) * kScheduleUnitInts, Int4{index, share, shares, 0});
      }
    }
    if (taken > 0) unit_count += __shfl_sync(kFullWarp, sum, taken - 1);
    split += taken;
    if (taken < 32) break;
  }
  const int most = min(sharing.tiles, split + p.max_heavy);
  int heavy = split;
  while (heavy < most) {
    const int index = heavy + lane;
    const bool early = index < most && sharing.must_not_be_last(p, sharing.rows_of(p, index));
    const u32 stops = ~__ballot_sync(kFullWarp, early);
    const int taken = stops == 0 ? 32 : __ffs(static_cast<int>(stops)) - 1;
    heavy += taken;
    if (taken < 32) break;
  }
  if (lane == 0) st_global_int4(p.schedule, Int4{split, unit_count, heavy, 0});
}

/// Empties the accumulators of one shared tile and kv head, the `item`-th.
__device__ __forceinline__ void clear_tile(const BackwardParams& p, int item) {
  const int tile = item / p.heads_kv;
  const Sharing sharing(p);
  if (tile >= sharing.tiles || !sharing.shared(p, tile, sharing.rows_of(p, tile))) return;
  const auto clear = [&](float* accumulator, int dims) {
    const int floats = kConfig.block_n * dims;
    float* to = accumulator + static_cast<i64>(item) * floats;
    for (int i = static_cast<int>(threadIdx.x) * 4; i < floats; i += kElementwiseThreads * 4) {
      st_global_float4(to + i, Float4{0.0f, 0.0f, 0.0f, 0.0f});
    }
  };
  clear(p.dk_accumulator, kConfig.padded_dim());
  clear(p.dv_accumulator, kConfig.padded_dim_v());
}

__device__ __forceinline__ void prepare(const BackwardParams& p) {
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0 && threadIdx.x < 32) make_schedule(p);
    return;
  }
  constexpr int kChunks = kConfig.head_dim_v / 8;
  constexpr int kLanes = ceil_pow2(kChunks);  // 32 at most
  constexpr int kRows = kElementwiseThreads / kLanes;
  const int row_blocks = (p.total_q + kRows - 1) / kRows;
  if (static_cast<int>(blockIdx.x) > row_blocks) {
    const int item =
        (static_cast<int>(blockIdx.x) - 1 - row_blocks) * p.heads + static_cast<int>(blockIdx.y);
    if (item < p.max_split * p.heads_kv) clear_tile(p, item);
    return;
  }
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
