#include "runtime/attention/backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "generator/launch_bounds.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr std::int64_t kAlignFloats = 4;

/// How many tiles and shares the schedule may hold. For balance a tile is shared if it costs more
/// than most of what each of `slots` blocks has to do; its shares cost half of that. So there are
/// fewer than 2 slots / heads_kv such tiles of a kv head, and as many shares more than tiles. For
/// the L2 any tile that enough rows see is shared by the query heads.
struct ScheduleSizes {
  std::int64_t max_split = 0;
  std::int64_t max_units = 0;
};

ScheduleSizes schedule_sizes(const PlanShape& plan, const Shape& shape, const KernelSpec& spec,
                             int slots, bool deterministic, int heads_apart_octave) {
  // Another order of summands with other totals would be another gradient.
  if (deterministic || plan.total_k == 0) return {};
  const std::int64_t tiles = tile_slots(plan.total_k, plan.batch, spec.tile.block_n);
  const std::int64_t steps =
      (std::int64_t{plan.total_q} / spec.tile.block_m + 1) * (shape.heads / shape.heads_kv);
  const int heads_per_kv = shape.heads / shape.heads_kv;
  // Sequences with rows enough for heads to go apart, and their tiles.
  const std::int64_t long_sequences =
      std::min<std::int64_t>(plan.batch, plan.total_q >> (heads_apart_octave - 1));
  const std::int64_t apart = heads_per_kv > 1 && long_sequences > 0
                                 ? plan.total_k / spec.tile.block_n + long_sequences
                                 : 0;
  if (apart == 0 && steps <= kLeastSteps) return {};
  const std::int64_t fair = 2 * slots / shape.heads_kv + 1;
  const std::int64_t split = std::min(tiles, apart + fair);
  return {split, split * heads_per_kv + fair};
}

/// Sections of the workspace, in floats from its start; each is 16-byte aligned.
struct WorkspaceOffsets {
  std::int64_t lse_log2, delta, dq, schedule, dk, dv, total;
};

