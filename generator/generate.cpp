#include "generator/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "generator/emit.h"
#include "generator/launch_bounds.h"
#include "generator/template_source.h"
#include "generator/tile_space.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

/// A C identifier made of the spec's own words: profilers show it.
std::string entry_name(const KernelSpec& spec) {
  std::string name = "treeattn_" + to_string(spec);
  const std::size_t at = name.find('@');
  name.erase(at, name.find('/', at) - at);
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
}

std::string emit_entry(const KernelEntry& entry, int blocks, std::string_view params,
                       std::string_view function) {
  return fmt::format(
      "extern \"C\" __global__ void __launch_bounds__({}, {})\n"
      "{}(const __grid_constant__ treeattn::{} p) {{\n  treeattn::{}(p);\n}}\n",
      entry.threads, blocks, entry.name, params, function);
}

GeneratedSource generate_forward(const KernelSpec& spec, Flattener& templates) {
  const ForwardConfig config = forward_config(spec);
  const KernelEntry entry{entry_name(spec), config.threads(), config.smem_bytes()};
  const int blocks = blocks_per_sm(spec);
  GeneratedSource source{spec, {}, {entry}};
  source.text = emit_banner(
      spec,
      fmt::format("// One block per query tile and query head: {} threads, {} bytes of dynamic "
                  "shared memory,\n// {} together on a multiprocessor.\n",
                  entry.threads, entry.smem_bytes, blocks));
  source.text += templates.flatten("shared/params.h");
  source.text += "#line 1 \"emitted/config\"\n" + emit_forward_config(spec);
  source.text += "#line 1 \"emitted/mma\"\n" + emit_mma(spec);
  source.text += templates.flatten("kernels/forward_sm80.cuh");
  source.text += "#line 1 \"emitted/entry\"\n";
  source.text += emit_entry(entry, blocks, "ForwardParams", "forward_sm80");
  return source;
}

GeneratedSource generate_forward_sm90(const KernelSpec& spec, Flattener& templates) {
  const ForwardSm90Config config = forward_sm90_config(spec);
  const KernelEntry entry{entry_name(spec), config.threads(), config.smem_bytes()};
  GeneratedSource source{spec, {}, {entry}};
  source.text = emit_banner(
      spec, fmt::format("// A block per multiprocessor walks pairs of a query tile and a query "
                        "head: {} threads,\n// {} bytes of dynamic shared memory.\n",
                        entry.threads, entry.smem_bytes));
  source.text += templates.flatten("shared/params.h");
  source.text += "#line 1 \"emitted/config\"\n" + emit_forward_sm90_config(spec);
  source.text += "#line 1 \"emitted/mma\"\n" + emit_mma(spec);
  source.text += "#line 1 \"emitted/wgmma\"\n" + emit_wgmma(spec);
  source.text += templates.flatten("kernels/forward_sm90.cuh");
  source.text += "#line 1 \"emitted/entry\"\n";
  source.text += emit_entry(entry, 1, "ForwardSm90Params", "forward_sm90");
  return source;
}

/// Entries in launch order: prepare, the main kernel, and the sums of what it accumulated.
GeneratedSource generate_backward(const KernelSpec& spec, Flattener& templates) {
  const bool sm90 = spec.problem.family == Family::kSm90;
  const BackwardConfig config = backward_config(spec);
  const BackwardSm90Config sm90_config = backward_sm90_config(spec);
  const std::string name = entry_name(spec);
  const KernelEntry main{name, sm90 ? sm90_config.threads() : config.threads(),
                         sm90 ? sm90_config.smem_bytes() : config.smem_bytes()};
  const int blocks = blocks_per_sm(spec);
  GeneratedSource source{spec, {}, {}};
  source.text = emit_banner(
      spec,
      fmt::format("// Three kernels. The main one has one block per key tile, kv head and share of "
                  "its query heads:\n// {} threads, {} bytes of dynamic shared memory, {} together "
                  "on a multiprocessor.\n",
                  main.threads, main.smem_bytes, blocks));
  source.text += templates.flatten("shared/params.h");
  source.text += "#line 1 \"emitted/config\"\n" +
                 (sm90 ? emit_backward_sm90_config(spec) : emit_backward_config(spec));
  source.text += "#line 1 \"emitted/mma\"\n" + emit_mma(spec);
  if (sm90) source.text += "#line 1 \"emitted/wgmma\"\n" + emit_backward_wgmma(spec);
  source.text += templates.flatten("kernels/backward_prepare.cuh");
  source.text +=
      templates.flatten(sm90 ? "kernels/backward_sm90.cuh" : "kernels/backward_sm80.cuh");
  source.text += templates.flatten("kernels/backward_sum.cuh");
  source.text += "#line 1 \"emitted/entries\"\n";
  const auto add = [&source](const KernelEntry& entry, int min_blocks, std::string_view params,
                             std::string_view function) {
    source.text += emit_entry(entry, min_blocks, params, function);
    source.entries.push_back(entry);
  };
  add({name + "_prepare", kElementwiseThreads, 0}, 1, "BackwardParams", "backward::prepare");
  add(main, blocks, sm90 ? "BackwardSm90Params" : "BackwardParams",
      sm90 ? "backward_sm90" : "backward_sm80");
  add({name + "_sum", kElementwiseThreads, 0}, 1, "BackwardParams", "backward::sum");
  return source;
}

