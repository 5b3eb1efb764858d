#!/usr/bin/env bash
# Checks the formatting of every C++ and CUDA file that git knows or would add; --fix rewrites them.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

clang_format=clang-format
if [ -x .venv/bin/clang-format ]; then
  clang_format=.venv/bin/clang-format
fi
command -v "$clang_format" >/dev/null || die "clang-format was not found; run scripts/setup.sh --lint"

mode=(--dry-run -Werror)
if [ "${1:-}" = --fix ]; then
  mode=(-i)
elif [ -n "${1:-}" ]; then
  die "unknown argument '$1'; usage: scripts/check_format.sh [--fix]"
fi
mapfile -t files < <(git ls-files -co --exclude-standard -- '*.cpp' '*.h' '*.cuh')
[ "${#files[@]}" -gt 0 ] || die "git lists no source files here"
"$clang_format" "${mode[@]}" "${files[@]}"
say "format: ${#files[@]} files"
