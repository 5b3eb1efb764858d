// treeattn check: random and listed workloads against attention by its definition.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cli/attention_case.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/reference.h"
#include "cli/session.h"
#include "runtime/attention/splitmix.h"
#include "runtime/attention/workload.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

struct CheckOptions {
  std::string device = "auto";
  std::string pass = "fwd";
  bool deterministic = false;
  int cases = -1;
  std::int64_t seed = -1;
  std::string head_dims;
  std::string dtypes;
  int heads = 0;
  int heads_kv = 0;
  double softcap = -1;
  int threads = 0;
  std::int64_t rows = 1024;
  std::vector<std::string> workloads;
  bool json = false;
};

constexpr int kUsualCases = 24;
constexpr double kUsualSoftcap = 20;

struct Result {
  AttentionCase problem;
  Comparison comparison;
  std::string failure;
  std::string reproduce;
  std::uint64_t seed = 0;
};

/// A node's length, and how nodes hang together, vary by the form of the tree.
Tree random_tree(SplitMix64& rng, std::int64_t tokens) {
  enum Form { kChain, kStar, kOneToken, kDeep, kForest, kUniform, kForms = 8 };
  const auto form = static_cast<Form>(rng.below(kForms));
  const std::int64_t longest =
      form == kOneToken ? 1 : std::max<std::int64_t>(1, tokens / rng.between(2, 12));
  std::vector<TreeNode> nodes;
  for (std::int64_t left = tokens; left > 0;) {
    const auto count = static_cast<std::int64_t>(nodes.size());
    std::int64_t parent = count == 0 ? -1 : rng.below(count);
    if (form == kChain) parent = count - 1;
    if (form == kStar && count > 0) parent = 0;
    if (form == kDeep && count > 0) parent = std::max<std::int64_t>(0, count - 1 - rng.below(3));
    if (form == kForest && rng.chance(0.2)) parent = -1;
    const std::int64_t length = std::min(left, rng.between(rng.chance(0.1) ? 0 : 1, longest));
    nodes.push_back({parent, length});
    left -= length;
  }
  return Tree::from_nodes(nodes);
}

/// Queries as the last tokens of each tree, or keys as the last ones.
void drop_leading(SplitMix64& rng, AttentionCase& problem) {
  const bool queries = rng.chance(0.7);
  std::vector<std::int32_t>& cu = queries ? problem.cu_q : problem.cu_k;
  std::vector<std::int32_t>& array = queries ? problem.start : problem.end;
  std::vector<std::int32_t> kept_cu{0}, kept;
  for (std::size_t b = 0; b + 1 < cu.size(); ++b) {
    const std::int64_t dropped = rng.between(0, cu[b + 1] - cu[b]);
    kept.insert(kept.end(), array.begin() + cu[b] + dropped, array.begin() + cu[b + 1]);
    kept_cu.push_back(static_cast<std::int32_t>(kept.size()));
  }
  cu = std::move(kept_cu);
  array = std::move(kept);
}

struct Choices {
  std::vector<DType> dtypes;
  std::vector<HeadDims> dims;
};

template <class Value>
const Value& pick(SplitMix64& rng, const std::vector<Value>& values) {
  return values[static_cast<std::size_t>(rng.below(std::ssize(values)))];
}

/// Everything follows from the seed and the options.
AttentionCase random_case(const CheckOptions& options, const Choices& choices, std::uint64_t seed,
                          bool gpu) {
  SplitMix64 rng(seed);
  const bool is_long = rng.chance(gpu ? 1.0 / 3 : 0.1);
  const std::int64_t trees = rng.chance(0.5) ? 1 : rng.between(2, 5);
  std::int64_t left = is_long ? rng.between(2001, 4500) : rng.between(1, 700);
  // The gradients' reference takes all rows of all heads.
  if (options.pass == "bwd") left = is_long ? rng.between(701, 1500) : rng.between(1, 400);
  Workload work;
  for (std::int64_t t = 0; t < trees; ++t) {
    const bool empty = trees > 1 && rng.chance(0.1);
    const std::int64_t tokens = empty ? 0 : t + 1 == trees ? left : rng.between(0, left);
    work.trees.push_back(random_tree(rng, tokens));
    left -= tokens;
  }
  CaseShape shape;
  shape.dtype = pick(rng, choices.dtypes);
  shape.dims = pick(rng, choices.dims);
  static const std::vector<std::pair<int, int>> kHeads{{1, 1}, {4, 4}, {2, 1}, {4, 2}, {6, 2},
                                                       {8, 1}, {3, 3}, {5, 1}, {8, 2}};
  std::tie(shape.heads, shape.heads_kv) = pick(rng, kHeads);
  const bool softcap = rng.chance(1.0 / 6);
  shape.softcap = softcap ? kUsualSoftcap : 0;
  if (options.heads > 0) {
    shape.heads = options.heads;
    shape.heads_kv = options.heads_kv;
  }
  if (options.softcap >= 0) shape.softcap = options.softcap;
  work.name = fmt::format("random {}", seed);
  AttentionCase problem = make_case(work, shape, seed);
  if (rng.chance(1.0 / 3)) {
    drop_leading(rng, problem);
    fill_case(problem, seed);
  }
  return problem;
}

