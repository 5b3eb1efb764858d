// Forward, sm90 family: wgmma, TMA, mbarriers, warp specialisation.
//
// Work      a persistent grid, one block a multiprocessor. An item is a query tile of the plan and
//           a pack of 2^s query heads of one kv head; s comes with the call. Row r of the tile is
//           its token r / 2^s and the pack's head r % 2^s. The list is heavy first inside groups of
//           heads whose K and V share the L2, and blocks draw from it (Schedule).
// Roles     warp 1 scans, warp 0 loads Q and K, warp 2 loads V; 2 or 3 consumer warpgroups own 64
//           rows each. A box of Q has the tile's tokens and the pack's heads, in the rows' order.
// Tiles     the scanner tests the bounds of boxes of box_n keys, 32 at a time, and of their 16-key
//           granules where a box is not full, and strings visible granules together:
//           block_n / 16 of them, wherever they lie, make one MMA tile. Granules that are full for
//           a warpgroup's rows run without mask code. One load brings a run of box_n keys that is
//           whole in a tile; other granules are loaded one by one.
//
//   scanner       up to 4 tiles ahead of the loads, into the next items
//   loaders       K0 Q | K1 | K2 | ...    V0 | V1 | V2 | ... the next item's follow at once
//   warpgroup     QK0 softmax0 | QK1 PV0 softmax1 | QK2 PV1 softmax2 | ... | PV(n-1) store
//                              issued together: softmax j runs beside PV(j-1)
//   warpgroups    take turns issuing: one's softmax runs beside the other's MMAs
//
// Barriers  mbarriers: record full / empty (scanner and loaders), Q full / empty, K and V full /
//           empty per stage. Q full: warp 0, with the work and Q's bytes. K full: lane 0 with
//           the bytes and flags, and 32 lanes with their intervals. V full: lane 0 with the bytes,
//           or, at a sequence's end, once what lies behind it is zero (tail). Empty: one arrival
//           per consumer warp. Named barriers 1..3: a warpgroup's turn to issue.
// Registers O: head_dim_v / 2 a thread; S: block_n / 2; P: block_n / 4. The producers' warpgroup
//           gives its registers to the consumers (setmaxnreg).
// Shared    1 or 2 x Q | stages x K | stages x V | (stages + 1) x {first, len, flags} | queue of
//           granules | records | work | mbarriers; ForwardSm90Config has the offsets. Q has two
//           stages where there is room.
#pragma once

#include "../device/softmax.cuh"
#include "forward_sm90_producers.cuh"

namespace treeattn {
namespace forward {

/// A consumer warpgroup's softmax state of its 64 rows: a thread holds rows lane / 4 and
/// lane / 4 + 8 of its warp's 16.
using State = SoftmaxState<1>;

/// A consumer warpgroup.
struct Consumer {
  const ForwardParams& p;
  Smem smem;
  int warpgroup;
  int lane;
  Ring<kQStages> q_ring;
  Ring<kStages> k_ring, v_ring;
  u32 slot = 0;
  int token;        ///< packed, of this thread's first row
  int tokens_left;  ///< of the tile, from that one on
  int head;         ///< of both rows, which are eight apart

  __device__ __forceinline__ Consumer(const ForwardParams& params, Smem shared)
      : p(params),
        smem(shared),
        warpgroup(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 128) - 1, 0)),
        lane(static_cast<int>(threadIdx.x % 32)) {}

  /// How many tokens this thread's row r, 0 or 1, is behind its first one.
  __device__ __forceinline__ int tokens_on(int r) const { return r * p.tokens_in_8_rows; }

  __device__ __forceinline__ u32 turn(int w) const { return 1 + w; }