GeneratedSource generate_backward_dq(const KernelSpec& spec, Flattener& templates) {
  const BackwardDqConfig config = backward_dq_config(spec);
  const KernelEntry entry{entry_name(spec), config.threads(), config.smem_bytes()};
  const int blocks = blocks_per_sm(spec);
  GeneratedSource source{spec, {}, {entry}};
  source.text = emit_banner(
      spec, fmt::format("// One block per query tile and query head: {} threads, {} bytes of "
                        "dynamic shared memory,\n// {} together on a multiprocessor.\n",
                        entry.threads, entry.smem_bytes, blocks));
  source.text += templates.flatten("shared/params.h");
  source.text += "#line 1 \"emitted/config\"\n" + emit_backward_dq_config(spec);
  source.text += "#line 1 \"emitted/mma\"\n" + emit_mma(spec);
  source.text += templates.flatten("kernels/backward_dq_sm80.cuh");
  source.text += "#line 1 \"emitted/entry\"\n";
  source.text += emit_entry(entry, blocks, "BackwardParams", "backward_dq_sm80");
  return source;
}

GeneratedSource generate_plan(const KernelSpec& spec, Flattener& templates) {
  struct PlanKernel {
    std::string_view function;
    int threads;
  };
  // In launch order, as make_plan_launch() sizes their grids.
  static constexpr std::array<PlanKernel, 4> kKernels{{{"plan_sequences", 1024},
                                                       {"plan_intervals", 256},
                                                       {"plan_key_tiles", 256},
                                                       {"plan_query_tiles", 1024}}};
  GeneratedSource source{spec, {}, {}};
  source.text = emit_banner(spec, "// Four kernels, launched one after the other.\n");
  source.text += templates.flatten("shared/params.h");
  source.text += templates.flatten("kernels/plan.cuh");
  source.text += "#line 1 \"emitted/entries\"\n";
  for (const PlanKernel& kernel : kKernels) {
    const KernelEntry entry{fmt::format("treeattn_{}", kernel.function), kernel.threads, 0};
    source.text += emit_entry(entry, 1, "PlanParams", kernel.function);
    source.entries.push_back(entry);
  }
  return source;
}

}  // namespace

GeneratedSource generate(const KernelSpec& spec, const std::string& template_dir) {
  auto refused = refuse_problem(spec.problem);
  if (!refused) refused = refuse_tile(spec.problem, spec.tile);
  if (refused) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("kernel spec {}: {}", to_string(spec), *refused));
  }
  Flattener templates(template_dir);
  switch (spec.problem.pass) {
    case Pass::kPlan:
      return generate_plan(spec, templates);
    case Pass::kForward:
      if (spec.problem.family == Family::kSm90) return generate_forward_sm90(spec, templates);
      return generate_forward(spec, templates);
    case Pass::kBackward:
      return generate_backward(spec, templates);
    case Pass::kBackwardDq:
      return generate_backward_dq(spec, templates);
  }
  throw Error(ErrorCode::kInternal, "unknown pass");
}

const std::string& embedded_templates_text() {
  static const std::string text = [] {
    std::string all;
    for (const EmbeddedTemplate& t : embedded_templates()) {
      all += fmt::format("{}\n{}\n", t.name, t.text);
    }
    return all;
  }();
  return text;
}

}  // namespace treeattn
