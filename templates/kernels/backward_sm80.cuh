// Backward, sm80 family: mma.sync, ldmatrix, cp.async. The main kernel: dk, dv and dq's
// contributions.
//
// Work      one block = one key tile of the plan (block_n keys) x one kv head, or a share of its
//           steps where several blocks work on one (backward_prepare.cuh). K and V stay in shared
//           memory, dK and dV in registers; the block walks the query rows that its keys' intervals
//           span, [min_first, max_last], for each query head in turn.
// Steps     S = Q K^T, in partial steps with the interval test; P = exp2(S - lse) in between the
//           MMAs of dP = dO V^T - delta, which starts from -delta; dS = P dP; P and dS go through
//           shared memory (they change from accumulators to A operands; by stmatrix from sm_90
//           on); dV += P^T dO; dK += dS^T Q; dQ = dS K is added to a float32 accumulator in global
//           memory, which another kernel scales and converts.
// Pipeline  stages = 2: Q, dO, lse and delta of step i+1 fly from the end of dV in step i on:
//             wait(i) barrier S dP with P, dS | barrier | dV load(i+1) dK dQ
//           stages = 1: loads follow the last use, after one more barrier.
//           What step i+1 covers is worked out beside the end of dQ of step i.
// Masks     pairs of warps own groups of keys and know their bounds: a step's rows that see nothing
//           of a group cost its warps nothing; groups that all rows see skip the interval test. dQ
//           is one product where all groups are seen, else one for each that is.
// Warps     2 x warps/2 over S and dP (rows x keys) and over dQ (rows x dims); warps/2 x 2 over dK
//           and dV (keys x dims).
// dQ        where the bulk copy engine is (sm_90 on), through shared memory: one reduction a step,
//           sent by one thread; else by reductions from registers.
// Barriers  __syncthreads only.
// Registers dK and dV: block_n * (padded_dim + padded_dim_v) / (32 * warps) a thread, then S and
//           dP: 2 * block_m * block_n / (32 * warps).
// Shared    K (reused for dK) | V (reused for dV) | stages x Q | stages x dO | P | dS |
//           stages x {lse, delta} | {first, len} | bounds of groups | work | dQ; BackwardConfig has
//           the offsets.
#pragma once

#include "../device/softmax.cuh"
#include "../device/tile_copy.cuh"
#include "backward_work.cuh"

namespace treeattn {
namespace backward {

inline constexpr int kThreads = kConfig.threads();
inline constexpr int kStages = kConfig.stages;
inline constexpr int kSide = kGroups;  ///< warps along the longer side of the grid of warps
inline constexpr int kDim = kConfig.padded_dim();
inline constexpr int kDimV = kConfig.padded_dim_v();

// MMA tiles of a warp: rows of 16, columns in pairs of 8.
inline constexpr int kScoreRows = kM / 2 / 16;
inline constexpr int kScorePairs = kN / kSide / 16;
inline constexpr int kKeyRows = kN / kSide / 16;
inline constexpr int kDimPairs = (kDim / 16 + 1) / 2;
inline constexpr int kDimVPairs = (kDimV / 16 + 1) / 2;
inline constexpr int kDqRows = kM / 2 / 16;
inline constexpr int kDqPairs = (kDim / 16 + kSide - 1) / kSide;

static_assert(kM % 32 == 0 && kN % (16 * kSide) == 0, "every warp owns whole 16x16 MMA tiles");
static_assert(kStages == 1 || kStages == 2, "one or two Q/dO stages");

using QkRows = SwizzledRows<kDim / 8>;
using VRows = SwizzledRows<kDimV / 8>;
using PRows = SwizzledRows<kN / 8>;

/// How many of a warp's 16-dim tiles exist, of kTotal dealt out kEach by kEach. A constant where
/// they divide evenly: a branch around every MMA would keep the compiler from interleaving them.
template <int kTotal, int kParts, int kEach>
__device__ __forceinline__ int existing_pairs(int part) {
  return kTotal % kParts == 0 ? kEach : min(kEach, kTotal - part * kEach);
}

/// Lane patterns of ldmatrix. `A`: row lane % 16, chunk half lane / 16 (A operands as stored, B
/// operands transposed). `B`: row 0-7 twice then 8-15 twice, halves alternating (B operands as
/// stored, A operands transposed).
__device__ __forceinline__ u32 row_a(u32 lane) {
  return lane % 16;
}
__device__ __forceinline__ u32 half_a(u32 lane) {
  return lane / 16;
}
__device__ __forceinline__ u32 row_b(u32 lane) {
  return lane / 16 * 8 + lane % 8;
}
__device__ __forceinline__ u32 half_b(u32 lane) {
  return lane / 8 % 2;
}

template <int kTiles, int kPairs>
__device__ __forceinline__ void clear(float (&c)[kTiles][kPairs * 2][4], float to = 0.0f) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kPairs * 2; ++n) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = to;
  }
}

