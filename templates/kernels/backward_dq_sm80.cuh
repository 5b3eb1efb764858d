// dq by blocks that own their query rows, sm80 family: for gradients that must not depend on the
// order of additions. Costs two products more than accumulating dq in the main kernel.
//
// Work      one block = one query tile of the plan (block_m rows) x one query head, heavy first.
// Steps     S = Q K^T; P = exp2(S - lse); dP = dO V^T; dS = P (dP - delta), which stays in
//           registers: accumulators of S are the A operand of dQ += dS K.
// Visits    every warp tests the bounds of 32 key tiles at once, one lane a tile; tiles nobody in
//           the block sees are never loaded, and a warp skips those that its own 16 rows do not
//           see.
// Pipeline  stages = 2: K, V and intervals of tile j+1 are in flight while tile j is computed;
//             wait(j) barrier load(j+1) S dP dQ
//           stages = 1: the load follows the last use, after one more barrier.
// Barriers  __syncthreads only.
// Registers dQ: padded_dim / 2 a thread; S and dP: block_n.
// Shared    Q (reused for dQ) | dO | stages x K | stages x V | stages x {first, len, bounds};
//           BackwardDqConfig has the offsets.
#pragma once

#include "../device/softmax.cuh"
#include "../device/tile_copy.cuh"

namespace treeattn {
namespace backward_dq {

inline constexpr int kM = kConfig.block_m;
inline constexpr int kN = kConfig.block_n;
inline constexpr int kThreads = kConfig.threads();
inline constexpr int kStages = kConfig.stages;
inline constexpr int kDim = kConfig.padded_dim();
inline constexpr int kDimV = kConfig.padded_dim_v();
inline constexpr int kTilesN = kN / 8;
inline constexpr int kTilesD = kDim / 8;

using QkRows = SwizzledRows<kDim / 8>;
using VRows = SwizzledRows<kDimV / 8>;

static_assert(kM == 16 * kConfig.warps, "a warp owns one 16-row MMA tile");
static_assert(kN % 16 == 0, "key tiles are made of 16-key MMA steps");

/// Hands out the key tiles that the block's rows may see, in ascending order. All threads agree.
struct Visits {
  const int* bounds;  ///< of the sequence's first tile
  int base, hi;       ///< tiles looked at: [base, base + 32)
  int first, last;    ///< rows of the block
  u32 bits;           ///< those not yet handed out

  __device__ __forceinline__ Visits(const BackwardParams& p, const QueryTile& tile)
      : bounds(p.plan + p.key_tiles + static_cast<i64>(tile.slot0) * kKeyTileInts),
        base(tile.lo),
        hi(tile.hi),
        first(tile.row0),
        last(tile.row0 + tile.rows - 1),
        bits(look()) {}

  __device__ __forceinline__ u32 look() const {
    const int t = base + static_cast<int>(threadIdx.x % 32);
    bool visit = false;
    if (t < hi) {
      const Int4 b = ld_plan_int4(bounds + static_cast<i64>(t) * kKeyTileInts);
      visit = !tile_skipped(KeyTile{b.x, b.y, b.z, b.w}, first, last);
    }
    return __ballot_sync(kFullWarp, visit);
  }

  /// The next tile, relative to the sequence's first, or -1.
  __device__ __forceinline__ int next() {
    while (bits == 0) {
      base += 32;
      if (base >= hi) return -1;
      bits = look();
    }
    const int bit = __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
    return base + bit;
  }
};

/// Copies key tile t of the sequence into a stage.
__device__ __forceinline__ void load_tile(const BackwardParams& p, const QueryTile& tile,
                                          int kv_head, u32 smem, int t, int stage) {
  const int key0 = tile.key0 + t * kN;
  const int valid = min(kN, tile.keys - t * kN);
  load_rows<kThreads, kN, kConfig.head_dim / 8, kDim / 8>(
      smem + kConfig.k_offset() + stage * kConfig.k_stage_bytes(),
      static_cast<const u16*>(p.k) + kv_head * p.k_head_stride + key0 * p.k_token_stride,
      p.k_token_stride, valid);
  load_rows<kThreads, kN, kConfig.head_dim_v / 8, kDimV / 8>(
      smem + kConfig.v_offset() + stage * kConfig.v_stage_bytes(),
      static_cast<const u16*>(p.v) + kv_head * p.v_head_stride + key0 * p.v_token_stride,
      p.v_token_stride, valid);
  const u32 mask = smem + kConfig.mask_offset() + stage * kConfig.mask_stage_bytes();
  constexpr int kPasses = (2 * kN + kThreads - 1) / kThreads;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {  // keys past the sequence: len = 0
    const int i = static_cast<int>(thread_index_here()) + pass * kThreads;
    const int* array = p.plan + (i < kN ? p.first : p.len);
    if (2 * kN % kThreads == 0 || i < 2 * kN) {
      cp_async_4(mask + i * 4, array + key0 + i % kN, i % kN < valid);
    }
  }
  if (threadIdx.x == 0) {
    cp_async_16(mask + 2 * kN * 4,
                p.plan + p.key_tiles + static_cast<i64>(tile.slot0 + t) * kKeyTileInts, true);
  }
}

/// c = X Y^T for the warp's 16 rows of X and all keys of Y.
template <class Rows, int kSteps>
__device__ __forceinline__ void scores(float (&c)[kTilesN][4], u32 x_lane, u32 y_lane) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 a[4];
    ldmatrix_x4(a, Rows::at(x_lane, step * 2));
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      u32 b[4];
      ldmatrix_x4(b, Rows::at(y_lane, step * 2) + n * 8 * Rows::kRowBytes);
      const u32 b0[2] = {b[0], b[1]};
      const u32 b1[2] = {b[2], b[3]};
      mma_m16n8k16(c[n], a, b0);
      mma_m16n8k16(c[n + 1], a, b1);
    }
  }
}

