// treeattn precompile: compiles kernels ahead, for any GPU, on any machine.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/store.h"
#include "generator/arch.h"
#include "generator/tile_space.h"
#include "runtime/cuda/device.h"
#include "runtime/cuda/driver.h"
#include "runtime/cuda/nvrtc.h"
#include "runtime/support/config.h"
#include "runtime/support/file_io.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct PrecompileOptions {
  std::string arch;
  std::string head_dims;
  std::string dtypes = "bf16";
  std::string passes = "fwd";
  std::string softcap = "off";
  std::vector<std::string> specs;
  int jobs = 0;
  std::string out;
  bool force = false;
  bool json = false;
};

std::atomic<bool> interrupted = false;
static_assert(std::atomic<bool>::is_always_lock_free);  // a signal handler sets it

/// The first Ctrl-C lets the kernels under way finish and starts no others; the second one ends the
/// program, which leaves no half-written entry either.
class InterruptGuard {
 public:
  InterruptGuard() {
    struct sigaction action {};
    action.sa_handler = [](int) { interrupted = true; };
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
    sigaction(SIGINT, &action, &before_int_);
    sigaction(SIGTERM, &action, &before_term_);
  }
  ~InterruptGuard() {
    sigaction(SIGINT, &before_int_, nullptr);
    sigaction(SIGTERM, &before_term_, nullptr);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  struct sigaction before_int_ {};
  struct sigaction before_term_ {};
};

std::vector<Target> known_to_nvrtc() {
  std::vector<int> archs;
  if (const NvrtcTable* table = try_nvrtc()) archs = nvrtc_supported_archs(*table);
  std::vector<Target> targets;
  targets.reserve(known_targets().size() + 1);
  for (const ArchLimits& known : known_targets()) {
    const bool compiles = archs.empty() || std::count(archs.begin(), archs.end(), known.target.cc);
    if (!compiles) continue;
    targets.push_back(known.target);
    if (known.target.cc == kSm90Target.cc) targets.push_back(kSm90Target);
  }
  return targets;
}

std::vector<Target> local_targets() {
  std::vector<Target> targets;
  std::string why;
  const DriverTable* table = try_driver(&why);
  int count = 0;
  if (table != nullptr) check(table->cuDeviceGetCount(&count), "counting GPUs");
  targets.reserve(static_cast<std::size_t>(count));
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    targets.push_back(kernel_target(device_info(ordinal)));
  }
  if (targets.empty()) {
    throw UsageError(
        "--arch: 'native' is not possible: there is no GPU; expected targets such as sm_80,sm_90, "
        "or all");
  }
  return targets;
}

std::vector<Target> parse_targets(const std::string& text) {
  std::vector<Target> targets;
  for (const std::string& part : split_list("--arch", text)) {
    std::vector<Target> some;
    if (part == "all") {
      some = known_to_nvrtc();
    } else if (part == "native") {
      some = local_targets();
    } else {
      // As for native: what a GPU of this target runs, which on 9.0 is compiled for two targets.
      some.push_back(kernel_target(parse_target(part)));
    }
    targets.insert(targets.end(), some.begin(), some.end());
  }
  return targets;
}

std::vector<Pass> parse_passes(const std::string& text) {
  std::vector<Pass> passes;
  for (const std::string& part : split_list("--pass", text)) {
    if (part == "fwd") {
      passes.push_back(Pass::kForward);
    } else if (part == "bwd") {
      passes.push_back(Pass::kBackward);
      passes.push_back(Pass::kBackwardDq);  // of deterministic mode
    } else if (part != "plan") {
      throw UsageError(fmt::format("--pass: '{}' is not fwd, bwd or plan", part));
    }
  }
  return passes;
}

KernelSpec plan_spec(const Target& target) {
  Problem problem;
  problem.pass = Pass::kPlan;
  return {on_device(problem, target), {}};
}

