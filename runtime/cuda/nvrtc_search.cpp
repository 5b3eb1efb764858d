#include "runtime/cuda/nvrtc_search.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>

#include "runtime/support/config.h"

namespace treeattn {

namespace fs = std::filesystem;

namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

bool is_folder(const fs::path& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

/// Sub-folders whose name starts so, in no order.
std::vector<fs::path> folders_starting(const fs::path& parent, std::string_view prefix) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator it(parent, error), end; !error && it != end; it.increment(error)) {
    if (it->path().filename().string().starts_with(prefix) && is_folder(it->path())) {
      found.push_back(it->path());
    }
  }
  return found;
}

/// The numbers after a prefix: cuda-12.10 -> {12, 10}, python3.11 -> {3, 11}.
std::vector<int> version_in(const std::string& name) {
  std::vector<int> numbers;
  const char* at = name.data();
  const char* const end = at + name.size();
  while (at != end) {
    int number = 0;
    const auto [next, error] = std::from_chars(at, end, number);
    const bool is_number = error == std::errc{} && *at != '-';
    if (is_number) numbers.push_back(number);
    at = is_number ? next : at + 1;
  }
  return numbers;
}

std::vector<fs::path> newest_first(std::vector<fs::path> folders) {
  std::sort(folders.begin(), folders.end(), [](const fs::path& a, const fs::path& b) {
    const auto version_a = version_in(a.filename().string());
    const auto version_b = version_in(b.filename().string());
    return version_a != version_b ? version_a > version_b : a < b;
  });
  return folders;
}

/// Roots of the Python that a shell would run: beside the command itself (a virtual environment)
/// and beside what it links to.
void add_python_on_path(std::vector<std::string>& prefixes) {
  const std::string path = environment("PATH");
  for (std::size_t begin = 0; begin < path.size();) {
    const std::size_t end = std::min(path.find(':', begin), path.size());
    const fs::path folder = path.substr(begin, end - begin);
    begin = end + 1;
    const fs::path python = folder / "python3";
    std::error_code error;
    if (!folder.is_absolute() || !fs::exists(python, error)) continue;
    prefixes.push_back(folder.parent_path().string());
    const fs::path target = fs::canonical(python, error);
    if (!error) prefixes.push_back(target.parent_path().parent_path().string());
    return;
  }
}

/// Folders with libraries inside one Python environment.
void add_python_folders(const fs::path& prefix, std::vector<fs::path>& folders) {
  for (const char* lib : {"lib", "lib64", "local/lib"}) {
    for (const fs::path& python : newest_first(folders_starting(prefix / lib, "python3"))) {
      for (const char* packages : {"site-packages", "dist-packages"}) {
        const fs::path nvidia = python / packages / "nvidia";
        folders.push_back(nvidia / "cu13" / "lib");
        folders.push_back(nvidia / "cuda_nvrtc" / "lib");
      }
    }
  }
  folders.push_back(prefix / "lib");  // conda's cuda-nvrtc
}

void add_toolkit_folders(const fs::path& toolkit, std::vector<fs::path>& folders) {
  folders.push_back(toolkit / "lib64");
  folders.push_back(toolkit / "lib");
#if defined(__aarch64__)
  folders.push_back(toolkit / "targets/sbsa-linux/lib");
#else
  folders.push_back(toolkit / "targets/x86_64-linux/lib");
#endif
}

}  // namespace

NvrtcPlaces NvrtcPlaces::from_environment() {
  NvrtcPlaces places;
  places.named = config().nvrtc_path;
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    if (std::string value = environment(name); !value.empty()) {
      places.toolkits.push_back(std::move(value));
    }
  }
  places.toolkits.emplace_back("/usr/local/cuda");
  places.versioned_toolkits = "/usr/local";
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (std::string value = environment(name); !value.empty()) {
      places.python_prefixes.push_back(std::move(value));
    }
  }
  add_python_on_path(places.python_prefixes);
  if (const std::string home = environment("HOME"); !home.empty()) {
    places.python_prefixes.push_back(home + "/.local");  // pip install --user
  }
  return places;
}

const std::vector<std::string>& nvrtc_sonames() {
  static const auto* const names =
      new std::vector<std::string>{"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"};
  return *names;
}

std::vector<fs::path> nvrtc_folders(const NvrtcPlaces& places) {
  std::vector<fs::path> folders;
  for (const std::string& toolkit : places.toolkits) add_toolkit_folders(toolkit, folders);
  if (!places.versioned_toolkits.empty()) {
    for (const fs::path& toolkit :
         newest_first(folders_starting(places.versioned_toolkits, "cuda-"))) {
      add_toolkit_folders(toolkit, folders);
    }
  }
  for (const std::string& prefix : places.python_prefixes) add_python_folders(prefix, folders);

  std::vector<fs::path> existing;
  for (const fs::path& folder : folders) {
    if (is_folder(folder) &&
        std::find(existing.begin(), existing.end(), folder) == existing.end()) {
      existing.push_back(folder);
    }
  }
  return existing;
}

std::vector<std::string> nvrtc_named_candidates(const std::string& named) {
  if (!is_folder(named)) return {named};
  std::vector<std::string> candidates;
  for (const char* below : {"", "lib64", "lib"}) {
    const fs::path folder = fs::path(named) / below;
    for (const std::string& soname : nvrtc_sonames()) {
      std::error_code ignored;
      if (fs::exists(folder / soname, ignored)) candidates.push_back((folder / soname).string());
    }
  }
  // So that the message says what was missing.
  if (candidates.empty()) candidates.push_back((fs::path(named) / nvrtc_sonames()[0]).string());
  return candidates;
}

}  // namespace treeattn
