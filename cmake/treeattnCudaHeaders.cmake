# Finds cuda.h and nvrtc.h. Only their types are used: neither the driver nor NVRTC is linked. Both
# headers come in one folder in a toolkit, and in NVIDIA's wheels, which scripts/setup.sh puts into .venv.
file(GLOB treeattn_wheel_roots ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu13)
find_path(TREEATTN_CUDA_INCLUDE_DIR NAMES cuda.h
  HINTS ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda ${treeattn_wheel_roots}
  PATH_SUFFIXES include)
if(NOT TREEATTN_CUDA_INCLUDE_DIR)
  message(FATAL_ERROR "cuda.h was not found in CUDAToolkit_ROOT, CUDA_HOME, CUDA_PATH or /usr/local/cuda. "
    "Run scripts/setup.sh, which fetches NVIDIA's header and NVRTC wheels, or install the packages "
    "cuda-cudart-dev and cuda-nvrtc-dev, or pass -DTREEATTN_CUDA_INCLUDE_DIR=<folder of cuda.h>.")
endif()
file(STRINGS ${TREEATTN_CUDA_INCLUDE_DIR}/cuda.h treeattn_cuda_version REGEX "^#define CUDA_VERSION ")
string(REGEX MATCH "[0-9]+" treeattn_cuda_version "${treeattn_cuda_version}")
if(treeattn_cuda_version LESS 12000)
  message(FATAL_ERROR "${TREEATTN_CUDA_INCLUDE_DIR}/cuda.h is of version ${treeattn_cuda_version}; 12000 or newer is "
    "needed. Run scripts/setup.sh or pass -DTREEATTN_CUDA_INCLUDE_DIR=<folder of a newer cuda.h>.")
endif()
if(NOT EXISTS ${TREEATTN_CUDA_INCLUDE_DIR}/nvrtc.h)
  message(FATAL_ERROR "${TREEATTN_CUDA_INCLUDE_DIR} has cuda.h but no nvrtc.h. Install cuda-nvrtc-dev of the same "
    "version, or run scripts/setup.sh with CUDA_HOME unset.")
endif()
