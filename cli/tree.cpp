// treeattn tree show: draws a tree's mask and the tiles it is cut into, and says what sharing
// saves.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/draw.h"
#include "runtime/attention/plan_cpu.h"
#include "runtime/attention/plan_stats.h"
#include "runtime/attention/workload.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

struct ShowOptions {
  std::string source;
  std::string svg;
  std::string png;
  int block_m = 128;
  int block_n = 64;
  std::int64_t tree = 0;
  bool ascii = false;
  bool json = false;
};

/// Trees, and the tokens of everything written out without sharing.
struct Source {
  Workload work;
  std::int64_t unshared_tokens = 0;
};

[[noreturn]] void refuse_file(const std::string& path, const std::string& why) {
  throw UsageError(fmt::format(
      "'{}' {}; expected {{\"parents\": [...], \"lengths\": [...]}}, {{\"start\": [...], \"end\": "
      "[...]}}, {{\"rows\": [[token, ...], ...]}}, or one list per tree of {{\"parent\": ..., "
      "\"length\": ...}}",
      path, why));
}

template <class Integer>
std::vector<Integer> whole_numbers(const std::string& path, const Json& list,
                                   const std::string& name) {
  if (!list.is_array()) refuse_file(path, fmt::format("has '{}' that is not a list", name));
  std::vector<Integer> numbers;
  for (const Json& item : list) {
    // Beyond int64, get() would wrap around.
    const bool whole = item.is_number_integer() &&
                       (!item.is_number_unsigned() || item.get<std::uint64_t>() <= INT64_MAX);
    const auto value = whole ? item.get<std::int64_t>() : 0;
    if (!whole || value < std::numeric_limits<Integer>::min() ||
        value > std::numeric_limits<Integer>::max()) {
      refuse_file(
          path, fmt::format("has {} in '{}' where a whole number belongs",
                            item.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 40),
                            name));
    }
    numbers.push_back(static_cast<Integer>(value));
  }
  return numbers;
}

Tree tree_from_parents(const std::string& path, const Json& json) {
  const auto parents = whole_numbers<std::int64_t>(path, json["parents"], "parents");
  const auto lengths = whole_numbers<std::int64_t>(path, json["lengths"], "lengths");
  if (parents.size() != lengths.size()) {
    refuse_file(path, fmt::format("has {} parents and {} lengths", parents.size(), lengths.size()));
  }
  std::vector<TreeNode> nodes;
  for (std::size_t i = 0; i < parents.size(); ++i) nodes.push_back({parents[i], lengths[i]});
  return Tree::from_nodes(nodes);
}

Source source_from_rows(const std::string& path, const Json& json) {
  if (!json.is_array()) refuse_file(path, "has 'rows' that are not a list");
  std::vector<std::vector<std::int64_t>> rows;
  for (const Json& row : json) rows.push_back(whole_numbers<std::int64_t>(path, row, "rows"));
  const std::vector<std::span<const std::int64_t>> views(rows.begin(), rows.end());
  Source source;
  PackedRows packed = pack_rows(views);
  source.unshared_tokens = std::ssize(packed.row_positions);
  source.work.trees.push_back(std::move(packed.tree));
  return source;
}

Source source_from_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Error(ErrorCode::kIoError, fmt::format("cannot read '{}'", path));
  const Json json = Json::parse(stream, nullptr, false);
  if (json.is_discarded()) refuse_file(path, "is not JSON");
  Source source;
  if (json.is_array()) {
    source.work = parse_workload("file:" + path);
    source.unshared_tokens = source.work.unshared_tokens();
    return source;
  }
  if (!json.is_object()) refuse_file(path, "holds no tree");
  if (json.contains("rows")) {
    source = source_from_rows(path, json["rows"]);
  } else if (json.contains("parents") && json.contains("lengths")) {
    source.work.trees.push_back(tree_from_parents(path, json));
  } else if (json.contains("start") && json.contains("end")) {
    source.work.trees.push_back(
        Tree::from_arrays(whole_numbers<std::int32_t>(path, json["start"], "start"),
                          whole_numbers<std::int32_t>(path, json["end"], "end")));
  } else {
    refuse_file(path, "holds no tree");
  }
  source.work.name = path;
  if (!json.contains("rows")) source.unshared_tokens = source.work.unshared_tokens();
  return source;
}

Source open_source(const std::string& text) {
  std::error_code ignored;
  const bool is_file = text.ends_with(".json") || std::filesystem::exists(text, ignored);
  const bool has_kind = text.find(':') != std::string::npos;
  if (is_file && !text.starts_with("file:") && text.find("*file:") == std::string::npos) {
    return source_from_file(text);
  }
  if (!has_kind) {
    throw UsageError(fmt::format("'{}' is neither a workload nor a file; a workload is one of\n{}",
                                 text, workload_grammar()));
  }
  Source source;
  source.work = parse_workload(text);
  source.unshared_tokens = source.work.unshared_tokens();
  return source;
}

