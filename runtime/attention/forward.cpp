#include "runtime/attention/forward.h"

#include <fmt/format.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr std::uintptr_t kAlignBytes = 16;

[[noreturn]] void refuse(std::string_view what, std::string_view value, std::string_view expected,
                         std::string hint = {}) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{} is {}, expected {}", what, value, expected), std::move(hint));
}

int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF32:
      return 4;
    case DType::kF64:
      return 8;
  }
  refuse("dtype", fmt::format("{}", static_cast<int>(dtype)),
         "0 (f16), 1 (bf16), 2 (f32) or 3 (f64)");
}

void check_heads(const Shape& shape) {
  if (shape.heads <= 0) refuse("heads", fmt::format("{}", shape.heads), "at least 1");
  if (shape.heads_kv <= 0) refuse("heads_kv", fmt::format("{}", shape.heads_kv), "at least 1");
  if (shape.heads % shape.heads_kv != 0) {
    refuse("heads", fmt::format("{}", shape.heads),
           fmt::format("a multiple of heads_kv = {}", shape.heads_kv));
  }
}

/// `dims` names the sizes of the dimensions that the strides step over.
void check_tensor(std::string_view name, const ConstTensor& t, std::int64_t tokens, int heads,
                  int bytes, bool cuda) {
  if (tokens == 0) return;
  if (t.data == nullptr) refuse(fmt::format("{}.data", name), "null", "a pointer to its elements");
  if (!cuda) return;
  if (reinterpret_cast<std::uintptr_t>(t.data) % kAlignBytes != 0) {
    refuse(fmt::format("{}.data", name), fmt::format("{}", t.data),
           "a pointer aligned to 16 bytes");
  }
  const auto check_stride = [&](std::string_view which, std::int64_t stride) {
    if (stride * bytes % static_cast<std::int64_t>(kAlignBytes) == 0) return;
    refuse(
        fmt::format("{}.{}", name, which), fmt::format("{} elements", stride),
        fmt::format("a multiple of {} elements (16 bytes)", static_cast<int>(kAlignBytes) / bytes));
  };
  if (tokens > 1) check_stride("token_stride", t.token_stride);
  if (heads > 1) check_stride("head_stride", t.head_stride);
}

/// Rows of out that alias would be written by several blocks at once.
void check_output(const Tensor& out, std::int64_t tokens, int heads) {
  if (tokens > 1 && out.token_stride == 0) refuse("out.token_stride", "0", "distinct rows");
  if (tokens > 0 && heads > 1 && out.head_stride == 0)
    refuse("out.head_stride", "0", "distinct heads");
}

}  // namespace

void check_shape(const Shape& shape, bool cuda) {
  check_heads(shape);
  element_bytes(shape.dtype);
  const int dim_v = value_head_dim(shape.head_dim, shape.head_dim_v);
  if (!cuda) {
    if (shape.head_dim <= 0) refuse("head_dim", fmt::format("{}", shape.head_dim), "at least 1");
    if (dim_v <= 0) refuse("head_dim_v", fmt::format("{}", dim_v), "at least 1");
    return;
  }
  if (shape.dtype != DType::kF16 && shape.dtype != DType::kBF16) {
    refuse("dtype", shape.dtype == DType::kF32 ? "f32" : "f64", "f16 or bf16 on a GPU",
           "the CPU executor (EngineKind::kCpu) takes f32 and f64 too");
  }
  const auto check_dim = [](std::string_view name, int dim) {
    if (dim >= kHeadDimMin && dim <= kHeadDimMax && dim % kHeadDimStep == 0) return;
    refuse(name, fmt::format("{}", dim),
           fmt::format("a multiple of {} from {} to {}", kHeadDimStep, kHeadDimMin, kHeadDimMax));
  };
  check_dim("head_dim", shape.head_dim);
  check_dim("head_dim_v", dim_v);
}

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
  if (!(args.softmax_scale > 0) || !std::isfinite(args.softmax_scale)) {
    refuse("softmax_scale", fmt::format("{}", args.softmax_scale), "a positive finite number",
           "1 / sqrt(head_dim) is usual");
  }
  if (!(args.softcap >= 0) || !std::isfinite(args.softcap)) {
    refuse("softcap", fmt::format("{}", args.softcap), "0 (off) or a positive finite number");
  }
  if (args.plan == nullptr) refuse("plan", "null", "the header that plan_for() returned");
  if (args.plan_buffer == nullptr)
    refuse("plan_buffer", "null", "the buffer that build_plan() filled");
  const PlanShape plan = to_plan_shape(*args.plan);
  const int bytes = element_bytes(args.dtype);
  check_tensor("q", args.q, plan.total_q, args.heads, bytes, cuda);
  check_tensor("k", args.k, plan.total_k, args.heads_kv, bytes, cuda);
  check_tensor("v", args.v, plan.total_k, args.heads_kv, bytes, cuda);
  check_tensor("out", {args.out.data, args.out.token_stride, args.out.head_stride}, plan.total_q,
               args.heads, bytes, cuda);
  check_output(args.out, plan.total_q, args.heads);
  return plan;
}

