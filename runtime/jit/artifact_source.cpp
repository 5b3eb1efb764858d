#include "runtime/jit/artifact_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "runtime/support/digest.h"
#include "runtime/support/log.h"
#include "treeattn/error.h"

namespace treeattn {

namespace {

constexpr int kOldestNvrtcMajor = 12;

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

std::string probe_lines(const std::vector<StoreProbe>& probes) {
  std::string lines;
  for (const StoreProbe& probe : probes) {
    lines += fmt::format("\n  {}: {}", probe.path, probe.outcome);
  }
  return lines.empty() ? "\n  no folder is configured (TREEATTN_CACHE_DIR, TREEATTN_CACHE_PATH)"
                       : lines;
}

std::string remedy_hint(const KernelSpec& spec) {
  return "build it where NVRTC is with\n    " + precompile_command(spec) +
         "\n  and name the folder in TREEATTN_CACHE_PATH here";
}

/// NVRTC majors to ask the store for, in order; 0 is any, newest first.
std::vector<int> majors_to_try(int cuda_major) {
  std::vector<int> majors;
  if (cuda_major > 0) majors.push_back(cuda_major);
  majors.push_back(0);
  // Reached only where the driver refused a newer compiler's code.
  for (int major = cuda_major - 1; major >= kOldestNvrtcMajor; --major) majors.push_back(major);
  return majors;
}

}  // namespace

/// One obtain() under way.
struct ArtifactSource::Attempt {
  const GeneratedSource& source;
  const int cuda_major;
  const Accept& accept;
  const std::string spec;
  const CompileOptions options;
  const ArtifactKey key;
  std::vector<StoreProbe> probes;                      // without repetitions
  std::set<std::pair<std::string, std::string>> seen;  // of probes
  std::set<Digest> refused;                            // code that was offered in vain
  int rejected = 0;

  Attempt(const GeneratedSource& from, int major, const Accept& accepts)
      : source(from),
        cuda_major(major),
        accept(accepts),
        spec(to_string(from.spec)),
        options(compile_options(from.spec)),
        key(artifact_key(from, options)) {}

  void note(StoreProbe probe) {
    if (!seen.emplace(probe.path, probe.outcome).second) return;
    if (probe.outcome.starts_with("refused")) ++rejected;
    if (probe.outcome != "hit") probes.push_back(std::move(probe));
  }

