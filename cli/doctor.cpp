// treeattn doctor: what this machine has and what can be done with it.
#include <fmt/format.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

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

namespace fs = std::filesystem;

Json examine_driver() {
  Json json;
  std::string why;
  const DriverTable* table = try_driver(&why);
  json["found"] = table != nullptr;
  if (table == nullptr) {
    json["problem"] = why;
    return json;
  }
  json["path"] = table->path;
  int version = 0;
  if (table->cuDriverGetVersion(&version) == CUDA_SUCCESS) {
    json["cuda"] = cuda_version_text(version);
  }
  return json;
}

Json examine_gpu(int ordinal) {
  Json json;
  json["ordinal"] = ordinal;
  try {
    const DeviceInfo& info = device_info(ordinal);
    json["name"] = info.name;
    json["compute_capability"] = fmt::format("{}.{}", info.major, info.minor);
    json["sm_count"] = info.sm_count;
    json["memory_bytes"] = info.memory_bytes;
    json["l2_bytes"] = info.l2_bytes;
    json["smem_per_block_bytes"] = info.smem_optin_bytes;
    const Target target = kernel_target(info);
    json["target"] = to_string(target);
    for (const auto& [name, pass] : {std::pair("forward", Pass::kForward),
                                     {"backward", Pass::kBackward},
                                     {"plan", Pass::kPlan}}) {
      Problem usual;
      usual.pass = pass;
      usual.head_dim = usual.head_dim_v = 128;
      const Problem kernels = on_device(usual, target);
      json["kernels"][name] =
          fmt::format("{}@{}", to_string(kernels.family), to_string(kernels.target));
    }
  } catch (const Error& error) {
    json["problem"] = error.what();
  }
  return json;
}

Json examine_gpus() {
  Json gpus = Json::array();
  const DriverTable* table = try_driver();
  int count = 0;
  if (table == nullptr || table->cuDeviceGetCount(&count) != CUDA_SUCCESS) return gpus;
  for (int ordinal = 0; ordinal < count; ++ordinal) gpus.push_back(examine_gpu(ordinal));
  return gpus;
}

Json examine_nvrtc() {
  Json json;
  const NvrtcTable* table = try_nvrtc();
  json["found"] = table != nullptr;
  if (table == nullptr) {
    try {
      nvrtc();  // its message says what was tried and what to install
    } catch (const Error& error) {
      json["problem"] = error.what();
    }
    return json;
  }
  json["path"] = table->path;
  json["version"] = nvrtc_version(*table);
  Json targets = Json::array();
  for (const int cc : nvrtc_supported_archs(*table)) {
    if (cc >= known_targets().front().target.cc) targets.push_back(fmt::format("sm_{}", cc));
  }
  json["targets"] = std::move(targets);
  return json;
}

/// Whether a folder that is not there yet could be made.
std::string refuse_creation(fs::path folder) {
  std::error_code error;
  while (!fs::exists(folder, error) && folder.has_relative_path()) folder = folder.parent_path();
  if (!fs::is_directory(folder, error)) {
    return fmt::format("cannot be made: {} is no folder", folder.string());
  }
  if (access(folder.c_str(), W_OK | X_OK) == 0) return {};
  return fmt::format("cannot be made: {} is not writable", folder.string());
}

Json examine_folder(const std::string& path, bool writable) {
  Json json;
  json["path"] = path;
  json["kind"] = writable ? "cache" : "prebuilt";
  std::error_code error;
  const bool exists = fs::exists(path, error);
  json["exists"] = exists;
  std::string problem;
  if (exists) {
    const auto trust = writable ? Trust::kPrivate : Trust::kNotByAnyone;
    if (const auto why = refuse_folder(path, trust)) problem = *why;
    if (problem.empty() && writable && access(path.c_str(), W_OK | X_OK) != 0) {
      problem = "is not writable; kernels that are in it are used, new ones stay in memory";
    }
  } else {
    problem = writable ? refuse_creation(path) : "does not exist";
  }
  json["usable"] = problem.empty();
  if (!problem.empty()) json["problem"] = problem;
  if (!exists) return json;
  std::uint64_t bytes = 0;
  int damaged = 0;
  const std::vector<StoreEntry> entries = CubinStore({{path, writable, false}}).list();
  for (const StoreEntry& entry : entries) {
    bytes += entry.bytes;
    damaged += !entry.artifact;
  }
  json["entries"] = entries.size();
  json["damaged"] = damaged;
  json["bytes"] = bytes;
  return json;
}

Json examine() {
  const Config& settings = config();
  Json json;
  json["version"] = library_version();
  json["templates_sha256"] = template_digest();
  json["driver"] = examine_driver();
  json["gpus"] = examine_gpus();
  json["nvrtc"] = examine_nvrtc();
  json["cache"] = Json::array();
  for (const std::string& path : settings.cache_path) {
    json["cache"].push_back(examine_folder(path, false));
  }
  if (!settings.cache_dir.empty()) {
    json["cache"].push_back(examine_folder(settings.cache_dir, true));
  }
  json["environment"] = Json::array();
  for (const EnvVar& variable : environment_table()) {
    if (variable.value.empty()) continue;
    json["environment"].push_back(
        {{"name", variable.name}, {"value", variable.value}, {"effect", variable.effect}});
  }
  json["problems"] = settings.problems;
  bool gpu = false;
  for (const Json& found : json["gpus"]) gpu = gpu || found.contains("target");
  bool keeps = false;
  for (const Json& folder : json["cache"]) {
    keeps = keeps || (folder["kind"] == "cache" && folder["usable"]);
  }
  json["can"] = {{"run_on_cpu", true},
                 {"run_on_gpu", gpu},
                 {"compile", json["nvrtc"]["found"]},
                 {"keep_kernels", keeps}};
  return json;
}

