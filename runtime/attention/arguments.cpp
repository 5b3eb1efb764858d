#include "runtime/attention/arguments.h"

#include <fmt/format.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

constexpr std::size_t kAlignBytes = 16;

bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

[[noreturn]] void refuse_alignment(std::string_view name, const void* pointer, std::size_t bytes) {
  refuse(name, fmt::format("{}", pointer), fmt::format("a pointer aligned to {} bytes", bytes));
}

void check_heads(const Shape& shape) {
  if (shape.heads <= 0) refuse("heads", fmt::format("{}", shape.heads), "at least 1");
  if (shape.heads_kv <= 0) refuse("heads_kv", fmt::format("{}", shape.heads_kv), "at least 1");
  if (shape.heads % shape.heads_kv != 0) {
    refuse("heads", fmt::format("{}", shape.heads),
           fmt::format("a multiple of heads_kv = {}", shape.heads_kv));
  }
}

}  // namespace

[[noreturn]] void refuse(std::string_view what, std::string_view value, std::string_view expected,
                         std::string hint) {
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

void check_scale(double softmax_scale, double softcap) {
  if (!(softmax_scale > 0) || !std::isfinite(softmax_scale)) {
    refuse("softmax_scale", fmt::format("{}", softmax_scale), "a positive finite number",
           "1 / sqrt(head_dim) is usual");
  }
  if (!(softcap >= 0) || !std::isfinite(softcap)) {
    refuse("softcap", fmt::format("{}", softcap), "0 (off) or a positive finite number");
  }
  // Kernels take the scales as f32, with a factor of log2(e).
  constexpr double kMost = 1e37;
  constexpr double kLeast = 1e-37;
  const auto check_range = [&](std::string_view what, double value) {
    if (value >= kLeast && value <= kMost) return;
    refuse(what, fmt::format("{}", value), fmt::format("{} to {}", kLeast, kMost));
  };
  check_range("softmax_scale", softmax_scale);
  if (softcap == 0) return;
  check_range("softcap", softcap);
  check_range("softmax_scale / softcap", softmax_scale / softcap);
}

PlanShape check_plan(const Plan* plan, const std::int32_t* plan_buffer) {
  if (plan == nullptr) refuse("plan", "null", "the header that plan_for() returned");
  if (plan_buffer == nullptr) refuse("plan_buffer", "null", "the buffer that build_plan() filled");
  check_aligned("plan_buffer", plan_buffer, kAlignBytes);
  return to_plan_shape(*plan);
}

void check_aligned(std::string_view name, const void* pointer, std::size_t bytes) {
  if (!is_aligned(pointer, bytes)) refuse_alignment(name, pointer, bytes);
}

void check_tensor(std::string_view name, const ConstTensor& t, std::int64_t tokens, int heads,
                  DType dtype, bool cuda) {
  if (tokens == 0) return;
  // Names are put together for errors only: that took longer than all checks of a hot call.
  if (t.data == nullptr) refuse(fmt::format("{}.data", name), "null", "a pointer to its elements");
  if (!cuda) return;
  if (!is_aligned(t.data, kAlignBytes)) {
    refuse_alignment(fmt::format("{}.data", name), t.data, kAlignBytes);
  }
  const int bytes = element_bytes(dtype);
  const auto check_stride = [&](std::string_view which, std::int64_t stride) {
    if (stride % (static_cast<std::int64_t>(kAlignBytes) / bytes) == 0) return;
    refuse(
        fmt::format("{}.{}", name, which), fmt::format("{} elements", stride),
        fmt::format("a multiple of {} elements (16 bytes)", static_cast<int>(kAlignBytes) / bytes));
  };
  if (tokens > 1) check_stride("token_stride", t.token_stride);
  if (heads > 1) check_stride("head_stride", t.head_stride);
}

void check_output(std::string_view name, const Tensor& t, std::int64_t tokens, int heads, int dim,
                  DType dtype, bool cuda) {
  check_tensor(name, {t.data, t.token_stride, t.head_stride}, tokens, heads, dtype, cuda);
  const auto distance = [](std::int64_t stride) {
    return std::abs(std::max(stride, -std::numeric_limits<std::int64_t>::max()));
  };
  const std::int64_t token = tokens > 1 ? distance(t.token_stride) : 0;
  const std::int64_t head = heads > 1 ? distance(t.head_stride) : 0;
  // outer >= (count - 1) * inner + dim, without overflow.
  const auto steps_over = [dim](std::int64_t outer, std::int64_t inner, std::int64_t count) {
    return outer >= dim && (count <= 1 || inner <= (outer - dim) / (count - 1));
  };
  // One dimension must step over all of the other.
  const bool token_major =
      (heads <= 1 || head >= dim) && (tokens <= 1 || steps_over(token, head, heads));
  const bool head_major =
      (tokens <= 1 || token >= dim) && (heads <= 1 || steps_over(head, token, tokens));
  if (tokens == 0 || token_major || head_major) return;
  refuse(fmt::format("{}'s strides", name),
         fmt::format("token_stride {}, head_stride {}", t.token_stride, t.head_stride),
         fmt::format("strides that keep {} tokens of {} heads of {} elements apart", tokens, heads,
                     dim));
}

Problem problem_for(Pass pass, const Shape& shape, Target target) {
  Problem problem;
  problem.pass = pass;
  problem.dtype = shape.dtype == DType::kF16 ? KernelDType::kF16 : KernelDType::kBF16;
  problem.head_dim = static_cast<std::uint16_t>(shape.head_dim);
  problem.head_dim_v = static_cast<std::uint16_t>(value_head_dim(shape.head_dim, shape.head_dim_v));
  problem.softcap = shape.softcap;
  return on_device(problem, target);
}

TensorMapRequest tensor_map_request(const ConstTensor& tensor, KernelDType dtype, int dims,
                                    int heads, std::int64_t tokens, int rows, int box_heads) {
  return {tensor.data,        dtype, dims,     heads, tokens, tensor.token_stride,
          tensor.head_stride, rows,  box_heads};
}

void refuse_missing_view(const KernelSpec& spec) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("the plan holds no tile lists for {}x{} tiles, which kernel {} needs",
                          spec.tile.block_m, spec.tile.view_block_n(), to_string(spec)),
              "make the plan with plan_for() and pass it this shape");
}

int require_view(const PlanShape& plan, const KernelSpec& spec) {
  const int view = find_view(plan, spec.tile.block_m, spec.tile.view_block_n());
  if (view < 0) refuse_missing_view(spec);
  return view;
}

void check_workspace(const void* workspace, std::size_t bytes, std::size_t needed,
                     std::string_view function) {
  if (needed == 0) return;
  if (workspace == nullptr) {
    refuse("workspace", "null", fmt::format("{}() = {} bytes", function, needed));
  }
  check_aligned("workspace", workspace, kAlignBytes);
  if (bytes < needed) {
    refuse("workspace_bytes", fmt::format("{}", bytes),
           fmt::format("at least {}() = {}", function, needed));
  }
}

unsigned check_blocks(std::int64_t blocks, const KernelSpec& spec) {
  if (blocks <= INT_MAX) return static_cast<unsigned>(blocks);
  throw Error(ErrorCode::kUnsupported,
              fmt::format("kernel {} would need {} thread blocks, at most {} can be launched",
                          to_string(spec), blocks, INT_MAX),
              "split the batch");
}

}  // namespace treeattn
