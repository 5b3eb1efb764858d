// Forward, sm80 family: mma.sync, ldmatrix, cp.async.
//
// Work      one block = one query tile of the plan x one pack of 2^s query heads of one kv head; s
//           comes with the call. Row r of the tile is its token r / 2^s, head r % 2^s of the pack.
//           Blocks are ordered heavy tiles first inside groups of heads whose K/V share the L2.
// Visits    the block tests the bounds of up to 2,048 key tiles at once, one thread a tile, and
//           keeps one bit each in shared memory; tiles nobody in the block sees are never loaded.
//           Each warp tests a visited tile again for the tokens of its own 16 or 32 rows: skip,
//           full (no mask code) or partial.
// Pipeline  stages = 2: K, V and intervals of tile j+1 are in flight while tile j is computed;
//             wait(j) barrier load(j+1) S=QK softmax O+=PV
//           stages = 1: V(j) flies during S=QK, K(j+1) during softmax and O+=PV;
//             wait(K j) barrier load(V j) S=QK wait(V j) barrier load(K j+1) softmax O+=PV
// Barriers  __syncthreads only: one a tile with two stages, two with one.
// Registers O and S accumulators: rows_per_warp * (head_dim_v + block_n) / 32 a thread; Q is read
//           from shared memory again for every key tile.
// Shared    Q (reused for out) | stages x K | stages x V | stages x {first, len, bounds} | visit
//           bits | the block's work; ForwardConfig has the offsets. Rows are swizzled, never padded
//           (swizzle.cuh).
#pragma once

#include "../device/softmax.cuh"
#include "../device/tile_copy.cuh"

namespace treeattn {
namespace forward {

inline constexpr int kM = kConfig.block_m;
inline constexpr int kN = kConfig.block_n;
inline constexpr int kThreads = kConfig.threads();
inline constexpr int kStages = kConfig.stages;
inline constexpr int kWarpRows = kConfig.rows_per_warp();
inline constexpr int kTilesM = kWarpRows / 16;
inline constexpr int kTilesN = kN / 8;
inline constexpr int kTilesV = kConfig.head_dim_v / 8;
inline constexpr int kStepsK = kConfig.head_dim / 16;
inline constexpr bool kTailK = kConfig.head_dim % 16 != 0;
inline constexpr int kStepsPv = kN / 16;

using QkRows = SwizzledRows<kConfig.head_dim / 8>;
using VRows = SwizzledRows<kConfig.head_dim_v / 8>;

static_assert(kWarpRows == 16 || kWarpRows == 32, "a warp owns one or two 16-row MMA tiles");
static_assert(kN % 16 == 0 && kN % kGranuleKeys == 0, "key tiles are made of 16-key MMA steps");
static_assert(kStages == 1 || kStages == 2, "one or two K/V stages");

/// What a block works on. It lies in shared memory and is read again wherever it is needed: the
/// main loop has no registers to keep it.
struct Work {
  const ForwardParams& p;
  u32 smem;

  __device__ __forceinline__ u32 address() const { return smem + kConfig.work_offset(); }

  /// One thread; a barrier must follow.
  __device__ __forceinline__ void store(const QueryTile& t, int head, const u16* k,
                                        const u16* v) const {
    st_shared_int4(address(), Int4{t.row0, t.rows, t.key0, t.keys});
    st_shared_int4(address() + 16, Int4{t.slot0, t.lo, t.hi, head});
    st_shared_pointer(address() + 32, k);
    st_shared_pointer(address() + 40, v);
  }

  /// The first one of the pack.
  __device__ __forceinline__ int head() const {
    return static_cast<int>(ld_shared_u32(address() + 28));
  }

  /// The range of tiles whose visit bits are in shared memory: its first tile and the end of the
  /// bits.
  __device__ __forceinline__ u32 scan_address() const { return address() + 48; }

  __device__ __forceinline__ QueryTile tile() const {
    const Int4 a = ld_shared_int4(address());
    const Int4 b = ld_shared_int4(address() + 16);
    return QueryTile{a.x, a.y, a.z, a.w, b.x, b.y, b.z, 0};
  }

  __device__ __forceinline__ u32 mask_address(int stage) const {
    return smem + kConfig.mask_offset() + stage * kConfig.mask_stage_bytes();
  }

