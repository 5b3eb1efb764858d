// treeattn cache list | verify | prune | explain: looks into the kernel cache and tidies it.
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/arguments.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/store.h"
#include "generator/tile_space.h"
#include "runtime/attention/forward.h"
#include "runtime/support/config.h"
#include "runtime/support/file_io.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

struct CacheOptions {
  std::string dir;
  std::string spec;
  std::string older_than;
  std::string keep_bytes;
  bool all = false;
  bool dry_run = false;
  bool json = false;
};

Json entry_json(const StoreEntry& entry) {
  Json json;
  json["path"] = entry.path.string();
  json["bytes"] = entry.bytes;
  json["mtime"] = entry.mtime;
  json["ok"] = entry.artifact.has_value();
  if (!entry.artifact) {
    json["damage"] = entry.damage;
    return json;
  }
  const ArtifactFacts facts = summarise(*entry.artifact);
  json["spec"] = entry.artifact->spec;
  json["key"] = entry.artifact->key.hex();
  json["target"] = entry.artifact->target;
  json["nvrtc"] = entry.artifact->nvrtc;
  json["registers"] = facts.registers;
  json["spill_bytes"] = facts.spill_bytes;
  json["smem_bytes"] = facts.smem_bytes;
  return json;
}

Json roots_json(const CubinStore& store) {
  Json roots = Json::array();
  for (const StoreRoot& root : store.roots()) {
    roots.push_back({{"path", root.path.string()}, {"writable", root.writable}});
  }
  return roots;
}

std::uint64_t total_bytes(const std::vector<StoreEntry>& entries) {
  std::uint64_t bytes = 0;
  for (const StoreEntry& entry : entries) bytes += entry.bytes;
  return bytes;
}

std::string roots_text(const CubinStore& store) {
  std::string text;
  for (const StoreRoot& root : store.roots()) {
    text += fmt::format("{}{}\n", root.path.string(), root.writable ? "" : " (read only)");
  }
  return text.empty() ? "no folder can be used; see 'treeattn doctor'\n" : text;
}

/// A folder that was named must be one: an empty list would hide a typing error.
CubinStore open_named(const CacheOptions& options, bool writable) {
  if (!options.dir.empty()) {
    const Trust trust = writable ? Trust::kPrivate : Trust::kNotByAnyone;
    if (const auto why = refuse_folder(options.dir, trust)) {
      throw UsageError(fmt::format("--dir: '{}' {}", options.dir, *why));
    }
  }
  return open_store(options.dir, writable);
}

std::string entry_table(const std::vector<StoreEntry>& entries) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"kernel"},
               {"NVRTC"},
               {"registers", kRight},
               {"spills", kRight},
               {"bytes", kRight},
               {"age", kRight},
               {"key"}});
  const auto now = static_cast<std::int64_t>(std::time(nullptr));
  for (const StoreEntry& entry : entries) {
    if (!entry.artifact) {
      table.add({entry.path.filename().string().substr(0, 48), "damaged", "-", "-",
                 format_count(static_cast<std::int64_t>(entry.bytes)),
                 format_age(now - entry.mtime), "-"});
      continue;
    }
    const ArtifactFacts facts = summarise(*entry.artifact);
    table.add({entry.artifact->spec, entry.artifact->nvrtc, fmt::format("{}", facts.registers),
               fmt::format("{}", facts.spill_bytes),
               format_count(static_cast<std::int64_t>(entry.bytes)), format_age(now - entry.mtime),
               entry.artifact->key.hex().substr(0, 12)});
  }
  return table.text();
}

int run_list(const CacheOptions& options) {
  const CubinStore store = open_named(options, false);
  const std::vector<StoreEntry> entries = store.list();
  if (options.json) {
    Json json;
    json["roots"] = roots_json(store);
    json["entries"] = Json::array();
    for (const StoreEntry& entry : entries) json["entries"].push_back(entry_json(entry));
    json["bytes"] = total_bytes(entries);
    print_json(json);
    return kExitOk;
  }
  print(roots_text(store));
  if (!entries.empty()) print("\n" + entry_table(entries));
  print(fmt::format("\n{}, {}\n", plural(std::ssize(entries), "kernel"),
                    format_bytes(total_bytes(entries))));
  return kExitOk;
}

