// Backward, sm90 family: wgmma, TMA, mbarriers, warp specialisation. The main kernel: dk, dv and
// dq's contributions. The kernels before and after it are those of the sm80 family.
//
// Work      as in backward_sm80.cuh: one block = one key tile x one kv head, or a share of its
//           steps; it walks the query rows that its keys' intervals span, head by head.
// Roles     warp 0 loads K, V, Q, dO, lse and delta; warp 1 sends dQ; 2 consumer warpgroups own 64
//           keys each. A step that no key of the block is seen in is nobody's; a warpgroup whose
//           keys are not seen in a step only helps with dQ.
// Steps     transposed: S^T = K Q^T, P^T = exp2(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T -
//           delta). A thread holds two keys, so their intervals stay in registers; P^T and dS^T are
//           A operands as they are: dV += P^T dO, dK += dS^T Q. For dQ = dS K, dS goes through
//           shared memory, transposed by stmatrix; each warpgroup makes one chunk of 64 dims of all
//           rows.
//
//   loader        K V Q0 dO0 | Q1 dO1 | Q2 dO2 | ...
//   warpgroup     S0 dP0 P0 dV0 dS0 | dQ0 dK0 | S1 dP1 P1 dV1 dS1 | dQ1 dK1 | ... | dk dv
//                               barrier, both have dS
//                 dV runs beside dS; dK beside dQ's way out
//   sender                              dQ0                          dQ1 ...
//
// Barriers  mbarriers: K full, V full; Q and dO full / empty per stage (full: the loader, with the
//           bytes and 32 lanes' lse or delta); dQ full (a consumer warp each) and empty (the
//           sender); tails, of K or Q and of V or dO: rows behind which another sequence's tokens
//           are overwritten with zeros before the full barrier is told.
//           Named barrier 1: dS is written. dS has two stages: whoever writes the next one has
//           seen both warpgroups past the MMAs that read the one before.
// Registers dK and dV: (head_dim + head_dim_v) / 2 a thread; S and dP: block_m / 2 each; their
//           packed forms half of that; dQ: 32. The producers' warpgroup gives its registers away.
// Shared    K | V | stages x Q | stages x dO | 2 x dS | dQ | stages x {lse, delta} | bounds of
//           groups | work | mbarriers; BackwardSm90Config has the offsets.
#pragma once

#include "../device/sm90.cuh"
#include "../device/softmax.cuh"
#include "backward_work.cuh"

namespace treeattn {
namespace backward {

inline constexpr int kStages = kConfig.stages;
inline constexpr int kConsumerWarps = kConfig.warps;
inline constexpr int kChunksQk = kConfig.chunks();
inline constexpr int kChunksV = kConfig.chunks_v();
inline constexpr int kStepsQk = (kConfig.head_dim + 15) / 16;
inline constexpr int kStepsV = (kConfig.head_dim_v + 15) / 16;
inline constexpr int kStepsRows = kM / 16;
inline constexpr int kDim = kConfig.padded_dim();
inline constexpr int kDimV = kConfig.padded_dim_v();
inline constexpr int kScores = kM / 2;  ///< S accumulators of a thread
inline constexpr int kChunkDims = BackwardSm90Config::kChunkDims;
inline constexpr int kRowBytes = BackwardSm90Config::kRowBytes;

static_assert(kM == 64 && kN == 128 && kGroups == 2, "dQ has 64 rows; a warpgroup owns 64 keys");
static_assert(kChunksQk == 2, "each warpgroup makes a chunk of dQ");
static_assert(!kConfig.softcap, "its derivative has no registers");
static_assert(128 * kConfig.producer_registers() +
                      32 * kConfig.warps * kConfig.consumer_registers() <=
                  kConfig.threads() * kConfig.registers(),
              "who asks for more registers than there are waits forever");

/// Rows of 128 bytes, eight to a group: K-major operands.
inline constexpr u64 kMajorLayout = matrix_layout(16, 8 * kRowBytes);

/// Shared memory by name.
struct Smem {
  u32 base;