  __device__ __forceinline__ u32 visit_address() const { return smem + kConfig.visit_offset(); }

  __device__ __forceinline__ void load_k(int t, int stage) const {
    const QueryTile tile = this->tile();
    const int key = t * kN;
    const u16* k = ld_shared_pointer<u16>(address() + 32);
    load_rows<kThreads, kN, kConfig.head_dim / 8>(
        smem + kConfig.k_offset() + stage * kConfig.k_stage_bytes(), k + key * p.k_token_stride,
        p.k_token_stride, min(kN, tile.keys - key));
    if (threadIdx.x == 0) {  // bounds travel with K: they decide whether a warp needs the tile
      cp_async_16(mask_address(stage) + 2 * kN * 4,
                  p.plan + p.key_tiles + static_cast<i64>(tile.slot0 + t) * kKeyTileInts, true);
    }
  }

  __device__ __forceinline__ void load_v(int t, int stage) const {
    const QueryTile tile = this->tile();
    const int key = t * kN;
    const int valid = min(kN, tile.keys - key);
    const u16* v = ld_shared_pointer<u16>(address() + 40);
    load_rows<kThreads, kN, kConfig.head_dim_v / 8>(
        smem + kConfig.v_offset() + stage * kConfig.v_stage_bytes(), v + key * p.v_token_stride,
        p.v_token_stride, valid);
    constexpr int kPasses = (2 * kN + kThreads - 1) / kThreads;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {  // keys past the sequence: len = 0
      const u32 i = thread_index_here() + pass * kThreads;
      const int j = static_cast<int>(i % kN);
      const int* array = p.plan + (i < kN ? p.first : p.len);
      if (2 * kN % kThreads == 0 || i < 2 * kN) {
        cp_async_4(mask_address(stage) + i * 4, array + (tile.key0 + key + j), j < valid);
      }
    }
  }
};

/// Classifies the tiles [base, min(base + kScanTiles, hi)), one thread a tile, into the visit bits.
__device__ __forceinline__ void scan_tiles(const Work& work, const QueryTile& tile, int base) {
  const int tiles = min(tile.hi - base, ForwardConfig::kScanTiles);
  const int* bounds =
      work.p.plan + work.p.key_tiles + static_cast<i64>(tile.slot0 + base) * kKeyTileInts;
  constexpr int kInFlight = 4;  // loads a thread waits for at once
  static_assert(ForwardConfig::kScanTiles % (kInFlight * kThreads) == 0,
                "no bit past the last word");
#pragma unroll 1
  for (int start = 0; start < tiles; start += kInFlight * kThreads) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = start + u * kThreads + threadIdx.x;
      bool visit = false;
      if (i < tiles) {
        const Int4 b = ld_plan_int4(bounds + static_cast<i64>(i) * kKeyTileInts);
        visit = !tile_skipped(KeyTile{b.x, b.y, b.z, b.w}, tile.row0, tile.row0 + tile.rows - 1);
      }
      const u32 ballot = __ballot_sync(kFullWarp, visit);
      if (threadIdx.x % 32 == 0) st_shared_u32(work.visit_address() + i / 32 * 4, ballot);
    }
  }
  if (threadIdx.x == 0) {
    st_shared_u32(work.scan_address(), static_cast<u32>(base));
    st_shared_u32(work.scan_address() + 4, work.visit_address() + (tiles + 31) / 32 * 4);
  }
}

/// Walks the visit bits of one scan in ascending order. All threads agree on every step.
struct VisitCursor {
  u32 word;  ///< shared-memory address of the present word
  u32 bits;  ///< its tiles not yet handed out

  __device__ __forceinline__ explicit VisitCursor(const Work& work)
      : word(work.visit_address()), bits(ld_shared_u32(word)) {}

  /// The next tile, relative to the sequence's first, or -1.
  __device__ __forceinline__ int next(const Work& work) {
    const Int2 scan = ld_shared_int2(work.scan_address());
    while (bits == 0) {
      word += 4;
      if (word >= static_cast<u32>(scan.y)) return -1;
      bits = ld_shared_u32(word);
    }
    const int bit = __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
    return scan.x + static_cast<int>(word - work.visit_address()) * 8 + bit;
  }
};