int run_verify(const CacheOptions& options) {
  const CubinStore store = open_named(options, false);
  const std::vector<StoreEntry> entries = store.list();
  Json damaged = Json::array();
  for (const StoreEntry& entry : entries) {
    if (!entry.artifact) damaged.push_back(entry_json(entry));
  }
  const std::int64_t good = std::ssize(entries) - static_cast<std::int64_t>(damaged.size());
  if (options.json) {
    Json json;
    json["roots"] = roots_json(store);
    json["ok"] = good;
    json["damaged"] = damaged;
    print_json(json);
  } else {
    print(fmt::format("{} in order, {} damaged\n", plural(good, "kernel"), damaged.size()));
  }
  for (const Json& entry : damaged) {
    print_error(fmt::format("{}: {}", entry["path"].get<std::string>(),
                            entry["damage"].get<std::string>()));
  }
  if (damaged.empty()) return kExitOk;
  print_error("damaged entries are never used; 'treeattn cache prune' removes them");
  return kExitFailure;
}

bool is_below(const std::filesystem::path& path, const std::filesystem::path& root) {
  const auto [end, ignored] = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
  return end == root.end();
}

/// Entries of the writable root that the options give up: damaged ones always.
std::vector<StoreEntry> choose_pruned(const CubinStore& store, const CacheOptions& options) {
  std::vector<StoreEntry> entries = store.list();
  const auto writable = std::find_if(store.roots().begin(), store.roots().end(),
                                     [](const StoreRoot& root) { return root.writable; });
  entries.erase(std::remove_if(entries.begin(), entries.end(),
                               [&](const StoreEntry& entry) {
                                 return writable == store.roots().end() ||
                                        !is_below(entry.path, writable->path);
                               }),
                entries.end());
  const auto now = static_cast<std::int64_t>(std::time(nullptr));
  const std::int64_t oldest = options.older_than.empty()
                                  ? std::numeric_limits<std::int64_t>::max()
                                  : parse_duration("--older-than", options.older_than);
  const std::uint64_t most = options.keep_bytes.empty()
                                 ? std::numeric_limits<std::uint64_t>::max()
                                 : parse_bytes("--keep-bytes", options.keep_bytes);
  std::stable_sort(entries.begin(), entries.end(),
                   [](const StoreEntry& a, const StoreEntry& b) { return a.mtime > b.mtime; });
  std::vector<StoreEntry> pruned;
  std::uint64_t kept = 0;
  bool full = false;
  for (StoreEntry& entry : entries) {
    const bool unwanted = options.all || !entry.artifact || now - entry.mtime > oldest;
    // Once the newest fill the room, everything older goes: no small old entry slips through.
    full = full || (!unwanted && kept + entry.bytes > most);
    if (unwanted || full) {
      pruned.push_back(std::move(entry));
    } else {
      kept += entry.bytes;
    }
  }
  return pruned;
}

int run_prune(const CacheOptions& options) {
  // Checked before anything is listed.
  if (!options.older_than.empty()) parse_duration("--older-than", options.older_than);
  if (!options.keep_bytes.empty()) parse_bytes("--keep-bytes", options.keep_bytes);
  CubinStore store = open_named(options, true);
  const std::vector<StoreEntry> pruned = choose_pruned(store, options);
  std::map<std::filesystem::path, std::int64_t> chosen;
  for (const StoreEntry& entry : pruned) chosen.emplace(entry.path, entry.mtime);
  std::uint64_t removed = 0;
  if (!options.dry_run) {
    removed = store.remove_if([&](const StoreEntry& entry) {
      const auto found = chosen.find(entry.path);
      return found != chosen.end() && found->second == entry.mtime;
    });
  }
  const bool failed = !options.dry_run && removed < pruned.size();
  if (options.json) {
    Json json;
    json["dry_run"] = options.dry_run;
    json["entries"] = Json::array();
    for (const StoreEntry& entry : pruned) json["entries"].push_back(entry_json(entry));
    json["bytes"] = total_bytes(pruned);
    json["removed"] = removed;
    print_json(json);
  } else {
    if (!pruned.empty()) print(entry_table(pruned) + "\n");
    print(fmt::format(
        "{} {}, {}\n", options.dry_run ? "would remove" : "removed",
        plural(options.dry_run ? std::ssize(pruned) : static_cast<std::int64_t>(removed), "kernel"),
        format_bytes(total_bytes(pruned))));
  }
  if (failed) {
    print_error(
        fmt::format("{} could not be removed, or changed meanwhile; run it again",
                    plural(std::ssize(pruned) - static_cast<std::int64_t>(removed), "kernel")));
  }
  return failed ? kExitFailure : kExitOk;
}

