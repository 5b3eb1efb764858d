// What forward and backward ask of their arguments alike. Everything throws
// Error(kInvalidArgument / kUnsupported) naming the argument, its value and what was expected, and
// allocates nothing unless it throws.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "generator/kernel_spec.h"
#include "runtime/attention/plan.h"
#include "runtime/cuda/tensor_map.h"
#include "treeattn/treeattn.h"

namespace treeattn {

inline constexpr double kLog2E = 1.4426950408889634;

/// head_dim_v with its default applied.
inline int value_head_dim(int head_dim, int head_dim_v) {
  return head_dim_v == 0 ? head_dim : head_dim_v;
}

[[noreturn]] void refuse(std::string_view what, std::string_view value, std::string_view expected,
                         std::string hint = {});

int element_bytes(DType dtype);
/// `cuda` adds what the kernels ask for: f16 or bf16, head dims they exist for.
void check_shape(const Shape& shape, bool cuda);
/// Checks that every pointer the lowering needs is there.
void check_plan_inputs(const PlanShape& shape, const PlanInputs& inputs);
void check_scale(double softmax_scale, double softcap);
PlanShape check_plan(const Plan* plan, const std::int32_t* plan_buffer);
/// A [tokens, heads, dim] tensor: there if it is not empty; with `cuda`, aligned to 16 bytes.
void check_tensor(std::string_view name, const ConstTensor& tensor, std::int64_t tokens, int heads,
                  DType dtype, bool cuda);
/// The same, and vectors of `dim` elements that do not overlap: several blocks would write them.
void check_output(std::string_view name, const Tensor& tensor, std::int64_t tokens, int heads,
                  int dim, DType dtype, bool cuda);
void check_aligned(std::string_view name, const void* pointer, std::size_t bytes);

/// The problem that a shape poses to the default kernels of a device's target.
Problem problem_for(Pass pass, const Shape& shape, Target target);

/// One kernel's blocks; x == 0: it is not launched.
struct Grid {
  unsigned x = 0, y = 1, z = 1;
};

/// A tensor as the copy engine reads it: boxes of `rows` tokens and `box_heads` heads.
TensorMapRequest tensor_map_request(const ConstTensor& tensor, KernelDType dtype, int dims,
                                    int heads, std::int64_t tokens, int rows, int box_heads = 1);

/// `function` says how many bytes are needed.
void check_workspace(const void* workspace, std::size_t bytes, std::size_t needed,
                     std::string_view function);
[[noreturn]] void refuse_missing_view(const KernelSpec& spec);
/// Throws if the plan holds no tile lists for the spec's tile.
int require_view(const PlanShape& plan, const KernelSpec& spec);
/// Throws kUnsupported if a grid of this many blocks cannot be launched.
unsigned check_blocks(std::int64_t blocks, const KernelSpec& spec);

}  // namespace treeattn
