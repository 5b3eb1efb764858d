// treeattn demo: a tree, the kernels for it, the result, and the check of it.
#include <fmt/format.h>

#include <array>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cli/attention_case.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/draw.h"
#include "cli/reference.h"
#include "cli/session.h"
#include "cli/store.h"
#include "runtime/cuda/nvrtc.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct DemoOptions {
  std::string device = "auto";
  bool json = false;
};

constexpr CaseShape kShape{
    .dtype = DType::kBF16, .heads = 4, .heads_kv = 2, .dims = {64, 64}, .softcap = 0};
/// What is compiled where there is no GPU to compile for.
constexpr const char* kShownSpec = "fwd/sm80@sm_90/bf16/d64v64";

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// The README's picture.
std::string small_mask() {
  const std::array nodes{TreeNode{-1, 3}, TreeNode{0, 2}, TreeNode{0, 3}};
  const MaskPicture picture = make_picture(Tree::from_nodes(nodes), 16, 16);
  return draw_mask(picture, {}, "PPPaabbb");
}

/// The README's example: a prompt and three answers.
Workload example_workload() {
  const std::array nodes{TreeNode{-1, 96}, TreeNode{0, 32}, TreeNode{0, 57}, TreeNode{0, 24}};
  Workload work;
  work.name = "a prompt of 96 tokens and answers of 32, 57 and 24";
  work.trees.push_back(Tree::from_nodes(nodes));
  return work;
}

/// One kernel compiled by NVRTC whether or not it is cached: what a GPU's first call does.
Json compile_shown_kernel() {
  Json json;
  json["spec"] = to_string(parse_kernel_spec(kShownSpec));
  std::string why;
  if (try_nvrtc(&why) == nullptr) {
    json["compiled"] = false;
    json["problem"] = why;
    return json;
  }
  ArtifactSource source = make_source(open_store({}, true));
  const BuildReport report = source.build(parse_kernel_spec(kShownSpec), true);
  const ArtifactFacts facts = summarise(report.artifact);
  json["compiled"] = true;
  json["nvrtc"] = report.artifact.nvrtc;
  json["ms"] = report.ms;
  json["registers"] = facts.registers;
  json["spill_bytes"] = facts.spill_bytes;
  json["smem_bytes"] = facts.smem_bytes;
  json["cubin_bytes"] = report.artifact.cubin.size();
  json["kept"] = report.published;
  if (!report.problem.empty()) json["problem"] = report.problem;
  return json;
}

Json prepare_kernels(Engine& engine, const AttentionCase& problem) {
  const Shape shape = problem.engine_shape();
  Json kernels = Json::array();
  for (const PreparedKernel& kernel : engine.prepare({&shape, 1})) {
    kernels.push_back({{"spec", kernel.spec}, {"origin", kernel.origin}, {"ms", kernel.ms}});
  }
  return kernels;
}

std::string kernel_text(const Json& json) {
  if (json.contains("kernels")) {
    std::string text;
    for (const Json& kernel : json["kernels"]) {
      text += fmt::format("  {:<44} {} in {} ms\n", kernel["spec"].get<std::string>(),
                          kernel["origin"] == "compiled" ? "compiled" : "loaded from the cache",
                          format_ms(kernel["ms"].get<double>()));
    }
    return text;
  }
  const Json& shown = json["kernel"];
  if (!shown["compiled"].get<bool>()) {
    return fmt::format(
        "  not shown: NVRTC was not found ('treeattn doctor' says where it was "
        "looked for)\n");
  }
  return fmt::format(
      "  {}\n  compiled with NVRTC {} in {} ms: {} registers, {} bytes of spills, {} of shared "
      "memory\n",
      shown["spec"].get<std::string>(), shown["nvrtc"].get<std::string>(),
      format_ms(shown["ms"].get<double>()), shown["registers"].get<int>(),
      shown["spill_bytes"].get<int>(), format_bytes(shown["smem_bytes"].get<std::uint64_t>()));
}

std::string report(const Json& json) {
  std::string text =
      "A prompt P with two answers a and b, packed into one tree. Rows are queries, columns are\n"
      "keys; every token sees its ancestors and nothing else:\n\n" +
      json["mask"].get<std::string>();
  text += fmt::format("\nThe example: {}\n", json["example"].get<std::string>());
  text += fmt::format("  {} tokens in place of {}; {} query heads, {} key heads of 64, bf16\n",
                      json["tokens"].get<int>(), json["unshared_tokens"].get<int>(), kShape.heads,
                      kShape.heads_kv);
  text += fmt::format("\nKernels{}:\n", json.contains("kernels")
                                            ? ""
                                            : ", as a GPU with compute capability 9.0 "
                                              "would get them");
  text += kernel_text(json);
  text += fmt::format("\nRun on: {}\n", json["device"]["description"].get<std::string>());
  text += fmt::format("  plan and attention in {} ms\n", format_ms(json["run_ms"].get<double>()));
  text += fmt::format(
      "\nAgainst the definition, element by element in float64:\n"
      "  relative error {:.1e}, worst row {:.1e}, lse {:.1e}: {}\n",
      json["rel_l2"].get<double>(), json["worst_row"].get<double>(), json["lse"].get<double>(),
      json["ok"].get<bool>() ? "good" : "WRONG");
  return text;
}

int run_demo(const DemoOptions& options) {
  Session session(parse_device("--device", options.device));
  const Workload work = example_workload();
  const AttentionCase problem = make_case(work, kShape, 1);
  Json json;
  json["mask"] = small_mask();
  json["example"] = work.name;
  json["tokens"] = work.tokens();
  json["unshared_tokens"] = work.unshared_tokens();
  json["device"] = session.json();
  if (session.gpu()) {
    json["kernels"] = prepare_kernels(session.engine(), problem);
  } else {
    json["kernel"] = compile_shown_kernel();
  }
  CaseRun run(session.engine(), problem);
  run.poison();
  const auto start = Clock::now();
  run.build_plan();
  run.forward();
  run.require_valid_plan();
  json["run_ms"] = ms_since(start);
  const Comparison result =
      compare(problem, reference_forward(problem, problem.total_q()), run.out(), run.lse());
  json["rel_l2"] = result.rel_l2;
  json["worst_row"] = result.worst_row;
  json["lse"] = result.lse;
  json["ok"] = result.failure.empty();
  if (options.json) {
    print_json(json);
  } else {
    print(report(json));
  }
  if (result.failure.empty()) return kExitOk;
  print_error("the result is wrong: " + result.failure);
  return kExitFailure;
}

}  // namespace

void add_demo(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "demo", "Build a tree, compile the kernels for it, run it and check the result");
  const auto options = std::make_shared<DemoOptions>();
  command->add_option("--device", options->device, kDeviceHelp)->type_name("DEVICE");
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Without a GPU the CPU executor runs it, and one kernel is compiled all the same "
      "where NVRTC is found.\n\nExample:\n  treeattn demo");
  command->callback([options, &action] { action = [options] { return run_demo(*options); }; });
}

}  // namespace treeattn::cli