  __device__ __forceinline__ void wait_turn() const { named_barrier_sync(turn(warpgroup), 256); }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(turn(warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1), 256);
  }

  /// After all lanes' reads.
  __device__ __forceinline__ void release(u32 barrier) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  /// s = q k^T, issued.
  __device__ __forceinline__ void issue_qk(float (&s)[kScores]) const {
    // Rows of 128 bytes, eight to a group; a step of 16 dims is 32 bytes further in the row.
    constexpr u64 kLayout = matrix_layout(16, 8 * kRowBytes);
    const u64 q = matrix_descriptor(smem.q(q_ring.stage) + warpgroup * 64 * kRowBytes, kLayout);
    const u64 k = matrix_descriptor(smem.k(k_ring.stage), kLayout);
#pragma unroll
    for (int step = 0; step < kStepsQk; ++step) {
      const int chunk = step / 4;
      const int within = step % 4 * 32;
      wgmma_qk(s, q + ((chunk * kM * kRowBytes + within) >> 4),
               k + ((chunk * kN * kRowBytes + within) >> 4), step != 0);
    }
    wgmma_commit_group();
  }

  /// o += p v, issued.
  __device__ __forceinline__ void issue_pv(float (&o)[kOutputs],
                                           const u32 (&numerators)[kStepsPv][4]) const {
    // V is read along its dims: groups of 8 keys are 1,024 bytes apart, chunks of 64 dims kN rows.
    constexpr u64 kLayout = matrix_layout(kN * kRowBytes, 8 * kRowBytes);
    const u64 v = matrix_descriptor(smem.v(v_ring.stage), kLayout);
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
      wgmma_pv(o, numerators[step], v + ((step * 16 * kRowBytes) >> 4));
    }
    wgmma_commit_group();
  }

  /// Scores outside their key's interval of tokens become -inf, in granules that are not full.
  __device__ __forceinline__ void mask_scores(float (&s)[kScores], u32 full) const {
    const u32 at = smem.mask(slot) + lane % 4 * 8;
    const int tokens[2] = {token, token + tokens_on(1)};
#pragma unroll
    for (int g = 0; g < kGranules; ++g) {
      if ((full >> g & 1) != 0) continue;
#pragma unroll
      for (int n = g * (kGranuleKeys / 8); n < (g + 1) * (kGranuleKeys / 8); ++n) {
        const Int2 first = ld_shared_int2(at + n * 8 * 4);
        const Int2 len = ld_shared_int2(at + (kN + n * 8) * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (static_cast<u32>(tokens[r] - first.x) >= static_cast<u32>(len.x))
            s[n * 4 + r * 2] = neg_infinity();
          if (static_cast<u32>(tokens[r] - first.y) >= static_cast<u32>(len.y))
            s[n * 4 + r * 2 + 1] = neg_infinity();
        }
      }
    }
  }

  /// Scores become numerators; `alpha` is what was accumulated before is to be multiplied by. True
  /// if it is not 1 for some row of the warp.
  __device__ __forceinline__ bool softmax(float (&s)[kScores], State& state, float (&alpha)[2],
                                          u32 flags) const {
    if constexpr (kConfig.softcap) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = tanh_exp2(s[i] * p.softcap_in);
    }
    const u32 full = flags >> warpgroup * kFlagBits & kTileFull;
    if (full != kTileFull) mask_scores(s, full);
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[r * 2], s[r * 2 + 1]);
#pragma unroll
      for (int n = 1; n < kN / 8; ++n) {
        top = fmaxf(top, fmaxf(s[n * 4 + r * 2], s[n * 4 + r * 2 + 1]));
      }
      top = quad_max(top) * p.scale_log2;
      const float old = state.reference[0][r];
      const bool move = top > old + kLazyMax;
      alpha[r] = move ? exp2_approx(old - top) : 1.0f;
      state.reference[0][r] = move ? top : old;
      moved |= move;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = state.reference[0][r];
      // A row without any key so far.
      const float base = reference == neg_infinity() ? 0.0f : reference;
      float sum = state.sum[0][r] * alpha[r];
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        float& s0 = s[n * 4 + r * 2];
        float& s1 = s[n * 4 + r * 2 + 1];
        s0 = exp2_approx(fmaf(s0, p.scale_log2, -base));
        s1 = exp2_approx(fmaf(s1, p.scale_log2, -base));
        sum += s0 + s1;
      }
      state.sum[0][r] = sum;
    }
    return __any_sync(kFullWarp, moved);
  }

  /// The accumulator layout of scores 16j..16j+15 is the A operand's of step j.
  __device__ __forceinline__ void pack(const float (&s)[kScores],
                                       u32 (&numerators)[kStepsPv][4]) const {
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        numerators[step][i] = pack2(s[step * 8 + i * 2], s[step * 8 + i * 2 + 1]);
      }
    }
  }

  /// Waits for all MMAs; their A operands are in use until then.
  __device__ __forceinline__ void wait_pv(float (&o)[kOutputs],
                                          u32 (&numerators)[kStepsPv][4]) const {
    wgmma_wait_group<0>(o);
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(numerators[step][i])::"memory");
    }
  }

  __device__ __forceinline__ void attend(float (&o)[kOutputs], State& state) {
    float s[kScores];
    u32 numerators[kStepsPv][4];
    float alpha[2];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;

    mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
    wait_turn();
    wgmma_fence();
    issue_qk(s);
    pass_turn();
    u32 flags = ld_shared_u32(smem.flags(slot));
    wgmma_wait_group<0>(s);
    release(smem.k_empty(k_ring.stage));
    k_ring.advance();
    softmax(s, state, alpha, flags);
    pack(s, numerators);
    slot = (slot + 1) % kMaskSlots;
    if ((flags & kLastTile) == 0) {
#pragma unroll 1
      while (true) {
        mbarrier_wait(smem.k_full(k_ring.stage), k_ring.parity);
        wait_turn();
        wgmma_fence();
        issue_qk(s);
        mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
        wgmma_fence();
        issue_pv(o, numerators);
        pass_turn();
        flags = ld_shared_u32(smem.flags(slot));
        wgmma_wait_group<1>(s);
        release(smem.k_empty(k_ring.stage));
        k_ring.advance();
        const bool moved = softmax(s, state, alpha, flags);
        // Computed here: compilers sink the exponentials below the wait, where they no longer run
        // beside the MMAs that are waited for. ptxas does too, but for a branch: twice the same.
        pin(s);
        if ((flags & kLastTile) != 0) {
          finish_pv(o, numerators, s, moved, alpha);
          break;
        }
        finish_pv(o, numerators, s, moved, alpha);
      }
    }
    release(smem.q_empty(q_ring.stage));
    q_ring.advance();
    mbarrier_wait(smem.v_full(v_ring.stage), v_ring.parity);
    wgmma_fence();
    issue_pv(o, numerators);
    wait_pv(o, numerators);
    release(smem.v_empty(v_ring.stage));
    v_ring.advance();
  }

  /// Waits for PV, makes the next A operands of s, and scales o where a reference moved.
  __device__ __forceinline__ void finish_pv(float (&o)[kOutputs], u32 (&numerators)[kStepsPv][4],
                                            const float (&s)[kScores], bool moved,
                                            const float (&alpha)[2]) {
    wait_pv(o, numerators);
    release(smem.v_empty(v_ring.stage));
    v_ring.advance();
    slot = (slot + 1) % kMaskSlots;
    pack(s, numerators);
    if (moved) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= alpha[i / 2 % 2];
    }
  }

  /// Normalises and stores.
  __device__ __forceinline__ void store(const float (&o)[kOutputs], const State& state) const {
    u16* const out = static_cast<u16*>(p.out) + head * p.out_head_stride;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[0][r]);
      const bool seen = sum != 0.0f;  // a NaN that it saw, too
      const float inverse = seen ? 1.0f / sum : 0.0f;
      const bool inside = tokens_on(r) < tokens_left;
      const i64 at = token + tokens_on(r);
      if (p.lse != nullptr && lane % 4 == 0 && inside) {
        p.lse[static_cast<i64>(head) * p.total_q + at] =
            seen ? kLn2 * (state.reference[0][r] + log2_approx(sum)) : neg_infinity();
      }
      store_row<kConfig.head_dim_v>(o, r, inverse, out + at * p.out_token_stride, inside);
    }
  }

  /// Rows without any key, and rows of invalid sequences.
  __device__ __forceinline__ void fill(u32 out_pair, float lse) const {
    constexpr int kChunks8 = kConfig.head_dim_v / 8;
    u16* const out = static_cast<u16*>(p.out) + head * p.out_head_stride;
    const int pair = static_cast<int>(out_pair);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (tokens_on(r) >= tokens_left) continue;
      const i64 at = token + tokens_on(r);
#pragma unroll 1
      for (int chunk = lane % 4; chunk < kChunks8; chunk += 4) {
        st_global_int4(out + at * p.out_token_stride + chunk * 8, Int4{pair, pair, pair, pair});
      }
      if (p.lse != nullptr && lane % 4 == 0) {
        p.lse[static_cast<i64>(head) * p.total_q + at] = lse;
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (warpgroup == kWarpgroups - 1) pass_turn();
    while (true) {
      mbarrier_wait(smem.q_full(q_ring.stage), q_ring.parity);
      // By the lane that releases it, for checkers of races.
      Int4 work{};
      if (lane == 0) work = ld_shared_int4(smem.work(q_ring.stage));
      work = Int4{__shfl_sync(kFullWarp, work.x, 0), __shfl_sync(kFullWarp, work.y, 0),
                  __shfl_sync(kFullWarp, work.z, 0), __shfl_sync(kFullWarp, work.w, 0)};
      if (work.w == kExit) return;
      const int local = static_cast<int>(threadIdx.x / 32 - 4) * 16 + lane / 4;
      const int token_in_tile = local >> p.heads_per_pack_log2;
      token = work.x + token_in_tile;
      tokens_left = work.y - token_in_tile;
      head = work.z + (local & ((1 << p.heads_per_pack_log2) - 1));
      if (work.w != kAttend) {
        release(smem.q_empty(q_ring.stage));
        q_ring.advance();
        constexpr u32 kNanPair = kConfig.dtype == KernelDType::kF16 ? 0x7e007e00u : 0x7fc07fc0u;
        if (work.w == kInvalid) {
          fill(kNanPair, quiet_nan());
        } else {
          fill(0, neg_infinity());
        }
        continue;
      }
      float o[kOutputs];
      State state;
      state.init();
      attend(o, state);
      store(o, state);
    }
  }
};

