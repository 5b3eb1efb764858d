// treeattn bench: times workloads, useful work only.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cli/attention_case.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/session.h"
#include "generator/arch.h"
#include "generator/tile_space.h"
#include "runtime/attention/arguments.h"
#include "runtime/attention/forward.h"
#include "runtime/attention/workload.h"
#include "runtime/cuda/device_memory.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  std::vector<std::string> workloads;
  std::string device = "gpu";
  std::string passes = "fwd";
  bool deterministic = false;
  std::string dtypes = "bf16";
  std::string head_dims = "128";
  int heads = 0;
  int heads_kv = 0;
  double softcap = 0;
  std::vector<std::string> specs;
  std::string heads_per_pack;
  int warmup = 5;
  int reps = 0;
  bool cold_l2 = false;
  int threads = 0;
  std::int64_t seed = 1;
  bool json = false;
};

constexpr const char* kGpuWorkloads[] = {
    "chain:16384",  "fork:4096,16x1024", "fork:4001,16x1013", "fork:1024,16x2048",
    "binary:6,512", "binary:6,500",      "binary:9,64",       "binary:9,61"};
constexpr const char* kCpuWorkloads[] = {"chain:512", "fork:256,4x64", "binary:4,32"};

/// Milliseconds of repeated calls.
struct Times {
  std::vector<double> ms;

  double median() const { return quantile(0.5); }
  double min() const { return ms.empty() ? 0 : *std::min_element(ms.begin(), ms.end()); }
  double quantile(double share) const {
    if (ms.empty()) return 0;
    std::vector<double> sorted = ms;
    std::sort(sorted.begin(), sorted.end());
    return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
  }
};

Json times_json(const Times& times) {
  return {{"median", times.median()},
          {"min", times.min()},
          {"p10", times.quantile(0.1)},
          {"p90", times.quantile(0.9)}};
}

