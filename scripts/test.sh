#!/usr/bin/env bash
# Sets up, builds everything and runs the tests. Arguments go to ctest, such as -L runtime or -R Tree.
set -euo pipefail
scripts="$(dirname "${BASH_SOURCE[0]}")"
"$scripts/build.sh" release
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
use_cuda
exec ctest --preset release --parallel "$(nproc)" --no-label-summary "$@"