WorkspaceOffsets workspace_offsets(const PlanShape& plan, const Shape& shape,
                                   const KernelSpec& spec, const ScheduleSizes& sizes,
                                   bool deterministic) {
  const auto padded = [](int dim) { return (dim + 15) / 16 * 16; };
  std::int64_t at = 0;
  const auto take = [&at](std::int64_t floats) {
    const std::int64_t begin = at;
    at += (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
    return begin;
  };
  const std::int64_t rows = std::int64_t{shape.heads} * plan.total_q;
  const std::int64_t keys = sizes.max_split * shape.heads_kv * spec.tile.block_n;
  WorkspaceOffsets o{};
  o.lse_log2 = take(rows);
  o.delta = take(rows);
  o.dq = take(deterministic ? 0 : rows * padded(shape.head_dim));
  o.schedule = take(kScheduleHeaderInts + sizes.max_units * kScheduleUnitInts);
  o.dk = take(keys * padded(shape.head_dim));
  o.dv = take(keys * padded(value_head_dim(shape.head_dim, shape.head_dim_v)));
  o.total = at;
  return o;
}

unsigned blocks_of(std::int64_t items, int per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

int ceil_pow2(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

}  // namespace

Shape shape_of(const BackwardArgs& args) {
  return Shape{args.dtype,
               args.heads,
               args.heads_kv,
               args.head_dim,
               value_head_dim(args.head_dim, args.head_dim_v),
               args.softcap > 0,
               true};
}

PlanShape check_backward(const BackwardArgs& args, bool cuda) {
  check_shape(shape_of(args), cuda);
  check_scale(args.softmax_scale, args.softcap);
  const PlanShape plan = check_plan(args.plan, args.plan_buffer);
  check_tensor("q", args.q, plan.total_q, args.heads, args.dtype, cuda);
  check_tensor("k", args.k, plan.total_k, args.heads_kv, args.dtype, cuda);
  check_tensor("v", args.v, plan.total_k, args.heads_kv, args.dtype, cuda);
  check_tensor("out", args.out, plan.total_q, args.heads, args.dtype, cuda);
  check_tensor("dout", args.dout, plan.total_q, args.heads, args.dtype, cuda);
  if (plan.total_q > 0 && args.lse == nullptr) {
    refuse("lse", "null", "the [heads, total_q] f32 that forward wrote");
  }
  check_aligned("lse", args.lse, alignof(float));
  check_aligned("dlse", args.dlse, alignof(float));
  check_output("dq", args.dq, plan.total_q, args.heads, args.head_dim, args.dtype, cuda);
  check_output("dk", args.dk, plan.total_k, args.heads_kv, args.head_dim, args.dtype, cuda);
  check_output("dv", args.dv, plan.total_k, args.heads_kv,
               value_head_dim(args.head_dim, args.head_dim_v), args.dtype, cuda);
  return plan;
}

std::size_t backward_workspace_bytes(const PlanShape& plan, const Shape& shape,
                                     const KernelSpec& spec, int sm_count, bool deterministic,
                                     int heads_apart_octave) {
  const int slots = sm_count * blocks_per_sm(spec);
  const ScheduleSizes sizes =
      schedule_sizes(plan, shape, spec, slots, deterministic, heads_apart_octave);
  const WorkspaceOffsets at = workspace_offsets(plan, shape, spec, sizes, deterministic);
  return static_cast<std::size_t>(at.total) * sizeof(float);
}

Grid add_dq_launch(BackwardParams& params, const PlanShape& plan, const KernelSpec& spec) {
  const int view = require_view(plan, spec);
  const PlanOffsets at = plan_offsets(plan);
  params.query_tiles = at.views[view].query_tiles;
  params.key_tiles = at.views[view].key_tiles;
  params.query_tile_count = kMetaQueryTiles + view;
  if (plan.total_q == 0) return {};
  return {check_blocks(
      std::int64_t{tile_slots(plan.total_q, plan.batch, spec.tile.block_m)} * params.heads, spec)};
}

BackwardTensorMaps backward_tensor_maps(const BackwardArgs& args, const PlanShape& plan,
                                        const KernelSpec& spec) {
  const KernelDType dtype = spec.problem.dtype;
  const int dim_v = value_head_dim(args.head_dim, args.head_dim_v);
  return {
      tensor_map_request(args.q, dtype, args.head_dim, args.heads, plan.total_q, spec.tile.block_m),
      tensor_map_request(args.k, dtype, args.head_dim, args.heads_kv, plan.total_k,
                         spec.tile.block_n),
      tensor_map_request(args.v, dtype, dim_v, args.heads_kv, plan.total_k, spec.tile.block_n),
      tensor_map_request(args.dout, dtype, dim_v, args.heads, plan.total_q, spec.tile.block_m)};
}

std::string describe_misfit(const BackwardTensorMaps& maps) {
  for (const auto& [name, map] :
       {std::pair("q", &maps.q), {"k", &maps.k}, {"v", &maps.v}, {"dout", &maps.dout}}) {
    if (!fits_tensor_map(*map)) return describe_misfit(name, *map);
  }
  return {};
}

BackwardLaunch make_backward_launch(const BackwardArgs& args, const PlanShape& plan,
                                    const KernelSpec& spec, int sm_count, int heads_apart_octave) {
  BackwardLaunch launch;
  const Shape shape = shape_of(args);
  const int view = require_view(plan, spec);
  const PlanOffsets at = plan_offsets(plan);
  BackwardParams& p = launch.params;
  p.slots = sm_count * blocks_per_sm(spec);
  const ScheduleSizes sizes =
      schedule_sizes(plan, shape, spec, p.slots, args.deterministic, heads_apart_octave);
  p.max_units = static_cast<int>(sizes.max_units);  // check_blocks() sees the full number
  p.max_split = static_cast<int>(sizes.max_split);
  p.heads_apart_octave = heads_apart_octave;
  const WorkspaceOffsets work = workspace_offsets(plan, shape, spec, sizes, args.deterministic);
  check_workspace(args.workspace, args.workspace_bytes,
                  static_cast<std::size_t>(work.total) * sizeof(float), "backward_workspace_bytes");
  auto* workspace = static_cast<float*>(args.workspace);
  p.q = args.q.data;
  p.k = args.k.data;
  p.v = args.v.data;
  p.out = args.out.data;
  p.dout = args.dout.data;
  p.lse = args.lse;
  p.dlse = args.dlse;
  p.dq = args.dq.data;
  p.dk = args.dk.data;
  p.dv = args.dv.data;
  p.plan = args.plan_buffer;
  p.lse_log2 = workspace + work.lse_log2;
  p.delta = workspace + work.delta;
  p.dq_accumulator = args.deterministic ? nullptr : workspace + work.dq;
  p.schedule = reinterpret_cast<int*>(workspace + work.schedule);
  p.dk_accumulator = workspace + work.dk;
  p.dv_accumulator = workspace + work.dv;
  p.q_token_stride = args.q.token_stride;
  p.q_head_stride = args.q.head_stride;
  p.k_token_stride = args.k.token_stride;
  p.k_head_stride = args.k.head_stride;
  p.v_token_stride = args.v.token_stride;
  p.v_head_stride = args.v.head_stride;
  p.out_token_stride = args.out.token_stride;
  p.out_head_stride = args.out.head_stride;
  p.dout_token_stride = args.dout.token_stride;
  p.dout_head_stride = args.dout.head_stride;
  p.dq_token_stride = args.dq.token_stride;
  p.dq_head_stride = args.dq.head_stride;
  p.dk_token_stride = args.dk.token_stride;
  p.dk_head_stride = args.dk.head_stride;
  p.dv_token_stride = args.dv.token_stride;
  p.dv_head_stride = args.dv.head_stride;
  p.key_tiles = at.views[view].key_tiles;
  p.key_order = at.views[view].key_order;
  p.key_rank = at.views[view].key_rank;
  p.first = at.first;
  p.len = at.len;
  p.cu_q = at.cu_q;
  p.seq_fault = at.seq_fault;
  p.key_tile_count = kMetaKeyTiles + view;
  p.key_rows = kMetaKeyRows + 2 * view;
  p.max_key_tiles = tile_slots(plan.total_k, plan.batch, spec.tile.block_n);
  // Each costs a quarter of what a slot has to do.
  p.max_heavy = std::min(p.max_key_tiles, 4 * p.slots / args.heads_kv + 1);
  p.batch = plan.batch;
  p.total_q = plan.total_q;
  p.total_k = plan.total_k;
  p.heads = args.heads;
  p.heads_kv = args.heads_kv;
  p.heads_per_kv = args.heads / args.heads_kv;
  const int dim_v = value_head_dim(args.head_dim, args.head_dim_v);
  const bool capped = args.softcap > 0;
  p.softmax_scale = static_cast<float>(args.softmax_scale);
  p.scale_log2 = static_cast<float>((capped ? args.softcap : args.softmax_scale) * kLog2E);
  p.softcap_in = capped ? static_cast<float>(args.softmax_scale / args.softcap) : 0.0F;

  const auto heads = static_cast<unsigned>(args.heads);
  launch.prepare = {1 + blocks_of(plan.total_q, kElementwiseThreads / ceil_pow2(dim_v / 8)) +
                        blocks_of(p.max_split, p.heads_per_kv),
                    heads};
  if (plan.total_k > 0) {
    launch.main.x =
        check_blocks((p.max_key_tiles + sizes.max_units + p.max_heavy) * args.heads_kv, spec);
  }
  const BackwardConfig config = backward_config(spec);
  const std::int64_t dk_dv = std::int64_t{p.max_split} * args.heads_kv * config.tile_sum_blocks();
  const std::int64_t dq = args.deterministic ? 0
                                             : args.heads * BackwardConfig::dq_sum_blocks(
                                                                config.padded_dim(), plan.total_q);
  launch.sum.x = check_blocks(dk_dv + dq, spec);
  return launch;
}

}  // namespace treeattn