  __device__ __forceinline__ u32 k() const { return base; }
  __device__ __forceinline__ u32 v() const { return base + kConfig.v_offset(); }
  __device__ __forceinline__ u32 q(int stage) const {
    return base + kConfig.q_offset() + stage * kConfig.q_stage_bytes();
  }
  __device__ __forceinline__ u32 dout(int stage) const {
    return base + kConfig.do_offset() + stage * kConfig.do_stage_bytes();
  }
  __device__ __forceinline__ u32 ds(int stage) const {
    return base + kConfig.ds_offset() + stage * kConfig.ds_stage_bytes();
  }
  __device__ __forceinline__ u32 dq() const { return base + kConfig.dq_offset(); }
  __device__ __forceinline__ u32 lse(int stage) const {
    return base + kConfig.stats_offset() + stage * kConfig.stats_stage_bytes();
  }
  __device__ __forceinline__ u32 delta(int stage) const { return lse(stage) + kM * 4; }
  __device__ __forceinline__ u32 barrier(int index) const {
    return base + kConfig.barrier_offset() + index * 8;
  }
  __device__ __forceinline__ u32 tail(int which) const { return barrier(which); }
  __device__ __forceinline__ u32 k_full() const { return barrier(2); }
  __device__ __forceinline__ u32 v_full() const { return barrier(3); }
  __device__ __forceinline__ u32 dq_full() const { return barrier(4); }
  __device__ __forceinline__ u32 dq_empty() const { return barrier(5); }
  __device__ __forceinline__ u32 q_full(int stage) const { return barrier(6 + stage); }
  __device__ __forceinline__ u32 q_empty(int stage) const { return barrier(6 + kStages + stage); }
  __device__ __forceinline__ u32 do_full(int stage) const {
    return barrier(6 + 2 * kStages + stage);
  }
  __device__ __forceinline__ u32 do_empty(int stage) const {
    return barrier(6 + 3 * kStages + stage);
  }
};

/// Calls body(walk, span) for every step in which a key of the block is seen: the same steps in
/// every role.
template <class Body>
__device__ __forceinline__ void for_each_step(const BackwardParams& p, u32 smem, Body body) {
  Walk walk(Work::load(smem), p.heads_per_kv);
#pragma unroll 1
  do {
    const Span span(smem, walk.row0);
    if (span.seen != 0) body(walk, span);
  } while (walk.next(smem));
}

/// Warp 0.
struct Loader {
  const BackwardSm90Params& p;
  Smem smem;
  int lane;
  u32 tail_parity[2] = {0, 0};

  /// Begins to load kRows rows, of which `valid` exist. Those behind them must be finished.
  template <int kRows, int kChunks>
  __device__ __forceinline__ void begin(int tail, u32 to, const TensorMap& map, u32 full, int head,
                                        int token, int valid) const {
    const u32 arrives_at = valid < kRows ? smem.tail(tail) : full;
    if (lane == 0) mbarrier_arrive_expect_tx(arrives_at, kRows * kChunks * kRowBytes);
    __syncwarp();
    if (lane < kChunks) {
      tensor_load(to + lane * kRows * kRowBytes, map, arrives_at, lane * kChunkDims, head, token);
    }
  }

  /// Zeros behind the valid rows: what another sequence's tokens hold times zero may still be NaN.
  template <int kRows, int kChunks>
  __device__ __forceinline__ void finish(int tail, u32 to, u32 full, int valid) {
    if (valid >= kRows) return;
    mbarrier_wait(smem.tail(tail), tail_parity[tail]);
    tail_parity[tail] ^= 1;
#pragma unroll 1
    for (int row = valid + lane / 8; row < kRows; row += 4) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        st_shared_int4(to + (chunk * kRows + row) * kRowBytes + lane % 8 * 16, Int4{0, 0, 0, 0});
      }
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(full);
  }