/// Gradients from the case's own forward.
void run_backward(Session& session, const CheckOptions& options, Result& result) {
  const AttentionCase& problem = result.problem;
  RunOptions how;
  how.backward = true;
  how.deterministic = options.deterministic;
  CaseRun run(session.engine(), problem, how);
  run.build_plan();
  run.require_valid_plan();
  run.poison();
  run.forward();
  run.backward();
  const std::vector<std::byte> dq = run.dq();
  result.comparison = compare_gradients(problem, dq, run.dk(), run.dv());
  result.failure = result.comparison.failure;
  if (!options.deterministic) return;
  run.poison();
  run.forward();
  run.backward();
  if (run.dq() != dq) {
    result.failure +=
        fmt::format("{}a second run gave other bits", result.failure.empty() ? "" : "; ");
  }
}

void run_case(Session& session, const CheckOptions& options, Result& result) {
  if (options.pass == "bwd") {
    run_backward(session, options, result);
    return;
  }
  const AttentionCase& problem = result.problem;
  CaseRun run(session.engine(), problem);
  run.build_plan();
  run.require_valid_plan();
  run.poison();
  run.forward();
  const std::vector<std::byte> out = run.out();
  const std::vector<float> lse = run.lse();
  result.comparison = compare(problem, reference_forward(problem, options.rows), out, lse);
  result.failure = result.comparison.failure;
  run.poison();
  run.forward();
  if (run.out() != out) result.failure += "; a second run gave other bits";
  run.poison();
  run.set_q(std::vector<std::byte>(problem.q.size()));
  run.forward();
  if (const std::string miscounted = compare_counts(problem, run.lse()); !miscounted.empty()) {
    result.failure += "; visible keys: " + miscounted;
  }
  if (result.failure.starts_with("; ")) result.failure.erase(0, 2);
}

Table make_table() {
  constexpr auto kRight = Table::Align::kRight;
  return Table({{"case", Table::Align::kLeft, 24},
                {"queries", kRight, 7},
                {"keys", kRight, 7},
                {"dtype", Table::Align::kLeft, 5},
                {"head dim", kRight},
                {"heads", kRight, 6},
                {"softcap", kRight},
                {"rel_l2", kRight, 8},
                {"worst row", kRight},
                {"lse", kRight, 8},
                {"result"}});
}

Table::Cells cells_of(const Result& result) {
  const CaseShape& shape = result.problem.shape;
  return {result.problem.name,
          fmt::format("{}", result.problem.total_q()),
          fmt::format("{}", result.problem.total_k()),
          std::string(dtype_name(shape.dtype)),
          to_string(shape.dims),
          fmt::format("{}/{}", shape.heads, shape.heads_kv),
          shape.softcap > 0 ? fmt::format("{:g}", shape.softcap) : "-",
          fmt::format("{:.1e}", result.comparison.rel_l2),
          fmt::format("{:.1e}", result.comparison.worst_row),
          fmt::format("{:.1e}", result.comparison.lse),
          result.failure.empty() ? "ok" : "FAILED"};
}

