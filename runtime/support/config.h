// Every environment variable the library reads, read once. The table in README.md is this file's.
// Parsing neither throws nor logs: bad values are listed.
#pragma once

#include <string>
#include <vector>

namespace treeattn {

/// When a kernel is not cached: compile it, refuse with an explained error, or recompile always.
enum class JitPolicy { kAuto, kOff, kForce };
/// A kernel that is missing while a stream is captured: load it with a warning, or fail.
enum class CaptureMiss { kLoad, kError };
/// Which kernels run where several families could: those of the device's own generation, or sm80's.
enum class FamilyChoice { kAuto, kSm80 };
enum class LogLevel { kError, kWarning, kInfo, kDebug };

struct EnvVar {
  std::string name;
  std::string value;   ///< as set, empty if unset
  std::string effect;  ///< one line for doctor and the README
};

/// Values after parsing; a bad value falls back to the default and is listed in `problems`.
struct Config {
  /// TREEATTN_CACHE_DIR, else XDG_CACHE_HOME/treeattn, else HOME/.cache/treeattn; absolute;
  /// empty: memory only.
  std::string cache_dir;
  std::vector<std::string> cache_path;  ///< TREEATTN_CACHE_PATH: read-only roots, searched first
  JitPolicy jit = JitPolicy::kAuto;     ///< TREEATTN_JIT = auto | off | force
  CaptureMiss capture_miss = CaptureMiss::kLoad;  ///< TREEATTN_CAPTURE_MISS = load | error
  FamilyChoice family = FamilyChoice::kAuto;      ///< TREEATTN_FAMILY = auto | sm80
  LogLevel log_level = LogLevel::kWarning;        ///< TREEATTN_LOG = error | warning | info | debug
  std::string nvrtc_path;                         ///< TREEATTN_NVRTC: library file or its folder
  std::string driver_path;                        ///< TREEATTN_LIBCUDA: library file
  std::string dump_dir;      ///< TREEATTN_DUMP: source, log and cubin of every compile
  std::string template_dir;  ///< TREEATTN_TEMPLATE_DIR: read templates from here
  std::vector<std::string> problems;

  /// Parses the environment afresh (tests); apps use config().
  static Config from_environment();
};

/// The process's configuration, parsed at first use.
const Config& config();
/// Every variable with its present value, for doctor.
std::vector<EnvVar> environment_table();

}  // namespace treeattn