PlanStats analyse(const Workload& work, int block_m, int block_n) {
  const PackedTrees packed = work.pack();
  PlanShape shape{};
  shape.total_q = shape.total_k = static_cast<int>(packed.start.size());
  shape.batch = static_cast<int>(work.trees.size());
  shape.num_views = 1;
  shape.views[0] = {block_m, block_n};
  PlanInputs inputs;
  inputs.cu_seqlens_q = inputs.cu_seqlens_k = packed.cu_seqlens.data();
  inputs.tree_dfs_order_start_q = packed.start.data();
  inputs.tree_dfs_order_end_k = packed.end.data();
  std::vector<int> buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints));
  build_plan_cpu(shape, inputs, buffer.data());
  return analyse_plan(shape, buffer.data(), 0);
}

std::int64_t nodes_of(const Workload& work) {
  std::int64_t nodes = 0;
  for (const Tree& tree : work.trees) nodes += std::ssize(tree.nodes());
  return nodes;
}

std::int64_t leaves_of(const Workload& work) {
  std::int64_t leaves = 0;
  for (const Tree& tree : work.trees) leaves += tree.leaves();
  return leaves;
}

double sharing_ratio(const Source& source) {
  const auto tokens = static_cast<double>(source.work.tokens());
  return tokens > 0 ? static_cast<double>(source.unshared_tokens) / tokens : 1;
}

Json show_json(const Source& source, const PlanStats& stats, const MaskPicture* picture,
               const ShowOptions& options) {
  constexpr std::size_t kMostTilesListed = 1 << 16;
  const auto share = [&](std::int64_t tiles) {
    return stats.tiles() > 0 ? static_cast<double>(tiles) / static_cast<double>(stats.tiles()) : 0;
  };
  Json json;
  json["source"] = source.work.name;
  json["trees"] = source.work.trees.size();
  json["nodes"] = nodes_of(source.work);
  json["leaves"] = leaves_of(source.work);
  json["tokens"] = source.work.tokens();
  json["unshared_tokens"] = source.unshared_tokens;
  json["sharing_ratio"] = sharing_ratio(source);
  json["visible_pairs"] = stats.visible_pairs;
  json["block_m"] = options.block_m;
  json["block_n"] = options.block_n;
  json["tiles"] = {{"skipped", stats.tiles_skipped},
                   {"partial", stats.tiles_partial},
                   {"full", stats.tiles_full},
                   {"skipped_share", share(stats.tiles_skipped)},
                   {"partial_share", share(stats.tiles_partial)},
                   {"full_share", share(stats.tiles_full)},
                   {"useful_share", stats.useful_share}};
  if (picture != nullptr && picture->tiles.classes.size() <= kMostTilesListed) {
    json["tree"] = options.tree;
    json["tile_rows"] = tile_rows(*picture);
  }
  if (!options.svg.empty()) json["svg"] = options.svg;
  if (!options.png.empty()) json["png"] = options.png;
  return json;
}

std::string show_text(const Source& source, const PlanStats& stats, const ShowOptions& options) {
  const auto tiles = static_cast<double>(stats.tiles());
  std::string text = fmt::format(
      "{}: {}, {}, {}\n", source.work.name, plural(std::ssize(source.work.trees), "tree"),
      plural(nodes_of(source.work), "node"),
      leaves_of(source.work) == 1 ? "1 leaf" : format_count(leaves_of(source.work)) + " leaves");
  text += fmt::format("tokens            {}\n", format_count(source.work.tokens()));
  text += fmt::format("without sharing   {} ({:.2f} times as many)\n",
                      format_count(source.unshared_tokens), sharing_ratio(source));
  text += fmt::format("visible pairs     {}\n", format_count(stats.visible_pairs));
  text += fmt::format("tiles of {} x {}, of those plain causal attention would visit:\n",
                      options.block_m, options.block_n);
  const auto line = [&](std::string_view name, std::int64_t count, std::string_view meaning) {
    text += fmt::format("  {:<8} {:>12} {:>8}  {}\n", name, format_count(count),
                        format_share(static_cast<double>(count), tiles), meaning);
  };
  line("skipped", stats.tiles_skipped, "never loaded");
  line("full", stats.tiles_full, "no mask code runs");
  line("partial", stats.tiles_partial, "the mask is tested");
  text += fmt::format("useful share of the visited tiles' area: {}\n",
                      format_share(stats.useful_share, 1));
  return text;
}

