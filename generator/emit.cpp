#include "generator/emit.h"

#include <fmt/format.h>

#include "generator/launch_bounds.h"
#include "templates/shared/params.h"

namespace treeattn {

std::string emit_banner(const KernelSpec& spec, const std::string& launch) {
  return fmt::format(
      "// {}\n"
      "// Written by treeattn's generator; `treeattn emit {}` prints it again.\n"
      "{}"
      "// By hand: nvcc -std=c++17 -arch={} -cubin\n\n",
      to_string(spec), to_string(spec), launch, to_string(spec.problem.target));
}

namespace {

/// nvcc, unlike NVRTC, knows a constant that a member function is called on at run time only if it
/// is a device variable; such a variable must not be inline.
template <class Config>
std::string emit_config(const Config& c, std::string_view type, std::string_view params,
                        std::size_t params_bytes, std::string_view more = {}) {
  return fmt::format(
      "namespace treeattn {{\n"
      "__device__ constexpr {} kConfig{{\n"
      "    /*dtype=*/KernelDType::{}, /*head_dim=*/{}, /*head_dim_v=*/{},\n"
      "    /*block_m=*/{}, /*block_n=*/{}, /*stages=*/{}, /*warps=*/{}, /*softcap=*/{}{}}};\n"
      "static_assert(kConfig.smem_bytes() == {}, \"shared memory as the host sized it\");\n"
      "static_assert(sizeof({}) == {}, \"parameters as the host passes them\");\n"
      "}}  // namespace treeattn\n",
      type, c.dtype == KernelDType::kF16 ? "kF16" : "kBF16", c.head_dim, c.head_dim_v, c.block_m,
      c.block_n, c.stages, c.warps, c.softcap, more, c.smem_bytes(), params, params_bytes);
}

}  // namespace

std::string emit_forward_config(const KernelSpec& spec) {
  return emit_config(forward_config(spec), "ForwardConfig", "ForwardParams", sizeof(ForwardParams));
}

std::string emit_forward_sm90_config(const KernelSpec& spec) {
  const ForwardSm90Config c = forward_sm90_config(spec);
  return fmt::format(
      "namespace treeattn {{\n"
      "__device__ constexpr ForwardSm90Config kConfig{{\n"
      "    /*dtype=*/KernelDType::{}, /*head_dim=*/{}, /*head_dim_v=*/{},\n"
      "    /*block_m=*/{}, /*block_n=*/{}, /*box_n=*/{}, /*stages=*/{}, /*warps=*/{}, "
      "/*softcap=*/{}}};\n"
      "static_assert(kConfig.smem_bytes() == {}, \"shared memory as the host sized it\");\n"
      "static_assert(sizeof(ForwardSm90Params) == {}, \"parameters as the host passes them\");\n"
      "}}  // namespace treeattn\n",
      c.dtype == KernelDType::kF16 ? "kF16" : "kBF16", c.head_dim, c.head_dim_v, c.block_m,
      c.block_n, c.box_n, c.stages, c.warps, c.softcap, c.smem_bytes(), sizeof(ForwardSm90Params));
}

std::string emit_backward_config(const KernelSpec& spec) {
  return emit_config(backward_config(spec), "BackwardConfig", "BackwardParams",
                     sizeof(BackwardParams),
                     backward_config(spec).bulk_dq ? ", /*bulk_dq=*/true" : ", /*bulk_dq=*/false");
}

std::string emit_backward_sm90_config(const KernelSpec& spec) {
  return emit_config(backward_sm90_config(spec), "BackwardSm90Config", "BackwardSm90Params",
                     sizeof(BackwardSm90Params), ", /*bulk_dq=*/true");
}

std::string emit_backward_dq_config(const KernelSpec& spec) {
  return emit_config(backward_dq_config(spec), "BackwardDqConfig", "BackwardParams",
                     sizeof(BackwardParams));
}

namespace {

/// `count` operands from %first on, as an instruction lists them.
std::string operand_list(int first, int count) {
  std::string list;
  for (int i = 0; i < count; ++i) list += fmt::format("{}%{}", i == 0 ? "" : ", ", first + i);
  return list;
}

std::string accumulator_constraints(int count) {
  std::string list;
  for (int i = 0; i < count; ++i) list += fmt::format("{}\"+f\"(d[{}])", i == 0 ? "" : ", ", i);
  return list;
}

}  // namespace

namespace {

/// d = a b + (accumulate ? d : 0), a and b in shared memory.
std::string emit_wgmma_shared(std::string_view name, int columns, std::string_view type,
                              bool transpose_b) {
  const int count = columns / 2;
  return fmt::format(
      R"(/// d = a b + (accumulate ? d : 0): 64 rows, {0} columns, 16 deep; a is K-major, b {7}-major, in shared memory.
__device__ __forceinline__ void {1}(float (&d)[{2}], unsigned long long a, unsigned long long b,
                                    int accumulate) {{
  asm volatile(
      "{{\n.reg .pred p;\nsetp.ne.b32 p, %{2}, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n{0}k16.f32.{3}.{3} {{{4}}}, %{5}, %{6}, p, 1, 1, 0, {8};\n}}\n"
      : {9}
      : "r"(accumulate), "l"(a), "l"(b));
}}
)",
      columns, name, count, type, operand_list(0, count), count + 1, count + 2,
      transpose_b ? "MN" : "K", transpose_b ? 1 : 0, accumulator_constraints(count));
}

/// d += a b, a in registers.
std::string emit_wgmma_registers(std::string_view name, int columns, std::string_view type) {
  const int count = columns / 2;
  return fmt::format(
      R"(/// d += a b: 64 rows, {0} columns, 16 deep; a in registers, b MN-major in shared memory.
__device__ __forceinline__ void {1}(float (&d)[{2}], const unsigned (&a)[4],
                                    unsigned long long b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{0}k16.f32.{3}.{3} {{{4}}}, {{{5}}}, %{6}, 1, 1, 1, 1;\n"
      : {7}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
)",
      columns, name, count, type, operand_list(0, count), operand_list(count, 4), count + 4,
      accumulator_constraints(count));
}

std::string in_namespace(const std::string& text) {
  return "namespace treeattn {\n" + text + "}  // namespace treeattn\n";
}

}  // namespace

