// The kernel cache as the commands see it. Neither touches the driver. Throws what ArtifactSource
// throws.
#pragma once

#include <string>
#include <vector>

#include "runtime/cache/cubin_store.h"
#include "runtime/jit/artifact_source.h"

namespace treeattn::cli {

/// The configured cache; or one folder, read or made as a pack that other users may read.
CubinStore open_store(const std::string& folder, bool writable);
/// Kernels from a store, or from NVRTC, as the process is configured.
ArtifactSource make_source(CubinStore store);
/// The source of a spec, with the templates that the process is configured to use.
GeneratedSource generate_source(const KernelSpec& spec);

/// What an artifact's entries need together: the largest of each, spills summed.
struct ArtifactFacts {
  int registers = 0;
  int spill_bytes = 0;
  int smem_bytes = 0;  ///< static and dynamic
  int threads = 0;
};
ArtifactFacts summarise(const Artifact& artifact);

}  // namespace treeattn::cli
