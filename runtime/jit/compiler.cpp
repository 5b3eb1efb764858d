#include "runtime/jit/compiler.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <filesystem>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/jit/ptxas_log.h"
#include "runtime/support/file_io.h"
#include "runtime/support/log.h"

namespace treeattn {

namespace fs = std::filesystem;

namespace {

constexpr const char* kBugHint =
    "this is a bug of treeattn, or of this NVRTC: please report it with this message; another "
    "NVRTC can be named in TREEATTN_NVRTC";

/// One NVRTC program, destroyed with this object.
class Program {
 public:
  Program(const NvrtcTable& nvrtc, const GeneratedSource& source) : nvrtc_(nvrtc) {
    const std::string name = to_string(source.spec) + ".cu";
    check(nvrtc_.nvrtcCreateProgram(&program_, source.text.c_str(), name.c_str(), 0, nullptr,
                                    nullptr),
          "nvrtcCreateProgram");
  }
  ~Program() {
    if (program_ != nullptr) nvrtc_.nvrtcDestroyProgram(&program_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  nvrtcResult compile(const std::vector<std::string>& options) {
    std::vector<const char*> texts;
    texts.reserve(options.size());
    for (const std::string& option : options) texts.push_back(option.c_str());
    return nvrtc_.nvrtcCompileProgram(program_, static_cast<int>(texts.size()), texts.data());
  }
  std::string log() const {
    std::size_t bytes = 0;
    if (nvrtc_.nvrtcGetProgramLogSize(program_, &bytes) != NVRTC_SUCCESS || bytes == 0) return {};
    std::string text(bytes, '\0');
    if (nvrtc_.nvrtcGetProgramLog(program_, text.data()) != NVRTC_SUCCESS) return {};
    text.resize(std::min(text.find('\0'), text.size()));
    return text;
  }
  std::vector<std::byte> cubin() const {
    std::size_t bytes = 0;
    check(nvrtc_.nvrtcGetCUBINSize(program_, &bytes), "nvrtcGetCUBINSize");
    std::vector<std::byte> code(bytes);
    check(nvrtc_.nvrtcGetCUBIN(program_, reinterpret_cast<char*>(code.data())), "nvrtcGetCUBIN");
    return code;
  }

 private:
  void check(nvrtcResult result, const char* what) const {
    if (result == NVRTC_SUCCESS) return;
    throw Error(ErrorCode::kCompileFailed,
                fmt::format("{} failed: {}", what, nvrtc_.nvrtcGetErrorString(result)), kBugHint);
  }

  const NvrtcTable& nvrtc_;
  nvrtcProgram program_ = nullptr;
};

/// The key's options, then those that only shape the log.
std::vector<std::string> command_line(const NvrtcTable& nvrtc, const CompileOptions& options) {
  std::vector<std::string> line{"--gpu-architecture=" + to_string(options.target)};
  line.insert(line.end(), options.flags.begin(), options.flags.end());
  line.emplace_back("--ptxas-options=-v");
  // NVRTC's own cache would swallow ptxas's report; older ones have neither it nor the option.
  if (std::pair(nvrtc.major, nvrtc.minor) >= std::pair(12, 9)) line.emplace_back("--no-cache");
  return line;
}

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// Writes one compile into the dump folder; the path of the source, or nothing.
class Dump {
 public:
  Dump(const std::string& folder, const GeneratedSource& source, const ArtifactKey& key)
      : folder_(folder) {
    if (folder_.empty()) return;
    std::string name = to_string(source.spec);
    for (char& c : name) {
      if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_') c = '-';
    }
    stem_ = name + "-" + key.hex().substr(0, 12);
    if (const IoStatus made = make_folders(folder_); !made) {
      warn(made.why);
      folder_.clear();
    }
  }

  /// The path written; empty if nothing was.
  std::string write(std::string_view suffix, std::span<const std::byte> bytes) {
    if (folder_.empty()) return {};
    const fs::path path = fs::path(folder_) / (stem_ + std::string(suffix));
    const IoStatus written = write_file_atomically(path, bytes, 0644);
    if (!written) warn(written.why);
    return written ? path.string() : std::string();
  }

 private:
  void warn(const std::string& why) const {
    log_once(LogLevel::kWarning, "dump:" + folder_, "TREEATTN_DUMP=" + folder_ + ": " + why);
  }

  std::string folder_;
  std::string stem_;
};

std::vector<EntryFacts> launch_facts(const GeneratedSource& source) {
  std::vector<EntryFacts> facts;
  for (const KernelEntry& entry : source.entries) {
    facts.push_back({entry.name, entry.threads, entry.smem_bytes, 0, 0, 0, 0});
  }
  return facts;
}

/// Why this NVRTC cannot compile for the target, before it says so in fewer words.
std::optional<std::string> refuse_target(const NvrtcTable& nvrtc, const Target& target) {
  const std::vector<int> archs = nvrtc_supported_archs(nvrtc);
  if (archs.empty() || std::find(archs.begin(), archs.end(), target.cc) != archs.end()) {
    return std::nullopt;
  }
  return fmt::format("NVRTC {}.{} ({}) does not compile for {}; it knows sm_{}", nvrtc.major,
                     nvrtc.minor, nvrtc.path, to_string(target), fmt::join(archs, ", sm_"));
}

std::string with_log(std::string message, const std::string& log, const std::string& saved) {
  message += saved.empty() ? "\nthe source was not kept: set TREEATTN_DUMP to a folder"
                           : "\nthe source is " + saved;
  return message + "\n" + (log.empty() ? "(no log)" : log);
}

void fail(CompileResult& result, ErrorCode code, std::string message, std::string hint) {
  result.artifact.reset();
  result.code = code;
  result.failure = std::move(message);
  result.hint = std::move(hint);
}

/// Everything after NVRTC said yes.
void finish(const NvrtcTable& nvrtc, const GeneratedSource& source, const CompileOptions& options,
            const ArtifactKey& key, std::vector<std::byte> cubin, const std::string& saved,
            CompileResult& result) {
  Artifact artifact{key,
                    to_string(source.spec),
                    nvrtc_version(nvrtc),
                    to_string(options.target),
                    launch_facts(source),
                    std::move(cubin)};
  if (read_ptxas_log(result.log, artifact.entries) < static_cast<int>(artifact.entries.size())) {
    log(LogLevel::kInfo, artifact.spec + ": ptxas did not report on every entry");
  }
  if (const std::string_view warning = find_performance_warning(result.log); !warning.empty()) {
    result.performance_warning = true;
    fail(result, ErrorCode::kCompileFailed,
         with_log(
             fmt::format("{} compiled, but ptxas gave up its speed: {}", artifact.spec, warning),
             result.log, saved),
         kBugHint);
    return;
  }
  if (const auto refused = refuse_artifact(artifact)) {
    fail(result, ErrorCode::kCompileFailed,
         with_log(fmt::format("NVRTC {} ({}) made no usable code of {}: {}", artifact.nvrtc,
                              nvrtc.path, artifact.spec, *refused),
                  result.log, saved),
         kBugHint);
    return;
  }
  result.artifact = std::move(artifact);
}

}  // namespace

Artifact CompileResult::take() {
  if (!artifact) throw Error(code, failure, hint);
  return std::move(*artifact);
}

CompileResult NvrtcCompiler::compile(const GeneratedSource& source, const CompileOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  const NvrtcTable& nvrtc = treeattn::nvrtc();
  const ArtifactKey key = artifact_key(source, options);
  CompileResult result;
  if (auto refused = refuse_target(nvrtc, options.target)) {
    fail(result, ErrorCode::kUnsupported, std::move(*refused),
         "name a newer NVRTC in TREEATTN_NVRTC, or compile where there is one and set "
         "TREEATTN_CACHE_PATH");
    return result;
  }
  Dump dump(dump_dir_, source, key);
  const std::string saved = dump.write(".cu", as_bytes(source.text));

  Program program(nvrtc, source);
  const nvrtcResult compiled = program.compile(command_line(nvrtc, options));
  result.log = program.log();
  dump.write(".log", as_bytes(result.log));
  if (compiled != NVRTC_SUCCESS) {
    fail(result, ErrorCode::kCompileFailed,
         with_log(
             fmt::format("NVRTC {}.{} ({}) could not compile {}: {}", nvrtc.major, nvrtc.minor,
                         nvrtc.path, to_string(source.spec), nvrtc.nvrtcGetErrorString(compiled)),
             result.log, saved),
         kBugHint);
  } else {
    std::vector<std::byte> cubin = program.cubin();
    dump.write(".cubin", cubin);
    finish(nvrtc, source, options, key, std::move(cubin), saved, result);
  }
  result.ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return result;
}

CompilerInfo NvrtcCompiler::info() {
  CompilerInfo info;
  const NvrtcTable* const nvrtc = try_nvrtc(&info.problem);
  if (nvrtc == nullptr) return info;
  info.available = true;
  info.major = nvrtc->major;
  info.version = fmt::format("{}.{}", nvrtc->major, nvrtc->minor);
  info.path = nvrtc->path;
  return info;
}

}  // namespace treeattn