  /// Offers a found artifact; whether it was taken.
  bool offer(const Artifact& artifact, const std::string& where) {
    if (refused.count(sha256(artifact.cubin)) > 0) return false;
    const std::optional<std::string> why = accept(artifact);
    if (!why) return true;
    refused.insert(sha256(artifact.cubin));
    note({where, "refused: " + *why});
    log_once(
        LogLevel::kWarning, "kernel-refused:" + where,
        fmt::format("cached kernel {} (NVRTC {}) is not used: {}", where, artifact.nvrtc, *why));
    return false;
  }
};

ArtifactSource::ArtifactSource(CubinStore store, std::unique_ptr<Compiler> compiler,
                               ArtifactSourceOptions options)
    : store_(std::move(store)), compiler_(std::move(compiler)), options_(std::move(options)) {
  if (!options_.generate) {
    options_.generate = [](const KernelSpec& spec) { return treeattn::generate(spec); };
  }
}

bool ArtifactSource::has_writable_root() const {
  const auto& roots = store_.roots();
  return std::any_of(roots.begin(), roots.end(), [](const StoreRoot& r) { return r.writable; });
}

std::string ArtifactSource::lock_name(const ArtifactKey& key) const {
  FieldHasher hasher;
  for (const StoreRoot& root : store_.roots()) {
    if (!root.writable) continue;
    std::error_code error;
    const std::filesystem::path real = std::filesystem::weakly_canonical(root.path, error);
    hasher.field((error ? root.path : real).native());
  }
  return to_hex(hasher.field(key.hex()).finish());
}

AdvisoryLock ArtifactSource::share_work(const ArtifactKey& key, bool& waited) const {
  const std::string name = lock_name(key);
  AdvisoryLock lock = AdvisoryLock::acquire(name, 0);
  waited = !lock.held();
  return waited ? AdvisoryLock::acquire(name, options_.lock_timeout_ms) : std::move(lock);
}

std::optional<Artifact> ArtifactSource::search(Attempt& attempt) const {
  for (const int major : majors_to_try(attempt.cuda_major)) {
    std::vector<StoreProbe> probes;
    std::optional<Artifact> found = store_.find(attempt.key, attempt.spec, major, &probes);
    const std::string where = probes.empty() ? "cache" : probes.back().path;
    for (StoreProbe& probe : probes) attempt.note(std::move(probe));
    if (found && attempt.offer(*found, where)) return found;
    if (!found && major == 0) break;  // nothing in any folder
  }
  return std::nullopt;
}

void ArtifactSource::throw_missing(const Attempt& attempt, const std::string& why) const {
  throw Error(ErrorCode::kNotFound,
              fmt::format("no kernel for {} (key {}...): {}. Looked at{}", attempt.spec,
                          attempt.key.hex().substr(0, 12), why, probe_lines(attempt.probes)),
              remedy_hint(attempt.source.spec));
}

ObtainedArtifact ArtifactSource::compile(Attempt& attempt) {
  CompileResult result = compiler_->compile(attempt.source, attempt.options);
  ObtainedArtifact obtained{result.take(), true, result.ms, 0};
  log(LogLevel::kInfo, fmt::format("compiled {} with NVRTC {} in {:.0f} ms", attempt.spec,
                                   obtained.artifact.nvrtc, result.ms));
  std::string why;  // the store has said it; the bytes at hand serve
  if (has_writable_root()) store_.publish(obtained.artifact, why);
  return obtained;
}

ObtainedArtifact ArtifactSource::obtain(const GeneratedSource& source, int cuda_major,
                                        const Accept& accept) {
  Attempt attempt(source, cuda_major, accept);
  const auto from_store = [&](Artifact found) {
    return ObtainedArtifact{std::move(found), false, 0, attempt.rejected};
  };
  const bool look = options_.jit != JitPolicy::kForce;
  if (look) {
    if (auto found = search(attempt)) return from_store(std::move(*found));
  }
  if (options_.jit == JitPolicy::kOff) {
    throw_missing(attempt, "it is not cached, and TREEATTN_JIT=off forbids compiling");
  }
  if (const CompilerInfo info = compiler_->info(); !info.available) {
    throw_missing(attempt, "it is not cached, and NVRTC, which would compile it, was not found (" +
                               info.problem + ")");
  }
  AdvisoryLock lock;
  if (look && has_writable_root()) {
    bool waited = false;
    lock = share_work(attempt.key, waited);
    if (auto found = search(attempt)) return from_store(std::move(*found));
    // Whoever held it did not publish (a full disk, say): one after the other would be slower than
    // all at once.
    if (waited) lock.release();
  }
  ObtainedArtifact obtained = compile(attempt);
  lock.release();
  obtained.rejected = attempt.rejected;
  if (const auto why = accept(obtained.artifact)) {
    const std::string versions =
        cuda_major > 0 ? fmt::format("; the driver is for CUDA {}", cuda_major) : std::string();
    throw Error(ErrorCode::kUnsupported,
                fmt::format("{} compiled with NVRTC {}, but {}{}", attempt.spec,
                            obtained.artifact.nvrtc, *why, versions),
                "install a newer driver, or name an NVRTC that is no newer than the driver in "
                "TREEATTN_NVRTC");
  }
  return obtained;
}

BuildReport ArtifactSource::build(const KernelSpec& spec, bool force) {
  const auto start = std::chrono::steady_clock::now();
  const GeneratedSource source = generate(spec);
  const CompileOptions options = compile_options(spec);
  BuildReport report;
  AdvisoryLock lock;
  if (!force) {
    const ArtifactKey key = artifact_key(source, options);
    const int major = compiler_->info().major;
    const auto find = [&] {
      auto found = store_.find(key, to_string(spec), major);
      if (!found) return false;
      report.artifact = std::move(*found);
      report.kept = true;
      report.ms = ms_since(start);
      return true;
    };
    if (find()) return report;
    // As in obtain(): ranks that run the same command share the work.
    bool waited = false;
    lock = share_work(key, waited);
    if (find()) return report;
    if (waited) lock.release();
  }
  CompileResult result = compiler_->compile(source, options);
  report.log = result.log;
  report.artifact = result.take();
  report.published = store_.publish(report.artifact, report.problem);
  report.ms = ms_since(start);
  return report;
}

KernelExplanation ArtifactSource::explain(const KernelSpec& spec) const {
  const GeneratedSource source = generate(spec);
  KernelExplanation explanation;
  explanation.spec = spec;
  explanation.text = to_string(spec);
  explanation.options = compile_options(spec);
  explanation.key = artifact_key(source, explanation.options);
  explanation.entries = source.entries;
  explanation.source_bytes = source.text.size();
  explanation.jit = options_.jit;
  explanation.compiler = compiler_->info();
  explanation.remedy = precompile_command(spec);
  explanation.artifact = store_.find(explanation.key, explanation.text, 0, &explanation.probes);
  return explanation;
}

std::string precompile_command(const KernelSpec& spec) {
  return "treeattn precompile --spec " + to_string(spec) + " --out DIR";
}

}  // namespace treeattn