struct Nothing {
  __device__ __forceinline__ void operator()(int /*step*/) const {}
};

/// c += A B over kSteps 16-deep steps. `load_a` and `load_b` fetch operands by step and tile; of B,
/// `pairs` 16-wide tiles exist. `beside(step)` is work of other units, dealt out over the steps.
template <int kSteps, int kTiles, int kPairs, class LoadA, class LoadB, class Beside = Nothing>
__device__ __forceinline__ void multiply(float (&c)[kTiles][kPairs * 2][4], int pairs, LoadA load_a,
                                         LoadB load_b, Beside beside = {}) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    u32 a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_a(a[m], step, m);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      if (n < pairs) {
        u32 b[4];
        load_b(b, step, n);
        const u32 b0[2] = {b[0], b[1]};
        const u32 b1[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_m16n8k16(c[m][n * 2], a[m], b0);
          mma_m16n8k16(c[m][n * 2 + 1], a[m], b1);
        }
      }
    }
    beside(step);
  }
}

/// Where a warp stands in the three grids of warps.
struct Place {
  u32 smem, lane, warp;

  /// Made anew where it is used: addresses that follow from it would otherwise be hoisted out of
  /// the main loop, into registers that the accumulators need.
  __device__ __forceinline__ explicit Place(u32 base) : smem(base) {
    const u32 thread = thread_index_here();
    lane = thread % 32;
    warp = thread / 32;
  }
  __device__ __forceinline__ u32 score_row() const { return warp % 2 * (kM / 2); }
  __device__ __forceinline__ u32 score_key() const { return warp / 2 * (kN / kSide); }
  __device__ __forceinline__ u32 grad_key() const { return warp / 2 * (kN / kSide); }
  __device__ __forceinline__ u32 grad_half() const { return warp % 2; }
  __device__ __forceinline__ u32 dq_row() const { return warp % 2 * (kM / 2); }
  __device__ __forceinline__ u32 dq_part() const { return warp / 2; }
  /// Keys of a pair of warps: what one pair does not see, it does not compute.
  __device__ __forceinline__ u32 group() const { return warp / 2; }
};

/// A number for each of the warp's rows that this thread holds.
struct RowValues {
  float of[kScoreRows][2];

  __device__ __forceinline__ void load(const Place& at, u32 from) {
#pragma unroll
    for (int i = 0; i < kScoreRows * 2; ++i) {
      of[i / 2][i % 2] = __int_as_float(
          static_cast<int>(ld_shared_u32(from + (at.score_row() + at.lane / 4 + i * 8) * 4)));
    }
  }
};