/// A row of a tile: a token, counted from the tile's first, and a query head, from the pack's.
struct PackedRow {
  int token;
  int head;

  __device__ __forceinline__ PackedRow(const ForwardParams& p, int row)
      : token(row >> p.heads_per_pack_log2), head(row & ((1 << p.heads_per_pack_log2) - 1)) {}

  __device__ __forceinline__ i64 offset(i64 token_stride, i64 head_stride) const {
    return token * token_stride + head * head_stride;
  }
};

/// Copies a tile's `valid` rows into shared memory; the rest become zero. As load_rows(), for rows
/// that lie a token or a head apart.
__device__ __forceinline__ void load_q(const ForwardParams& p, u32 dst, const u16* src, int valid) {
  constexpr int kChunks = kConfig.head_dim / 8;
  constexpr int kRowThreads = ceil_pow2(kChunks);
  constexpr int kRowsPerPass = kThreads / kRowThreads;
  constexpr int kPasses = (kM + kRowsPerPass - 1) / kRowsPerPass;
  const u32 thread = thread_index_here();
  const u32 chunk = thread % kRowThreads;
  const int row0 = static_cast<int>(thread / kRowThreads);
  if (kChunks != kRowThreads && chunk >= kChunks) return;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = row0 + pass * kRowsPerPass;
    if (kM % kRowsPerPass == 0 || row < kM) {
      const i64 from = PackedRow(p, row).offset(p.q_token_stride, p.q_head_stride) + chunk * 8;
      cp_async_16(dst + QkRows::offset(row, chunk), src + from, row < valid);
    }
  }
}

/// Scores of the warp's rows against one key tile: s = q k^T.
__device__ __forceinline__ void multiply_qk(float (&s)[kTilesM][kTilesN][4], u32 q_lane, u32 k_lane,
                                            u32 q_tail, u32 k_tail) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kStepsK; ++step) {
    u32 a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x4(a[m], QkRows::at(q_lane, step * 2) + m * 16 * QkRows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      u32 b[4];
      ldmatrix_x4(b, QkRows::at(k_lane, step * 2) + n * 8 * QkRows::kRowBytes);
      const u32 b0[2] = {b[0], b[1]};
      const u32 b1[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma_m16n8k16(s[m][n], a[m], b0);
        mma_m16n8k16(s[m][n + 1], a[m], b1);
      }
    }
  }
  if constexpr (kTailK) {  // the last eight dims of a head_dim that is not a multiple of 16
    u32 a[kTilesM][2];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ldmatrix_x2(a[m], q_tail + m * 16 * QkRows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      u32 b[2];
      ldmatrix_x2(b, k_tail + n * 8 * QkRows::kRowBytes);
      const u32 b0[1] = {b[0]};
      const u32 b1[1] = {b[1]};
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma_m16n8k8(s[m][n], a[m], b0);
        mma_m16n8k8(s[m][n + 1], a[m], b1);
      }
    }
  }
}

__device__ __forceinline__ void cap_scores(float (&s)[kTilesM][kTilesN][4], float softcap_in) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = tanh_exp2(s[m][n][e] * softcap_in);
    }
  }
}

/// Scores outside their key's interval of tokens become -inf. `token` is that of the thread's first
/// row.
__device__ __forceinline__ void mask_scores(const ForwardParams& p, float (&s)[kTilesM][kTilesN][4],
                                            int token, u32 mask_lane) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const Int2 first = ld_shared_int2(mask_lane + n * 8 * 4);
    const Int2 len = ld_shared_int2(mask_lane + (kN + n * 8) * 4);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Not tokens_in_8_rows: the compiler keeps that in a register, which some heads lack.
        const int i = token + (m * 2 + r) * (8 >> p.heads_per_pack_log2);
        if (static_cast<u32>(i - first.x) >= static_cast<u32>(len.x))
          s[m][n][r * 2] = neg_infinity();
        if (static_cast<u32>(i - first.y) >= static_cast<u32>(len.y))
          s[m][n][r * 2 + 1] = neg_infinity();
      }
    }
  }
}