/// Later lines of a text below its first one.
std::string indented(const std::string& text) {
  std::string out;
  for (const char c : text) {
    out += c;
    if (c == '\n') out += "             ";
  }
  return out;
}

std::string line(std::string_view title, const std::string& text) {
  return fmt::format("{:<12} {}\n", title, indented(text));
}

std::string text_of(const Json& json, const char* key) {
  return json.value(key, std::string());
}

std::string folder_text(const Json& folder) {
  std::string text = text_of(folder, "path");
  text += folder["kind"] == "cache" ? "" : " (prebuilt, read only)";
  if (folder.contains("entries")) {
    text += fmt::format(": {}, {}", plural(folder["entries"].get<std::int64_t>(), "kernel"),
                        format_bytes(folder["bytes"].get<std::uint64_t>()));
    if (folder["damaged"] > 0) {
      text +=
          fmt::format(", {} damaged (see 'treeattn cache verify')", folder["damaged"].get<int>());
    }
  } else if (folder["usable"]) {
    text += ": will be made when the first kernel is compiled";
  }
  if (folder.contains("problem")) text += "\nit " + text_of(folder, "problem");
  return text;
}

std::string gpu_text(const Json& gpu) {
  if (gpu.contains("problem")) {
    return fmt::format("{}: {}", gpu["ordinal"].get<int>(), text_of(gpu, "problem"));
  }
  return fmt::format("{}: {}, compute capability {}, {} SMs, {}, kernels for {}",
                     gpu["ordinal"].get<int>(), text_of(gpu, "name"),
                     text_of(gpu, "compute_capability"), gpu["sm_count"].get<int>(),
                     format_bytes(gpu["memory_bytes"].get<std::uint64_t>()),
                     describe_targets(parse_target(text_of(gpu, "target"))));
}

std::string verdict(const Json& can) {
  const bool compiles = can["compile"];
  std::string text;
  if (can["run_on_gpu"]) {
    text = compiles ? "Ready: kernels are compiled for this machine's GPU when first needed."
                    : "The GPU can run prebuilt kernels only, since NVRTC is missing.";
  } else {
    text = "No GPU: the CPU executor computes the same, slowly.";
    if (compiles) text += " Kernels can be compiled for any GPU (treeattn precompile).";
  }
  if (!can["keep_kernels"]) text += " Compiled kernels are not kept on disk.";
  return text;
}

std::string report(const Json& found) {
  std::string text =
      line("treeattn", fmt::format("{}, templates {}", text_of(found, "version"),
                                   text_of(found, "templates_sha256").substr(0, 12)));
  const Json& driver = found["driver"];
  text += line("driver", driver["found"] ? fmt::format("CUDA {} ({})", text_of(driver, "cuda"),
                                                       text_of(driver, "path"))
                                         : "not found: " + text_of(driver, "problem"));
  for (const Json& gpu : found["gpus"]) text += line("GPU", gpu_text(gpu));
  if (found["gpus"].empty()) text += line("GPU", "none");
  const Json& nvrtc = found["nvrtc"];
  if (nvrtc["found"]) {
    std::string targets;
    for (const Json& target : nvrtc["targets"]) targets += " " + target.get<std::string>();
    text += line("NVRTC", fmt::format("{} ({})\ncompiles for{}", text_of(nvrtc, "version"),
                                      text_of(nvrtc, "path"), targets));
  } else {
    text += line("NVRTC", "not found: " + text_of(nvrtc, "problem"));
  }
  for (const Json& folder : found["cache"]) text += line("cache", folder_text(folder));
  if (found["cache"].empty()) text += line("cache", "in memory only: no folder is configured");
  for (const Json& variable : found["environment"]) {
    text +=
        line("environment", fmt::format("{}={}\n{}", text_of(variable, "name"),
                                        text_of(variable, "value"), text_of(variable, "effect")));
  }
  for (const Json& problem : found["problems"]) {
    text += line("problem", problem.get<std::string>());
  }
  return text + "\n" + verdict(found["can"]) + "\n";
}

}  // namespace

void add_doctor(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "doctor", "Say what was found: driver, GPUs, NVRTC, cache folders, environment");
  const auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "Print JSON");
  command->footer(
      "Works with nothing installed and always exits with 0.\n\nExample:\n"
      "  treeattn doctor");
  command->callback([json, &action] {
    action = [json] {
      const Json found = examine();
      if (*json) {
        print_json(found);
      } else {
        print(report(found));
      }
      return static_cast<int>(kExitOk);
    };
  });
}

}  // namespace treeattn::cli