Json result_json(const Result& result) {
  const CaseShape& shape = result.problem.shape;
  Json json;
  json["case"] = result.problem.name;
  json["seed"] = result.seed;
  json["queries"] = result.problem.total_q();
  json["keys"] = result.problem.total_k();
  json["trees"] = result.problem.batch();
  json["dtype"] = dtype_name(shape.dtype);
  json["head_dim"] = shape.dims.head_dim;
  json["head_dim_v"] = shape.dims.head_dim_v;
  json["heads"] = shape.heads;
  json["heads_kv"] = shape.heads_kv;
  json["softcap"] = shape.softcap;
  json["rel_l2"] = result.comparison.rel_l2;
  json["worst_row"] = result.comparison.worst_row;
  json["lse"] = result.comparison.lse;
  json["ok"] = result.failure.empty();
  if (!result.failure.empty()) {
    json["failure"] = result.failure;
    json["reproduce"] = result.reproduce;
  }
  return json;
}

/// The options that shape a case, as they were given.
std::string shaping_options(const CheckOptions& options) {
  std::string text = " --device " + options.device;
  if (options.pass != "fwd") text += " --pass " + options.pass;
  if (options.deterministic) text += " --deterministic";
  if (!options.dtypes.empty()) text += " --dtype " + options.dtypes;
  if (!options.head_dims.empty()) text += " --head-dim " + options.head_dims;
  if (options.heads > 0) {
    text += fmt::format(" --heads {} --heads-kv {}", options.heads, options.heads_kv);
  }
  if (options.softcap >= 0) text += fmt::format(" --softcap {:g}", options.softcap);
  return text;
}

/// Prints results as they come, or collects them for one document.
class Report {
 public:
  explicit Report(bool json) : json_(json), table_(make_table()) {}

  void begin(const Session& session, std::uint64_t seed) {
    if (!json_) {
      print(fmt::format("{}\nseed {}\n\n{}", session.description(), seed, table_.header()));
      std::fflush(stdout);
      return;
    }
    document_["device"] = session.json();
    document_["seed"] = seed;
    document_["cases"] = Json::array();
  }

  void add(const Result& result) {
    ++count_;
    failures_ += !result.failure.empty();
    if (json_) {
      document_["cases"].push_back(result_json(result));
    } else {
      print(table_.line(cells_of(result)));
      std::fflush(stdout);
    }
    if (!result.failure.empty()) {
      print_error(fmt::format("{}: {}\n  to repeat it: {}", result.problem.name, result.failure,
                              result.reproduce));
    }
  }

  int finish() {
    if (json_) {
      document_["checked"] = count_;
      document_["failed"] = failures_;
      print_json(document_);
    } else {
      print(fmt::format("\n{} checked, {} failed\n", plural(count_, "case"), failures_));
    }
    return failures_ > 0 ? kExitFailure : kExitOk;
  }

 private:
  bool json_;
  Table table_;
  Json document_;
  int count_ = 0;
  int failures_ = 0;
};

/// One listed workload in every dtype and head dim asked for.
void check_listed(Session& session, const CheckOptions& options, const Choices& choices,
                  const Workload& work, std::uint64_t seed, Report& report) {
  for (const DType dtype : choices.dtypes) {
    for (const HeadDims& dims : choices.dims) {
      Result result;
      result.seed = seed;
      const CaseShape shape{dtype, options.heads > 0 ? options.heads : 4,
                            options.heads > 0 ? options.heads_kv : 2, dims,
                            std::max(0.0, options.softcap)};
      result.problem = make_case(work, shape, seed);
      CheckOptions repeat = options;
      repeat.dtypes = dtype_name(dtype);
      repeat.head_dims = to_string(dims);
      result.reproduce =
          fmt::format("treeattn check --seed {}{} '{}'", seed, shaping_options(repeat), work.name);
      run_case(session, options, result);
      report.add(result);
    }
  }
}

Choices make_choices(const CheckOptions& options, bool gpu, bool listed) {
  const char* dtypes = listed ? "bf16" : gpu ? "f16,bf16" : "f16,bf16,f32,f64";
  const char* dims = listed ? "128" : "64,80,128,192/128,256";
  return {parse_dtypes("--dtype", options.dtypes.empty() ? dtypes : options.dtypes, !gpu),
          parse_head_dims("--head-dim", options.head_dims.empty() ? dims : options.head_dims)};
}