/// Moves the rows' references to this tile's maxima where they must, and rescales what was
/// accumulated.
__device__ __forceinline__ void update_softmax(const float (&s)[kTilesM][kTilesN][4],
                                               float (&o)[kTilesM][kTilesV][4],
                                               SoftmaxState<kTilesM>& state, float scale_log2) {
  float alpha[kTilesM][2];
  bool moved = false;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(s[m][0][r * 2], s[m][0][r * 2 + 1]);
#pragma unroll
      for (int n = 1; n < kTilesN; ++n) top = fmaxf(top, fmaxf(s[m][n][r * 2], s[m][n][r * 2 + 1]));
      top = quad_max(top) * scale_log2;
      const float old = state.reference[m][r];
      const bool move = top > old + kLazyMax;
      alpha[m][r] = move ? exp2_approx(old - top) : 1.0f;
      state.reference[m][r] = move ? top : old;
      moved |= move;
    }
  }
  if (__any_sync(kFullWarp, moved)) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        state.sum[m][r] *= alpha[m][r];
#pragma unroll
        for (int n = 0; n < kTilesV; ++n) {
          o[m][n][r * 2] *= alpha[m][r];
          o[m][n][r * 2 + 1] *= alpha[m][r];
        }
      }
    }
  }
}

/// Softmax numerators of s, rounded and packed as A operands: p[m] of 16-key step j is the
/// accumulator layout of score tiles 2j and 2j + 1.
__device__ __forceinline__ void exponentiate(const float (&s)[kTilesM][kTilesN][4],
                                             u32 (&p)[kStepsPv][kTilesM][4],
                                             SoftmaxState<kTilesM>& state, float scale_log2) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = state.reference[m][r];
      const float base =
          reference == neg_infinity() ? 0.0f : reference;  // a row without any key so far
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        const float p0 = exp2_approx(fmaf(s[m][n][r * 2], scale_log2, -base));
        const float p1 = exp2_approx(fmaf(s[m][n][r * 2 + 1], scale_log2, -base));
        state.sum[m][r] += p0 + p1;
        p[n / 2][m][n % 2 * 2 + r] = pack2(p0, p1);
      }
    }
  }
}

/// o += p v.
__device__ __forceinline__ void multiply_pv(const u32 (&p)[kStepsPv][kTilesM][4],
                                            float (&o)[kTilesM][kTilesV][4], u32 v_lane,
                                            u32 v_tail) {
#pragma unroll
  for (int step = 0; step < kStepsPv; ++step) {
#pragma unroll
    for (int n = 0; n + 1 < kTilesV; n += 2) {
      u32 b[4];
      ldmatrix_x4_trans(b, VRows::at(v_lane, n) + step * 16 * VRows::kRowBytes);
      const u32 b0[2] = {b[0], b[1]};
      const u32 b1[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        mma_m16n8k16(o[m][n], p[step][m], b0);
        mma_m16n8k16(o[m][n + 1], p[step][m], b1);
      }
    }
    if constexpr (kTilesV % 2 != 0) {
      u32 b[2];
      ldmatrix_x2_trans(b, v_tail + step * 16 * VRows::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) mma_m16n8k16(o[m][kTilesV - 1], p[step][m], b);
    }
  }
}

/// Rows without any key, and rows of invalid sequences.
__device__ __forceinline__ void fill_tile(const ForwardParams& p, const QueryTile& tile, int head,
                                          u32 out_pair, float lse) {
  constexpr int kChunks = kConfig.head_dim_v / 8;
  u16* out = static_cast<u16*>(p.out) + tile.row0 * p.out_token_stride + head * p.out_head_stride;
  const int pair = static_cast<int>(out_pair);
  const int rows = tile.rows << p.heads_per_pack_log2;
  for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
    st_global_int4(out + PackedRow(p, i / kChunks).offset(p.out_token_stride, p.out_head_stride) +
                       i % kChunks * 8,
                   Int4{pair, pair, pair, pair});
  }
  if (p.lse == nullptr) return;
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const PackedRow row(p, i);
    p.lse[static_cast<i64>(head + row.head) * p.total_q + tile.row0 + row.token] = lse;
  }
}