/// c += X Y^T for this warp's rows and keys; X has row tiles of the step, Y the block's keys.
template <class Rows, int kSteps, class Beside = Nothing>
__device__ __forceinline__ void scores(float (&c)[kScoreRows][kScorePairs * 2][4], const Place& at,
                                       u32 x, u32 y, Beside beside = {}) {
  const u32 a_lane = Rows::lane_address(x, at.score_row() + row_a(at.lane), half_a(at.lane));
  const u32 b_lane = Rows::lane_address(y, at.score_key() + row_b(at.lane), half_b(at.lane));
  multiply<kSteps, kScoreRows, kScorePairs>(
      c, kScorePairs,
      [&](u32(&a)[4], int step, int m) {
        ldmatrix_x4(a, Rows::at(a_lane, step * 2) + m * 16 * Rows::kRowBytes);
      },
      [&](u32(&b)[4], int step, int n) {
        ldmatrix_x4(b, Rows::at(b_lane, step * 2) + n * 16 * Rows::kRowBytes);
      },
      beside);
}

/// c += P^T X for this warp's keys and half of the dims: P [rows][keys] and X [rows][dims] in
/// shared memory, both read transposed.
template <class Rows, int kPairs, class Beside = Nothing>
__device__ __forceinline__ void gradient(float (&c)[kKeyRows][kPairs * 2][4], const Place& at,
                                         u32 p, u32 x, int pairs, Beside beside = {}) {
  const u32 key_chunk = at.grad_key() / 8;
  const u32 dim_chunk = at.grad_half() * kPairs * 2;
  multiply<kM / 16, kKeyRows, kPairs>(
      c, pairs,
      [&](u32(&a)[4], int step, int m) {
        ldmatrix_x4_trans(
            a, p + PRows::offset(step * 16 + row_b(at.lane), key_chunk + m * 2 + half_b(at.lane)));
      },
      [&](u32(&b)[4], int step, int n) {
        ldmatrix_x4_trans(
            b, x + Rows::offset(step * 16 + row_a(at.lane), dim_chunk + n * 2 + half_a(at.lane)));
      },
      beside);
}

/// Hands out accumulators as f32: each lane's four values of a 16-dim pair lie side by side, so
/// that a quad moves 64 bytes at once; backward_sum.cuh undoes the exchange. `row` is the lane's
/// first row.
template <int kTiles, int kPairs, class Put>
__device__ __forceinline__ void put_rows(const float (&c)[kTiles][kPairs * 2][4], u32 row, int rows,
                                         int pairs, Put put) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = static_cast<int>(row) + m * 16 + r * 8;
      if (i >= rows) continue;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        if (n < pairs) {
          put(i, n,
              Float4{c[m][n * 2][r * 2], c[m][n * 2][r * 2 + 1], c[m][n * 2 + 1][r * 2],
                     c[m][n * 2 + 1][r * 2 + 1]});
        }
      }
    }
  }
}

/// c += dS K over kGroups groups of keys, from `group` on.
template <int kGroups>
__device__ __forceinline__ void multiply_groups(float (&c)[kDqRows][kDqPairs * 2][4],
                                                const Place& at, u32 ds_lane, int group) {
  constexpr int kGroupSteps = kGroupKeys / 16;
  const int pair0 = static_cast<int>(at.dq_part()) * kDqPairs;
  const int pairs = existing_pairs<kDim / 16, kSide, kDqPairs>(static_cast<int>(at.dq_part()));
  multiply<kGroups * kGroupSteps, kDqRows, kDqPairs>(
      c, pairs,
      [&](u32(&a)[4], int step, int m) {
        ldmatrix_x4(
            a, PRows::at(ds_lane, (group * kGroupSteps + step) * 2) + m * 16 * PRows::kRowBytes);
      },
      [&](u32(&b)[4], int step, int n) {
        const int key = (group * kGroupSteps + step) * 16;
        ldmatrix_x4_trans(
            b, at.smem + QkRows::offset(key + row_a(at.lane), (pair0 + n) * 2 + half_a(at.lane)));
      });
}

