// Turns generated source into a cubin. Compilers are thread-safe and know nothing of caches. A
// source that does not compile is a value that carries the log.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "generator/generate.h"
#include "runtime/cache/artifact.h"
#include "runtime/cuda/nvrtc.h"
#include "runtime/support/config.h"
#include "treeattn/error.h"

namespace treeattn {

struct CompileResult {
  std::optional<Artifact> artifact;  ///< empty: failed
  std::string log;                   ///< the compiler's and ptxas's text
  /// Where it failed: what was wrong and what to do, the log included.
  ErrorCode code = ErrorCode::kOk;
  std::string failure;
  std::string hint;
  /// ptxas would have serialised wgmma or ignored setmaxnreg; a failure.
  bool performance_warning = false;
  double ms = 0;

  /// The artifact, or throws the failure.
  Artifact take();
};

/// What a compiler says about itself without compiling.
struct CompilerInfo {
  bool available = false;
  int major = 0;        ///< of NVRTC
  std::string version;  ///< such as 13.0
  std::string path;
  std::string problem;  ///< where it is not available: what was tried
};

class Compiler {
 public:
  virtual ~Compiler() = default;
  /// Throws Error(kNotFound) if the compiler itself is missing.
  virtual CompileResult compile(const GeneratedSource& source, const CompileOptions& options) = 0;
  virtual CompilerInfo info() = 0;
};

/// Compiles with nvrtc(), which is opened by the first call.
class NvrtcCompiler final : public Compiler {
 public:
  /// Source, log and cubin of every compile are kept in `dump_dir` unless it is empty.
  explicit NvrtcCompiler(std::string dump_dir) : dump_dir_(std::move(dump_dir)) {}

  CompileResult compile(const GeneratedSource& source, const CompileOptions& options) override;
  CompilerInfo info() override;

 private:
  std::string dump_dir_;
};

}  // namespace treeattn