double wall_ms(const std::function<void()>& work) {
  const auto start = Clock::now();
  work();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// Times calls by the clock that fits the session: events around each call on a GPU.
class Stopwatch {
 public:
  Stopwatch(Session& session, const BenchOptions& options) : options_(options) {
    if (!session.gpu()) return;
    stream_.emplace();
    // Twice the cache, so that nothing of the inputs is left in it.
    if (options.cold_l2) {
      flush_ = DeviceBuffer(static_cast<std::size_t>(2 * session.device().l2_bytes));
    }
  }

  Stream stream() const { return stream_ ? stream_->get() : nullptr; }

  /// Warms up, decides how many calls, times them. `host_us`: what one call costs its thread.
  Times measure(const std::function<void()>& call, double* host_us = nullptr) {
    for (int i = 1; i < options_.warmup; ++i) call();
    const double once = wall_ms([&] {
      call();
      if (stream_) stream_->synchronize();
    });
    const int reps = options_.reps > 0 ? options_.reps : usual_reps(once);
    return stream_ ? measure_gpu(call, reps, host_us) : measure_cpu(call, reps);
  }

 private:
  /// About a second, within reason.
  static int usual_reps(double once_ms) {
    constexpr double kBudgetMs = 1000;
    return static_cast<int>(std::clamp(kBudgetMs / std::max(once_ms, 0.01), 5.0, 200.0));
  }

  Times measure_cpu(const std::function<void()>& call, int reps) {
    Times times;
    for (int i = 0; i < reps; ++i) times.ms.push_back(wall_ms(call));
    return times;
  }

  Times measure_gpu(const std::function<void()>& call, int reps, double* host_us) {
    std::vector<std::pair<Event, Event>> events(static_cast<std::size_t>(reps));
    Times host;
    for (auto& [before, after] : events) {
      if (flush_.bytes() > 0) flush_.fill(0, stream_->get());
      before.record(stream_->get());
      host.ms.push_back(wall_ms(call));
      after.record(stream_->get());
    }
    stream_->synchronize();
    Times times;
    for (const auto& [before, after] : events) {
      times.ms.push_back(static_cast<double>(after.ms_since(before)));
    }
    if (host_us != nullptr) *host_us = host.median() * 1000;
    return times;
  }

  const BenchOptions& options_;
  std::optional<StreamOwner> stream_;
  DeviceBuffer flush_;
};

struct Item {
  Workload work;
  CaseShape shape;
  std::string spec;  ///< empty: the default kernel
  Pass pass = Pass::kForward;
  int heads_per_pack = 0;  ///< 0: as plan_for() has it

  bool backward() const { return pass == Pass::kBackward; }
};

/// The kernel that will run; empty on the CPU.
std::string kernel_of(const Session& session, const Item& item) {
  if (!item.spec.empty() || !session.gpu()) return item.spec;
  const Shape shape{item.shape.dtype,         item.shape.heads,           item.shape.heads_kv,
                    item.shape.dims.head_dim, item.shape.dims.head_dim_v, item.shape.softcap > 0};
  return to_string(default_spec(problem_for(item.pass, shape, kernel_target(session.device()))));
}

/// Query heads that share the rows of the forward kernel's tiles.
int heads_per_pack(const Item& item) {
  if (item.heads_per_pack > 0) return item.heads_per_pack;
  if (!item.spec.empty()) return 1;
  Shape shape;
  shape.heads = item.shape.heads;
  shape.heads_kv = item.shape.heads_kv;
  return 1 << heads_per_pack_log2_for(shape);
}

/// Multiply-adds of the pairs that the mask allows, counted as two each: two products forward, five
/// backward.
double useful_flops(const Item& item) {
  return (item.backward() ? 5.0 : 2.0) * item.shape.heads *
         (item.shape.dims.head_dim + item.shape.dims.head_dim_v) *
         static_cast<double>(item.work.visible_pairs());
}

struct Measurement {
  Times attention, plan, both;
  std::vector<PreparedKernel>
      kernels;  ///< how each became ready, from an empty cache or a full one
  double host_us = 0;
};

Measurement measure(Session& session, const Item& item, const BenchOptions& options) {
  const AttentionCase problem =
      make_case(item.work, item.shape, static_cast<std::uint64_t>(options.seed));
  Measurement result;
  const Shape shape = problem.engine_shape(item.backward());
  result.kernels = session.engine().prepare({&shape, 1});
  Stopwatch watch(session, options);
  const Stream stream = watch.stream();
  RunOptions how{item.spec, item.backward(), options.deterministic, item.heads_per_pack};
  // The plan is made by hand, for a kernel that is named.
  if (how.heads_per_pack > 0) how.spec = kernel_of(session, item);
  CaseRun run(session.engine(), problem, how);
  run.build_plan(stream);
  run.require_valid_plan(stream);
  run.forward(stream);
  const auto attend = [&] { item.backward() ? run.backward(stream) : run.forward(stream); };
  result.attention = watch.measure(attend, &result.host_us);
  result.plan = watch.measure([&] { run.build_plan(stream); });
  result.both = watch.measure([&] {
    run.build_plan(stream);
    attend();
  });
  return result;
}

double teraflops(const Item& item, double ms) {
  return ms > 0 ? useful_flops(item) / ms / 1e9 : 0;
}

Json item_json(const Session& session, const Item& item, const Measurement& found,
               const BenchOptions& options) {
  Json json;
  json["date"] = utc_now();
  json["device"] = session.json();
  json["version"] = library_version();
  json["templates_sha256"] = template_digest();
  json["spec"] = session.gpu() ? Json(kernel_of(session, item)) : Json(nullptr);
  json["pass"] = item.backward() ? "bwd" : "fwd";
  if (item.backward()) json["deterministic"] = options.deterministic;
  if (session.gpu() && !item.backward()) json["heads_per_pack"] = heads_per_pack(item);
  json["workload"] = item.work.name;
  json["tokens"] = item.work.tokens();
  json["unshared_tokens"] = item.work.unshared_tokens();
  json["visible_pairs"] = item.work.visible_pairs();
  json["dtype"] = dtype_name(item.shape.dtype);
  json["heads"] = item.shape.heads;
  json["heads_kv"] = item.shape.heads_kv;
  json["head_dim"] = item.shape.dims.head_dim;
  json["head_dim_v"] = item.shape.dims.head_dim_v;
  json["softcap"] = item.shape.softcap;
  json["l2"] = options.cold_l2 ? "cold" : "warm";
  json["warmup"] = options.warmup;
  json["reps"] = found.attention.ms.size();
  json["seed"] = options.seed;
  json["useful_flops"] = useful_flops(item);
  json["attention_ms"] = times_json(found.attention);
  json["useful_tflops"] = teraflops(item, found.attention.median());
  json["plan_ms"] = times_json(found.plan);
  json["plan_and_attention_ms"] = times_json(found.both);
  json["plan_and_attention_useful_tflops"] = teraflops(item, found.both.median());
  if (session.gpu()) json["host_us"] = found.host_us;
  json["kernels"] = Json::array();
  for (const PreparedKernel& kernel : found.kernels) {
    json["kernels"].push_back(
        {{"spec", kernel.spec}, {"origin", kernel.origin}, {"ms", kernel.ms}});
  }
  return json;
}

Table make_table() {
  constexpr auto kRight = Table::Align::kRight;
  return Table({{"workload", Table::Align::kLeft, 20},
                {"pass", Table::Align::kLeft, 4},
                {"dtype", Table::Align::kLeft, 5},
                {"head dim", kRight},
                {"heads", kRight, 6},
                {"tokens", kRight, 8},
                {"ms median", kRight},
                {"min", kRight, 8},
                {"TFLOP/s", kRight, 8},
                {"plan ms", kRight, 8},
                {"plan+attention ms", kRight},
                {"host us", kRight},
                {"kernel"}});
}

Table::Cells cells_of(const Session& session, const Item& item, const Measurement& found) {
  const double rate = teraflops(item, found.attention.median());
  return {item.work.name,
          item.backward() ? "bwd" : "fwd",
          std::string(dtype_name(item.shape.dtype)),
          to_string(item.shape.dims),
          fmt::format("{}/{}", item.shape.heads, item.shape.heads_kv),
          format_count(item.work.tokens()),
          format_ms(found.attention.median()),
          format_ms(found.attention.min()),
          rate < 10 ? fmt::format("{:.3f}", rate) : fmt::format("{:.1f}", rate),
          format_ms(found.plan.median()),
          format_ms(found.both.median()),
          session.gpu() ? fmt::format("{:.1f}", found.host_us) : "-",
          session.gpu() ? kernel_of(session, item) : "CPU executor"};
}

/// The heads that measurements of this workload are quoted with.
std::pair<int, int> usual_heads(const std::string& workload) {
  return workload == "chain:16384" ? std::pair(16, 16) : std::pair(32, 8);
}

CaseShape shape_for(const Workload& work, const BenchOptions& options) {
  CaseShape shape;
  std::tie(shape.heads, shape.heads_kv) = usual_heads(work.name);
  if (options.heads > 0) {
    shape.heads = options.heads;
    shape.heads_kv = options.heads_kv;
  }
  shape.softcap = options.softcap;
  return shape;
}

CaseShape shape_for_spec(CaseShape shape, const std::string& text) {
  const Problem problem = parse_kernel_spec(text).problem;
  if (problem.pass != Pass::kForward && problem.pass != Pass::kBackward) {
    throw UsageError(
        fmt::format("--spec: '{}' is not a forward or backward kernel (fwd/..., bwd/...)", text));
  }
  shape.dtype = problem.dtype == KernelDType::kF16 ? DType::kF16 : DType::kBF16;
  shape.dims = {problem.head_dim, problem.head_dim_v};
  if (problem.softcap != (shape.softcap > 0)) {
    throw UsageError(fmt::format("--spec: '{}' is {} softcap, but --softcap is {:g}", text,
                                 problem.softcap ? "with" : "without", shape.softcap));
  }
  return shape;
}

std::vector<Pass> parse_passes(const std::string& text) {
  std::vector<Pass> passes;
  for (const std::string& part : split_list("--pass", text)) {
    if (part != "fwd" && part != "bwd") {
      throw UsageError(fmt::format("--pass: '{}' is not fwd or bwd", part));
    }
    passes.push_back(part == "fwd" ? Pass::kForward : Pass::kBackward);
  }
  return passes;
}

/// One item for each of --pack-heads.
void add_packs(const BenchOptions& options, std::vector<Item>& items) {
  if (options.heads_per_pack.empty()) return;
  std::vector<Item> packed;
  for (const Item& item : items) {
    if (item.backward()) throw UsageError("--pack-heads is about forward: it needs --pass fwd");
    const int most = 1 << most_heads_per_pack_log2(item.shape.heads / item.shape.heads_kv);
    for (const std::string& text : split_list("--pack-heads", options.heads_per_pack)) {
      Item one = item;
      for (int count = 1; count <= most; count *= 2) {
        if (text == std::to_string(count)) one.heads_per_pack = count;
      }
      if (one.heads_per_pack == 0) {
        throw UsageError(
            fmt::format("--pack-heads: '{}' is not a power of two from 1 to {}, which {} "
                        "query heads to {} kv heads allow",
                        text, most, item.shape.heads, item.shape.heads_kv));
      }
      packed.push_back(std::move(one));
    }
  }
  items = std::move(packed);
}

std::vector<Item> list_items(const BenchOptions& options, bool cpu) {
  std::vector<std::string> texts = options.workloads;
  if (texts.empty()) {
    if (cpu) {
      texts.assign(std::begin(kCpuWorkloads), std::end(kCpuWorkloads));
    } else {
      texts.assign(std::begin(kGpuWorkloads), std::end(kGpuWorkloads));
    }
  }
  const std::vector<DType> dtypes = parse_dtypes("--dtype", options.dtypes, cpu);
  const std::vector<HeadDims> dims = parse_head_dims("--head-dim", options.head_dims);
  const std::vector<Pass> passes = parse_passes(options.passes);
  std::vector<Item> items;
  for (const std::string& text : texts) {
    const Workload work = parse_workload(text);
    CaseShape shape = shape_for(work, options);
    for (const std::string& spec : options.specs) {
      const KernelSpec parsed = parse_kernel_spec(spec);
      items.push_back({work, shape_for_spec(shape, spec), to_string(parsed), parsed.problem.pass});
    }
    if (!options.specs.empty()) continue;
    for (const DType dtype : dtypes) {
      for (const HeadDims& dim : dims) {
        shape.dtype = dtype;
        shape.dims = dim;
        for (const Pass pass : passes) items.push_back({work, shape, {}, pass});
      }
    }
  }
  const auto is_backward = [](const Item& item) { return item.backward(); };
  if (options.deterministic && std::none_of(items.begin(), items.end(), is_backward)) {
    throw UsageError("--deterministic is about gradients: it needs --pass bwd");
  }
  add_packs(options, items);
  return items;
}

int run_bench(BenchOptions options) {
  const DeviceChoice device = parse_device("--device", options.device);
  if (options.heads > 0 && options.heads_kv == 0) options.heads_kv = options.heads;
  if (options.heads == 0 && options.heads_kv > 0) options.heads = options.heads_kv;
  if (options.heads > 0) check_heads(options.heads, options.heads_kv);
  list_items(options, device.kind == DeviceChoice::Kind::kCpu);  // judges all arguments first
  Session session(device, options.threads);
  if (!session.gpu() && !options.specs.empty()) {
    throw UsageError(fmt::format("--spec: '{}' is a GPU kernel, but --device is {}",
                                 options.specs.front(), options.device));
  }
  if (!session.gpu() && !options.heads_per_pack.empty()) {
    throw UsageError(
        fmt::format("--pack-heads is about GPU kernels, but --device is {}", options.device));
  }
  const Table table = make_table();
  if (!options.json) {
    print(fmt::format("{}\n{}, treeattn {}, templates {}, {} L2, times in ms, useful TFLOP/s\n\n{}",
                      session.description(), utc_now(), library_version(),
                      template_digest().substr(0, 12), options.cold_l2 ? "cold" : "warm",
                      table.header()));
    std::fflush(stdout);
  }
  for (const Item& item : list_items(options, !session.gpu())) {
    const Measurement found = measure(session, item, options);
    if (options.json) {
      print_json_line(item_json(session, item, found, options));
    } else {
      print(table.line(cells_of(session, item, found)));
      for (const PreparedKernel& kernel : found.kernels) {
        if (kernel.origin == "memory") continue;
        print(fmt::format("  {} {} in {:.1f} ms\n", kernel.spec,
                          kernel.origin == "disk" ? "loaded from the cache" : "compiled and loaded",
                          kernel.ms));
      }
    }
    std::fflush(stdout);
  }
  return kExitOk;
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("bench", "Time workloads such as fork:4096,16x1024");
  const auto options = std::make_shared<BenchOptions>();
  command
      ->add_option("workloads", options->workloads,
                   "What to time; default: the workloads that measurements are quoted with")
      ->type_name("WORKLOAD");
  command->add_option("--device", options->device, "gpu (default), gpu:N, cpu or auto")
      ->type_name("DEVICE");
  command->add_option("--pass", options->passes, "fwd, bwd or both; default fwd")
      ->type_name("LIST");
  command->add_flag("--deterministic", options->deterministic,
                    "Gradients that are bit-identical from run to run");
  command->add_option("--dtype", options->dtypes, "f16, bf16; on the CPU f32 and f64 too")
      ->type_name("LIST");
  command->add_option("--head-dim", options->head_dims, "Head dims: 64,192/128; default 128")
      ->type_name("LIST");
  command->add_option("--heads", options->heads, "Query heads; default 32, 16 for chain:16384")
      ->type_name("N")
      ->check(whole_number(1, 1024));
  command->add_option("--heads-kv", options->heads_kv, "Key heads; default 8, 16 for chain:16384")
      ->type_name("N")
      ->check(whole_number(1, 1024));
  command->add_option("--softcap", options->softcap, "Softcap; default 0: off")
      ->type_name("X")
      ->check(number(0, 1e6));
  command
      ->add_option("--spec", options->specs, "This kernel in place of the default; may be repeated")
      ->type_name("SPEC")
      ->allow_extra_args(false);
  command
      ->add_option("--pack-heads", options->heads_per_pack,
                   "Query heads of a kv head that share a forward tile's rows: 1,8")
      ->type_name("LIST");
  command->add_option("--warmup", options->warmup, "Calls before timing; default 5")
      ->type_name("N")
      ->check(whole_number(1, 100'000));
  command->add_option("--reps", options->reps, "Timed calls; default: about a second, 5 to 200")
      ->type_name("N")
      ->check(whole_number(1, 100'000));
  command->add_flag("--cold-l2", options->cold_l2, "Empty the GPU's cache before every call");
  command->add_option("--threads", options->threads, "Threads of the CPU executor; default: cores")
      ->type_name("N")
      ->check(whole_number(1, 4096));
  command->add_option("--seed", options->seed, "Seed of the inputs; default 1")
      ->type_name("N")
      ->check(whole_number(0, std::numeric_limits<std::int64_t>::max()));
  command->add_flag("--json", options->json, "Print one JSON document a line");
  command->footer(
      "Useful TFLOP/s count only the pairs that the mask allows. GPU times are taken with events\n"
      "around each call.\n\n"
      "Examples:\n"
      "  treeattn bench chain:16384 fork:4096,16x1024 binary:9,64\n"
      "  treeattn bench --pass fwd,bwd fork:4096,16x1024\n"
      "  treeattn bench --head-dim 64,128 --dtype f16,bf16 --json chain:8192\n"
      "  treeattn bench --device cpu fork:256,4x64");
  command->callback([options, &action] { action = [options] { return run_bench(*options); }; });
}

}  // namespace treeattn::cli