/// What a thread knows of its two rows.
struct Rows {
  int first;  ///< packed row of the warp's row lane / 4
  float lse[2], delta[2];
};

/// S becomes dS. `full`: every row of the warp sees every key.
__device__ __forceinline__ void score_gradients(float (&s)[kTilesN][4],
                                                const float (&dp)[kTilesN][4],
                                                const BackwardParams& p, const Rows& rows, u32 mask,
                                                bool full) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    Int2 first{0, 0};
    Int2 len{kIntMax, kIntMax};
    if (!full) {
      first = ld_shared_int2(mask + n * 8 * 4);
      len = ld_shared_int2(mask + (kN + n * 8) * 4);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x = s[n][r * 2 + e];
        float slope = 1.0f;
        if constexpr (kConfig.softcap) {
          x = tanh_exp2(x * p.softcap_in);
          slope = 1.0f - x * x;
        }
        const float probability = exp2_approx(fmaf(x, p.scale_log2, -rows.lse[r]));
        const float ds = probability * (dp[n][r * 2 + e] - rows.delta[r]) * slope;
        const int i = rows.first + r * 8 - (e == 0 ? first.x : first.y);
        const bool sees = full || static_cast<u32>(i) < static_cast<u32>(e == 0 ? len.x : len.y);
        s[n][r * 2 + e] = sees ? ds : 0.0f;
      }
    }
  }
}

/// dq += dS K: K's rows are the depth of the product, read transposed.
__device__ __forceinline__ void multiply_ds_k(const float (&ds)[kTilesN][4],
                                              float (&dq)[kTilesD][4], u32 k_lane) {
#pragma unroll
  for (int step = 0; step < kN / 16; ++step) {
    const u32 a[4] = {pack2(ds[step * 2][0], ds[step * 2][1]),
                      pack2(ds[step * 2][2], ds[step * 2][3]),
                      pack2(ds[step * 2 + 1][0], ds[step * 2 + 1][1]),
                      pack2(ds[step * 2 + 1][2], ds[step * 2 + 1][3])};
#pragma unroll
    for (int n = 0; n < kTilesD; n += 2) {
      u32 b[4];
      ldmatrix_x4_trans(b, QkRows::at(k_lane, n) + step * 16 * QkRows::kRowBytes);
      const u32 b0[2] = {b[0], b[1]};
      const u32 b1[2] = {b[2], b[3]};
      mma_m16n8k16(dq[n], a, b0);
      mma_m16n8k16(dq[n + 1], a, b1);
    }
  }
}

/// Scales, rounds and stores the warp's rows through shared memory, where its Q was.
__device__ __forceinline__ void store_rows(const BackwardParams& p, const QueryTile& tile, int head,
                                           u32 smem, const float (&dq)[kTilesD][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kTilesD; ++n) {
      st_shared_u32(smem + QkRows::offset(warp_row + r * 8 + lane / 4, n) + lane % 4 * 4,
                    pack2(dq[n][r * 2] * p.softmax_scale, dq[n][r * 2 + 1] * p.softmax_scale));
    }
  }
  __syncwarp();
  constexpr int kChunks = kConfig.head_dim / 8;
  u16* out = static_cast<u16*>(p.dq) + head * p.dq_head_stride +
             (tile.row0 + static_cast<i64>(warp_row)) * p.dq_token_stride;
  const int rows = min(16, tile.rows - warp_row);
  for (int i = lane; i < rows * kChunks; i += 32) {
    st_global_int4(out + (i / kChunks) * p.dq_token_stride + i % kChunks * 8,
                   ld_shared_int4(smem + QkRows::offset(warp_row + i / kChunks, i % kChunks)));
  }
}