int run_check(CheckOptions options) {
  const DeviceChoice device = parse_device("--device", options.device);
  if (options.heads > 0 && options.heads_kv == 0) options.heads_kv = options.heads;
  if (options.heads == 0 && options.heads_kv > 0) options.heads = options.heads_kv;
  if (options.heads > 0) check_heads(options.heads, options.heads_kv);
  // All arguments are judged before anything runs.
  if (options.deterministic && options.pass != "bwd") {
    throw UsageError("--deterministic is about gradients: it needs --pass bwd");
  }
  make_choices(options, false, false);
  std::vector<Workload> listed;
  for (const std::string& text : options.workloads) listed.push_back(parse_workload(text));
  if (options.cases < 0) options.cases = listed.empty() ? kUsualCases : 0;
  const std::uint64_t seed =
      options.seed >= 0 ? static_cast<std::uint64_t>(options.seed) : std::random_device{}();

  Session session(device, options.threads);
  const Choices random_choices = make_choices(options, session.gpu(), false);
  Report report(options.json);
  report.begin(session, seed);
  for (const Workload& work : listed) {
    check_listed(session, options, make_choices(options, session.gpu(), true), work, seed, report);
  }
  for (int i = 0; i < options.cases; ++i) {
    Result result;
    result.seed = seed + static_cast<std::uint64_t>(i);
    result.problem = random_case(options, random_choices, result.seed, session.gpu());
    result.reproduce =
        fmt::format("treeattn check --cases 1 --seed {}{}", result.seed, shaping_options(options));
    run_case(session, options, result);
    report.add(result);
  }
  return report.finish();
}

}  // namespace

void add_check(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "check", "Compare kernels with attention by its definition on random and listed trees");
  const auto options = std::make_shared<CheckOptions>();
  command
      ->add_option("workloads", options->workloads,
                   "Trees to check beside, or without, random ones")
      ->type_name("WORKLOAD");
  command->add_option("--device", options->device, kDeviceHelp)->type_name("DEVICE");
  command->add_option("--pass", options->pass, "fwd, or bwd: gradients; default fwd")
      ->type_name("PASS")
      ->check(one_of({"fwd", "bwd"}));
  command->add_flag("--deterministic", options->deterministic,
                    "With --pass bwd: deterministic gradients, run twice for equal bits");
  command
      ->add_option("--cases", options->cases,
                   "Random cases; default 24, or none where workloads are listed")
      ->type_name("N")
      ->check(whole_number(0, 1'000'000));
  command->add_option("--seed", options->seed, "Seed of the first case; default: a new one")
      ->type_name("N")
      ->check(whole_number(0, std::numeric_limits<std::int64_t>::max()));
  command
      ->add_option("--head-dim", options->head_dims,
                   "Head dims: 64,192/128 or all; default 64,80,128,192/128,256 (listed: 128)")
      ->type_name("LIST");
  command
      ->add_option("--dtype", options->dtypes,
                   "f16, bf16; on the CPU f32 and f64 too; default all (listed: bf16)")
      ->type_name("LIST");
  command->add_option("--heads", options->heads, "Query heads; default: random (listed: 4)")
      ->type_name("N")
      ->check(whole_number(1, 1024));
  command->add_option("--heads-kv", options->heads_kv, "Key heads; default: random (listed: 2)")
      ->type_name("N")
      ->check(whole_number(1, 1024));
  command->add_option("--softcap", options->softcap, "Softcap; 0: off; default: some random cases")
      ->type_name("X")
      ->check(number(0, 1e6));
  command
      ->add_option("--rows", options->rows,
                   "Query rows of a case that are compared in full; default 1024")
      ->type_name("N")
      ->check(whole_number(4, std::numeric_limits<std::int32_t>::max()));
  command->add_option("--threads", options->threads, "Threads of the CPU executor; default: cores")
      ->type_name("N")
      ->check(whole_number(1, 4096));
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Every case is compared row by row, run twice for equal bits, and its visible keys are\n"
      "counted exactly in all rows. Exits with 1 if any case failed.\n\n"
      "Examples:\n"
      "  treeattn check --cases 100 --seed 1\n"
      "  treeattn check --pass bwd --deterministic\n"
      "  treeattn check --device cpu --dtype f32 fork:512,4x128 random:7,40,60");
  command->callback([options, &action] { action = [options] { return run_check(*options); }; });
}

}  // namespace treeattn::cli