  /// Of rows that are not there: zeros, so that P = 1 meets dO = 0, and dS = 0.
  __device__ __forceinline__ void load_rows_stats(u32 to, const float* from, int rows,
                                                  u32 full) const {
    for (int i = lane; i < kM; i += 32) cp_async_4(to + i * 4, from + i, i < rows);
    cp_async_mbarrier_arrive(full);
  }

  __device__ __forceinline__ void run() {
    const Work work = Work::load(smem.base);
    begin<kN, kChunksQk>(0, smem.k(), p.k, smem.k_full(), work.kv_head * p.k_head_step, work.key0,
                         work.keys);
    begin<kN, kChunksV>(1, smem.v(), p.v, smem.v_full(), work.kv_head * p.v_head_step, work.key0,
                        work.keys);
    finish<kN, kChunksQk>(0, smem.k(), smem.k_full(), work.keys);
    finish<kN, kChunksV>(1, smem.v(), smem.v_full(), work.keys);
    Ring<kStages> ring;
    for_each_step(p.f, smem.base, [&](const Walk& walk, const Span& span) {
      const int stage = ring.stage;
      const i64 row = static_cast<i64>(walk.head) * p.f.total_q + walk.row0;
      mbarrier_wait(smem.q_empty(stage), ring.parity ^ 1);
      begin<kM, kChunksQk>(0, smem.q(stage), p.q, smem.q_full(stage), walk.head * p.q_head_step,
                           walk.row0, span.rows);
      load_rows_stats(smem.lse(stage), p.f.lse_log2 + row, span.rows, smem.q_full(stage));
      mbarrier_wait(smem.do_empty(stage), ring.parity ^ 1);
      begin<kM, kChunksV>(1, smem.dout(stage), p.dout, smem.do_full(stage),
                          walk.head * p.dout_head_step, walk.row0, span.rows);
      load_rows_stats(smem.delta(stage), p.f.delta + row, span.rows, smem.do_full(stage));
      finish<kM, kChunksQk>(0, smem.q(stage), smem.q_full(stage), span.rows);
      finish<kM, kChunksV>(1, smem.dout(stage), smem.do_full(stage), span.rows);
      ring.advance();
    });
    // A block whose steps see nothing waits for V nowhere else; what is under way when it ends
    // would land in the next one's memory.
    mbarrier_wait(smem.v_full(), 0);
  }
};

/// One lane of warp 1, if the block contributes to dq.
struct Sender {
  const BackwardSm90Params& p;
  Smem smem;

  __device__ __forceinline__ void run() const {
    u32 parity = 0;
    for_each_step(p.f, smem.base, [&](const Walk& walk, const Span& span) {
      mbarrier_wait(smem.dq_full(), parity);
      parity ^= 1;
      const i64 row = static_cast<i64>(walk.head) * p.f.total_q + walk.row0;
      bulk_red_add_f32(p.f.dq_accumulator + row * kDim, smem.dq(), span.rows * kDim * 4);
      bulk_commit_group();
      bulk_wait_read();
      mbarrier_arrive(smem.dq_empty());
    });
    bulk_wait();
  }
};

/// A consumer warpgroup.
struct Consumer {
  const BackwardSm90Params& p;
  Smem smem;
  int warpgroup;
  int warp;  ///< of the warpgroup
  int lane;

