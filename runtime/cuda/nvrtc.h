// NVRTC, opened lazily wherever people have it: a table of entry points that tests replace by a
// fake. Nothing links it. Thread-safe; a search that found nothing is remembered.
#pragma once

#include <nvrtc.h>

#include <string>
#include <vector>

#include "runtime/cuda/nvrtc_search.h"

namespace treeattn {

#define TREEATTN_NVRTC_FUNCTIONS(X) \
  X(nvrtcVersion)                   \
  X(nvrtcGetErrorString)            \
  X(nvrtcCreateProgram)             \
  X(nvrtcDestroyProgram)            \
  X(nvrtcCompileProgram)            \
  X(nvrtcGetCUBINSize)              \
  X(nvrtcGetCUBIN)                  \
  X(nvrtcGetProgramLogSize)         \
  X(nvrtcGetProgramLog)             \
  X(nvrtcGetNumSupportedArchs)      \
  X(nvrtcGetSupportedArchs)

struct NvrtcTable {
#define TREEATTN_FIELD(name) decltype(&::name) name = nullptr;
  TREEATTN_NVRTC_FUNCTIONS(TREEATTN_FIELD)
#undef TREEATTN_FIELD
  int major = 0;
  int minor = 0;
  std::string path;  ///< the library that was opened
};

/// The compiler, opened at first use. Throws Error(kNotFound) that lists what was tried and what to
/// install.
const NvrtcTable& nvrtc();
/// The same as a value: null, with the reason in `why` unless that is null.
const NvrtcTable* try_nvrtc(std::string* why = nullptr);
/// Replaces NVRTC by a fake; null restores the real one.
void set_nvrtc_for_testing(const NvrtcTable* table);

/// Searches these places and opens the first NVRTC that serves; null with what was tried. The table
/// is never freed.
const NvrtcTable* open_nvrtc(const NvrtcPlaces& places, std::string& tried);

/// Version with its build, such as 13.0.88; 13.0.0 if the build cannot be told. Remembered per
/// library path; the first call may run a tiny compile.
std::string nvrtc_version(const NvrtcTable& table);
/// Compute capabilities times ten that it compiles for, ascending.
std::vector<int> nvrtc_supported_archs(const NvrtcTable& table);

}  // namespace treeattn
