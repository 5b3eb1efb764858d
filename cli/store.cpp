#include "cli/store.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <utility>

#include "runtime/jit/compiler.h"
#include "runtime/support/config.h"

namespace treeattn::cli {

CubinStore open_store(const std::string& folder, bool writable) {
  if (folder.empty()) return CubinStore::from_config(config());
  return CubinStore({{std::filesystem::absolute(folder), writable, true}});
}

GeneratedSource generate_source(const KernelSpec& spec) {
  return generate(spec, config().template_dir);
}

ArtifactSource make_source(CubinStore store) {
  ArtifactSourceOptions options;
  options.jit = config().jit;
  options.generate = generate_source;
  return {std::move(store), std::make_unique<NvrtcCompiler>(config().dump_dir), std::move(options)};
}

ArtifactFacts summarise(const Artifact& artifact) {
  ArtifactFacts facts;
  for (const EntryFacts& entry : artifact.entries) {
    facts.registers = std::max(facts.registers, entry.registers);
    facts.spill_bytes += entry.spill_bytes;
    facts.smem_bytes = std::max(facts.smem_bytes, entry.smem_bytes + entry.static_smem_bytes);
    facts.threads = std::max(facts.threads, entry.threads);
  }
  return facts;
}

}  // namespace treeattn::cli