/// The main loop over the visited tiles.
__device__ __forceinline__ void walk_keys(const BackwardParams& p, const QueryTile& tile, int head,
                                          u32 smem, float (&dq)[kTilesD][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int kv_head = head / p.heads_per_kv;
  const int warp_first = tile.row0 + warp_row;
  const int warp_last = min(warp_first + 16, tile.row0 + tile.rows) - 1;
  Rows rows;
  rows.first = warp_first + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = rows.first + r * 8 <= warp_last;
    const i64 at = static_cast<i64>(head) * p.total_q + (exists ? rows.first + r * 8 : tile.row0);
    rows.lse[r] = p.lse_log2[at];
    rows.delta[r] = p.delta[at];
  }
  const u32 q_lane = QkRows::lane_address(smem, warp_row + lane % 16, lane / 16);
  const u32 do_lane =
      VRows::lane_address(smem + kConfig.do_offset(), warp_row + lane % 16, lane / 16);
  const u32 key_row = lane / 16 * 8 + lane % 8;
  const u32 k_lane = QkRows::lane_address(smem + kConfig.k_offset(), key_row, lane / 8 % 2);
  const u32 v_lane = VRows::lane_address(smem + kConfig.v_offset(), key_row, lane / 8 % 2);
  const u32 k_trans = QkRows::lane_address(smem + kConfig.k_offset(), lane % 16, lane / 16);

  Visits visits(p, tile);
  int current = visits.next();
  if (current < 0) return;
  load_tile(p, tile, kv_head, smem, current, 0);
  cp_async_commit_group();
  int stage = 0;
  while (current >= 0) {
    const int following = visits.next();
    cp_async_wait_group<0>();
    __syncthreads();
    if (kStages == 2 && following >= 0) {
      load_tile(p, tile, kv_head, smem, following, stage ^ 1);
    }
    cp_async_commit_group();
    const u32 mask = smem + kConfig.mask_offset() + stage * kConfig.mask_stage_bytes();
    const Int4 b = ld_shared_int4(mask + 2 * kN * 4);
    const KeyTile bounds{b.x, b.y, b.z, b.w};
    if (warp_last >= warp_first && !tile_skipped(bounds, warp_first, warp_last)) {
      float s[kTilesN][4];
      float dp[kTilesN][4];
      scores<QkRows, kDim / 16>(s, q_lane, k_lane + stage * kConfig.k_stage_bytes());
      scores<VRows, kDimV / 16>(dp, do_lane, v_lane + stage * kConfig.v_stage_bytes());
      score_gradients(s, dp, p, rows, mask + lane % 4 * 8,
                      tile_full(bounds, warp_first, warp_last));
      multiply_ds_k(s, dq, k_trans + stage * kConfig.k_stage_bytes());
    }
    if (kStages == 1) {
      __syncthreads();
      if (following >= 0) load_tile(p, tile, kv_head, smem, following, 0);
      cp_async_commit_group();
    }
    if (kStages == 2) stage ^= 1;
    current = following;
  }
}

__device__ __forceinline__ void run(const BackwardParams& p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const u32 smem = smem_address(shared_memory);
  const int index = static_cast<int>(blockIdx.x) / p.heads;
  const int head = static_cast<int>(blockIdx.x) - index * p.heads;
  if (index >= p.plan[p.query_tile_count]) return;
  const int* record = p.plan + p.query_tiles + static_cast<i64>(index) * kQueryTileInts;
  const Int4 a = ld_plan_int4(record);
  const Int4 b = ld_plan_int4(record + 4);
  const QueryTile tile{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  float dq[kTilesD][4];
  const float start = tile.work < 0 ? quiet_nan() : 0.0f;
#pragma unroll
  for (int n = 0; n < kTilesD; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = start;
  if (tile.work > 0) {
    load_rows<kThreads, kM, kConfig.head_dim / 8, kDim / 8>(
        smem, static_cast<const u16*>(p.q) + head * p.q_head_stride + tile.row0 * p.q_token_stride,
        p.q_token_stride, tile.rows);
    load_rows<kThreads, kM, kConfig.head_dim_v / 8, kDimV / 8>(smem + kConfig.do_offset(),
                                                               static_cast<const u16*>(p.dout) +
                                                                   head * p.dout_head_stride +
                                                                   tile.row0 * p.dout_token_stride,
                                                               p.dout_token_stride, tile.rows);
    cp_async_commit_group();
    walk_keys(p, tile, head, smem, dq);
    cp_async_wait_group<0>();  // Q may still fly when no tile was visited
    __syncthreads();
  }
  store_rows(p, tile, head, smem, dq);
}

}  // namespace backward_dq

__device__ __forceinline__ void backward_dq_sm80(const BackwardParams& p) {
  backward_dq::run(p);
}

}  // namespace treeattn
