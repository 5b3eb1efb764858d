#include "runtime/cuda/nvrtc.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "runtime/support/dynamic_library.h"
#include "treeattn/error.h"

namespace treeattn {

namespace fs = std::filesystem;

namespace {

constexpr int kOldestMajor = 12;  // the first that compiles C++20
constexpr const char* kInstallHint =
    "install the CUDA toolkit, or NVRTC alone (pip install nvidia-cuda-nvrtc-cu12), or name the "
    "library or its folder in TREEATTN_NVRTC. Kernels that were compiled before need no NVRTC: see "
    "TREEATTN_CACHE_PATH";

struct NvrtcState {
  std::mutex mutex;
  bool tried = false;
  const NvrtcTable* real = nullptr;
  const NvrtcTable* fake = nullptr;
  std::string problem;
};

NvrtcState& state() {
  static auto* const leaked = new NvrtcState;
  return *leaked;
}

/// Fills the table from an open library; why it does not serve, or nothing.
std::optional<std::string> resolve(const DynamicLibrary& library, NvrtcTable& table) {
#define TREEATTN_RESOLVE(name)                                                         \
  if (!library.load<std::remove_pointer_t<decltype(table.name)>>(table.name, #name)) { \
    return "it has no " #name;                                                         \
  }
  TREEATTN_NVRTC_FUNCTIONS(TREEATTN_RESOLVE)
#undef TREEATTN_RESOLVE
  table.path = library.path();
  if (table.nvrtcVersion(&table.major, &table.minor) != NVRTC_SUCCESS) {
    return "nvrtcVersion failed";
  }
  if (table.major < kOldestMajor) {
    return fmt::format("it is NVRTC {}.{}, and {}.0 or newer is needed", table.major, table.minor,
                       kOldestMajor);
  }
  return std::nullopt;
}

/// NVRTC opens libnvrtc-builtins by soname, whatever folder it was itself loaded from. Once the
/// sibling is loaded under that soname the loader answers with it.
void preload_builtins(const NvrtcTable& table) {
  const std::string name = fmt::format("libnvrtc-builtins.so.{}.{}", table.major, table.minor);
  std::vector<std::string> candidates;
  std::error_code error;
  const fs::path real = fs::canonical(table.path, error);
  for (const fs::path& library : {fs::path(table.path), error ? fs::path() : real}) {
    const fs::path sibling = library.parent_path() / name;
    std::error_code ignored;
    if (library.has_parent_path() && fs::exists(sibling, ignored)) {
      candidates.push_back(sibling.string());
    }
  }
  static_cast<void>(DynamicLibrary::open(candidates));
}

/// Opens one candidate at a time, so that an unfit library does not end the search.
class Search {
 public:
  const NvrtcTable* try_all(const std::vector<std::string>& candidates,
                            DynamicLibrary::Mode mode = DynamicLibrary::Mode::kOpen) {
    for (const std::string& candidate : candidates) {
      const DynamicLibrary library = DynamicLibrary::open({&candidate, 1}, mode);
      NvrtcTable table;
      if (library) {
        const std::optional<std::string> unfit = resolve(library, table);
        if (!unfit) {
          preload_builtins(table);
          return new NvrtcTable(std::move(table));
        }
        note(library.path() + ": " + *unfit);
      } else if (mode == DynamicLibrary::Mode::kOpen) {
        note(library.failure_text());
      }
    }
    return nullptr;
  }
  void note(std::string_view line) {
    if (!tried_.empty()) tried_ += '\n';
    tried_ += line;
  }
  std::string take() { return std::move(tried_); }

 private:
  std::string tried_;
};

const NvrtcTable* search(const NvrtcPlaces& places, Search& search) {
  if (!places.named.empty()) return search.try_all(nvrtc_named_candidates(places.named));
  if (places.loader) {
    // A framework's own first: two NVRTC of one soname in a process would be a gamble.
    const auto loaded = DynamicLibrary::Mode::kOnlyIfLoaded;
    if (const NvrtcTable* table = search.try_all(nvrtc_sonames(), loaded)) return table;
    if (const NvrtcTable* table = search.try_all(nvrtc_sonames())) return table;
  }
  for (const fs::path& folder : nvrtc_folders(places)) {
    std::vector<std::string> present;
    for (const std::string& soname : nvrtc_sonames()) {
      std::error_code ignored;
      if (fs::exists(folder / soname, ignored)) present.push_back((folder / soname).string());
    }
    if (present.empty()) search.note(folder.string() + ": no libnvrtc in it");
    if (const NvrtcTable* table = search.try_all(present)) return table;
  }
  return nullptr;
}

/// libnvrtc.so.13.0.88 -> 13.0.88, if that is the version of this table.
std::optional<std::string> version_from_name(const NvrtcTable& table) {
  std::error_code error;
  const std::string name = fs::canonical(table.path, error).filename().string();
  constexpr std::string_view kPrefix = "libnvrtc.so.";
  if (error || !name.starts_with(kPrefix)) return std::nullopt;
  const std::string version = name.substr(kPrefix.size());
  const std::string expected = fmt::format("{}.{}.", table.major, table.minor);
  const std::string_view build =
      std::string_view(version).substr(std::min(expected.size(), version.size()));
  const bool digits = !build.empty() && std::all_of(build.begin(), build.end(),
                                                    [](char c) { return c >= '0' && c <= '9'; });
  if (!version.starts_with(expected) || !digits) return std::nullopt;
  return version;
}

constexpr std::string_view kBuildMark = "treeattn-nvrtc-build=";
constexpr const char* kBuildProbe =
    "#define TEXT_OF(x) #x\n"
    "#define TEXT(x) TEXT_OF(x)\n"
    "static_assert(false, \"treeattn-nvrtc-build=\" TEXT(__CUDACC_VER_BUILD__) \";\");\n";

/// The number that a failing assertion makes the compiler print.
std::optional<int> build_from_probe(const NvrtcTable& table) {
  nvrtcProgram program = nullptr;
  if (table.nvrtcCreateProgram(&program, kBuildProbe, "version_probe.cu", 0, nullptr, nullptr) !=
      NVRTC_SUCCESS) {
    return std::nullopt;
  }
  constexpr std::array kOptions = {"-std=c++17"};
  static_cast<void>(table.nvrtcCompileProgram(program, kOptions.size(), kOptions.data()));
  std::size_t bytes = 0;
  std::string log;
  if (table.nvrtcGetProgramLogSize(program, &bytes) == NVRTC_SUCCESS) {
    log.resize(bytes);
    if (bytes > 0) static_cast<void>(table.nvrtcGetProgramLog(program, log.data()));
  }
  table.nvrtcDestroyProgram(&program);

  const std::size_t mark = log.find(kBuildMark);
  if (mark == std::string::npos) return std::nullopt;
  int build = 0;
  const char* const begin = log.data() + mark + kBuildMark.size();
  const auto [end, error] = std::from_chars(begin, log.data() + log.size(), build);
  if (error != std::errc{} || end == begin) return std::nullopt;
  return build;
}

}  // namespace

const NvrtcTable* open_nvrtc(const NvrtcPlaces& places, std::string& tried) {
  Search attempt;
  const NvrtcTable* const table = search(places, attempt);
  tried = attempt.take();
  return table;
}

const NvrtcTable* try_nvrtc(std::string* why) {
  NvrtcState& s = state();
  const std::lock_guard lock(s.mutex);
  if (s.fake != nullptr) return s.fake;
  if (!s.tried) {
    s.tried = true;
    s.real = open_nvrtc(NvrtcPlaces::from_environment(), s.problem);
  }
  if (s.real == nullptr && why != nullptr) *why = s.problem;
  return s.real;
}

const NvrtcTable& nvrtc() {
  std::string tried;
  const NvrtcTable* const table = try_nvrtc(&tried);
  if (table == nullptr) {
    throw Error(ErrorCode::kNotFound,
                "NVRTC, which compiles kernels, was not found; tried\n" + tried, kInstallHint);
  }
  return *table;
}

void set_nvrtc_for_testing(const NvrtcTable* table) {
  NvrtcState& s = state();
  const std::lock_guard lock(s.mutex);
  s.fake = table;
}

std::string nvrtc_version(const NvrtcTable& table) {
  if (auto version = version_from_name(table)) return *version;
  static auto* const mutex = new std::mutex;
  static auto* const known = new std::map<std::string, std::string>;
  const std::string name = fmt::format("{}@{}.{}", table.path, table.major, table.minor);
  const std::lock_guard lock(*mutex);
  std::string& version = (*known)[name];
  if (version.empty()) {
    version =
        fmt::format("{}.{}.{}", table.major, table.minor, build_from_probe(table).value_or(0));
  }
  return version;
}

std::vector<int> nvrtc_supported_archs(const NvrtcTable& table) {
  int count = 0;
  if (table.nvrtcGetNumSupportedArchs(&count) != NVRTC_SUCCESS || count <= 0) return {};
  std::vector<int> archs(static_cast<std::size_t>(count));
  if (table.nvrtcGetSupportedArchs(archs.data()) != NVRTC_SUCCESS) return {};
  std::sort(archs.begin(), archs.end());
  return archs;
}

}  // namespace treeattn