/// The warp's part of dQ = dS K over the groups of keys that are `seen` (a bit each), added to the
/// accumulator; `rows` of the step exist. `beside` is called where the last MMAs are waited for.
template <class Beside>
__device__ __forceinline__ void add_dq(const Place& at, float* dq, int row0, int rows, u32 seen,
                                       Beside beside) {
  float c[kDqRows][kDqPairs * 2][4];
  clear<kDqRows, kDqPairs>(c);
  const u32 ds_lane = PRows::lane_address(at.smem + kConfig.ds_offset(),
                                          at.dq_row() + row_a(at.lane), half_a(at.lane));
  // Most steps see all groups: one product without branches, whose loads run ahead.
  if (seen == (1u << kSide) - 1) {
    multiply_groups<kSide>(c, at, ds_lane, 0);
  } else {
#pragma unroll
    for (int group = 0; group < kSide; ++group) {
      if ((seen >> group & 1) != 0) multiply_groups<1>(c, at, ds_lane, group);
    }
  }
  beside();
  const u32 row = at.dq_row() + at.lane / 4;
  const int lane = static_cast<int>(at.lane % 4 * 4);
  const int pair0 = static_cast<int>(at.dq_part()) * kDqPairs;
  const int pairs = existing_pairs<kDim / 16, kSide, kDqPairs>(static_cast<int>(at.dq_part()));
  if constexpr (kConfig.bulk_dq) {
    // All rows of a thread are odd or all are even; those past the last are written and not sent.
    const int odd = (row0 + static_cast<int>(row)) & 1;
    const u32 stage = at.smem + kConfig.dq_offset() + (row * kDim + lane) * 4;
    put_rows<kDqRows, kDqPairs>(c, 0, kM, pairs, [&](int i, int n, const Float4& v) {
      st_shared_float4(stage + kConfig.dq_place(kDim, odd, pair0 + n) * 64 + i * kDim * 4, v);
    });
  } else {
    put_rows<kDqRows, kDqPairs>(c, row, rows, pairs, [&](int i, int n, const Float4& v) {
      const int place = kConfig.dq_place(kDim, row0 + i, pair0 + n);
      red_add_float4(dq + static_cast<i64>(i) * kDim + place * 16 + lane, v);
    });
  }
}

/// dQ on its way to the accumulator through shared memory. All but put_dq() is for one thread: it
/// notes where the dQ of a step goes, sends it after the barrier that the next step begins with,
/// and waits for it to be read before the barrier that the next dQ is written after.
struct DqMail {
  u32 smem;

  __device__ __forceinline__ u32 note() const {
    return smem + kConfig.dq_offset() + kConfig.dq_bytes();
  }
  __device__ __forceinline__ void write(const float* dq, int rows) const {
    st_shared_pointer(note(), dq);
    st_shared_u32(note() + 8, static_cast<u32>(rows * kDim * 4));
  }
  __device__ __forceinline__ void send() const {
#if __CUDA_ARCH__ >= 900
    const u32 bytes = ld_shared_u32(note() + 8);
    if (bytes == 0) return;
    bulk_red_add_f32(const_cast<float*>(ld_shared_pointer<float>(note())),
                     smem + kConfig.dq_offset(), bytes);
    bulk_commit_group();
#endif
  }
  __device__ __forceinline__ void wait_read() const {
#if __CUDA_ARCH__ >= 900
    bulk_wait_read();
#endif
  }
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    bulk_wait();
#endif
  }
};

/// Gives pairs of a row and a key that do not see each other the value `hidden`.
__device__ __forceinline__ void hide(float (&s)[kScoreRows][kScorePairs * 2][4], const Place& at,
                                     int row0, float hidden) {
  const int row = row0 + static_cast<int>(at.score_row() + at.lane / 4);
  const u32 mask = at.smem + kConfig.mask_offset() + (at.score_key() + at.lane % 4 * 2) * 4;
#pragma unroll
  for (int n = 0; n < kScorePairs * 2; ++n) {
    const Int2 first = ld_shared_int2(mask + n * 8 * 4);
    const Int2 len = ld_shared_int2(mask + (kN + n * 8) * 4);
#pragma unroll
    for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row + m * 16 + r * 8;
        if (static_cast<u32>(i - first.x) >= static_cast<u32>(len.x)) s[m][n][r * 2] = hidden;
        if (static_cast<u32>(i - first.y) >= static_cast<u32>(len.y)) s[m][n][r * 2 + 1] = hidden;
      }
    }
  }
}

