#include "runtime/cache/artifact.h"
#include "runtime/support/digest.h"

namespace treeattn {

namespace {

// Raise it when the meaning of a stored entry changes although its source does not.
constexpr std::string_view kKeySchema = "treeattn-artifact-key-1";

}  // namespace

std::string ArtifactKey::hex() const {
  return to_hex(bytes);
}

std::optional<ArtifactKey> parse_artifact_key(std::string_view hex) {
  const std::optional<Digest> digest = digest_from_hex(hex);
  if (!digest) return std::nullopt;
  return ArtifactKey{*digest};
}

CompileOptions compile_options(const KernelSpec& spec) {
  // Denormals flushed as the kernels' exponentials do; multiply-add fused as every reference GPU
  // kernel.
  return {spec.problem.target, {"-std=c++20", "--ftz=true", "--fmad=true"}};
}

ArtifactKey artifact_key(const GeneratedSource& source, const CompileOptions& options) {
  FieldHasher hasher;
  hasher.field(kKeySchema).field(to_string(options.target));
  hasher.number(options.flags.size());
  for (const std::string& flag : options.flags) hasher.field(flag);
  hasher.number(source.entries.size());
  for (const KernelEntry& entry : source.entries) hasher.field(entry.name);
  hasher.field(source.text);
  return {hasher.finish()};
}

}  // namespace treeattn