std::string emit_wgmma(const KernelSpec& spec) {
  const ForwardSm90Config config = forward_sm90_config(spec);
  const std::string_view type = to_string(config.dtype);
  return in_namespace(emit_wgmma_shared("wgmma_qk", config.block_n, type, false) +
                      emit_wgmma_registers("wgmma_pv", config.head_dim_v, type));
}

std::string emit_backward_wgmma(const KernelSpec& spec) {
  const BackwardSm90Config config = backward_sm90_config(spec);
  const std::string_view type = to_string(config.dtype);
  return in_namespace(emit_wgmma_shared("wgmma_scores", config.block_m, type, false) +
                      emit_wgmma_registers("wgmma_dv", config.head_dim_v, type) +
                      emit_wgmma_registers("wgmma_dk", config.head_dim, type) +
                      emit_wgmma_shared("wgmma_dq", BackwardSm90Config::kChunkDims, type, true));
}

std::string emit_mma(const KernelSpec& spec) {
  // bf16 is the upper half of an f32.
  static constexpr std::string_view kUnpackBf16 = R"(/// The halves of packed numbers as f32.
__device__ __forceinline__ float unpack_low(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float unpack_high(unsigned x) { return __uint_as_float(x & 0xffff0000u); })";
  static constexpr std::string_view kUnpackF16 = R"(/// The halves of packed numbers as f32.
__device__ __forceinline__ float unpack_low(unsigned x) {
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ float unpack_high(unsigned x) {
  float y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
  return y;
})";
  const std::string_view unpack =
      spec.problem.dtype == KernelDType::kBF16 ? kUnpackBf16 : kUnpackF16;
  return fmt::format(
      R"(namespace treeattn {{
/// d += a b, one 16x8x16 step (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {{
  asm("mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, "
      "{{%8, %9}}, {{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
/// The same for 8 values of k: the end of a head dim that is no multiple of 16.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2],
                                            const unsigned (&b)[1]) {{
  asm("mma.sync.aligned.m16n8k8.row.col.f32.{0}.{0}.f32 {{%0, %1, %2, %3}}, {{%4, %5}}, {{%6}}, "
      "{{%0, %1, %2, %3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}}
/// Two numbers rounded to the kernel's type, `lo` in the lower half.
__device__ __forceinline__ unsigned pack2(float lo, float hi) {{
  unsigned packed;
  asm("cvt.rn.{0}x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}}
{1}
}}  // namespace treeattn
)",
      to_string(spec.problem.dtype), unpack);
}

}  // namespace treeattn