/// Turns scores into P in place, a few of them at a time. Without softcap hidden scores are -inf by
/// now; with it they become zero afterwards.
struct Probabilities {
  float (&s)[kScoreRows][kScorePairs * 2][4];
  float (&cap)[kScoreRows][kScorePairs * 2][4];
  const BackwardParams& p;
  RowValues lse;

  /// The share of step `step` of kSteps.
  template <int kSteps>
  __device__ __forceinline__ void make(int step) {
    constexpr int kAll = kScoreRows * kScorePairs * 8;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (i < step * kAll / kSteps || i >= (step + 1) * kAll / kSteps) continue;
      const int m = i / (kScorePairs * 8);
      const int n = i / 4 % (kScorePairs * 2);
      const int e = i % 4;
      float& x = s[m][n][e];
      if constexpr (kConfig.softcap) {
        const float t = tanh_exp2(x * p.softcap_in);
        cap[m][n][e] = 1.0f - t * t;
        x = t;
      }
      x = exp2_approx(fmaf(x, p.scale_log2, -lse.of[m][e / 2]));
    }
  }
};

/// Writes accumulators of [rows][keys] as 16-bit pairs.
__device__ __forceinline__ void store_scores(const float (&s)[kScoreRows][kScorePairs * 2][4],
                                             const Place& at, u32 to) {
  if constexpr (kHasStmatrix) {
    const u32 lane =
        PRows::at(PRows::lane_address(to, at.score_row() + row_a(at.lane), half_a(at.lane)),
                  at.score_key() / 8);
#pragma unroll
    for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
      for (int n = 0; n < kScorePairs; ++n) {
        const float(&c0)[4] = s[m][n * 2];
        const float(&c1)[4] = s[m][n * 2 + 1];
        stmatrix_x4(PRows::at(lane, n * 2) + m * 16 * PRows::kRowBytes, pack2(c0[0], c0[1]),
                    pack2(c0[2], c0[3]), pack2(c1[0], c1[1]), pack2(c1[2], c1[3]));
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32 row = at.score_row() + at.lane / 4 + m * 16 + r * 8;
#pragma unroll
        for (int n = 0; n < kScorePairs * 2; ++n) {
          st_shared_u32(to + PRows::offset(row, at.score_key() / 8 + n) + at.lane % 4 * 4,
                        pack2(s[m][n][r * 2], s[m][n][r * 2 + 1]));
        }
      }
    }
  }
}

__device__ __forceinline__ void load_step(const BackwardParams& p, u32 smem, int head, int row0,
                                          int rows, int stage) {
  load_rows<kThreads, kM, kConfig.head_dim / 8, kDim / 8>(
      smem + kConfig.q_offset() + stage * kConfig.q_stage_bytes(),
      static_cast<const u16*>(p.q) + head * p.q_head_stride + row0 * p.q_token_stride,
      p.q_token_stride, rows);
  load_rows<kThreads, kM, kConfig.head_dim_v / 8, kDimV / 8>(
      smem + kConfig.do_offset() + stage * kConfig.do_stage_bytes(),
      static_cast<const u16*>(p.dout) + head * p.dout_head_stride + row0 * p.dout_token_stride,
      p.dout_token_stride, rows);
  const u32 stats = smem + kConfig.stats_offset() + stage * kConfig.stats_stage_bytes();
  const i64 row = static_cast<i64>(head) * p.total_q + row0;
  constexpr int kPasses = (2 * kM + kThreads - 1) / kThreads;
#pragma unroll
  for (int pass = 0; pass < kPasses;
       ++pass) {  // rows that are not there: Q = dO = 0, P = 1, dS = 0
    const int i = static_cast<int>(thread_index_here()) + pass * kThreads;
    const float* array = i < kM ? p.lse_log2 : p.delta;
    cp_async_4_if(2 * kM % kThreads == 0 || i < 2 * kM, stats + i * 4, array + row + i % kM,
                  i % kM < rows);
  }
}