void check_plan_inputs(const PlanShape& shape, const PlanInputs& inputs) {
  const auto require = [](bool needed, const void* pointer, std::string_view name,
                          std::string_view size) {
    if (needed && pointer == nullptr) {
      refuse(name, "null", fmt::format("a pointer to {} int32", size));
    }
  };
  require(shape.batch > 0, inputs.cu_seqlens_q, "cu_seqlens_q", "batch + 1");
  require(shape.batch > 0, inputs.cu_seqlens_k, "cu_seqlens_k", "batch + 1");
  switch (inputs.lowering) {
    case Lowering::kTree:
      require(shape.total_q > 0, inputs.tree_dfs_order_start_q, "tree_dfs_order_start_q",
              "total_q");
      require(shape.total_k > 0, inputs.tree_dfs_order_end_k, "tree_dfs_order_end_k", "total_k");
      return;
    case Lowering::kIntervals:
      require(shape.total_k > 0, inputs.first, "first", "total_k");
      require(shape.total_k > 0, inputs.len, "len", "total_k");
      return;
    case Lowering::kCausal:
    case Lowering::kFull:
      return;
  }
  refuse("lowering", fmt::format("{}", static_cast<int>(inputs.lowering)),
         "0 (tree), 1 (causal), 2 (full) or 3 (intervals)");
}

Problem forward_problem(const Shape& shape, Target target) {
  Problem problem;
  problem.pass = Pass::kForward;
  problem.family = Family::kSm80;
  problem.target = target;
  problem.dtype = shape.dtype == DType::kF16 ? KernelDType::kF16 : KernelDType::kBF16;
  problem.head_dim = static_cast<std::uint16_t>(shape.head_dim);
  problem.head_dim_v = static_cast<std::uint16_t>(value_head_dim(shape.head_dim, shape.head_dim_v));
  problem.softcap = shape.softcap;
  return problem;
}

namespace {

/// Query heads walked together: as many kv heads as have their K and V in half the L2, in groups of
/// about equal size.
int heads_in_group(const ForwardArgs& args, const PlanShape& plan, std::int64_t l2_bytes) {
  const std::int64_t kv_bytes = static_cast<std::int64_t>(plan.total_k) *
                                (args.head_dim + value_head_dim(args.head_dim, args.head_dim_v)) *
                                2;
  const std::int64_t fitting = std::clamp<std::int64_t>(
      l2_bytes / 2 / std::max<std::int64_t>(kv_bytes, 1), 1, args.heads_kv);
  const std::int64_t groups = (args.heads_kv + fitting - 1) / fitting;
  const std::int64_t kv_heads = (args.heads_kv + groups - 1) / groups;
  return static_cast<int>(kv_heads * (args.heads / args.heads_kv));
}

}  // namespace

ForwardLaunch make_forward_launch(const ForwardArgs& args, const PlanShape& plan,
                                  const KernelSpec& spec, std::int64_t l2_bytes) {
  ForwardLaunch launch;
  const int view = find_view(plan, spec.tile.block_m, spec.tile.block_n);
  if (view < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("the plan holds no tile lists for {}x{} tiles, which kernel {} needs",
                            spec.tile.block_m, spec.tile.block_n, to_string(spec)),
                "make the plan with plan_for() and pass it this shape");
  }
  if (plan.total_q == 0) return launch;
  const PlanOffsets at = plan_offsets(plan);
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
  p.max_query_tiles = tile_slots(plan.total_q, plan.batch, spec.tile.block_m);
  p.total_q = plan.total_q;
  p.heads = args.heads;
  p.heads_per_kv = args.heads / args.heads_kv;
  p.heads_in_group = heads_in_group(args, plan, l2_bytes);
  const bool capped = args.softcap > 0;
  p.scale_log2 = static_cast<float>((capped ? args.softcap : args.softmax_scale) * kLog2E);
  p.softcap_in = capped ? static_cast<float>(args.softmax_scale / args.softcap) : 0.0F;
  const std::int64_t blocks = static_cast<std::int64_t>(p.max_query_tiles) * args.heads;
  if (blocks > INT_MAX) {
    throw Error(
        ErrorCode::kUnsupported,
        fmt::format("total_q / {} x heads needs {} thread blocks, at most {} can be launched",
                    spec.tile.block_m, blocks, INT_MAX),
        "split the batch");
  }
  launch.blocks = static_cast<unsigned>(blocks);
  return launch;
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