/// Normalises, writes lse, and stores out through shared memory in whole 16-byte chunks.
__device__ __forceinline__ void store_tile(const Work& work, float (&o)[kTilesM][kTilesV][4],
                                           SoftmaxState<kTilesM>& state) {
  const ForwardParams& p = work.p;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * kWarpRows;
  cp_async_wait_group<0>();  // Q may still fly when no tile was visited
  __syncthreads();           // every warp is done with Q
  const QueryTile tile = work.tile();
  const int head = work.head();
  const int tile_rows = tile.rows << p.heads_per_pack_log2;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[m][r]);
      const bool seen = sum != 0.0f;  // a NaN that it saw, too
      const float inverse = seen ? 1.0f / sum : 0.0f;
      const int row = warp_row + m * 16 + r * 8 + lane / 4;
      if (p.lse != nullptr && lane % 4 == 0 && row < tile_rows) {
        const PackedRow at(p, row);
        p.lse[static_cast<i64>(head + at.head) * p.total_q + tile.row0 + at.token] =
            seen ? kLn2 * (state.reference[m][r] + log2_approx(sum)) : neg_infinity();
      }
#pragma unroll
      for (int n = 0; n < kTilesV; ++n) {
        st_shared_u32(work.smem + VRows::offset(row, n) + lane % 4 * 4,
                      pack2(o[m][n][r * 2] * inverse, o[m][n][r * 2 + 1] * inverse));
      }
    }
  }
  __syncwarp();  // a warp stores its own rows
  constexpr int kChunks = kConfig.head_dim_v / 8;
  u16* out = static_cast<u16*>(p.out) + tile.row0 * p.out_token_stride + head * p.out_head_stride;
  const int rows = min(kWarpRows, tile_rows - warp_row);
  for (int i = lane; i < rows * kChunks; i += 32) {
    const int row = warp_row + i / kChunks;
    const int chunk = i % kChunks;
    st_global_int4(
        out + PackedRow(p, row).offset(p.out_token_stride, p.out_head_stride) + chunk * 8,
        ld_shared_int4(work.smem + VRows::offset(row, chunk)));
  }
}

