// Where compiled kernels come from: the cubin store, then the compiler. Joins the generator, the
// store and the compiler, and never touches the driver, so it serves precompiling on a machine
// without one. Thread-safe. A kernel that cannot be had is an Error that lists every place that was
// looked at and the command that would put it there.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "generator/generate.h"
#include "runtime/cache/artifact.h"
#include "runtime/cache/cubin_store.h"
#include "runtime/jit/compiler.h"
#include "runtime/support/advisory_lock.h"
#include "runtime/support/config.h"

namespace treeattn {

struct ArtifactSourceOptions {
  JitPolicy jit = JitPolicy::kAuto;
  /// Longest wait for another process that compiles the same kernel; then it is compiled here too.
  int lock_timeout_ms = 20'000;
  /// Emits a spec's source; generate() with the embedded templates if empty.
  std::function<GeneratedSource(const KernelSpec&)> generate;
};

/// An artifact that was accepted.
struct ObtainedArtifact {
  Artifact artifact;
  bool compiled = false;  ///< here and now; else from the store
  double compile_ms = 0;
  int rejected = 0;  ///< entries refused on the way, by the store or by the caller
};

/// What build() did for one spec.
struct BuildReport {
  Artifact artifact;
  bool kept = false;       ///< the store had it already
  bool published = false;  ///< written to the store
  std::string problem;     ///< why it was not published
  std::string log;         ///< of the compiler
  double ms = 0;
};

/// What is known about one spec without loading or compiling anything.
struct KernelExplanation {
  KernelSpec spec;
  std::string text;  ///< canonical text of the spec
  ArtifactKey key;
  CompileOptions options;
  std::vector<KernelEntry> entries;
  std::size_t source_bytes = 0;
  std::vector<StoreProbe> probes;    ///< every location with what came of it
  std::optional<Artifact> artifact;  ///< what the store would answer
  JitPolicy jit = JitPolicy::kAuto;
  CompilerInfo compiler;
  std::string remedy;  ///< the command that builds it
};

class ArtifactSource {
 public:
  /// Why the caller cannot use an artifact, or nothing.
  using Accept = std::function<std::optional<std::string>(const Artifact&)>;

  ArtifactSource(CubinStore store, std::unique_ptr<Compiler> compiler,
                 ArtifactSourceOptions options);

  GeneratedSource generate(const KernelSpec& spec) const { return options_.generate(spec); }
  /// The first artifact that `accept` takes: from the store, else compiled here, as the policy
  /// says. `cuda_major` (0: unknown) is the driver's: artifacts of that NVRTC are offered first.
  ObtainedArtifact obtain(const GeneratedSource& source, int cuda_major, const Accept& accept);
  /// Makes the store hold the spec as compiled by this machine's NVRTC, or by any where there is
  /// none. `force` compiles even what is there.
  BuildReport build(const KernelSpec& spec, bool force = false);
  /// Probes the store; compiles nothing.
  KernelExplanation explain(const KernelSpec& spec) const;

  /// What processes that would make the same entry of the same folder lock (AdvisoryLock). Those
  /// that keep theirs elsewhere would wait in vain: what they wait for is published to a folder
  /// that they do not look into.
  std::string lock_name(const ArtifactKey& key) const;

  const CubinStore& store() const { return store_; }
  CubinStore& store() { return store_; }
  Compiler& compiler() const { return *compiler_; }

 private:
  struct Attempt;
  std::optional<Artifact> search(Attempt& attempt) const;
  ObtainedArtifact compile(Attempt& attempt);
  [[noreturn]] void throw_missing(const Attempt& attempt, const std::string& why) const;
  bool has_writable_root() const;
  /// Waits, within limits, for another process that makes the same entry. Held, if there was none
  /// (`waited` is false then) or it ended in time.
  AdvisoryLock share_work(const ArtifactKey& key, bool& waited) const;

  CubinStore store_;
  std::unique_ptr<Compiler> compiler_;
  ArtifactSourceOptions options_;
};

/// The command line that builds a kernel for a folder of prebuilt ones.
std::string precompile_command(const KernelSpec& spec);

}  // namespace treeattn