std::string_view jit_name(JitPolicy jit) {
  switch (jit) {
    case JitPolicy::kAuto:
      return "auto";
    case JitPolicy::kOff:
      return "off";
    case JitPolicy::kForce:
      return "force";
  }
  return "";
}

/// What a call that needs this kernel would do.
std::string explain_verdict(const KernelExplanation& found) {
  const bool compiles = found.compiler.available && found.jit != JitPolicy::kOff;
  if (found.artifact && found.jit != JitPolicy::kForce) {
    return fmt::format("It is in the cache, compiled with NVRTC {}, and is used.",
                       found.artifact->nvrtc);
  }
  if (compiles) {
    return found.artifact ? "It is in the cache, but TREEATTN_JIT=force compiles it all the same."
                          : "It is not in the cache; the first call that needs it compiles it.";
  }
  const std::string reason = found.jit == JitPolicy::kOff
                                 ? "TREEATTN_JIT=off forbids compiling"
                                 : "NVRTC, which would compile it, is missing";
  return fmt::format("It is not in the cache, and {}: a call that needs it fails.\nTo add it: {}",
                     reason, found.remedy);
}

/// Whether calls that name no kernel come to this one of the sm90 family.
bool used_by_default(const KernelSpec& spec) {
  return config().family == FamilyChoice::kAuto && spec == default_spec(spec.problem);
}

/// What runs in its place where a tensor's strides rule it out, with a plan made for its shape
/// alone.
std::optional<KernelSpec> strided_spec_of(const KernelSpec& spec) {
  PlanShape plan{};
  plan.num_views = 1;
  plan.views[0] = {spec.tile.block_m, spec.tile.view_block_n()};
  return strided_spec(spec.problem, plan, 1);
}

/// When a kernel of the sm90 family is used.
std::string explain_use(const KernelSpec& spec) {
  const bool backward = spec.problem.pass == Pass::kBackward;
  const std::string strides =
      fmt::format("{} with a zero or negative token stride, or a negative head stride{}",
                  backward ? "q, k, v or dout" : "q, k or v",
                  backward ? "" : " (of q a zero one either, where query heads share tiles)");
  if (!used_by_default(spec)) {
    return fmt::format("by calls that name it{}; it refuses {}",
                       config().family == FamilyChoice::kSm80 ? ", under TREEATTN_FAMILY=sm80" : "",
                       strides);
  }
  const auto instead = strided_spec_of(spec);
  return fmt::format(
      "on compute capability 9.0, but not for {}: {}", strides,
      instead
          ? to_string(*instead) + " is used then"
          : "those need a plan that holds tiles of the sm80 family too, or TREEATTN_FAMILY=sm80");
}

