#!/usr/bin/env bash
# clang-tidy over the host code, with the checks of .clang-tidy; any finding fails. Needs a configured build/.
#   scripts/tidy.sh [files or regular expressions]
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command -v run-clang-tidy >/dev/null || die "run-clang-tidy was not found; run scripts/setup.sh --lint"
[ -e build/compile_commands.json ] || die "build/ is not configured; run scripts/test.sh first"
if [ "$#" = 0 ]; then
  set -- "^$treeattn_root/(generator|runtime|cli)/.*\.cpp$"
fi
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
if ! run-clang-tidy -quiet -p build -j "$(nproc)" -extra-arg=-Wno-unknown-warning-option "$@" >"$log" 2>/dev/null; then
  # Without its colours, which it cannot be told to leave out.
  sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -v '^clang-tidy\|^$' || true
  die "clang-tidy found the above"
fi
say "clang-tidy: $(grep -c '^clang-tidy' "$log") files"