/// Every combination of the lists for one target.
void add_grid(const PrecompileOptions& options, const Target& target,
              std::vector<KernelSpec>& specs) {
  const std::vector<Pass> passes = parse_passes(options.passes);
  if (passes.empty()) return;
  if (options.head_dims.empty()) {
    throw UsageError("--head-dim is missing: expected such as 64,128, or all");
  }
  std::vector<bool> softcaps;
  if (options.softcap != "on") softcaps.push_back(false);
  if (options.softcap != "off") softcaps.push_back(true);
  Problem problem;
  for (const Pass pass : passes) {
    problem.pass = pass;
    for (const DType dtype : parse_dtypes("--dtype", options.dtypes, false)) {
      problem.dtype = kernel_dtype(dtype);
      for (const HeadDims& dims : parse_head_dims("--head-dim", options.head_dims)) {
        problem.head_dim = static_cast<std::uint16_t>(dims.head_dim);
        problem.head_dim_v = static_cast<std::uint16_t>(dims.head_dim_v);
        for (const bool softcap : softcaps) {
          problem.softcap = softcap;
          specs.push_back(default_spec(on_device(problem, target)));
        }
      }
    }
  }
}

/// What was asked for and the plan kernels of its targets, which come first, each kernel once.
std::vector<KernelSpec> list_specs(const PrecompileOptions& options) {
  const bool grid = !options.arch.empty() || !options.head_dims.empty();
  if (!grid && options.specs.empty()) {
    throw UsageError("nothing to compile: expected --arch with --head-dim, or --spec");
  }
  if (grid && options.arch.empty()) {
    throw UsageError("--arch is missing: expected such as sm_80,sm_90");
  }
  std::vector<KernelSpec> wanted;
  for (const std::string& text : options.specs) wanted.push_back(parse_kernel_spec(text));
  if (grid) {
    for (const Target& target : parse_targets(options.arch)) {
      wanted.push_back(plan_spec(target));
      add_grid(options, target, wanted);
    }
  }
  std::vector<KernelSpec> specs;
  specs.reserve(2 * wanted.size());
  for (const KernelSpec& spec : wanted) specs.push_back(plan_spec(spec.problem.target));
  specs.insert(specs.end(), wanted.begin(), wanted.end());
  std::set<KernelSpec> seen;
  std::erase_if(specs, [&](const KernelSpec& spec) { return !seen.insert(spec).second; });
  return specs;
}

enum class Outcome { kSkipped, kKept, kBuilt, kFailed };

std::string_view outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kSkipped:
      return "skipped";
    case Outcome::kKept:
      return "kept";
    case Outcome::kBuilt:
      return "built";
    case Outcome::kFailed:
      return "failed";
  }
  return "";
}

struct Row {
  std::string spec;
  Outcome outcome = Outcome::kSkipped;
  std::optional<Artifact> artifact;
  std::string problem;
  double ms = 0;
};