  __device__ __forceinline__ Consumer(const BackwardSm90Params& params, Smem shared)
      : p(params),
        smem(shared),
        warpgroup(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 128) - 1, 0)),
        warp(static_cast<int>(threadIdx.x / 32 % 4)),
        lane(static_cast<int>(threadIdx.x % 32)) {}

  /// This thread's first key, of two that are eight apart, in the tile.
  __device__ __forceinline__ int key() const { return warpgroup * 64 + warp * 16 + lane / 4; }

  /// After all lanes' reads.
  __device__ __forceinline__ void release(u32 barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  /// c = this warpgroup's keys times the step's rows, issued: `keys` and `rows` have kSteps times
  /// 16 dims.
  template <int kSteps>
  __device__ __forceinline__ void issue_scores(float (&c)[kScores], u32 keys, u32 rows) const {
    const u64 a = matrix_descriptor(keys + warpgroup * 64 * kRowBytes, kMajorLayout);
    const u64 b = matrix_descriptor(rows, kMajorLayout);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = step / 4;
      const int within = step % 4 * 32;
      wgmma_scores(c, a + ((chunk * kN * kRowBytes + within) >> 4),
                   b + ((chunk * kM * kRowBytes + within) >> 4), step != 0);
    }
    wgmma_commit_group();
  }

  /// The step's rows as B operand, read along their dims.
  static __device__ __forceinline__ u64 rows_descriptor(u32 rows) {
    return matrix_descriptor(rows, matrix_layout(kM * kRowBytes, 8 * kRowBytes));
  }

  __device__ __forceinline__ void issue_dv(float (&dv)[kConfig.head_dim_v / 2],
                                           const u32 (&probabilities)[kStepsRows][4],
                                           int stage) const {
    const u64 b = rows_descriptor(smem.dout(stage));
#pragma unroll
    for (int step = 0; step < kStepsRows; ++step) {
      wgmma_dv(dv, probabilities[step], b + ((step * 16 * kRowBytes) >> 4));
    }
    wgmma_commit_group();
  }

  __device__ __forceinline__ void issue_dk(float (&dk)[kConfig.head_dim / 2],
                                           const u32 (&gradients)[kStepsRows][4], int stage) const {
    const u64 b = rows_descriptor(smem.q(stage));
#pragma unroll
    for (int step = 0; step < kStepsRows; ++step) {
      wgmma_dk(dk, gradients[step], b + ((step * 16 * kRowBytes) >> 4));
    }
    wgmma_commit_group();
  }

  /// This warpgroup's chunk of dQ = dS K over all keys, issued. Leaving out those that no row of
  /// the step sees takes a branch, across which ptxas finds no registers for MMAs under way: their
  /// dS is zero instead.
  __device__ __forceinline__ void issue_dq(float (&dq)[32], u32 ds) const {
    const u64 a = matrix_descriptor(ds, kMajorLayout);
    const u64 b = matrix_descriptor(smem.k() + warpgroup * kN * kRowBytes, kMajorLayout);
#pragma unroll
    for (int step = 0; step < kN / 16; ++step) {
      const int chunk = step / 4;
      const int within = step % 4 * 32;
      wgmma_dq(dq, a + ((chunk * kM * kRowBytes + within) >> 4), b + ((step * 16 * kRowBytes) >> 4),
               step != 0);
    }
    wgmma_commit_group();
  }

  /// The accumulator layout of columns 16j..16j+15 is the A operand's of step j.
  static __device__ __forceinline__ void pack(const float (&c)[kScores], u32 (&to)[kStepsRows][4]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) to[i / 4][i % 4] = pack2(c[i * 2], c[i * 2 + 1]);
  }

  /// dS^T, packed, to this warpgroup's chunk of dS: rows of 64 keys.
  __device__ __forceinline__ void store_ds(const u32 (&gradients)[kStepsRows][4], u32 ds) const {
    const u32 chunk = ds + warpgroup * kM * kRowBytes;
    // Of four 8 x 8 matrices, keys 0..7 and 8..15 of 8 rows, then of the next 8; a lane has the
    // address of row lane % 8 of matrix lane / 8.
    const u32 row = lane / 16 * 8 + lane % 8;
    const u32 place = static_cast<u32>(warp * 2 + lane / 8 % 2) ^ row % 8;
    const u32 to = chunk + row * kRowBytes + place * 16;
#pragma unroll
    for (int step = 0; step < kStepsRows; ++step) {
      stmatrix_x4_trans(to + step * 16 * kRowBytes, gradients[step][0], gradients[step][1],
                        gradients[step][2], gradients[step][3]);
    }
  }

  /// To the accumulator's layout: see put_rows() and write_pair() of the sm80 family.
  __device__ __forceinline__ void store_dq(const float (&dq)[32], int row0) const {
    const int row = warp * 16 + lane / 4;
    const u32 to = smem.dq() + (row * kDim + lane % 4 * 4) * 4;
    const int odd = (row0 + row) & 1;
    constexpr int kPairs = kDim / 16;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int pair = warpgroup * 4 + n;
      if (pair >= kPairs) continue;
      const u32 at = to + kConfig.dq_place(kDim, odd, pair) * 64;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        st_shared_float4(at + r * 8 * kDim * 4,
                         Float4{dq[n * 8 + r * 2], dq[n * 8 + r * 2 + 1], dq[n * 8 + 4 + r * 2],
                                dq[n * 8 + 5 + r * 2]});
      }
    }
  }

  /// Two numbers of neighbouring rows of the step.
  static __device__ __forceinline__ void load_pair(float (&to)[2], u32 from) {
    const Int2 pair = ld_shared_int2(from);
    to[0] = __int_as_float(pair.x);
    to[1] = __int_as_float(pair.y);
  }

  /// Scores become P. Element n * 4 + r * 2 + c is of key key() + 8r and of the step's row 8n + 2
  /// (lane % 4) + c.
  __device__ __forceinline__ void make_probabilities(float (&s)[kScores], u32 lse, int row0,
                                                     bool full, const int (&first)[2],
                                                     const int (&len)[2]) const {
    if (!full) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int row = row0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int r = i / 2 % 2;
        if (static_cast<u32>(row - first[r]) >= static_cast<u32>(len[r])) s[i] = neg_infinity();
      }
    }
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      float of[2];
      load_pair(of, lse + (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = n * 4; i < n * 4 + 4; ++i) {
        s[i] = exp2_approx(fmaf(s[i], p.f.scale_log2, -of[i % 2]));
      }
    }
  }

  /// dP becomes dS.
  __device__ __forceinline__ void make_gradients(float (&dp)[kScores], const float (&s)[kScores],
                                                 u32 delta) const {
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      float of[2];
      load_pair(of, delta + (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = n * 4; i < n * 4 + 4; ++i) dp[i] = s[i] * (dp[i] - of[i % 2]);
    }
  }

  /// P and dS of this warpgroup's keys and the step's rows, packed; dV's MMAs are under way.
  __device__ __forceinline__ void score_step(int row0, int rows, const Ring<kStages>& ring,
                                             const int (&first)[2], const int (&len)[2],
                                             float (&dv)[kConfig.head_dim_v / 2],
                                             u32 (&probabilities)[kStepsRows][4],
                                             u32 (&gradients)[kStepsRows][4]) const {
    const int stage = ring.stage;
    float s[kScores], dp[kScores];
    mbarrier_wait(smem.q_full(stage), ring.parity);
    wgmma_fence();
    issue_scores<kStepsQk>(s, smem.k(), smem.q(stage));
    mbarrier_wait(smem.v_full(), 0);
    mbarrier_wait(smem.do_full(stage), ring.parity);
    wgmma_fence();
    issue_scores<kStepsV>(dp, smem.v(), smem.dout(stage));
    wgmma_wait_group<1>(s);
    const bool full = tile_full(group_bounds(smem.base, warpgroup), row0, row0 + rows - 1);
    make_probabilities(s, smem.lse(stage), row0, full, first, len);
    pack(s, probabilities);
    wgmma_fence();
    issue_dv(dv, probabilities, stage);
    wgmma_wait_group<1>(dp);
    make_gradients(dp, s, smem.delta(stage));
    pack(dp, gradients);
  }

  /// With kDq the block contributes to dq.
  template <bool kDq>
  __device__ __forceinline__ void walk_rows(const Work& work, float (&dk)[kConfig.head_dim / 2],
                                            float (&dv)[kConfig.head_dim_v / 2]) const {
    int first[2], len[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = key() + r * 8 < work.keys;
      first[r] = exists ? p.f.plan[p.f.first + work.key0 + key() + r * 8] : 0;
      len[r] = exists ? p.f.plan[p.f.len + work.key0 + key() + r * 8] : 0;
    }
    Ring<kStages> ring;
    int ds_stage = 0;
    u32 dq_parity = 0;
    mbarrier_wait(smem.k_full(), 0);
    for_each_step(p.f, smem.base, [&](const Walk& walk, const Span& span) {
      const int stage = ring.stage;
      const auto issue_shared_dq = [&](float(&dq)[32], const u32(&ds)[kStepsRows][4]) {
        store_ds(ds, smem.ds(ds_stage));
        fence_proxy_async();
        named_barrier_sync(1, 256);
        wgmma_fence();
        issue_dq(dq, smem.ds(ds_stage));
      };
      const auto put_dq = [&](const float(&dq)[32]) {
        mbarrier_wait(smem.dq_empty(), dq_parity ^ 1);
        store_dq(dq, walk.row0);
        fence_proxy_async();
        release(smem.dq_full());
      };
      const int seen = uniform(static_cast<int>(span.seen));
      if ((seen >> warpgroup & 1) != 0) {
        u32 probabilities[kStepsRows][4], gradients[kStepsRows][4];
        score_step(walk.row0, span.rows, ring, first, len, dv, probabilities, gradients);
        if constexpr (kDq) {
          float dq[32];
          issue_shared_dq(dq, gradients);
          issue_dk(dk, gradients, stage);
          wgmma_wait_group<1>(dq);
          pin(dv);
          keep(probabilities);
          release(smem.do_empty(stage));
          put_dq(dq);
        } else {
          wgmma_fence();
          issue_dk(dk, gradients, stage);
          wgmma_wait_group<1>(dv);
          keep(probabilities);
          release(smem.do_empty(stage));
        }
        wgmma_wait_group<0>(dk);
        keep(gradients);
      } else {
        mbarrier_wait(smem.q_full(stage), ring.parity);
        mbarrier_wait(smem.do_full(stage), ring.parity);
        if constexpr (kDq) {
          const u32 zeros[kStepsRows][4] = {};
          float dq[32];
          issue_shared_dq(dq, zeros);
          wgmma_wait_group<0>(dq);
          put_dq(dq);
        }
        release(smem.do_empty(stage));
      }
      release(smem.q_empty(stage));
      ring.advance();
      ds_stage ^= 1;
      dq_parity ^= 1;
    });
  }

  /// Operands that MMAs read until now.
  static __device__ __forceinline__ void keep(u32 (&operands)[kStepsRows][4]) {
#pragma unroll
    for (int i = 0; i < kStepsRows * 4; ++i) {
      asm volatile("" : "+r"(operands[i / 4][i % 4])::"memory");
    }
  }

  /// A gradient of this thread's keys: 16-bit rows, or its share added to rows in f32.
  template <int kDims>
  __device__ __forceinline__ void store(const float (&c)[kDims / 2], float scale, u16* out,
                                        i64 row_stride, int keys) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = key() + r * 8;
      store_row<kDims>(c, r, scale, out + row * row_stride, row < keys);
    }
  }
  template <int kDims>
  __device__ __forceinline__ void add_share(const float (&c)[kDims / 2], float* accumulator) const {
    constexpr int kTiles = kDims / 8;
    constexpr int kPadded = (kDims + 15) / 16 * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const to = accumulator + (key() + r * 8) * kPadded + lane % 4 * 4;
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        const int at = n * 4 + r * 2;
        const bool whole = n + 1 < kTiles;
        red_add_float4(to + n * 8, Float4{c[at], c[at + 1], whole ? c[at + 4] : 0.0f,
                                          whole ? c[at + 5] : 0.0f});
      }
    }
  }

  __device__ __forceinline__ void run(bool seen, bool invalid) const {
    const BackwardParams& f = p.f;
    float dk[kConfig.head_dim / 2];
    float dv[kConfig.head_dim_v / 2];
#pragma unroll
    for (float& x : dk) x = invalid ? quiet_nan() : 0.0f;
#pragma unroll
    for (float& x : dv) x = invalid ? quiet_nan() : 0.0f;
    const Work work = Work::load(smem.base);
    if (seen && f.dq_accumulator != nullptr) walk_rows<true>(work, dk, dv);
    if (seen && f.dq_accumulator == nullptr) walk_rows<false>(work, dk, dv);
    if (work.shared_tile >= 0) {
      const i64 slab = static_cast<i64>(work.shared_tile) * f.heads_kv + work.kv_head;
      add_share<kConfig.head_dim>(dk, f.dk_accumulator + slab * kN * kDim);
      add_share<kConfig.head_dim_v>(dv, f.dv_accumulator + slab * kN * kDimV);
      return;
    }
    store<kConfig.head_dim>(
        dk, f.softmax_scale,
        static_cast<u16*>(f.dk) + work.kv_head * f.dk_head_stride + work.key0 * f.dk_token_stride,
        f.dk_token_stride, work.keys);
    store<kConfig.head_dim_v>(
        dv, 1.0f,
        static_cast<u16*>(f.dv) + work.kv_head * f.dv_head_stride + work.key0 * f.dv_token_stride,
        f.dv_token_stride, work.keys);
  }
};

