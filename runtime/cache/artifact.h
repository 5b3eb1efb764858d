// A compiled kernel with the facts that describe it, its key, and its form on disk. Pure functions
// over values: no files, no environment.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "generator/generate.h"

namespace treeattn {

/// SHA-256 over the inputs that shape the code: schema, options, entry names, text; never paths,
/// times, hosts or the compiler's version.
struct ArtifactKey {
  std::array<std::uint8_t, 32> bytes{};

  std::string hex() const;
  friend auto operator<=>(const ArtifactKey&, const ArtifactKey&) = default;
};
std::optional<ArtifactKey> parse_artifact_key(std::string_view hex);

/// Compiler options that shape the code, in order, without log-only flags.
struct CompileOptions {
  Target target;
  std::vector<std::string> flags;  ///< such as -std=c++20; the target is not among them
};
/// The options every kernel is compiled with for its target.
CompileOptions compile_options(const KernelSpec& spec);

ArtifactKey artifact_key(const GeneratedSource& source, const CompileOptions& options);

/// What ptxas reported for one entry.
struct EntryFacts {
  std::string name;
  int threads = 0;
  int smem_bytes = 0;  ///< dynamic, as the launch asks for
  int registers = 0;
  int spill_bytes = 0;  ///< stores + loads
  int stack_bytes = 0;
  int static_smem_bytes = 0;
  friend bool operator==(const EntryFacts&, const EntryFacts&) = default;
};

struct Artifact {
  ArtifactKey key;
  std::string spec;    ///< canonical text
  std::string nvrtc;   ///< version that compiled it, such as 13.0.88
  std::string target;  ///< sm_90
  std::vector<EntryFacts> entries;
  std::vector<std::byte> cubin;
  friend bool operator==(const Artifact&, const Artifact&) = default;
};

/// The first number of a version such as 13.0.88; nothing if it does not start with one above 0.
std::optional<int> nvrtc_major(std::string_view version);
/// Why an artifact has no file form (a field that breaks its line, no cubin); empty if it has one.
std::optional<std::string> refuse_artifact(const Artifact& artifact);

/// File form: the raw cubin, a text footer of name=value lines, 8 bytes of footer length (little
/// endian), 8 of magic. Equal artifacts give equal bytes. Throws Error(kInternal) where
/// refuse_artifact has a reason.
std::vector<std::byte> encode_artifact(const Artifact& artifact);
/// Verifies magic, lengths, digests and fields; `why` names the first thing wrong. Takes any bytes.
std::optional<Artifact> decode_artifact(std::span<const std::byte> file, std::string& why);

}  // namespace treeattn
