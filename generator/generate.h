// KernelSpec -> one self-contained CUDA source text. Pure: no files, no environment, no CUDA.
#pragma once

#include <string>
#include <vector>

#include "generator/kernel_spec.h"

namespace treeattn {

/// One `extern "C"` kernel of a source.
struct KernelEntry {
  std::string name;
  int threads = 0;     ///< threads per block
  int smem_bytes = 0;  ///< dynamic shared memory per block
};

struct GeneratedSource {
  KernelSpec spec;
  std::string text;                  ///< compiles alone, with NVRTC and with nvcc -cubin
  std::vector<KernelEntry> entries;  ///< one for forward, several for plan
};

/// Emits the source of a spec. Throws Error(kInvalidArgument) if tile_space refuses it.
/// The templates are those embedded in the library; `template_dir`, when not empty, reads them from
/// there instead (for developing templates without relinking).
GeneratedSource generate(const KernelSpec& spec, const std::string& template_dir = {});

/// Hex digest-free identity of the embedded templates: their concatenated text, for provenance.
const std::string& embedded_templates_text();

}  // namespace treeattn
