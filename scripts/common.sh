# Sourced by the other scripts: where the checkout is, where the CUDA headers and NVRTC are, how to configure.
# shellcheck shell=bash

treeattn_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$treeattn_root" || exit 1

say() { printf '== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# What the wheels below unpack to; a folder with include/ and lib/ like a toolkit's.
wheel_cuda_home() {
  local folder
  for folder in "$treeattn_root"/.venv/lib/python3*/site-packages/nvidia/cu13; do
    if is_cuda_home "$folder"; then
      printf '%s\n' "$folder"
      return 0
    fi
  done
  return 1
}

# Succeeds if a folder has the two headers, of CUDA 12 or newer, and an NVRTC that serves.
is_cuda_home() {
  local home="$1" version
  version="$(sed -n 's/^#define CUDA_VERSION \([0-9]*\).*/\1/p' "$home/include/cuda.h" 2>/dev/null)"
  [ -n "$version" ] && [ "$version" -ge 12000 ] && [ -e "$home/include/nvrtc.h" ] && nvrtc_in "$home" >/dev/null
}

# Prints the folder below a toolkit that holds NVRTC.
nvrtc_in() {
  local folder
  for folder in "$1/lib64" "$1/lib" "$1"/targets/*/lib; do
    if [ -e "$folder/libnvrtc.so.13" ] || [ -e "$folder/libnvrtc.so.12" ]; then
      printf '%s\n' "$folder"
      return 0
    fi
  done
  return 1
}

# Prints the toolkit to build and run with; fails if there is none yet. TREEATTN_SETUP_IGNORE_SYSTEM_CUDA=1 looks
# at the wheels alone.
find_cuda_home() {
  local home
  if [ "${TREEATTN_SETUP_IGNORE_SYSTEM_CUDA:-0}" != 1 ]; then
    for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
      if [ -n "$home" ] && is_cuda_home "$home"; then
        printf '%s\n' "$home"
        return 0
      fi
    done
  fi
  wheel_cuda_home
}

# Exports what the build and the built programs need to find CUDA's parts.
use_cuda() {
  local home
  home="$(find_cuda_home)" || die "no CUDA headers and NVRTC were found; run scripts/setup.sh first"
  export CUDA_HOME="$home"
  if [ -z "${TREEATTN_NVRTC:-}" ]; then
    TREEATTN_NVRTC="$(nvrtc_in "$home")"
    export TREEATTN_NVRTC
  fi
}

# configure PRESET [cmake arguments]
configure() {
  local preset="$1" launcher=()
  shift
  if command -v ccache >/dev/null; then
    launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
    export CCACHE_BASEDIR="$treeattn_root" CCACHE_NOHASHDIR=1 # checkouts share what they compile
  fi
  cmake --preset "$preset" "-DTREEATTN_CUDA_INCLUDE_DIR=$CUDA_HOME/include" "${launcher[@]}" "$@"
}

# build_preset PRESET [cmake --build arguments]
build_preset() {
  local preset="$1"
  shift
  cmake --build --preset "$preset" --parallel "$(nproc)" "$@"
}
