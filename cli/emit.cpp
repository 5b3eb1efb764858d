// treeattn emit SPEC: the source of a kernel, its key and its tile.
#include <fmt/format.h>

#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/store.h"
#include "generator/tile_space.h"
#include "runtime/cache/artifact.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

struct EmitOptions {
  std::string spec;
  std::string out;
  bool key = false;
  bool tiles = false;
  bool json = false;
};

Json tile_json(const TileConfig& tile) {
  return {{"text", to_string(tile)},
          {"block_m", tile.block_m},
          {"block_n", tile.block_n},
          {"stages", tile.stages},
          {"warps", tile.warps}};
}

Json tiles_json(const Problem& problem) {
  Json tiles = Json::array();
  for (const TileCandidate& candidate : tile_candidates(problem)) {
    Json json{{"tile", to_string(candidate.tile)}, {"legal", candidate.refused.empty()}};
    if (!candidate.refused.empty()) json["refused"] = candidate.refused;
    tiles.push_back(std::move(json));
  }
  return tiles;
}

Json describe(const GeneratedSource& source) {
  const CompileOptions options = compile_options(source.spec);
  Json json;
  json["spec"] = to_string(source.spec);
  json["key"] = artifact_key(source, options).hex();
  json["target"] = to_string(options.target);
  json["flags"] = options.flags;
  json["tile"] =
      source.spec.problem.pass == Pass::kPlan ? Json(nullptr) : tile_json(source.spec.tile);
  json["source_bytes"] = source.text.size();
  json["entries"] = Json::array();
  for (const KernelEntry& entry : source.entries) {
    json["entries"].push_back(
        {{"name", entry.name}, {"threads", entry.threads}, {"smem_bytes", entry.smem_bytes}});
  }
  return json;
}

void print_facts(const Json& facts) {
  print(fmt::format("spec    {}\nkey     {}\n", facts["spec"].get<std::string>(),
                    facts["key"].get<std::string>()));
  if (const Json& tile = facts["tile"]; !tile.is_null()) {
    print(fmt::format("tile    {}: {} query rows x {} keys, {} stages, {} warps\n",
                      tile["text"].get<std::string>(), tile["block_m"].get<int>(),
                      tile["block_n"].get<int>(), tile["stages"].get<int>(),
                      tile["warps"].get<int>()));
  }
  print(fmt::format("source  {} bytes\n\n", facts["source_bytes"].get<std::size_t>()));
  Table table(
      {{"entry"}, {"threads", Table::Align::kRight}, {"shared memory", Table::Align::kRight}});
  for (const Json& entry : facts["entries"]) {
    table.add({entry["name"].get<std::string>(), fmt::format("{}", entry["threads"].get<int>()),
               fmt::format("{} B", entry["smem_bytes"].get<int>())});
  }
  print(table.text());
}

void print_tiles(const Problem& problem) {
  Table table({{"tile"}, {"verdict"}});
  for (const TileCandidate& candidate : tile_candidates(problem)) {
    const bool is_default = candidate.refused.empty() && candidate.tile == default_tile(problem);
    table.add({to_string(candidate.tile), is_default                  ? "legal, the default"
                                          : candidate.refused.empty() ? "legal"
                                                                      : candidate.refused});
  }
  print(table.empty() ? "plan kernels have no tile\n" : table.text());
}

int run_emit(const EmitOptions& options) {
  const KernelSpec spec = parse_kernel_spec(options.spec);
  const GeneratedSource source = generate_source(spec);
  if (!options.out.empty()) write_output(options.out, source.text);
  if (options.json) {
    Json json = describe(source);
    if (options.tiles) json["tiles"] = tiles_json(spec.problem);
    if (!options.out.empty()) json["out"] = options.out;
    print_json(json);
  } else if (options.tiles) {
    print_tiles(spec.problem);
  } else if (options.key) {
    print_facts(describe(source));
  } else if (options.out.empty()) {
    print(source.text);
  }
  return kExitOk;
}

}  // namespace

void add_emit(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("emit", "Print the CUDA source of a kernel");
  const auto options = std::make_shared<EmitOptions>();
  command
      ->add_option("spec", options->spec,
                   "The kernel; the default tile is added where it names none")
      ->required()
      ->type_name("SPEC");
  command->add_option("--out", options->out, "Write the source to this file")->type_name("FILE");
  command->add_flag("--key", options->key, "Print key, tile and entries in place of the source");
  command->add_flag("--tiles", options->tiles,
                    "Print the tiles this kernel could have, and why others are refused");
  command->add_flag("--json", options->json, "Print key, tile and entries as JSON");
  command->footer(
      "Examples:\n"
      "  treeattn emit fwd/sm80@sm_90/bf16/d128v128\n"
      "  treeattn emit fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4 --out kernel.cu\n"
      "  treeattn emit plan/sm80@sm_80 --key");
  command->callback([options, &action] { action = [options] { return run_emit(*options); }; });
}

}  // namespace treeattn::cli