Json explanation_json(const KernelExplanation& found) {
  Json json;
  json["spec"] = found.text;
  json["key"] = found.key.hex();
  json["target"] = to_string(found.options.target);
  json["flags"] = found.options.flags;
  json["source_bytes"] = found.source_bytes;
  if (found.spec.problem.family == Family::kSm90) {
    json["used"] = explain_use(found.spec);
    if (used_by_default(found.spec)) {
      const auto instead = strided_spec_of(found.spec);
      json["other_strides"] = instead ? Json(to_string(*instead)) : Json(nullptr);
    }
  }
  json["jit"] = jit_name(found.jit);
  json["found"] = found.artifact.has_value();
  if (found.artifact) json["nvrtc"] = found.artifact->nvrtc;
  json["probes"] = Json::array();
  for (const StoreProbe& probe : found.probes) {
    json["probes"].push_back({{"path", probe.path}, {"outcome", probe.outcome}});
  }
  json["compiler"] = {{"available", found.compiler.available},
                      {"version", found.compiler.version},
                      {"path", found.compiler.path},
                      {"problem", found.compiler.problem}};
  json["remedy"] = found.remedy;
  json["verdict"] = explain_verdict(found);
  return json;
}

int run_explain(const CacheOptions& options) {
  const KernelSpec spec = parse_kernel_spec(options.spec);
  const KernelExplanation found = make_source(open_named(options, false)).explain(spec);
  if (options.json) {
    print_json(explanation_json(found));
    return kExitOk;
  }
  print(fmt::format("kernel    {}\nkey       {}\n", found.text, found.key.hex()));
  print(fmt::format("made of   {} bytes of source, {}, {}\n", found.source_bytes,
                    to_string(found.options.target), fmt::join(found.options.flags, " ")));
  print(fmt::format("compiler  {}\n",
                    found.compiler.available
                        ? fmt::format("NVRTC {} ({})", found.compiler.version, found.compiler.path)
                        : "NVRTC was not found"));
  print(fmt::format("policy    TREEATTN_JIT={}\n", jit_name(found.jit)));
  if (spec.problem.family == Family::kSm90) {
    print(fmt::format("used      {}\n", explain_use(spec)));
  }
  for (const StoreProbe& probe : found.probes) {
    print(fmt::format("looked at {}: {}\n", probe.path, probe.outcome));
  }
  print("\n" + explain_verdict(found) + "\n");
  return kExitOk;
}

using Run = int (*)(const CacheOptions&);

CLI::App* add_one(CLI::App& parent, Action& action, const std::shared_ptr<CacheOptions>& options,
                  const char* name, const char* about, Run run) {
  CLI::App* command = parent.add_subcommand(name, about);
  command->add_option("--dir", options->dir, "This folder of kernels in place of the cache")
      ->type_name("DIR");
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(fmt::format("Example:\n  treeattn cache {}", name));
  command->callback([options, run, &action] { action = [options, run] { return run(*options); }; });
  return command;
}

}  // namespace

void add_cache(CLI::App& app, Action& action) {
  CLI::App* cache = app.add_subcommand("cache", "Look into the kernel cache and tidy it");
  cache->footer("Examples:\n  treeattn cache list\n  treeattn cache prune --older-than 30d");
  const auto options = std::make_shared<CacheOptions>();
  add_one(*cache, action, options, "list", "List the kernels that are kept", run_list);
  add_one(*cache, action, options, "verify", "Check every entry; exits with 1 if one is damaged",
          run_verify);
  CLI::App* prune =
      add_one(*cache, action, options, "prune",
              "Remove damaged entries, stale temporary files, and what is asked for", run_prune);
  prune->add_option("--older-than", options->older_than, "Kernels compiled longer ago, such as 30d")
      ->type_name("TIME");
  prune
      ->add_option("--keep-bytes", options->keep_bytes,
                   "The oldest kernels beyond this size, such as 500M")
      ->type_name("SIZE");
  prune->add_flag("--all", options->all, "Every kernel");
  prune->add_flag("--dry-run", options->dry_run, "Only say what would be removed");
  prune->footer("Example:\n  treeattn cache prune --older-than 30d --keep-bytes 500M --dry-run");
  CLI::App* explain =
      add_one(*cache, action, options, "explain",
              "Say why a kernel is found or not, and what it is made of", run_explain);
  explain->add_option("spec", options->spec, "The kernel")->required()->type_name("SPEC");
  explain->footer("Example:\n  treeattn cache explain fwd/sm80@sm_90/bf16/d128v128");
}

}  // namespace treeattn::cli
