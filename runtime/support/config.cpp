#include "runtime/support/config.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

namespace treeattn {

namespace {

struct Variable {
  const char* name;
  const char* effect;
};

constexpr std::array kVariables = {
    Variable{"TREEATTN_CACHE_DIR", "folder that compiled kernels are kept in"},
    Variable{"TREEATTN_CACHE_PATH", "folders of prebuilt kernels, separated by colons, read only"},
    Variable{"TREEATTN_JIT",
             "auto: compile what is not cached; off: fail instead; force: compile always"},
    Variable{"TREEATTN_CAPTURE_MISS",
             "a kernel not loaded before graph capture: load (with a warning) or error"},
    Variable{"TREEATTN_FAMILY",
             "auto: the sm90 family's forward on a 9.0 GPU; sm80: the same kernels everywhere"},
    Variable{"TREEATTN_LOG", "error, warning, info or debug"},
    Variable{"TREEATTN_NVRTC", "the NVRTC library, or the folder that holds it"},
    Variable{"TREEATTN_LIBCUDA", "the CUDA driver library"},
    Variable{"TREEATTN_DUMP", "folder for source, log and cubin of every compile"},
    Variable{"TREEATTN_TEMPLATE_DIR", "read kernel templates from this folder (development)"},
    Variable{"XDG_CACHE_HOME", "kernels are kept in its folder treeattn"},
    Variable{"HOME", "else kernels are kept in its folder .cache/treeattn"},
};

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

template <typename Value>
using Choices = std::span<const std::pair<std::string_view, Value>>;

template <typename Value>
void parse_choice(const char* name, Choices<Value> choices, Value& value, Config& config) {
  const std::string text = environment(name);
  if (text.empty()) return;
  std::string expected;
  for (const auto& [choice, meaning] : choices) {
    if (text == choice) {
      value = meaning;
      return;
    }
    expected += (expected.empty() ? "" : ", ") + std::string(choice);
  }
  const auto fallback = std::find_if(choices.begin(), choices.end(),
                                     [&](const auto& choice) { return choice.second == value; });
  config.problems.push_back(std::string(name) + "='" + text + "' is not one of " + expected +
                            "; using " + std::string(fallback->first));
}

// A quoted or container-file value reaches us with its tilde; taking it literally would make a
// folder named "~" in the working directory.
bool refuse_tilde(const char* name, const std::string& path, Config& config) {
  if (!path.starts_with('~')) return false;
  config.problems.push_back(std::string(name) + "='" + path +
                            "' starts with '~', which only a shell expands; it is ignored: write "
                            "the full path");
  return true;
}

// Absolute, so that a later chdir does not move the cache.
std::string absolute_path(const std::string& path) {
  std::error_code error;
  const auto absolute = std::filesystem::absolute(path, error);
  std::string text = (error ? std::filesystem::path(path) : absolute).lexically_normal().string();
  if (text.size() > 1 && text.ends_with('/')) text.pop_back();
  return text;
}

std::string path_variable(const char* name, Config& config) {
  const std::string value = environment(name);
  if (value.empty() || refuse_tilde(name, value, config)) return {};
  return absolute_path(value);
}

std::string cache_dir(Config& config) {
  if (std::string own = path_variable("TREEATTN_CACHE_DIR", config); !own.empty()) return own;
  // The XDG specification has relative paths ignored.
  if (const std::string xdg = environment("XDG_CACHE_HOME"); xdg.starts_with('/')) {
    return absolute_path(xdg + "/treeattn");
  } else if (!xdg.empty()) {
    config.problems.push_back("XDG_CACHE_HOME='" + xdg + "' is not an absolute path; ignored");
  }
  if (const std::string home = environment("HOME"); home.starts_with('/')) {
    return absolute_path(home + "/.cache/treeattn");
  } else if (!home.empty()) {
    config.problems.push_back("HOME='" + home + "' is not an absolute path; ignored");
  }
  return {};
}

std::vector<std::string> cache_path(Config& config) {
  constexpr const char* kName = "TREEATTN_CACHE_PATH";
  std::vector<std::string> folders;
  const std::string value = environment(kName);
  for (std::size_t begin = 0; begin <= value.size();) {
    const std::size_t end = std::min(value.find(':', begin), value.size());
    const std::string part = value.substr(begin, end - begin);
    begin = end + 1;
    if (part.empty() || refuse_tilde(kName, part, config)) continue;
    std::string folder = absolute_path(part);
    if (std::find(folders.begin(), folders.end(), folder) == folders.end()) {
      folders.push_back(std::move(folder));
    }
  }
  return folders;
}

// A bare library name is left to the loader's search; anything with a slash is a path.
std::string library_variable(const char* name, Config& config) {
  const std::string value = environment(name);
  return value.find('/') == std::string::npos && !value.starts_with('~')
             ? value
             : path_variable(name, config);
}

}  // namespace

Config Config::from_environment() {
  static constexpr std::pair<std::string_view, JitPolicy> kJit[] = {
      {"auto", JitPolicy::kAuto}, {"off", JitPolicy::kOff}, {"force", JitPolicy::kForce}};
  static constexpr std::pair<std::string_view, CaptureMiss> kCapture[] = {
      {"load", CaptureMiss::kLoad}, {"error", CaptureMiss::kError}};
  static constexpr std::pair<std::string_view, FamilyChoice> kFamily[] = {
      {"auto", FamilyChoice::kAuto}, {"sm80", FamilyChoice::kSm80}};
  static constexpr std::pair<std::string_view, LogLevel> kLog[] = {{"error", LogLevel::kError},
                                                                   {"warning", LogLevel::kWarning},
                                                                   {"info", LogLevel::kInfo},
                                                                   {"debug", LogLevel::kDebug}};
  Config config;
  config.cache_dir = treeattn::cache_dir(config);
  config.cache_path = treeattn::cache_path(config);
  parse_choice<JitPolicy>("TREEATTN_JIT", kJit, config.jit, config);
  parse_choice<CaptureMiss>("TREEATTN_CAPTURE_MISS", kCapture, config.capture_miss, config);
  parse_choice<FamilyChoice>("TREEATTN_FAMILY", kFamily, config.family, config);
  parse_choice<LogLevel>("TREEATTN_LOG", kLog, config.log_level, config);
  config.nvrtc_path = library_variable("TREEATTN_NVRTC", config);
  config.driver_path = library_variable("TREEATTN_LIBCUDA", config);
  config.dump_dir = path_variable("TREEATTN_DUMP", config);
  config.template_dir = path_variable("TREEATTN_TEMPLATE_DIR", config);
  return config;
}

const Config& config() {
  static const auto* const parsed = new Config(Config::from_environment());
  return *parsed;
}

std::vector<EnvVar> environment_table() {
  std::vector<EnvVar> table;
  table.reserve(kVariables.size());
  for (const Variable& variable : kVariables) {
    table.push_back({variable.name, environment(variable.name), variable.effect});
  }
  return table;
}

}  // namespace treeattn
