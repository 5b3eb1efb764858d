#!/usr/bin/env bash
# Gets a Debian or Ubuntu machine ready to build: installs missing packages, and fetches NVIDIA's headers and
# NVRTC into .venv where no CUDA toolkit is found. Does nothing when nothing is missing.
#   scripts/setup.sh [--lint] [--python]
#     --lint: clang-format and clang-tidy too
#     --python: torch, transformers, PEFT and pytest in .venv-python, 5 GB, for the tests of the Python package
#   TREEATTN_SETUP_IGNORE_SYSTEM_CUDA=1   use the wheels even where there is a toolkit
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

lint=0
python=0
for argument in "$@"; do
  case "$argument" in
    --lint) lint=1 ;;
    --python) python=1 ;;
    *) die "unknown argument '$argument'; usage: scripts/setup.sh [--lint] [--python]" ;;
  esac
done

packages=(cmake ninja-build g++ libfmt-dev libcli11-dev nlohmann-json3-dev libgtest-dev libgmock-dev libsodium-dev)
clang_format_version=14.0.6
if [ "$lint" = 1 ]; then
  packages+=(clang-tidy python3 python3-venv)
fi
if [ "$python" = 1 ]; then
  packages+=(python3 python3-venv)
fi
need_wheels=0
if ! find_cuda_home >/dev/null; then
  need_wheels=1
  packages+=(python3 python3-venv)
fi

is_installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
  local missing=() package as_root=()
  for package in "${packages[@]}"; do
    is_installed "$package" || missing+=("$package")
  done
  if [ "${#missing[@]}" = 0 ]; then
    return
  fi
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
      die "these packages are missing, and there is no sudo to install them with; as root run: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

make_venv() {
  if [ ! -x .venv/bin/pip ]; then
    say "making .venv"
    # The distribution's own Python: its venv module is the one installed above.
    /usr/bin/python3 -m venv --clear .venv
  fi
}

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
  install_packages
else
  for tool in cmake ninja c++; do
    command -v "$tool" >/dev/null ||
      die "'$tool' was not found and this machine has no apt-get; install CMake 3.22, Ninja, a C++20 compiler, fmt, CLI11," \
        "nlohmann-json, GoogleTest and libsodium by its own means"
  done
fi

if [ "$need_wheels" = 1 ]; then
  make_venv
  say "no CUDA 12 or 13 toolkit: fetching NVIDIA's headers and NVRTC into .venv"
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88
  find_cuda_home >/dev/null || die "the wheels in .venv hold no cuda.h, nvrtc.h and libnvrtc.so; remove .venv and run this again"
fi

# Its output changes from version to version, so it is pinned.
if [ "$lint" = 1 ] && ! clang-format --version 2>/dev/null | grep -q "version ${clang_format_version%%.*}\."; then
  if ! .venv/bin/clang-format --version 2>/dev/null | grep -q "version $clang_format_version"; then
    make_venv
    .venv/bin/pip install --quiet --disable-pip-version-check "clang-format==$clang_format_version"
  fi
fi

# Pinned to what the tests were written against; .venv stays small for those who do not test the package.
python_packages=(torch==2.11.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 numpy pytest)
if [ "$python" = 1 ] && [ "$(cat .venv-python/treeattn-packages 2>/dev/null)" != "${python_packages[*]}" ]; then
  say "fetching ${python_packages[*]} into .venv-python"
  [ -x .venv-python/bin/pip ] || /usr/bin/python3 -m venv --clear .venv-python
  .venv-python/bin/pip install --quiet --disable-pip-version-check "${python_packages[@]}"
  echo "${python_packages[*]}" >.venv-python/treeattn-packages
fi

say "ready: CUDA headers and NVRTC from $(find_cuda_home)"