/// Says on standard error how far it is: a line that is rewritten on a terminal, else now and then
/// a line.
class Progress {
 public:
  explicit Progress(std::size_t total) : total_(total), is_terminal_(isatty(STDERR_FILENO) == 1) {}
  ~Progress() {
    if (is_terminal_ && done_ > 0) std::fputs("\r\033[K", stderr);
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void finished(const Row& row) {
    const std::lock_guard lock(mutex_);
    ++done_;
    const std::string text =
        fmt::format("[{}/{}] {} {}", done_, total_, outcome_name(row.outcome), row.spec);
    if (is_terminal_) {
      fmt::print(stderr, "\r\033[K{}", text);
      std::fflush(stderr);
      return;
    }
    constexpr auto kInterval = std::chrono::seconds(2);
    const auto now = Clock::now();
    if (done_ < total_ && now - last_ < kInterval) return;
    last_ = now;
    fmt::print(stderr, "{}\n", text);
  }

 private:
  std::mutex mutex_;
  std::size_t total_;
  std::size_t done_ = 0;
  bool is_terminal_;
  Clock::time_point last_ = Clock::now();
};

void build(ArtifactSource& source, const KernelSpec& spec, bool force, Row& row) {
  const auto start = Clock::now();
  try {
    BuildReport report = source.build(spec, force);
    row.outcome = report.kept ? Outcome::kKept : Outcome::kBuilt;
    if (!report.kept && !report.published) {
      row.outcome = Outcome::kFailed;
      row.problem = "it compiled but could not be kept: " + report.problem;
    }
    row.artifact = std::move(report.artifact);
  } catch (const std::exception& error) {
    row.outcome = Outcome::kFailed;
    row.problem = error.what();
  }
  row.ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::vector<Row> build_all(const PrecompileOptions& options, const std::vector<KernelSpec>& specs) {
  ArtifactSource source = make_source(open_store(options.out, true));
  std::vector<Row> rows(specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) rows[i].spec = to_string(specs[i]);
  Progress progress(specs.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < specs.size() && !interrupted; i = next++) {
      build(source, specs[i], options.force, rows[i]);
      progress.finished(rows[i]);
    }
  };
  const std::size_t jobs = options.jobs > 0 ? static_cast<std::size_t>(options.jobs)
                                            : std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::jthread> threads;
  for (std::size_t t = 1; t < std::min(jobs, specs.size()); ++t) threads.emplace_back(work);
  work();
  return rows;
}

std::int64_t count(const std::vector<Row>& rows, Outcome outcome) {
  return std::count_if(rows.begin(), rows.end(),
                       [&](const Row& row) { return row.outcome == outcome; });
}

std::string table_text(const std::vector<Row>& rows) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"kernel"},
               {"registers", kRight},
               {"spills", kRight},
               {"shared memory", kRight},
               {"bytes", kRight},
               {"ms", kRight},
               {"result"}});
  for (const Row& row : rows) {
    std::vector<std::string> cells{
        row.spec, "-", "-", "-", "-", "-", std::string(outcome_name(row.outcome))};
    if (row.artifact) {
      const ArtifactFacts facts = summarise(*row.artifact);
      cells[1] = fmt::format("{}", facts.registers);
      cells[2] = fmt::format("{}", facts.spill_bytes);
      cells[3] = format_count(facts.smem_bytes);
      cells[4] = format_count(std::ssize(row.artifact->cubin));
    }
    if (row.outcome != Outcome::kSkipped) cells[5] = fmt::format("{:.0f}", row.ms);
    table.add(std::move(cells));
  }
  return table.text();
}

Json row_json(const Row& row) {
  Json json;
  json["spec"] = row.spec;
  json["result"] = outcome_name(row.outcome);
  json["ms"] = row.ms;
  if (row.artifact) {
    const ArtifactFacts facts = summarise(*row.artifact);
    json["key"] = row.artifact->key.hex();
    json["nvrtc"] = row.artifact->nvrtc;
    json["registers"] = facts.registers;
    json["spill_bytes"] = facts.spill_bytes;
    json["smem_bytes"] = facts.smem_bytes;
    json["cubin_bytes"] = row.artifact->cubin.size();
  }
  if (!row.problem.empty()) json["problem"] = row.problem;
  return json;
}

/// Each reason once, however many kernels it struck.
void print_failures(const std::vector<Row>& rows) {
  std::vector<std::pair<std::string, std::vector<std::string>>> reasons;
  for (const Row& row : rows) {
    if (row.outcome != Outcome::kFailed) continue;
    auto known = std::find_if(reasons.begin(), reasons.end(),
                              [&](const auto& reason) { return reason.first == row.problem; });
    if (known == reasons.end()) known = reasons.insert(reasons.end(), {row.problem, {}});
    known->second.push_back(row.spec);
  }
  for (const auto& [problem, specs] : reasons) {
    print_error(specs.size() == 1
                    ? fmt::format("{}: {}", specs.front(), problem)
                    : fmt::format("{} and {} more: {}", specs.front(), specs.size() - 1, problem));
  }
}