__device__ __forceinline__ void init_barriers(Smem smem) {
  mbarrier_init(smem.tail(0), 1);
  mbarrier_init(smem.tail(1), 1);
  mbarrier_init(smem.k_full(), 1);
  mbarrier_init(smem.v_full(), 1);
  mbarrier_init(smem.dq_full(), kConsumerWarps);
  mbarrier_init(smem.dq_empty(), 1);
  for (int stage = 0; stage < kStages; ++stage) {
    mbarrier_init(smem.q_full(stage), 1 + 32);
    mbarrier_init(smem.q_empty(stage), kConsumerWarps);
    mbarrier_init(smem.do_full(stage), 1 + 32);
    mbarrier_init(smem.do_empty(stage), kConsumerWarps);
  }
  fence_mbarrier_init();
}

}  // namespace backward

__device__ __forceinline__ void backward_sm90(const BackwardSm90Params& p) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const backward::Smem smem{smem_address(shared_memory)};
  if (threadIdx.x == 0) {
    prefetch_tensormap(p.k);
    prefetch_tensormap(p.v);
    prefetch_tensormap(p.q);
    prefetch_tensormap(p.dout);
  }
  backward::Work work;
  bool invalid;
  if (!backward::assign(p.f, work, invalid)) return;
  const bool seen = work.row_last >= 0 && work.begin < work.end;
  const int warp = uniform(static_cast<int>(threadIdx.x / 32));
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    work.store(smem.base);
    backward::init_barriers(smem);
  }
  if (seen && warp >= 2 && warp < 2 + backward::kGroups) {  // by those that have no other role
    backward::find_group_bounds(p.f, work, smem.base, warp - 2, lane);
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<kConfig.producer_registers()>();
    if (!seen) return;
    if (warp == 0) backward::Loader{p, smem, lane}.run();
    if (warp == 1 && lane == 0 && p.f.dq_accumulator != nullptr) backward::Sender{p, smem}.run();
  } else {
    setmaxnreg_inc<kConfig.consumer_registers()>();
    backward::Consumer(p, smem).run(seen, invalid);
  }
}

}  // namespace treeattn