__device__ __forceinline__ void init_barriers(Smem smem) {
  mbarrier_init(smem.tail(), 1);
  for (int stage = 0; stage < kQStages; ++stage) {
    mbarrier_init(smem.q_full(stage), 1);
    mbarrier_init(smem.q_empty(stage), kConsumerWarps);
  }
  for (int stage = 0; stage < kStages; ++stage) {
    mbarrier_init(smem.k_full(stage), 1 + 32);
    mbarrier_init(smem.k_empty(stage), kConsumerWarps);
    mbarrier_init(smem.v_full(stage), 1);
    mbarrier_init(smem.v_empty(stage), kConsumerWarps);
  }
  for (int stage = 0; stage < kRecords; ++stage) {
    mbarrier_init(smem.record_full(stage), 32);
    mbarrier_init(smem.record_empty(stage), 2 * 32);
  }
  fence_mbarrier_init();
}

}  // namespace forward

__device__ __forceinline__ void forward_sm90(const ForwardSm90Params& p) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const forward::Smem smem{smem_address(shared_memory)};
  if (threadIdx.x == 0) forward::init_barriers(smem);
  __syncthreads();
  const int warp = uniform(static_cast<int>(threadIdx.x / 32));
  if (warp < 4) {
    setmaxnreg_dec<kConfig.producer_registers()>();
    if (warp == 0) forward::KeyLoader(p, smem).run();
    if (warp == 1) forward::Scanner(p, smem).run();
    if (warp == 2) forward::ValueLoader(p, smem).run();
  } else {
    setmaxnreg_inc<kConfig.consumer_registers()>();
    forward::Consumer(p.f, smem).run();
  }
}

}  // namespace treeattn