std::string picture_text(const MaskPicture& picture, const ShowOptions& options,
                         std::int64_t trees) {
  const DrawStyle style{!options.ascii && terminal_is_utf8(), terminal_columns()};
  const std::string which =
      trees > 1 ? fmt::format(" of tree {} (0 to {})", options.tree, trees - 1) : "";
  std::string text = fmt::format("Mask{}: queries down, keys to the right\n\n", which);
  text += draw_mask(picture, style);
  text += fmt::format("\nTiles{}: {} skipped, {} partial, {} full\n\n", which,
                      style.utf8 ? "·" : ".", style.utf8 ? "▒" : "+", style.utf8 ? "█" : "#");
  return text + draw_tiles(picture, style) + "\n";
}

double picture_tiles(const Tree& tree, const ShowOptions& options) {
  const auto tokens = static_cast<double>(tree.tokens());
  return tokens / options.block_m * tokens / options.block_n;
}

void check_block(const char* option, int block) {
  if (block % kGranuleKeys != 0) {
    throw UsageError(fmt::format("{}: '{}' is not a multiple of {}", option, block, kGranuleKeys));
  }
}

int run_show(const ShowOptions& options) {
  check_block("--block-m", options.block_m);
  check_block("--block-n", options.block_n);
  const Source source = open_source(options.source);
  const std::int64_t trees = std::ssize(source.work.trees);
  if (options.tree >= std::max<std::int64_t>(trees, 1)) {
    throw UsageError(fmt::format("--tree: '{}' is not a tree of '{}', which has {}", options.tree,
                                 source.work.name, plural(trees, "tree")));
  }
  const PlanStats stats = analyse(source.work, options.block_m, options.block_n);
  std::unique_ptr<MaskPicture> picture;
  const bool drawable =
      trees > 0 && picture_tiles(source.work.trees[options.tree], options) <= kMostPictureTiles;
  if (drawable) {
    picture = std::make_unique<MaskPicture>(
        make_picture(source.work.trees[options.tree], options.block_m, options.block_n));
  }
  if (picture == nullptr && !(options.svg.empty() && options.png.empty())) {
    throw Error(ErrorCode::kUnsupported, "the tree is too large to draw",
                "larger tiles (--block-m, --block-n) make fewer of them");
  }
  if (!options.svg.empty()) write_output(options.svg, draw_svg(*picture, source.work.name));
  if (!options.png.empty()) write_output(options.png, draw_png(*picture));
  if (options.json) {
    print_json(show_json(source, stats, picture.get(), options));
    return kExitOk;
  }
  if (picture != nullptr) print(picture_text(*picture, options, trees));
  print(show_text(source, stats, options));
  for (const std::string& file : {options.svg, options.png}) {
    if (!file.empty()) print(fmt::format("drawn to {}\n", file));
  }
  return kExitOk;
}

}  // namespace

void add_tree(CLI::App& app, Action& action) {
  CLI::App* tree = app.add_subcommand("tree", "Draw trees");
  CLI::App* show =
      tree->add_subcommand("show", "Draw a tree's mask and its tiles, and say what sharing saves");
  const auto options = std::make_shared<ShowOptions>();
  show->add_option("source", options->source,
                   "A workload such as fork:4096,16x1024, or a JSON file")
      ->required()
      ->type_name("WORKLOAD");
  show->add_option("--svg", options->svg, "Draw the mask to this file, too")->type_name("FILE");
  show->add_option("--png", options->png,
                   "The same as PNG: full tiles blue, partial ones orange, visible pairs darker")
      ->type_name("FILE");
  show->add_option("--block-m", options->block_m, "Query rows of a tile; default 128")
      ->type_name("N")
      ->check(whole_number(16, 4096));
  show->add_option("--block-n", options->block_n, "Keys of a tile; default 64")
      ->type_name("N")
      ->check(whole_number(16, 4096));
  show->add_option("--tree", options->tree, "Which tree of the workload to draw; default 0")
      ->type_name("N")
      ->check(whole_number(0, INT32_MAX));
  show->add_flag("--ascii", options->ascii, "Draw with ASCII characters only");
  show->add_flag("--json", options->json, "Print JSON");
  std::string grammar(workload_grammar());
  for (std::size_t at = 0; (at = grammar.find('\n', at)) != std::string::npos; at += 3) {
    grammar.replace(at, 1, "\n  ");
  }
  show->footer(
      "Workloads:\n  " + grammar +
      "\n\nA JSON file holds {\"parents\": [-1, 0, 0], \"lengths\": [3, 2, 3]}, {\"start\": [...], "
      "\"end\": [...]},\n{\"rows\": [[token ids], ...]}, or one list of nodes per tree.\n\n"
      "Examples:\n"
      "  treeattn tree show fork:3,2x2\n"
      "  treeattn tree show binary:6,512 --block-n 128 --svg tree.svg");
  show->callback([options, &action] { action = [options] { return run_show(*options); }; });
  tree->footer("Example:\n  treeattn tree show fork:3,2x2");
}

}  // namespace treeattn::cli