/// Writes a gradient tile [keys][dims] from accumulators through shared memory at `smem`.
template <class Rows, int kPairs, int kDims, int kPadded>
__device__ __forceinline__ void store_gradient(const float (&c)[kKeyRows][kPairs * 2][4],
                                               const Place& at, u32 smem, float scale, u16* out,
                                               i64 row_stride, int keys) {
  const int pairs = min(kPairs, kPadded / 16 - static_cast<int>(at.grad_half()) * kPairs);
#pragma unroll
  for (int m = 0; m < kKeyRows; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32 row = at.grad_key() + m * 16 + r * 8 + at.lane / 4;
#pragma unroll
      for (int n = 0; n < kPairs * 2; ++n) {
        if (n / 2 < pairs) {
          st_shared_u32(smem + Rows::offset(row, at.grad_half() * kPairs * 2 + n) + at.lane % 4 * 4,
                        pack2(c[m][n][r * 2] * scale, c[m][n][r * 2 + 1] * scale));
        }
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = kDims / 8;
  for (int i = threadIdx.x; i < keys * kChunks; i += kThreads) {
    st_global_int4(out + (i / kChunks) * row_stride + i % kChunks * 8,
                   ld_shared_int4(smem + Rows::offset(i / kChunks, i % kChunks)));
  }
}

/// Adds a block's share of a gradient tile to the tile's f32 rows, which backward_sum.cuh reads.
template <int kPairs, int kPadded>
__device__ __forceinline__ void add_share(const float (&c)[kKeyRows][kPairs * 2][4],
                                          const Place& at, float* accumulator) {
  const int pair0 = static_cast<int>(at.grad_half()) * kPairs;
  float* to = accumulator + pair0 * 16 + at.lane % 4 * 4;
  put_rows<kKeyRows, kPairs>(
      c, at.grad_key() + at.lane / 4, kN, min(kPairs, kPadded / 16 - pair0),
      [&](int i, int n, const Float4& v) { red_add_float4(to + i * kPadded + n * 16, v); });
}

/// P and dS of one step, for the warp's rows and keys, into shared memory.
__device__ __forceinline__ void score_step(const BackwardParams& p, const Place& at, u32 q,
                                           u32 dout, u32 stats, int row0, int rows) {
  float s[kScoreRows][kScorePairs * 2][4];
  float cap[kScoreRows][kScorePairs * 2][4];
  float dp[kScoreRows][kScorePairs * 2][4];
  clear<kScoreRows, kScorePairs>(s);
  scores<QkRows, kDim / 16>(s, at, q, at.smem);
  const bool full = tile_full(group_bounds(at.smem, at.group()), row0, row0 + rows - 1);
  // Hidden before the exponentials, so that no branch stands between these and the next product.
  if (!kConfig.softcap && !full) hide(s, at, row0, neg_infinity());
  Probabilities to_p{s, cap, p, {}};
  to_p.lse.load(at, stats);
  // dP starts from -delta.
  RowValues delta;
  delta.load(at, stats + kM * 4);
#pragma unroll
  for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
    for (int i = 0; i < kScorePairs * 8; ++i) dp[m][i / 4][i % 4] = -delta.of[m][i % 4 / 2];
  }
  constexpr int kSteps = kDimV / 16;
  scores<VRows, kSteps>(dp, at, dout, at.smem + kConfig.v_offset(), [&](int step) {
    if (kConfig.softcap || kSteps < 4) return;
    if (step < kSteps - 1) to_p.template make<kSteps - 1>(step);
    if (step == kSteps - 2) store_scores(s, at, at.smem + kConfig.p_offset());
  });
  if (kConfig.softcap || kSteps < 4) {
    to_p.template make<1>(0);
    if (kConfig.softcap && !full) hide(s, at, row0, 0.0f);
    store_scores(s, at, at.smem + kConfig.p_offset());
  }
#pragma unroll
  for (int m = 0; m < kScoreRows; ++m) {
#pragma unroll
    for (int i = 0; i < kScorePairs * 8; ++i) {
      float& ds = dp[m][i / 4][i % 4];
      ds *= s[m][i / 4][i % 4];
      if constexpr (kConfig.softcap) ds *= cap[m][i / 4][i % 4];
    }
  }
  store_scores(dp, at, at.smem + kConfig.ds_offset());
}

/// K, V and the intervals of the block's keys.
__device__ __forceinline__ void load_keys(const BackwardParams& p, const Work& work, u32 smem) {
  const u16* k =
      static_cast<const u16*>(p.k) + work.kv_head * p.k_head_stride + work.key0 * p.k_token_stride;
  const u16* v =
      static_cast<const u16*>(p.v) + work.kv_head * p.v_head_stride + work.key0 * p.v_token_stride;
  load_rows<kThreads, kN, kConfig.head_dim / 8, kDim / 8>(smem, k, p.k_token_stride, work.keys);
  load_rows<kThreads, kN, kConfig.head_dim_v / 8, kDimV / 8>(smem + kConfig.v_offset(), v,
                                                             p.v_token_stride, work.keys);
  for (int i = threadIdx.x; i < 2 * kN; i += kThreads) {
    const i64 array = i < kN ? p.first : p.len;
    cp_async_4(smem + kConfig.mask_offset() + i * 4, p.plan + array + work.key0 + i % kN,
               i % kN < work.keys);
  }
}

/// The main loop over the rows of all heads.
__device__ __forceinline__ void walk_rows(const BackwardParams& p, u32 smem, Walk walk,
                                          float (&dk)[kKeyRows][kDimPairs * 2][4],
                                          float (&dv)[kKeyRows][kDimVPairs * 2][4]) {
  // Steps alternate between the stages; which one follows from how many are left.
  const auto stage_of = [](const Walk& at) { return kStages == 2 ? at.left & 1 : 0; };
  load_step(p, smem, walk.head, walk.row0, walk.rows(smem), stage_of(walk));
  cp_async_commit_group();
  // The step that follows is worked out where it is loaded, not kept.
  const auto load_following = [&] {
    Walk following = walk;
    // Past the last step nothing is read: the tiles become zeros.
    const bool exists = following.next(smem);
    load_step(p, smem, following.head, following.row0, exists ? following.rows(smem) : 0,
              stage_of(following));
    cp_async_commit_group();
  };
  const DqMail mail{smem};
  if (kConfig.bulk_dq && threadIdx.x == 0) mail.write(nullptr, 0);
  Span span(smem, walk.row0);
  bool more = false;
  do {
    cp_async_wait_group<0>();
    __syncthreads();
    if (kConfig.bulk_dq && thread_index_here() == 0) mail.send();
    const int stage = stage_of(walk);
    const u32 q = smem + kConfig.q_offset() + stage * kConfig.q_stage_bytes();
    const u32 dout = smem + kConfig.do_offset() + stage * kConfig.do_stage_bytes();
    const bool mine = (span.seen >> Place(smem).group() & 1) != 0;
    if (mine) {
      score_step(p, Place(smem), q, dout,
                 smem + kConfig.stats_offset() + stage * kConfig.stats_stage_bytes(), walk.row0,
                 span.rows);
    }
    if (kConfig.bulk_dq && thread_index_here() == 0) mail.wait_read();
    __syncthreads();
    if (mine) {
      const Place at(smem);
      const int half = static_cast<int>(at.grad_half());
      // The other stage is free since the barrier that this step began with. Loaded into from here,
      // where its address arithmetic runs beside a product, it is there in time.
      gradient<VRows, kDimVPairs>(dv, at, smem + kConfig.p_offset(), dout,
                                  existing_pairs<kDimV / 16, 2, kDimVPairs>(half), [&](int step) {
                                    if (kStages == 2 && step == kM / 16 - 1) load_following();
                                  });
      gradient<QkRows, kDimPairs>(dk, at, smem + kConfig.ds_offset(), q,
                                  existing_pairs<kDim / 16, 2, kDimPairs>(half));
    } else if (kStages == 2) {
      load_following();
    }
    if (kStages == 1) {
      __syncthreads();
      load_following();
    }
    const Span now = span;
    const Walk here = walk;
    const auto go_on = [&] {
      more = walk.next(smem);
      span = Span(smem, walk.row0);
    };
    if (p.dq_accumulator != nullptr) {
      float* dq = p.dq_accumulator + (static_cast<i64>(here.head) * p.total_q + here.row0) * kDim;
      add_dq(Place(smem), dq, here.row0, now.rows, now.seen, go_on);
      if constexpr (kConfig.bulk_dq) {
        fence_proxy_async();
        if (thread_index_here() == 0) mail.write(dq, now.rows);
      }
    } else {
      go_on();
    }
  } while (more);
  __syncthreads();
  if (kConfig.bulk_dq && threadIdx.x == 0) {
    mail.send();
    mail.wait();
  }
}

__device__ __forceinline__ void store_tiles(const BackwardParams& p, const Place& at,
                                            const float (&dk)[kKeyRows][kDimPairs * 2][4],
                                            const float (&dv)[kKeyRows][kDimVPairs * 2][4]) {
  const Work work = Work::load(at.smem);
  if (work.shared_tile >= 0) {
    const i64 slab = static_cast<i64>(work.shared_tile) * p.heads_kv + work.kv_head;
    add_share<kDimPairs, kDim>(dk, at, p.dk_accumulator + slab * kN * kDim);
    add_share<kDimVPairs, kDimV>(dv, at, p.dv_accumulator + slab * kN * kDimV);
    return;
  }
  store_gradient<QkRows, kDimPairs, kConfig.head_dim, kDim>(
      dk, at, at.smem, p.softmax_scale,
      static_cast<u16*>(p.dk) + work.kv_head * p.dk_head_stride + work.key0 * p.dk_token_stride,
      p.dk_token_stride, work.keys);
  store_gradient<VRows, kDimVPairs, kConfig.head_dim_v, kDimV>(
      dv, at, at.smem + kConfig.v_offset(), 1.0f,
      static_cast<u16*>(p.dv) + work.kv_head * p.dv_head_stride + work.key0 * p.dv_token_stride,
      p.dv_token_stride, work.keys);
}

__device__ __forceinline__ void run(const BackwardParams& p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const u32 smem = smem_address(shared_memory);
  Work work;
  bool invalid;
  if (!assign(p, work, invalid)) return;
  if (threadIdx.x == 0) work.store(smem);
  float dk[kKeyRows][kDimPairs * 2][4];
  float dv[kKeyRows][kDimVPairs * 2][4];
  clear<kKeyRows, kDimPairs>(dk, invalid ? quiet_nan() : 0.0f);
  clear<kKeyRows, kDimVPairs>(dv, invalid ? quiet_nan() : 0.0f);
  const bool seen = work.row_last >= 0 && work.begin < work.end;
  if (seen) {
    load_keys(p, work, smem);
    const Place at(smem);
    if (at.warp % 2 == 0) find_group_bounds(p, work, smem, at.group(), at.lane);
  }
  __syncthreads();  // the work and the groups' bounds are stored
  if (seen) walk_rows(p, smem, Walk(work, p.heads_per_kv), dk, dv);
  store_tiles(p, Place(smem), dk, dv);
}

}  // namespace backward

__device__ __forceinline__ void backward_sm80(const BackwardParams& p) {
  backward::run(p);
}

}  // namespace treeattn
