#include "runtime/attention/forward.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "generator/launch_bounds.h"
#include "generator/tile_space.h"

namespace treeattn {

namespace {

/// kv heads that are walked together: as many as have their K and V in half the L2, in groups of
/// about equal size.
int kv_heads_in_group(int heads_kv, std::int64_t kv_bytes_per_head, std::int64_t l2_bytes) {
  const std::int64_t fitting = std::clamp<std::int64_t>(
      l2_bytes / 2 / std::max<std::int64_t>(kv_bytes_per_head, 1), 1, heads_kv);
  const std::int64_t groups = (heads_kv + fitting - 1) / fitting;
  return static_cast<int>((heads_kv + groups - 1) / groups);
}

}  // namespace

Shape shape_of(const ForwardArgs& args) {
  return Shape{args.dtype,
               args.heads,
               args.heads_kv,
               args.head_dim,
               value_head_dim(args.head_dim, args.head_dim_v),
               args.softcap > 0};
}

PlanShape check_forward(const ForwardArgs& args, bool cuda) {
  check_shape(shape_of(args), cuda);
  check_scale(args.softmax_scale, args.softcap);
  const PlanShape plan = check_plan(args.plan, args.plan_buffer);
  check_tensor("q", args.q, plan.total_q, args.heads, args.dtype, cuda);
  check_tensor("k", args.k, plan.total_k, args.heads_kv, args.dtype, cuda);
  check_tensor("v", args.v, plan.total_k, args.heads_kv, args.dtype, cuda);
  check_output("out", args.out, plan.total_q, args.heads,
               value_head_dim(args.head_dim, args.head_dim_v), args.dtype, cuda);
  check_aligned("lse", args.lse, alignof(float));
  return plan;
}

int most_heads_per_pack_log2(int heads_per_kv) {
  int log2 = 0;
  while (log2 < kMostHeadsPerPackLog2 && heads_per_kv % (2 << log2) == 0) ++log2;
  return log2;
}

int heads_per_pack_log2_for(const Shape& shape) {
  return std::min(2, most_heads_per_pack_log2(shape.heads / shape.heads_kv));
}

ForwardView forward_view(const PlanShape& plan, const TileConfig& tile, int heads_per_kv) {
  int log2 = most_heads_per_pack_log2(heads_per_kv);
  for (;; --log2) {
    const int view = find_view(plan, tile.block_m >> log2, tile.view_block_n());
    if (view >= 0 || log2 == 0) return {view, log2};
  }
}

ForwardLaunch make_forward_launch(const ForwardArgs& args, const PlanShape& plan,
                                  const KernelSpec& spec, int sm_count, std::int64_t l2_bytes) {
  ForwardLaunch launch;
  const int heads_per_kv = args.heads / args.heads_kv;
  const auto [view, heads_per_pack_log2] = forward_view(plan, spec.tile, heads_per_kv);
  if (view < 0) refuse_missing_view(spec);
  if (plan.total_q == 0) return launch;
  const PlanOffsets at = plan_offsets(plan);
  const int packs_per_kv = heads_per_kv >> heads_per_pack_log2;
  const int tokens_per_tile = plan.views[view].block_m;
  ForwardParams& p = launch.params;
  p.q = args.q.data;
  p.k = args.k.data;
  p.v = args.v.data;
  p.out = args.out.data;
  p.lse = args.lse;
  p.plan = args.plan_buffer;
  p.q_token_stride = args.q.token_stride;
  p.q_head_stride = args.q.head_stride;
  p.k_token_stride = args.k.token_stride;
  p.k_head_stride = args.k.head_stride;
  p.v_token_stride = args.v.token_stride;
  p.v_head_stride = args.v.head_stride;
  p.out_token_stride = args.out.token_stride;
  p.out_head_stride = args.out.head_stride;
  p.query_tiles = at.views[view].query_tiles;
  p.key_tiles = at.views[view].key_tiles;
  p.first = at.first;
  p.len = at.len;
  p.query_tile_count = kMetaQueryTiles + view;
  p.max_query_tiles = tile_slots(plan.total_q, plan.batch, tokens_per_tile);
  p.total_q = plan.total_q;
  p.head_packs = args.heads >> heads_per_pack_log2;
  p.heads_per_kv = heads_per_kv;
  p.heads_per_pack_log2 = heads_per_pack_log2;
  p.tokens_in_8_rows = 8 >> heads_per_pack_log2;
  const int dims = args.head_dim + value_head_dim(args.head_dim, args.head_dim_v);
  const bool draws = spec.problem.family == Family::kSm90;
  int together = kv_heads_in_group(args.heads_kv, std::int64_t{2} * plan.total_k * dims, l2_bytes);
  if (!draws) {
    // Blocks start in order. Whether or not they fit the L2, heads that are walked together fill
    // the chip twice: their heavy tiles come first, and those of the last group are waited for.
    const std::int64_t kv_head_blocks =
        std::max<std::int64_t>(1, plan.total_q / tokens_per_tile) * packs_per_kv;
    const auto filling = static_cast<int>(std::min<std::int64_t>(
        args.heads_kv,
        (std::int64_t{2} * sm_count * blocks_per_sm(spec) + kv_head_blocks - 1) / kv_head_blocks));
    const int groups = std::max(1, args.heads_kv / std::max(together, filling));
    together = (args.heads_kv + groups - 1) / groups;
  }
  p.head_packs_in_group = packs_per_kv * together;
  const bool capped = args.softcap > 0;
  p.scale_log2 = static_cast<float>((capped ? args.softcap : args.softmax_scale) * kLog2E);
  p.softcap_in = capped ? static_cast<float>(args.softmax_scale / args.softcap) : 0.0F;
  const std::int64_t items = static_cast<std::int64_t>(p.max_query_tiles) * p.head_packs;
  // Blocks that draw count on by one each after the last item.
  launch.grid.x = check_blocks(draws ? items + sm_count : items, spec);
  if (draws) {
    check_workspace(args.workspace, args.workspace_bytes, kForwardWorkspaceBytes,
                    "forward_workspace_bytes");
    launch.grid.x = static_cast<unsigned>(std::min<std::int64_t>(items, sm_count));
  }
  return launch;
}

ForwardTensorMaps forward_tensor_maps(const ForwardArgs& args, const PlanShape& plan,
                                      const KernelSpec& spec) {
  const KernelDType dtype = spec.problem.dtype;
  const TileConfig& tile = spec.tile;
  const auto keys = [&](const ConstTensor& tensor, int dims, int rows) {
    return tensor_map_request(tensor, dtype, dims, args.heads_kv, plan.total_k, rows);
  };
  const int dim_v = value_head_dim(args.head_dim, args.head_dim_v);
  const int packed = forward_view(plan, tile, args.heads / args.heads_kv).heads_per_pack_log2;
  return {tensor_map_request(args.q, dtype, args.head_dim, args.heads, plan.total_q,
                             tile.block_m >> packed, 1 << packed),
          keys(args.k, args.head_dim, tile.box_n), keys(args.k, args.head_dim, kGranuleKeys),
          keys(args.v, dim_v, tile.box_n), keys(args.v, dim_v, kGranuleKeys)};
}

std::optional<KernelSpec> strided_spec(const Problem& problem, const PlanShape& plan,
                                       int heads_per_kv) {
  Problem sm80 = problem;
  sm80.family = Family::kSm80;
  sm80.target.arch_specific = false;
  const auto tile =
      sm80_tile_for_views(sm80, {plan.views, static_cast<std::size_t>(plan.num_views)},
                          most_heads_per_pack_log2(heads_per_kv));
  if (!tile) return std::nullopt;
  return KernelSpec{sm80, *tile};
}

std::string describe_misfit(const ForwardTensorMaps& maps) {
  for (const auto& [name, map] : {std::pair("q", &maps.q), {"k", &maps.k}, {"v", &maps.v}}) {
    if (!fits_tensor_map(*map)) return describe_misfit(name, *map);
  }
  return {};
}

PlanLaunch make_plan_launch(const PlanShape& shape, const PlanInputs& inputs, std::int32_t* buffer,
                            int sm_count) {
  constexpr int kIntervalThreads = 256;
  constexpr int kWarpsPerBlock = 8;
  PlanLaunch launch;
  launch.params.shape = shape;
  launch.params.offsets = plan_offsets(shape);
  launch.params.plan = buffer;
  launch.params.cu_seqlens_q = inputs.cu_seqlens_q;
  launch.params.cu_seqlens_k = inputs.cu_seqlens_k;
  launch.params.start_q = inputs.tree_dfs_order_start_q;
  launch.params.end_k = inputs.tree_dfs_order_end_k;
  launch.params.first = inputs.first;
  launch.params.len = inputs.len;
  launch.params.lowering = static_cast<int>(inputs.lowering);
  const auto blocks_for = [&](std::int64_t items, int per_block, int per_sm) {
    const std::int64_t most = static_cast<std::int64_t>(sm_count) * per_sm;
    return static_cast<unsigned>(
        std::clamp<std::int64_t>((items + per_block - 1) / per_block, 1, most));
  };
  launch.intervals.x = blocks_for(std::max(shape.total_q, shape.total_k), kIntervalThreads, 8);
  launch.key_tiles.x =
      blocks_for(tile_slots(shape.total_k, shape.batch, kGranuleKeys), kWarpsPerBlock, 8);
  launch.key_tiles.y = 1 + static_cast<unsigned>(shape.num_views);
  launch.query_tiles.x = std::max(1U, 2 * static_cast<unsigned>(shape.num_views));
  return launch;
}

}  // namespace treeattn