/// Throws unless the folder can keep kernels: compiling takes minutes, which should not be lost.
void check_destination(const PrecompileOptions& options) {
  const std::string folder =
      options.out.empty() ? config().cache_dir : std::filesystem::absolute(options.out).string();
  const std::string name = options.out.empty() ? "the cache" : "--out";
  const char* const hint = options.out.empty() ? "name a folder with --out" : "";
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::kIoError,
                fmt::format("{}: kernels cannot be kept in '{}': {}", name, folder, why), hint);
  };
  if (folder.empty()) refuse("no folder is configured");
  // With the modes that the store gives them.
  if (const IoStatus made = make_folders(folder, options.out.empty() ? 0700 : 0755); !made) {
    refuse(made.why);
  }
  if (const auto why = refuse_folder(folder, Trust::kPrivate)) refuse("it " + *why);
}

int run_precompile(const PrecompileOptions& options) {
  const std::vector<KernelSpec> specs = list_specs(options);
  check_destination(options);
  const auto start = Clock::now();
  std::vector<Row> rows;
  {
    const InterruptGuard guard;
    rows = build_all(options, specs);
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const std::int64_t kept = count(rows, Outcome::kKept), built = count(rows, Outcome::kBuilt);
  const std::int64_t failed = count(rows, Outcome::kFailed);
  const std::int64_t skipped = count(rows, Outcome::kSkipped);
  if (options.json) {
    Json json;
    json["out"] = options.out.empty() ? config().cache_dir : options.out;
    json["kernels"] = Json::array();
    for (const Row& row : rows) json["kernels"].push_back(row_json(row));
    json["kept"] = kept;
    json["built"] = built;
    json["failed"] = failed;
    json["skipped"] = skipped;
    json["seconds"] = seconds;
    print_json(json);
  } else {
    print(table_text(rows));
    print(
        fmt::format("\n{} kept, {} built, {} failed in {:.1f} s\n", kept, built, failed, seconds));
  }
  print_failures(rows);
  if (interrupted) {
    print_error(fmt::format("interrupted: {} not tried", plural(skipped, "kernel")));
    return kExitInterrupted;
  }
  return failed > 0 ? kExitFailure : kExitOk;
}

}  // namespace

void add_precompile(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("precompile", "Compile kernels ahead, for any GPU, on any machine");
  const auto options = std::make_shared<PrecompileOptions>();
  command
      ->add_option("--arch", options->arch, "GPUs: sm_80,sm_90 or all, or native: this machine's")
      ->type_name("LIST");
  command
      ->add_option("--head-dim", options->head_dims,
                   "Head dims: 64,128 or all; 192/128 where v differs")
      ->type_name("LIST");
  command->add_option("--dtype", options->dtypes, "f16, bf16 or both; default bf16")
      ->type_name("LIST");
  command
      ->add_option("--pass", options->passes,
                   "fwd, bwd or plan; plan kernels are always included; default fwd")
      ->type_name("LIST");
  command->add_option("--softcap", options->softcap, "Kernels with softcap: off, on or both")
      ->type_name("WHICH")
      ->check(one_of({"off", "on", "both"}));
  command->add_option("--spec", options->specs, "One kernel by its spec; may be repeated")
      ->type_name("SPEC")
      ->allow_extra_args(false);
  command->add_option("-j,--jobs", options->jobs, "Kernels compiled at once; default: cores")
      ->type_name("N")
      ->check(whole_number(1, 1024));
  command
      ->add_option("--out", options->out,
                   "Folder of prebuilt kernels for TREEATTN_CACHE_PATH; default: the cache")
      ->type_name("DIR");
  command->add_flag("--force", options->force, "Compile kernels that are there already, too");
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Needs NVRTC but neither a GPU nor a driver. Exits with 1 if any kernel failed.\n\n"
      "Examples:\n"
      "  treeattn precompile --arch sm_80,sm_90 --head-dim 64,128 --dtype bf16 --out kernels\n"
      "  treeattn precompile --spec fwd/sm80@sm_90/bf16/d128v128 --out kernels");
  command->callback(
      [options, &action] { action = [options] { return run_precompile(*options); }; });
}

}  // namespace treeattn::cli