/// Query tile and first head of this block; false when there is none.
__device__ __forceinline__ bool assign(const ForwardParams& p, QueryTile& tile, int& head) {
  const int per_group = p.max_query_tiles * p.head_packs_in_group;
  const int group = blockIdx.x / per_group;
  const int rest = blockIdx.x - group * per_group;
  const int first_pack = group * p.head_packs_in_group;
  const int packs = min(p.head_packs_in_group, p.head_packs - first_pack);
  const int index = rest / packs;
  head = (first_pack + rest - index * packs) << p.heads_per_pack_log2;
  if (index >= p.plan[p.query_tile_count]) return false;
  const int* record = p.plan + p.query_tiles + static_cast<i64>(index) * kQueryTileInts;
  const Int4 a = ld_plan_int4(record);
  const Int4 b = ld_plan_int4(record + 4);
  tile = QueryTile{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  return true;
}

/// Lanes address ldmatrix rows: Q and V take row lane % 16, chunk lane / 16; K takes keys 0-7 for
/// the first two matrices and 8-15 for the others. Tails are single chunks.
struct LaneAddresses {
  u32 q, q_tail, k, k_tail, v, v_tail, mask;

  __device__ __forceinline__ explicit LaneAddresses(u32 smem) {
    const u32 lane = threadIdx.x % 32;
    const u32 q_row = threadIdx.x / 32 * kWarpRows + lane % 16;
    q = QkRows::lane_address(smem, q_row, lane / 16);
    q_tail = smem + QkRows::offset(q_row, kStepsK * 2);
    k = QkRows::lane_address(smem + kConfig.k_offset(), lane / 16 * 8 + lane % 8, lane / 8 % 2);
    k_tail = smem + kConfig.k_offset() + QkRows::offset(lane % 16, kStepsK * 2);
    v = VRows::lane_address(smem + kConfig.v_offset(), lane % 16, lane / 16);
    v_tail = smem + kConfig.v_offset() + VRows::offset(lane % 16, kTilesV - 1);
    mask = smem + kConfig.mask_offset() + lane % 4 * 8;
  }
};

/// The main loop over the visited tiles of one scan.
__device__ __forceinline__ void attend(const Work& work, VisitCursor cursor,
                                       float (&o)[kTilesM][kTilesV][4],
                                       SoftmaxState<kTilesM>& state) {
  const ForwardParams& p = work.p;
  const LaneAddresses at(work.smem);
  int current = cursor.next(work);
  if (current < 0) return;
  work.load_k(current, 0);
  if constexpr (kStages == 2) work.load_v(current, 0);
  cp_async_commit_group();
  int stage = 0;
  while (current >= 0) {
    const int following = cursor.next(work);
    cp_async_wait_group<0>();
    __syncthreads();
    if constexpr (kStages == 2) {
      if (following >= 0) {
        work.load_k(following, stage ^ 1);
        work.load_v(following, stage ^ 1);
      }
    } else {
      work.load_v(current, 0);
    }
    cp_async_commit_group();

    const QueryTile tile = work.tile();
    const int warp = static_cast<int>(thread_index_here() / 32);
    const int first = tile.row0 + warp * (kWarpRows / 8) * p.tokens_in_8_rows;
    const int last = min(first + kWarpRows / 8 * p.tokens_in_8_rows, tile.row0 + tile.rows) - 1;
    const Int4 b = ld_shared_int4(work.mask_address(stage) + 2 * kN * 4);
    const KeyTile bounds{b.x, b.y, b.z, b.w};
    const bool needed = last >= first && !tile_skipped(bounds, first, last);
    const bool full = tile_full(bounds, first, last);
    float s[kTilesM][kTilesN][4];
    if (needed) {
      multiply_qk(s, at.q, at.k + stage * kConfig.k_stage_bytes(), at.q_tail,
                  at.k_tail + stage * kConfig.k_stage_bytes());
    }
    if constexpr (kStages == 1) {
      cp_async_wait_group<0>();
      __syncthreads();
      if (following >= 0) work.load_k(following, 0);
      cp_async_commit_group();
    }
    if (needed) {
      if constexpr (kConfig.softcap) cap_scores(s, p.softcap_in);
      if (!full) {
        const int lane_row = static_cast<int>(thread_index_here() % 32 / 4);
        mask_scores(p, s, first + (lane_row >> p.heads_per_pack_log2),
                    at.mask + stage * kConfig.mask_stage_bytes());
      }
      update_softmax(s, o, state, p.scale_log2);
      u32 numerators[kStepsPv][kTilesM][4];
      exponentiate(s, numerators, state, p.scale_log2);
      multiply_pv(numerators, o, at.v + stage * kConfig.v_stage_bytes(),
                  at.v_tail + stage * kConfig.v_stage_bytes());
    }
    if constexpr (kStages == 2) stage ^= 1;
    current = following;
  }
}

__device__ __forceinline__ void run(const ForwardParams& p) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const Work work{p, smem_address(shared_memory)};
  QueryTile tile;
  int head;
  if (!assign(p, tile, head)) return;
  if (tile.work < 0) {
    constexpr u32 kNanPair = kConfig.dtype == KernelDType::kF16 ? 0x7e007e00u : 0x7fc07fc0u;
    fill_tile(p, tile, head, kNanPair, quiet_nan());
    return;
  }
  if (threadIdx.x == 0) {
    const int kv_head = head / p.heads_per_kv;
    work.store(
        tile, head,
        static_cast<const u16*>(p.k) + kv_head * p.k_head_stride + tile.key0 * p.k_token_stride,
        static_cast<const u16*>(p.v) + kv_head * p.v_head_stride + tile.key0 * p.v_token_stride);
  }
  load_q(p, work.smem,
         static_cast<const u16*>(p.q) + head * p.q_head_stride + tile.row0 * p.q_token_stride,
         tile.rows << p.heads_per_pack_log2);
  cp_async_commit_group();

  float o[kTilesM][kTilesV][4];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesV; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
  }
  SoftmaxState<kTilesM> state;
  state.init();
  int base = tile.lo;
  int hi = tile.hi;
  while (base < hi) {
    __syncthreads();  // the work is stored; every warp is done with the tiles of the scan before
    scan_tiles(work, work.tile(), base);
    __syncthreads();
    attend(work, VisitCursor(work), o, state);
    base = ld_shared_int2(work.scan_address()).x + ForwardConfig::kScanTiles;
    hi = work.tile().hi;
  }
  store_tile(work, o, state);
}

}  // namespace forward

__device__ __forceinline__ void forward_sm80(const ForwardParams& p) {
  forward::run(p);
}

}  // namespace treeattn
