// Where NVRTC may be: toolkits, the loader's path, NVIDIA's wheels in Python environments. Looks at
// folders only; runs nothing and opens nothing. Stateless.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace treeattn {

/// What a search starts from.
struct NvrtcPlaces {
  std::string named;  ///< a file, a folder or a bare soname; if set, nothing else is looked at
  std::vector<std::string> toolkits;         ///< CUDA_HOME, CUDA_PATH, /usr/local/cuda
  std::string versioned_toolkits;            ///< folder that holds cuda-13.0, cuda-12.6 and so on
  std::vector<std::string> python_prefixes;  ///< roots of Python environments
  bool loader = true;                        ///< ask the dynamic loader by soname

  /// From the configuration and the environment of this process.
  static NvrtcPlaces from_environment();
};

/// Sonames that serve, best first.
const std::vector<std::string>& nvrtc_sonames();
/// Folders below the places that might hold NVRTC, in order, existing ones only.
std::vector<std::filesystem::path> nvrtc_folders(const NvrtcPlaces& places);
/// Libraries that a named file or folder stands for.
std::vector<std::string> nvrtc_named_candidates(const std::string& named);

}  // namespace treeattn
